"""Trains the embedded model: pictures, captions, tokenizer, VAE, UNet, export."""
