"""What workers that are only simulated say of themselves, from the profile."""

from __future__ import annotations

from services.scheduler.devices.profile import Profile, num_pixels
from shared import messages

MAX_REQUESTS = 64
"""Resident at a UNet worker, as the real one has it by default."""


def unet_info(
    profile: Profile, *, group: str, max_requests: int = MAX_REQUESTS
) -> messages.WorkerInfo:
    """Return the UNet worker of a device group."""
    return _info("unet", f"{group}-unet", group, profile, max_requests)


def vae_info(profile: Profile, *, group: str, number: int) -> messages.WorkerInfo:
    """Return a VAE worker on a device."""
    return _info("vae", f"{group}-vae-{number}", group, profile, max_requests=0)


def _info(
    kind: str, name: str, group: str, profile: Profile, max_requests: int
) -> messages.WorkerInfo:
    key = profile.slots[0].key
    height, _, width = key.partition("x")
    decode = profile.decode(key)
    model = messages.ModelInfo(
        model_id=profile.model_id,
        latent_channels=4,
        vae_scale_factor=8,
        default_height=int(height),
        default_width=int(width),
        side_multiple=8,
        max_side=num_pixels(key),
        max_prompt_tokens=75,
        prediction_type="epsilon",
        samplers=("ddim",),
        default_sampler="ddim",
    )
    return messages.WorkerInfo(
        worker_id=name,
        incarnation=name,
        kind=kind,
        device_group=group,
        host="h",
        device=profile.device,
        dtype=profile.dtype,
        threads=profile.threads,
        max_requests=max_requests,
        model_id=profile.model_id,
        model=model if kind == "unet" else None,
        step_ms=dict(profile.slots[0].step_ms) if kind == "unet" else {},
        decode_ms=sum(decode.chunk_ms) if decode else 0.0,
        num_chunks=len(decode.chunk_ms) if decode else 1,
        pool="pool",
    )
