"""The scheduler's state and rules: events in, commands out, the clock passed in."""
