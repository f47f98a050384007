"""The body of `POST /v1/images/generations`: its fields, and what is wrong with it, in words.

Pure: bytes in, a checked `GenerationBody` out, or an `InvalidRequestError` that names the field and
what it may hold. What depends on a model (sizes, samplers, steps) is checked in `order`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import InvalidRequestError

MAX_PROMPT_CHARACTERS = 32_000
MAX_IMAGES = 10
MAX_SEED = 2**63 - 1
MAX_GUIDANCE_SCALE = 50.0
MAX_PRIORITY = 100
MAX_DEADLINE_MS = 86_400_000
_MAX_ECHO = 40
_MAX_UNKNOWN = 10
_NO_NUL = r"^[^\x00]*$"


class GenerationBody(BaseModel):
    """OpenAI's parameters, then ours; null is the same as left out, except for `prompt`.

    Unknown keys are kept aside and reported, so that newer clients go on working.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", title="GenerateImages")

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARACTERS,
        pattern=_NO_NUL,
        description="What the pictures show. Words beyond the model's limit are cut, with a "
        "warning in the reply.",
    )
    model: str | None = Field(
        None,
        max_length=512,
        description="One of `GET /v1/models`; left out, the default one or one that is ready.",
    )
    n: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description="How many pictures, with consecutive seeds."
    )
    size: str | None = Field(
        None,
        max_length=32,
        description='"auto" (the model\'s own size) or "WIDTHxHEIGHT" in pixels; '
        "`GET /v1/models/{id}` says which sides are possible.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="Pictures in the reply (`b64_json`, the default) or links to them."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="Default `png`, which carries its arguments as text."
    )
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 100 if left out."
    )
    background: Literal["opaque", "auto"] | None = Field(
        None, description="Pictures are always opaque."
    )
    stream: bool | None = Field(
        None,
        description="Answer with server-sent events: progress as comment lines, then "
        "`image_generation.completed`. One picture at a time.",
    )
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Accepted; only the final picture is sent."
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = (
        Field(None, description="Accepted; `num_inference_steps` is what decides.")
    )
    style: Literal["vivid", "natural"] | None = Field(
        None, description="Accepted; put the style into the prompt."
    )
    moderation: Literal["low", "auto"] | None = Field(
        None, description="Accepted; nothing is moderated."
    )
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted; `num_inference_steps` is what decides."
    )
    user: str | None = Field(None, max_length=512, description="Whose share of the service.")
    safety_identifier: str | None = Field(None, max_length=512, description="As `user`.")
    frame_count: None = Field(None, description="Animations are not offered.")
    frame_duration_ms: None = Field(None, description="Animations are not offered.")
    svg: None = Field(None, description="SVG is not offered.")

    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARACTERS,
        pattern=_NO_NUL,
        description="What the pictures should not show.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first picture; random if left out. The reply names every seed.",
    )
    num_inference_steps: int | None = Field(
        None, ge=1, description="Denoising steps; the limit depends on the sampler."
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE_SCALE,
        allow_inf_nan=False,
        description="How closely to follow the prompt; 1 or less means unguided, at half the cost.",
    )
    sampler: str | None = Field(
        None, max_length=64, description="One of the model's samplers: `GET /v1/models/{id}`."
    )
    guidance_skip: Literal["off", "balanced", "fast"] | None = Field(
        None,
        description="How much guidance may be extrapolated under load. `off` gives the very "
        "picture of the seed, and is the default where a seed is named.",
    )
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher goes first; default 0."
    )
    deadline_ms: int | None = Field(
        None,
        ge=0,
        le=MAX_DEADLINE_MS,
        description="Wanted within so many ms, or refused; 0 for no deadline.",
    )


def parse_body(payload: bytes) -> GenerationBody:
    """The checked body of a request.

    Raises:
        InvalidRequestError: Not JSON, or fields that are wrong: `field` is the first of them, and
            the message names them all with what they may hold.
    """
    try:
        value = json.loads(payload)
    except RecursionError as error:
        raise InvalidRequestError("The body is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from error
    except ValueError as error:
        raise InvalidRequestError("The body is not UTF-8, or holds an endless number.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body is {_name(value)}.", allowed="a JSON object")
    known = {name: value[name] for name in value if name in GenerationBody.model_fields}
    unknown = [name for name in value if name not in known][:_MAX_UNKNOWN]
    try:
        return GenerationBody.model_validate({**dict.fromkeys(map(_printable, unknown)), **known})
    except ValidationError as error:
        raise _explain(error, value) from error


def unknown_fields(body: GenerationBody) -> tuple[str, ...]:
    """Names of the body's keys that mean nothing here; the first ten, printable."""
    return tuple(body.model_extra or ())


def _printable(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()[:64]


def allowed_values(field: str) -> str:
    """What a field of the body may hold, in words.

    >>> allowed_values("n")
    'an integer from 1 to 10'
    """
    return _describe(_PROPERTIES[field])


_PROPERTIES: dict[str, dict[str, Any]] = GenerationBody.model_json_schema()["properties"]
_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null only",
}


def _describe(schema: Mapping[str, Any]) -> str:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    option: Mapping[str, Any] = options[0] if options else {"type": "null"}
    if "enum" in option:
        return " or ".join(", ".join(f'"{value}"' for value in option["enum"]).rsplit(", ", 1))
    if option["type"] == "string":
        least = option.get("minLength", 0)
        count = f"{least} to" if least else "at most"
        return f"a string of {count} {option['maxLength']:,} characters"
    words = _NAMES[option["type"]]
    if "maximum" in option:
        return f"{words} from {option['minimum']:g} to {_number(option['maximum'])}"
    return f"{words} of at least {option['minimum']}" if "minimum" in option else words


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _explain(error: ValidationError, value: Mapping[str, Any]) -> InvalidRequestError:
    parts: list[str] = []
    fields: list[str] = []
    for issue in error.errors(include_url=False, include_context=False, include_input=False):
        field = str(issue["loc"][0])
        if field in fields:
            continue
        fields.append(field)
        if issue["type"] == "missing":
            problem = f"'{field}' is missing"
        elif issue["type"] == "string_unicode":
            problem = f"'{field}' holds characters that are not valid Unicode"
        elif issue["type"] == "string_pattern_mismatch":
            problem = f"'{field}' holds a NUL character"
        else:
            problem = f"'{field}' is {_name(value[field])}"
        parts.append(f"{problem}. Allowed: {allowed_values(field)}.")
    return InvalidRequestError(" ".join(parts), field=fields[0])


def _name(value: object) -> str:
    """A value from JSON, short enough for a message."""
    match value:
        case None | bool() | float():
            return json.dumps(value)
        case int():
            return str(value) if abs(value) < 10**24 else "an enormous integer"
        case str() if len(value) > _MAX_ECHO:
            return f"a string of {len(value):,} characters"
        case str():
            return json.dumps(value)
        case list():
            return "a list"
        case _:
            return "an object"
