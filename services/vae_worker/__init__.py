"""The VAE worker: chunked decoding and image encoding."""
