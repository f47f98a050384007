"""How finely a worker cuts its decodes."""

from __future__ import annotations

from services.vae_worker.decoding import Granularity
from services.vae_worker.model import Decoder
from shared.profile_files import ChunkGranularity, find_granularity
from shared.settings import VaeWorkerSettings


def choose_granularity(settings: VaeWorkerSettings, decoder: Decoder) -> Granularity:
    """Return what the settings say, else the model's profile, else four chunks along the layers.

    Raises:
        ConfigurationError: A profile can't be read.
    """
    chosen = find_granularity(
        settings.profiles,
        model_id=decoder.name,
        device=decoder.device.type,
        dtype=str(decoder.dtype).removeprefix("torch."),
    )
    chosen = chosen or ChunkGranularity()
    fraction = settings.max_strip_fraction
    fraction = chosen.max_strip_fraction if fraction is None else fraction
    return Granularity(
        num_chunks=settings.num_chunks or chosen.num_chunks,
        max_strip_fraction=fraction or None,
    )
