"""How a forward is run fast on a device: one interface, an implementation for each kind."""
