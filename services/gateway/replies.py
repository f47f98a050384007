"""The JSON bodies that the gateway answers with; OpenAI's fields first, then ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong. param: the field to blame, null if none."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error object; every error is one."""

    error: ErrorDetail


class InputTokensDetails(BaseModel):
    """Of what kind the input was."""

    image_tokens: int = 0
    text_tokens: int


class Usage(BaseModel):
    """input_tokens: words and marks read of the prompts. output_tokens: latent positions made."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class ImageItem(BaseModel):
    """One picture: `b64_json` or `url`, as asked for.

    skipped_steps: steps whose guidance was extrapolated. warnings: such as a prompt that was cut.
    """

    b64_json: str | None = None
    url: str | None = None
    request_id: str
    seed: int
    skipped_steps: list[int]
    warnings: list[str]


class ImagesReply(BaseModel):
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


class CompletedEvent(BaseModel):
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


class OutcomeReply(BaseModel):
    """What a finished picture came with; seconds as the workers saw them."""

    content_type: str
    size_bytes: int
    skipped_steps: list[int]
    warnings: list[str]
    decode_s: float
    transport: str


class RequestReply(BaseModel):
    """How one picture is doing.

    state: queued, running, done, failed or cancelled. queue_position: 1 is next, null if it does
    not wait or is not known. step: UNet forwards done of num_steps, null if not known. Instants are
    seconds since the Unix epoch. url: where the picture is, null until done. error: of a failure.
    """

    id: str
    object: Literal["image.request"] = "image.request"
    job_id: str
    state: str
    queue_position: int | None
    step: int | None
    num_steps: int | None
    num_attempts: int
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    waited_s: float | None = Field(description="From submission to the first attempt.")
    total_s: float | None = Field(description="From submission to the final state.")
    parameters: dict[str, Any]
    url: str | None
    outcome: OutcomeReply | None
    error: ErrorDetail | None


class Sizes(BaseModel):
    """Sides in pixels."""

    default: str
    multiple: int
    max_side: int


class ModelLimits(BaseModel):
    """The largest value of each; num_inference_steps by sampler."""

    n: int
    num_inference_steps: dict[str, int]
    guidance_scale: float
    prompt_characters: int
    prompt_tokens: int


class ModelDefaults(BaseModel):
    """What holds where nothing is asked for."""

    size: str
    num_inference_steps: int
    guidance_scale: float
    guidance_skip: str
    sampler: str
    output_format: str = "png"
    response_format: str = "b64_json"


class ModelCard(BaseModel):
    """A model and what may be asked of it.

    ready: whether it has the workers it needs now. batch_invariant: whether the same request gives
    the same bytes alone and among others, on every worker that it has now.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "synerdiff"
    ready: bool
    batch_invariant: bool
    samplers: list[str]
    guidance_skips: list[str] = ["off", "balanced", "fast"]
    output_formats: list[str] = ["png", "jpeg", "webp"]
    sizes: Sizes
    limits: ModelLimits
    defaults: ModelDefaults


class ModelList(BaseModel):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ReadinessReply(BaseModel):
    """Whether pictures can be made now, and if not, why."""

    ready: bool
    reasons: list[str]
