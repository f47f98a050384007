"""One file for each kind of diffusers pipeline: all that differs between them."""
