"""What a VAE worker is told by the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages.parts import ImageParameters, TensorHandle
from shared.messages.to_any_worker import ToAnyWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLatents:
    """Decode and commit one image, as far as chunks are granted."""

    epoch: int
    request_id: str
    attempt: str
    handle: TensorHandle
    """Where the latents lie."""
    transport: str
    """How to get at them, "inline" for the copy in Redis; the others fall back on it."""
    parameters: ImageParameters
    """For the picture's format and the text in its file; no pixel depends on the rest."""
    skipped_steps: tuple[int, ...]
    """As in `LatentsFinished`, for the record."""
    warnings: tuple[str, ...]
    """As in `RequestAdmitted`, for the record."""
    release_to: str
    """The producer's control stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantChunks:
    """More chunks for a decode may run.

    Decodes whose chunks may run at the same time do so, and share the worker's threads.
    """

    epoch: int
    request_id: str
    attempt: str
    chunks: int
    """How many more."""
    threads: int
    """On at most so many threads; 0 for all that the worker has."""
    beside_seq: int = 0
    """They begin when every slot before that one is over beside them, as the pool's header tells; 0
    for at once. Where the header can't be read, or after a while, they begin at once, too."""
    pool: str = ""
    """The tensor pool of the UNet worker beside whose slots they run, empty for none; its header is
    told when they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureChunks:
    """Time decodes of dummy latents, chunk by chunk, as `MeasureSlot` does forwards."""

    epoch: int
    number: int
    """Of the measurement, for the answer."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    threads: int
    """As in `GrantChunks`."""
    window_ms: float
    """How long decodes are begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelDecode:
    """Stop at the next chunk."""

    epoch: int
    request_id: str
    attempt: str


ToVaeWorker = DecodeLatents | GrantChunks | MeasureChunks | CancelDecode | ToAnyWorker
