"""Checks a request against what the model can do."""

from __future__ import annotations

import math
from collections.abc import Collection

from services.unet_worker.families.protocol import ModelFacts
from shared.errors import InvalidRequestError
from shared.messages import ImageParameters

_MIN_SEED, _MAX_SEED = -(2**63), 2**64 - 1  # what torch.Generator.manual_seed takes


def check_parameters(
    parameters: ImageParameters,
    facts: ModelFacts,
    *,
    max_side: int,
    skip_levels: Collection[str],
) -> None:
    """Refuse what this model can't do; samplers and steps are checked by `Samplers`.

    Raises:
        InvalidRequestError: Names the field and what it may be.
    """
    for name, side in (("height", parameters.height), ("width", parameters.width)):
        if not 0 < side <= max_side or side % facts.side_multiple:
            raise InvalidRequestError(
                f"{name}={side} is not possible.",
                field=name,
                allowed=f"multiples of {facts.side_multiple} up to {max_side}",
            )
    if not math.isfinite(parameters.guidance_scale):
        raise InvalidRequestError(
            "guidance_scale is not finite.", field="guidance_scale", allowed="finite numbers"
        )
    if not _MIN_SEED <= parameters.seed <= _MAX_SEED:
        raise InvalidRequestError(
            f"seed={parameters.seed} is out of range.",
            field="seed",
            allowed=f"{_MIN_SEED} to {_MAX_SEED}",
        )
    if parameters.guidance_skip not in skip_levels:
        raise InvalidRequestError(
            f"unknown guidance_skip {parameters.guidance_skip!r}.",
            field="guidance_skip",
            allowed=", ".join(skip_levels),
        )
