"""Many requests denoised at once, a forward at a time."""
