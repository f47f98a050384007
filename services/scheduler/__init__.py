"""The scheduler: a pure core (events in, commands out) and a thin shell around it."""
