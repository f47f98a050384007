"""What makes a UNet fast on a CPU: done once, ahead of its first forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.unet_worker.giving_way import watch
from services.unet_worker.group_norms import lay_out_group_norms
from services.unet_worker.model import DiffusionModel


def prepare_unet(model: DiffusionModel, sizes: Sequence[tuple[int, int]] = ()) -> bool:
    """Prepare a model's UNet for its default size and for each (height, width) in pixels.

    Returns:
        Whether its forwards are recorded at all of these sizes; they work at every size.

    Raises:
        ConfigurationError: A side is no multiple of the model's `side_multiple`.
    """
    facts = model.facts
    sizes = [(facts.default_height, facts.default_width), *sizes]
    model.check_sizes(sizes)
    if model.device.type != "cpu":
        return False
    lay_out_group_norms(model.unet)
    watch(model.unet)
    are_recorded = [_record(model, height, width) for height, width in sizes]
    return all(are_recorded)


def _record(model: DiffusionModel, height: int, width: int) -> bool:
    facts, factor, rows = model.facts, model.facts.vae_scale_factor, 2
    sample = torch.zeros(rows, facts.latent_channels, height // factor, width // factor)
    cond = torch.zeros(rows, facts.timestep_cond_channels, dtype=model.dtype)
    return model.forward.record(
        sample.to(model.dtype, memory_format=torch.channels_last),
        torch.zeros(rows),
        torch.zeros(rows, facts.max_tokens, facts.text_width, dtype=model.dtype),
        *([cond] if facts.timestep_cond_channels else []),
    )
