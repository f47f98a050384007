"""The scheduler's own core against a profile instead of workers, event by event."""
