"""The four services, each a process of its own."""
