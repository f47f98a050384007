"""The decode of a diffusers VAE in chunks: its stages, where they are cut, and how they run."""

from services.vae_worker.decoding.decoder import decode_chunks
from services.vae_worker.decoding.plan import Chunk, ChunkPlan, Granularity, Unit, plan_chunks

__all__ = ["Chunk", "ChunkPlan", "Granularity", "Unit", "decode_chunks", "plan_chunks"]
