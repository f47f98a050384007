"""How a stack is put together, started, supervised and asked for pictures."""
