"""Every message on the wire, grouped by who receives it.

Commands are imperative, events past tense. All are plain frozen values; `shared.codec` turns them
into msgpack and back. Each is idempotent for its receiver: redelivery, reordering and restarts are
settled by `attempt`, `step_index`, `seq` and `epoch`, never by trust in exactly-once transport.

Words:
    request_id: one image. job_id: one HTTP request, of n images with consecutive seeds.
    attempt: an opaque token "EPOCH-NUMBER"; a request's record names the current one.
    epoch: a scheduler's life; workers ignore commands of an older one.
    incarnation: a worker process's life; its streams are named after it.
    step_index: the next UNet forward of a request, from 0 to its num_forwards.
    seq: the number of a slot on one UNet worker, ascending within an incarnation.
Instants (`*_at`) are seconds since the Unix epoch; durations carry their unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# --- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageParameters:
    """What a picture is made from; checked by the gateway, complete (no defaults left open).

    height, width: pixels. guidance_scale: 1 or less means unguided. guidance_skip: "off",
    "balanced" or "fast". output_compression: 0 to 100, for jpeg and webp.
    """

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    guidance_skip: str
    output_format: str
    output_compression: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHandle:
    """Where a tensor lies, in some 100 bytes.

    kind: "shm", "cuda_ipc" or "inline". pool: the pool's name. owner: the producer's incarnation.
    host: boot id and IPC namespace, so that a consumer elsewhere does not even try. slot,
    generation: the place in the pool and its turn. shape, dtype: of the tensor ("float32", ...).
    inline_key: the Redis key of the expiring copy, empty where there is none.
    """

    kind: str
    pool: str
    owner: str
    host: str
    slot: int
    generation: int
    shape: tuple[int, ...]
    dtype: str
    inline_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow:
    """One request's part in a slot: its next forward, guided in full unless `skip` is asked for."""

    request_id: str
    attempt: str
    step_index: int
    skip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReport:
    """What became of one `SlotRow`.

    has_run: whether the forward was done. next_step_index: the step the worker holds now, -1 if it
    does not hold this attempt (after its last forward it no longer does). was_skipped: the guidance
    was extrapolated. can_skip: the request's next guided step may be skipped; skip_steps: so may so
    many steps in a row from that one on. skip_error: relative error that extrapolated guidance
    would have made in the last full step's prediction, 0 where not measured.
    """

    request_id: str
    attempt: str
    has_run: bool
    next_step_index: int
    was_skipped: bool = False
    can_skip: bool = False
    skip_steps: int = 0
    skip_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFailure:
    """A request that failed inside a slot, alone; its neighbours went on."""

    request_id: str
    attempt: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRequest:
    """A request whose latents a UNet worker holds between slots.

    num_skipped: steps whose guidance was skipped so far. last_full: the last step that ran in full,
    -1 for none. warnings: as in `RequestAdmitted`.
    """

    request_id: str
    attempt: str
    step_index: int
    num_forwards: int
    is_guided: bool
    num_skipped: int = 0
    last_full: int = -1
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a model folder can do, as its worker read it; the gateway's limits come from here.

    default_height, default_width, max_side and side_multiple in pixels; max_prompt_tokens without
    the two markers that begin and end every prompt.
    """

    model_id: str
    latent_channels: int
    vae_scale_factor: int
    default_height: int
    default_width: int
    side_multiple: int
    max_side: int
    max_prompt_tokens: int
    prediction_type: str
    samplers: tuple[str, ...]
    default_sampler: str
    max_steps_by_sampler: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """How a worker introduces itself.

    kind: "unet" or "vae". worker_id survives a restart, incarnation does not. device_group: who
    shares its physical device. host: as in `TensorHandle`. device: "cpu" or "cuda:UUID" with its
    namespaces. threads: CPU threads it may use. max_requests: requests it can hold. model: from a
    UNet worker. model_digest: what tells models of one name apart, empty if not told. step_ms:
    median slot time by rows, alone, at the default size. decode_ms: median whole decode, alone.
    num_chunks: chunks a decode is cut into. pool: its tensor pool's name, empty if it has none.
    runs_side_by_side: whether its device computes for two processes at a time; a GPU does only
    under MPS.
    """

    worker_id: str
    incarnation: str
    kind: str
    device_group: str
    host: str
    device: str
    dtype: str
    threads: int
    max_requests: int
    model_id: str
    model: ModelInfo | None = None
    step_ms: dict[int, float] = field(default_factory=dict)
    decode_ms: float = 0.0
    num_chunks: int = 1
    pool: str = ""
    runs_side_by_side: bool = True
    model_digest: str = ""


# --- to the scheduler ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateImage:
    """Make one image. Stays in the request stream until its request is final.

    priority: higher goes first. deadline_ms: after submission, 0 for none. owner: whose share of
    the service it draws on. submitted_at: on the store's clock, filled in by who reads the entry.
    """

    request_id: str
    job_id: str
    owner: str
    priority: int
    deadline_ms: int
    submitted_at: float = 0.0
    parameters: ImageParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled:
    """The gateway has set the request's final state to cancelled; free what it holds."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    """A worker is there, or is there again after its registration had lapsed."""

    worker: WorkerInfo


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
    """A UNet worker that drains holds this request no more; another one goes on with it.

    step_index: the forward that comes next. Above 0 everything that the next worker needs lies in
    Redis (`keys.resume`), under the same attempt.
    """

    incarnation: str
    request_id: str
    attempt: str
    step_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAnnounced:
    """A worker's answer to each `BeginEpoch`: everything it holds.

    held: unfinished requests. finished: latents waiting in its pool. A VAE worker drops its decodes
    first and announces none: a decode is short, and its latents are still there.
    """

    incarnation: str
    epoch: int
    held: tuple[HeldRequest, ...] = ()
    finished: tuple[LatentsFinished, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAdmitted:
    """The prompt is encoded and the latents are resident; forwards may be scheduled.

    step_index: the first of them, above 0 where another worker has been before. num_skipped: steps
    whose guidance was skipped there.
    """

    incarnation: str
    request_id: str
    attempt: str
    num_forwards: int
    is_guided: bool
    warnings: tuple[str, ...] = ()
    step_index: int = 0
    num_skipped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDenoised:
    """A slot is over. duration_ms: on the compute thread, without waiting."""

    incarnation: str
    epoch: int
    seq: int
    duration_ms: float
    rows: tuple[RowReport, ...]
    failures: tuple[RowFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsFinished:
    """A request's denoising is done and its latents lie in the worker's pool.

    warnings: as in `RequestAdmitted`, for a scheduler that did not hear them.
    """

    incarnation: str
    request_id: str
    attempt: str
    handle: TensorHandle
    skipped_steps: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksDecoded:
    """A decode has come so far: one report per grant. duration_ms: of the chunks since the last.

    num_chunks: of this whole decode, which may differ from size to size; 0 for not told.
    """

    incarnation: str
    request_id: str
    attempt: str
    chunks_done: int
    duration_ms: float
    num_chunks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDecoded:
    """The image is committed: its request is final. transport: the handle kind that served."""

    incarnation: str
    request_id: str
    attempt: str
    decode_ms: float
    transport: str


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
    """The answer to `MeasureSlot`. step_ms: median forward, 0 where it could not be run."""

    incarnation: str
    epoch: int
    number: int
    step_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksMeasured:
    """The answer to `MeasureChunks`. chunk_ms: median of each chunk; none if it could not run."""

    incarnation: str
    epoch: int
    number: int
    chunk_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleLost:
    """Neither the handle nor the inline copy could be read: the request starts again."""

    incarnation: str
    request_id: str
    attempt: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """A worker can't go on with this request, and another try would not help.

    code: as in `shared.errors`. reason: in words for the client.
    """

    incarnation: str
    request_id: str
    attempt: str
    code: str
    reason: str


# --- to a UNet worker ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitRequest:
    """Encode the prompt and draw the latents.

    resume_step: above 0, go on at this forward with what a drained worker has left (`keys.resume`);
    where that is gone, begin at the first.
    """

    epoch: int
    request_id: str
    attempt: str
    parameters: ImageParameters
    resume_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotShape:
    """How a slot leaves room for decode chunks on its device.

    threads_beside: its own while chunks run, as its pool's header tells; 0 for no difference.
    waiting_share: of its rows, from 0 to 1, in parts that wait meanwhile.
    """

    threads_beside: int = 0
    waiting_share: float = 0.0

    def waiting_rows(self, rows: int) -> int:
        """So many of the rows wait; rounded down, but for what sharing has rounded away."""
        return int(rows * self.waiting_share + 1e-6)


NO_ROOM = SlotShape()
"""Of a slot that runs the same with chunks beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseSlot:
    """One batched UNet forward.

    kind: "alone" or "beside" (decode chunks run next to it). threads: for the compute thread, 0
    leaves the library's default.
    """

    epoch: int
    seq: int
    kind: str
    threads: int
    rows: tuple[SlotRow, ...]
    shape: SlotShape = NO_ROOM


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSlot:
    """Time forwards of dummy rows, one after another for `window_ms`; at least one.

    number: of the measurement, for the answer. height, width: pixels. threads: as in `DenoiseSlot`.
    Nothing else is asked of the worker meanwhile.
    """

    epoch: int
    number: int
    height: int
    width: int
    rows: int
    threads: int
    window_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Forget a request: cancelled, failed or moved. An older attempt's release changes nothing."""

    epoch: int
    request_id: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLatents:
    """The commit has made this pool slot free; sent by the commit itself."""

    slot: int
    generation: int


# --- to a VAE worker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLatents:
    """Decode and commit one image, as far as chunks are granted.

    transport: how to get at the latents, "inline" for the copy in Redis; the others fall back on
    it. parameters: for the picture's format and the text in its file; no pixel depends on the rest.
    release_to: the producer's control stream.
    """

    epoch: int
    request_id: str
    attempt: str
    handle: TensorHandle
    transport: str
    parameters: ImageParameters
    skipped_steps: tuple[int, ...]
    warnings: tuple[str, ...]
    release_to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantChunks:
    """More chunks for a decode may run, on so many threads (0: the library's default).

    pool: the tensor pool of the UNet worker beside whose slots they run, empty for none; its header
    is told when they do. beside_seq: they begin when every slot before that one is over there, as
    the header tells; 0 for at once. Where the header can't be read, or after a while, they begin at
    once, too.
    """

    epoch: int
    request_id: str
    attempt: str
    chunks: int
    threads: int
    beside_seq: int = 0
    pool: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureChunks:
    """Time decodes of dummy latents, chunk by chunk, as `MeasureSlot` does forwards."""

    epoch: int
    number: int
    height: int
    width: int
    threads: int
    window_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelDecode:
    """Stop at the next chunk."""

    epoch: int
    request_id: str
    attempt: str


# --- to any worker -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginEpoch:
    """This epoch's scheduler does not know what you hold: drop queued slots and decodes, announce.

    Of a new scheduler, and of the same one where a worker comes back or has kept it waiting; what
    was moved meanwhile is released by the answer to the announcement. An older epoch's is ignored.
    """

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveWhenDone:
    """Whatever the scheduler had for this draining worker has been sent: nothing new comes."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseWorker:
    """The worker can't join, as it is: it ends by a configuration error. reason: a sentence."""

    epoch: int
    reason: str


# --- to the gateways -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """How far one request is. state: as in the request's record."""

    request_id: str
    state: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsProgressed:
    """Progress of every request that a slot or an admission has moved."""

    items: tuple[RequestProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """A request has its final state: "done", "failed" or "cancelled". Read its record."""

    request_id: str
    state: str


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
ToUnetWorker = (
    AdmitRequest
    | DenoiseSlot
    | MeasureSlot
    | ReleaseRequest
    | ReleaseLatents
    | BeginEpoch
    | LeaveWhenDone
    | RefuseWorker
)
ToVaeWorker = (
    DecodeLatents
    | GrantChunks
    | MeasureChunks
    | CancelDecode
    | BeginEpoch
    | LeaveWhenDone
    | RefuseWorker
)
ToGateway = RequestsProgressed | RequestFinished
Message = ToScheduler | ToUnetWorker | ToVaeWorker | ToGateway
