"""The models: which there are, and what may be asked of each."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

from services.gateway import replies
from services.gateway.context import GATEWAY
from services.gateway.fleet import Fleet, SeenModel
from services.gateway.http_errors import ApiError, unavailable
from services.gateway.order import limits_of
from services.gateway.validation import MAX_GUIDANCE_SCALE, MAX_IMAGES, MAX_PROMPT_CHARACTERS
from shared.settings import GatewaySettings


async def list_models(request: web.Request) -> web.Response:
    """Every model, with what may be asked of it."""
    gateway = request.app[GATEWAY]
    models = sorted(gateway.fleet.models.items())
    cards = [describe_model(model, gateway.settings) for _, model in models]
    return web.json_response(text=replies.ModelList(data=cards).model_dump_json())


async def show_model(request: web.Request) -> web.Response:
    """One model."""
    gateway = request.app[GATEWAY]
    model = choose_model(request.match_info["model_id"], gateway.fleet)
    return web.json_response(text=describe_model(model, gateway.settings).model_dump_json())


def choose_model(name: str | None, fleet: Fleet, *, default: str = "") -> SeenModel:
    """Return the model that is meant by a name, or by none: the default one, or one that is ready.

    Where no model is ready, none means the one that was last.

    Raises:
        ApiError: 404, no such model; 503, its workers (or any at all) have not been seen yet.
    """
    if not fleet.models:
        raise unavailable("No worker has registered yet; pictures can't be made now.")
    if name is None and default:
        if default not in fleet.models:
            raise unavailable(f"No worker of the default model {default} is there.")
        return fleet.models[default]
    if name is None:
        return min(
            fleet.models.values(),
            key=lambda model: (not model.is_ready, -model.last_ready, model.info.model_id),
        )
    if name not in fleet.models:
        allowed = ", ".join(sorted(fleet.models))
        raise ApiError(
            status=HTTPStatus.NOT_FOUND,
            message=f"The 'model' {name[:80]!r} does not exist here. Allowed: {allowed}.",
            code="model_not_found",
            param="model",
        )
    return fleet.models[name]


def check_is_served(model: SeenModel, fleet: Fleet, now: float) -> None:
    """Let a request for a model's pictures pass if they can be expected to be made.

    What has just gone comes back within a restart's time, and requests wait for it.

    Raises:
        ApiError: 503, with what is missing. now: on the monotonic clock.
    """
    if reasons := fleet.reasons_not_to_wait(model, now):
        raise unavailable(f"Pictures can't be made now: {', and '.join(reasons)}.")


def check_store(fleet: Fleet, now: float) -> None:
    """Let a request pass if the store can take it.

    Raises:
        ApiError: 503, with why it can't. now: on the monotonic clock.
    """
    if problem := fleet.store_problem(now):
        code = "store_full" if fleet.is_store_full else "store_unavailable"
        raise unavailable(f"{problem}.", code=code, retry_after_s=5.0)


def describe_model(model: SeenModel, settings: GatewaySettings) -> replies.ModelCard:
    """A model and its limits, for clients."""
    limits = limits_of(model.info, settings)
    size = f"{limits.default_width}x{limits.default_height}"
    return replies.ModelCard(
        id=model.info.model_id,
        created=int(model.first_seen_at),
        ready=model.is_ready,
        samplers=list(limits.max_steps),
        sizes=replies.Sizes(
            default=size, multiple=model.info.side_multiple, max_side=limits.max_side
        ),
        limits=replies.ModelLimits(
            n=MAX_IMAGES,
            num_inference_steps=limits.max_steps,
            guidance_scale=MAX_GUIDANCE_SCALE,
            prompt_characters=MAX_PROMPT_CHARACTERS,
            prompt_tokens=model.info.max_prompt_tokens,
        ),
        defaults=replies.ModelDefaults(
            size=size,
            num_inference_steps=limits.default_steps(limits.default_sampler),
            guidance_scale=limits.default_guidance_scale,
            guidance_skip=limits.default_guidance_skip,
            sampler=limits.default_sampler,
        ),
    )
