"""Which profile a worker is planned by: one that was made for it, or one in short."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from services.scheduler.devices.profile import (
    DecodeTiming,
    Profile,
    SlotKind,
    SlotTiming,
    make_key,
)
from shared.messages import WorkerInfo

MADE_WITH = "made with"
"""Among the notes of a calibrated profile: the incarnation of its UNet worker."""

SHORT_SPREAD = 0.1
"""Relative spread put down for what a worker measures at its start, in a few repeats."""

STALE_RATIO = 3.0
"""A profile is stale where slots alone take so many times as long now, or as short. Less is drift,
or neighbours that are starting, too."""


def profile_in_short(unet: WorkerInfo, vaes: Sequence[WorkerInfo]) -> Profile:
    """Return a profile from what the workers of one device measured at their start.

    Raises:
        ValueError: The UNet worker has measured nothing.
    """
    model = unet.model
    key = make_key(model.default_height, model.default_width) if model else "512x512"
    decodes = [vae for vae in vaes if vae.decode_ms > 0]
    decode_ms = fmean(vae.decode_ms for vae in decodes) if decodes else 0.0
    num_chunks = min((vae.num_chunks for vae in decodes), default=1)
    timing = DecodeTiming(
        key=key,
        threads=max((vae.threads for vae in decodes), default=0),
        chunk_ms=(decode_ms / num_chunks,) * num_chunks,
        granularity=f"{num_chunks} chunks, taken as equal",
        spread=SHORT_SPREAD,
    )
    return Profile(
        model_id=unet.model_id,
        device=unet.device.partition(":")[0],
        dtype=unet.dtype,
        threads=unet.threads,
        slots=(
            SlotTiming(
                key=key,
                kind=SlotKind(unet_threads=unet.threads),
                step_ms=dict(unet.step_ms),
                spread=SHORT_SPREAD,
            ),
        ),
        decodes=(timing,) if decodes else (),
        source="short",
        notes={"by": "its workers, at their start"},
    )


def matching_profile(profiles: Sequence[Profile], unet: WorkerInfo) -> Profile | None:
    """Return the profile made for a worker's model, dtype, device and threads, if not stale.

    Whether it is stale tells the worker's own measurement at its start: the profile may come from
    another machine, or from before the model or the library changed. One that was made with this
    very worker is not, however noisy its start was.
    """
    device = unet.device.partition(":")[0]
    wanted = (unet.model_id, unet.dtype, device)
    for profile in profiles:
        found = (profile.model_id, profile.dtype, profile.device)
        if (
            found == wanted
            and profile.threads in {0, unet.threads}
            and (profile.notes.get(MADE_WITH) == unet.incarnation or not _is_stale(profile, unet))
        ):
            return profile
    return None


def _is_stale(profile: Profile, unet: WorkerInfo) -> bool:
    if not (unet.model and unet.step_ms):
        return False
    key = make_key(unet.model.default_height, unet.model.default_width)
    kind = profile.alone_kind(key)
    ratio = median(ms / profile.slot_ms(key, rows, kind)[0] for rows, ms in unet.step_ms.items())
    return not 1 / STALE_RATIO <= ratio <= STALE_RATIO
