"""The `synerdiff` command."""
