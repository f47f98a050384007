"""A request's resume state as bytes, for the worker that goes on with it, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from redis.asyncio import Redis

from services.unet_worker.denoising.guidance import GuidanceRecord
from services.unet_worker.denoising.latents import ResumeState
from shared import codec
from shared.errors import HandleLostError, ProtocolError
from shared.messages import ImageParameters
from shared.store import keys
from shared.tensors.wire import pack_tensor, unpack_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _PackedState:
    """`ResumeState` with its tensors as bytes. shape: of latents and carry, (1, C, h, w)."""

    request_id: str
    attempt: str
    parameters: ImageParameters
    step_index: int
    shape: tuple[int, ...]
    latents: bytes
    carry: bytes
    num_directions: int
    directions: bytes
    guidance: GuidanceRecord
    num_draws: int
    skipped_steps: tuple[int, ...]


def pack_state(state: ResumeState) -> bytes:
    """The state as msgpack."""
    return codec.encode_value(
        _PackedState(
            request_id=state.request_id,
            attempt=state.attempt,
            parameters=state.parameters,
            step_index=state.step_index,
            shape=tuple(state.latents.shape),
            latents=pack_tensor(state.latents),
            carry=pack_tensor(state.carry),
            num_directions=len(state.directions),
            directions=pack_tensor(state.directions),
            guidance=state.guidance,
            num_draws=state.num_draws,
            skipped_steps=state.skipped_steps,
        )
    )


def unpack_state(payload: bytes) -> ResumeState:
    """The state that `pack_state` packed.

    Raises:
        ProtocolError: These bytes are no state, or one of another version.
    """
    packed = codec.decode_value(payload, _PackedState)
    try:
        latents = unpack_tensor(packed.latents, packed.shape, "float32")
        carry = unpack_tensor(packed.carry, packed.shape, "float32")
        directions = (
            unpack_tensor(packed.directions, (packed.num_directions, *packed.shape[1:]), "float32")
            if packed.num_directions
            else torch.empty(0, *packed.shape[1:])
        )
    except HandleLostError as error:
        raise ProtocolError(f"the state of {packed.request_id} is damaged: {error}") from error
    return ResumeState(
        request_id=packed.request_id,
        attempt=packed.attempt,
        parameters=packed.parameters,
        step_index=packed.step_index,
        latents=latents,
        carry=carry,
        directions=directions,
        guidance=packed.guidance,
        num_draws=packed.num_draws,
        skipped_steps=packed.skipped_steps,
    )


async def leave_state(redis: Redis, state: ResumeState, *, ttl_s: int) -> None:
    """Put a state where the next worker finds it."""
    key = keys.resume(state.request_id, state.attempt)
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.hset(key, mapping={"step": state.step_index, "state": pack_state(state)})
        pipeline.expire(key, ttl_s)
        await cast("Any", pipeline.execute())


async def find_state(redis: Redis, request_id: str, attempt: str) -> ResumeState | None:
    """What a drained worker has left of a request, None if it is gone.

    Raises:
        ProtocolError: What lies there is no state of this version.
    """
    payload = await cast("Any", redis.hget(keys.resume(request_id, attempt), "state"))
    return unpack_state(payload) if payload else None
