"""What the scheduler hears: from gateways, from workers, and of how workers come and go."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages.parts import (
    HeldRequest,
    ImageParameters,
    RowFailure,
    RowReport,
    TensorHandle,
    WorkerInfo,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateImage:
    """Make one image. Stays in the request stream until its request is final."""

    request_id: str
    job_id: str
    owner: str
    """Whose share of the service it draws on."""
    priority: int
    """Higher goes first."""
    deadline_ms: int
    """After submission; 0 for none."""
    submitted_at: float = 0.0
    """On the store's clock, filled in by who reads the entry."""
    parameters: ImageParameters
    """What the picture is made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled:
    """The gateway has set the request's final state to cancelled; free what it holds."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    """A worker is there, or is there again after its registration had lapsed."""

    worker: WorkerInfo
    """As its registration in Redis says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker's heartbeat has lapsed, or it has said goodbye."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraining:
    """A worker was told to stop: give it nothing new, and say so with `LeaveWhenDone`."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHandedBack:
    """A UNet worker that drains holds this request no more; another one goes on with it."""

    incarnation: str
    request_id: str
    attempt: str
    step_index: int
    """The forward that comes next. Above 0 everything that the next worker needs lies in Redis
    (`keys.resume`), under the same attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAnnounced:
    """A worker's answer to each `BeginEpoch`: everything it holds.

    A VAE worker drops its decodes first and announces none: a decode is short, and its latents are
    still there.
    """

    incarnation: str
    epoch: int
    held: tuple[HeldRequest, ...] = ()
    """Unfinished requests."""
    finished: tuple[LatentsFinished, ...] = ()
    """Latents that wait in its pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAdmitted:
    """The prompt is encoded and the latents are resident; forwards may be scheduled."""

    incarnation: str
    request_id: str
    attempt: str
    num_forwards: int
    """Forwards from its beginning to its end."""
    is_guided: bool
    """Whether a forward in full is two rows."""
    warnings: tuple[str, ...] = ()
    """What the client should know of how the request was taken, a sentence each."""
    step_index: int = 0
    """The first forward, above 0 where another worker has been before."""
    num_skipped: int = 0
    """Steps whose guidance was skipped there."""
    batch_key: str = ""
    """What requests share whose rows can share a forward; means nothing but to their worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDenoised:
    """A slot is over."""

    incarnation: str
    epoch: int
    seq: int
    duration_ms: float
    """On the compute thread, without waiting."""
    rows: tuple[RowReport, ...]
    """What became of each row."""
    failures: tuple[RowFailure, ...] = ()
    """Requests that failed in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsFinished:
    """A request's denoising is done and its latents lie in the worker's pool."""

    incarnation: str
    request_id: str
    attempt: str
    handle: TensorHandle
    """Where they lie."""
    skipped_steps: tuple[int, ...] = ()
    """Steps whose guidance was skipped."""
    warnings: tuple[str, ...] = ()
    """As in `RequestAdmitted`, for a scheduler that did not hear them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksDecoded:
    """A decode has come so far: one report per grant."""

    incarnation: str
    request_id: str
    attempt: str
    chunks_done: int
    """Of the whole decode."""
    duration_ms: float
    """Of the chunks since the last report, on the threads granted; where decodes shared them, a
    decode's part of the time."""
    num_chunks: int = 0
    """Of this whole decode, which may differ from size to size; 0 for not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDecoded:
    """The image is committed: its request is final."""

    incarnation: str
    request_id: str
    attempt: str
    decode_ms: float
    """Of the whole decode."""
    transport: str
    """The handle kind that served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRefused:
    """A decoded image was not committed: another attempt is current, or the request is final.

    The latents are freed all the same.
    """

    incarnation: str
    request_id: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMeasured:
    """The answer to `MeasureSlot`."""

    incarnation: str
    epoch: int
    number: int
    """The measurement's."""
    step_ms: float
    """Median forward, 0 where it could not be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksMeasured:
    """The answer to `MeasureChunks`."""

    incarnation: str
    epoch: int
    number: int
    """The measurement's."""
    chunk_ms: tuple[float, ...]
    """Median of each chunk; none if it could not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleLost:
    """Neither the handle nor the inline copy could be read: the request starts again."""

    incarnation: str
    request_id: str
    attempt: str
    reason: str
    """In words, for whoever reads the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """A worker can't go on with this request, and another try would not help."""

    incarnation: str
    request_id: str
    attempt: str
    code: str
    """As in `shared.errors`."""
    reason: str
    """In words for the client."""


ToScheduler = (
    GenerateImage
    | RequestCancelled
    | WorkerRegistered
    | WorkerLost
    | WorkerDraining
    | WorkerAnnounced
    | RequestHandedBack
    | RequestAdmitted
    | SlotDenoised
    | LatentsFinished
    | ChunksDecoded
    | ImageDecoded
    | CommitRefused
    | SlotMeasured
    | ChunksMeasured
    | HandleLost
    | RequestFailed
)
