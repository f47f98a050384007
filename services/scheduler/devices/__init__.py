"""What devices can do: profiles, what serving teaches about them, and how they are measured."""
