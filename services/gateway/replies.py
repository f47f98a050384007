"""The JSON bodies that the gateway answers with; OpenAI's fields first, then ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """A part of an answer; the lines under its fields are the specification's."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field to blame, null if none."""
    code: str | None


class ErrorReply(Reply):
    """OpenAI's error object; every error is one."""

    error: ErrorDetail


class InputTokensDetails(Reply):
    """Of what kind the input was."""

    image_tokens: int = 0
    text_tokens: int


class Usage(Reply):
    """What the pictures took."""

    input_tokens: int
    """Words and marks read of the prompts."""
    input_tokens_details: InputTokensDetails
    output_tokens: int
    """Latent positions made."""
    total_tokens: int


class ImageItem(Reply):
    """One picture: `b64_json` or `url`, as asked for."""

    b64_json: str | None = None
    url: str | None = None
    request_id: str
    seed: int
    skipped_steps: list[int]
    """Steps whose guidance was extrapolated."""
    warnings: list[str]
    """Such as a prompt that was cut."""


class ImagesReply(Reply):
    """The answer to `POST /v1/images/generations`."""

    created: int
    data: list[ImageItem]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str
    usage: Usage
    model: str
    warnings: list[str]


class CompletedEvent(Reply):
    """The last event of a stream: the picture and what it came with."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str
    usage: Usage
    model: str
    request_id: str
    seed: int
    skipped_steps: list[int]
    warnings: list[str]


class OutcomeReply(Reply):
    """What a finished picture came with; seconds as the workers saw them."""

    content_type: str
    size_bytes: int
    skipped_steps: list[int]
    warnings: list[str]
    decode_s: float
    transport: str


class RequestReply(Reply):
    """How one picture is doing. Instants are seconds since the Unix epoch."""

    id: str
    object: Literal["image.request"] = "image.request"
    job_id: str
    state: str
    """queued, running, done, failed or cancelled."""
    queue_position: int | None
    """1 is next; null if it does not wait or is not known."""
    step: int | None
    """UNet forwards done of `num_steps`; null if not known."""
    num_steps: int | None
    num_attempts: int
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    waited_s: float | None
    """From submission to the first attempt."""
    total_s: float | None
    """From submission to the final state."""
    parameters: dict[str, Any]
    url: str | None
    """Where the picture is; null until done."""
    outcome: OutcomeReply | None
    error: ErrorDetail | None
    """Of a failure."""


class Sizes(Reply):
    """Sides in pixels."""

    default: str
    multiple: int
    max_side: int


class ModelLimits(Reply):
    """The largest value of each; num_inference_steps by sampler."""

    n: int
    num_inference_steps: dict[str, int]
    guidance_scale: float
    prompt_characters: int
    prompt_tokens: int


class ModelDefaults(Reply):
    """What holds where nothing is asked for."""

    size: str
    num_inference_steps: int
    guidance_scale: float
    guidance_skip: str
    sampler: str
    output_format: str = "png"
    response_format: str = "b64_json"


class ModelCard(Reply):
    """A model and what may be asked of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "synerdiff"
    ready: bool
    """Whether it has the workers it needs now."""
    batch_invariant: bool
    """Whether a request gives the same bytes alone and among others, on every worker it has."""
    samplers: list[str]
    guidance_skips: list[str] = ["off", "balanced", "fast"]
    output_formats: list[str] = ["png", "jpeg", "webp"]
    sizes: Sizes
    limits: ModelLimits
    defaults: ModelDefaults


class ModelList(Reply):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ReadinessReply(Reply):
    """Whether pictures can be made now, and if not, why."""

    ready: bool
    reasons: list[str]
