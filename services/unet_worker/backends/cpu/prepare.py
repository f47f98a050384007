"""What makes a UNet fast on a CPU: done once, ahead of its first forward."""

from __future__ import annotations

from collections.abc import Sequence

from services.unet_worker.backends.cpu.giving_way import watch
from services.unet_worker.backends.cpu.group_norms import lay_out_group_norms
from services.unet_worker.backends.measure import zero_inputs
from services.unet_worker.denoising.slot import unet_inputs
from services.unet_worker.families.loading import DiffusionModel

_ROWS = 2  # of what is recorded: one would be broadcast


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
    are_recorded = [
        model.forward.record(*unet_inputs(model, *zero_inputs(model, _ROWS, *size)))
        for size in sizes
    ]
    return all(are_recorded)
