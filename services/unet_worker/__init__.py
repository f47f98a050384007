"""The UNet worker: text encoding, denoising slots, latents."""
