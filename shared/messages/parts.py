"""What messages are made of: values that stand in several of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageParameters:
    """What a picture is made from; checked by the gateway, complete (no defaults left open)."""

    prompt: str
    """What the picture should show."""
    negative_prompt: str
    """What guidance leads away from; the empty prompt by default."""
    seed: int
    """What the initial latents and the sampler's noise are drawn from."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    num_inference_steps: int
    """Steps as the client counts them; some samplers need more forwards than steps."""
    guidance_scale: float
    """How far the prompt is followed; 1 or less means unguided."""
    sampler: str
    """One of the model's `samplers`."""
    guidance_skip: str
    """How readily guidance is extrapolated: "off", "balanced" or "fast"."""
    output_format: str
    """Of the picture's file: "png", "jpeg" or "webp"."""
    output_compression: int
    """From 0 to 100, for jpeg and webp."""
    model: str
    """The model's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHandle:
    """Where a tensor lies, in some 100 bytes."""

    kind: str
    """"shm", "cuda_ipc" or "inline"."""
    pool: str
    """The name of the pool that it lies in."""
    owner: str
    """The producer's incarnation."""
    host: str
    """Boot id and IPC namespace, so that a consumer elsewhere does not even try."""
    slot: int
    """The place in the pool."""
    generation: int
    """The slot's turn: another tensor in the same slot has another one."""
    shape: tuple[int, ...]
    """Of the tensor."""
    dtype: str
    """Of the tensor: "float32", "float16" or "bfloat16"."""
    inline_key: str = ""
    """The Redis key of the expiring copy, empty where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow:
    """One request's part in a slot: its next forward."""

    request_id: str
    attempt: str
    step_index: int
    skip: bool = False
    """Whether guidance may be extrapolated; the forward is guided in full otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReport:
    """What became of one `SlotRow`."""

    request_id: str
    attempt: str
    has_run: bool
    """Whether the forward was done."""
    next_step_index: int
    """The step that the worker holds now, -1 if it does not hold this attempt (after its last
    forward it no longer does)."""
    was_skipped: bool = False
    """Whether guidance was extrapolated."""
    can_skip: bool = False
    """Whether the request's next guided step may be skipped."""
    skip_steps: int = 0
    """How many steps in a row may be skipped from that one on."""
    skip_error: float = 0.0
    """Relative error that extrapolated guidance would have made in the last full step's prediction,
    0 where not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFailure:
    """A request that failed inside a slot, alone; its neighbours went on."""

    request_id: str
    attempt: str
    code: str
    """As in `shared.errors`."""
    reason: str
    """In words for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRequest:
    """A request whose latents a UNet worker holds between slots."""

    request_id: str
    attempt: str
    step_index: int
    num_forwards: int
    """Forwards from its beginning to its end."""
    is_guided: bool
    """Whether a forward in full is two rows."""
    num_skipped: int = 0
    """Steps whose guidance was skipped so far."""
    last_full: int = -1
    """The last step that ran in full, -1 for none."""
    warnings: tuple[str, ...] = ()
    """As in `RequestAdmitted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """How far one request is."""

    request_id: str
    state: str
    """As in the request's record."""
    step: int
    """Forwards that are done."""
    num_steps: int
    """Forwards from its beginning to its end; 0 until it is admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotShape:
    """How a slot leaves room for decode chunks on its device."""

    threads_beside: int = 0
    """Its own threads while chunks run, as its pool's header tells; 0 for no difference."""
    waiting_share: float = 0.0
    """Of its rows, from 0 to 1, in parts that wait meanwhile."""

    def waiting_rows(self, rows: int) -> int:
        """Return how many of the rows wait: rounded down, but for what sharing has rounded away."""
        return int(rows * self.waiting_share + 1e-6)


NO_ROOM = SlotShape()
"""Of a slot that runs the same with chunks beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a model folder can do, as its worker read it; the gateway's limits come from here."""

    model_id: str
    """The name that clients ask for."""
    latent_channels: int
    """Of a latent, as the VAE takes it."""
    vae_scale_factor: int
    """Pixels to a side of one latent."""
    default_height: int
    """In pixels."""
    default_width: int
    """In pixels."""
    side_multiple: int
    """What height and width are multiples of, in pixels."""
    max_side: int
    """The longest height or width, in pixels."""
    max_prompt_tokens: int
    """Without the two markers that begin and end every prompt."""
    prediction_type: str
    """What the UNet predicts, in diffusers' words: "epsilon", "v_prediction" or "sample"."""
    samplers: tuple[str, ...]
    """What a request may ask for."""
    default_sampler: str
    """What a request gets that does not ask."""
    max_steps_by_sampler: dict[str, int] = field(default_factory=dict)
    """The most steps that a sampler takes, where it is told."""
    is_batch_invariant: bool = False
    """Whether a seed gives the same bytes alone and among others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """How a worker introduces itself."""

    worker_id: str
    """The worker's name, which survives a restart; its incarnation does not."""
    incarnation: str
    kind: str
    """"unet" or "vae"."""
    device_group: str
    """Who shares its physical device."""
    host: str
    """As in `TensorHandle`."""
    device: str
    """"cpu", or "cuda:UUID" with its namespaces."""
    dtype: str
    """What it computes in."""
    threads: int
    """CPU threads that it may use."""
    max_requests: int
    """Requests that it can hold."""
    model_id: str
    """The model that it has loaded."""
    model: ModelInfo | None = None
    """What that model can do; from a UNet worker."""
    step_ms: dict[int, float] = field(default_factory=dict)
    """Median slot time by rows, alone, at the default size."""
    decode_ms: float = 0.0
    """Median whole decode, alone."""
    num_chunks: int = 1
    """Chunks that a decode is cut into."""
    pool: str = ""
    """Its tensor pool's name, empty if it has none."""
    runs_side_by_side: bool = True
    """Whether its device computes for two processes at a time; a GPU does only under MPS."""
    max_decodes: int = 1
    """Decodes that a VAE worker runs side by side."""
    model_digest: str = ""
    """What tells models of one name apart, empty if not told."""
