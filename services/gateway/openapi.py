"""`/openapi.json`: the paths by hand, every schema from the pydantic models that serve them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway import replies
from services.gateway.validation import GenerationBody

_ERRORS = {
    "400": "A field is wrong: `param` names it, the message says what is allowed.",
    "404": "Unknown.",
    "410": "The picture has expired, or its request was cancelled.",
    "413": "The body is too large.",
    "415": "The body is not `application/json`.",
    "429": "Too many open requests; `Retry-After` and `retry-after-ms` say when to come back.",
    "503": "Not now: no workers, the store is full, or the gateway is shutting down.",
    "504": "Not done in time; it has been cancelled.",
}


def make_openapi() -> dict[str, Any]:
    """Return the description of the whole HTTP interface, OpenAPI 3.1."""
    reply_models = [
        model
        for model in vars(replies).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and model is not BaseModel
    ]
    _, definitions = models_json_schema(
        [(GenerationBody, "validation"), *((model, "serialization") for model in reply_models)],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SynerDiff",
            "version": "1",
            "description": "Pictures from latent diffusion models. The OpenAI Python client works "
            "with `base_url` set to this server's `/v1`; parameters beyond OpenAI's go into "
            "`extra_body`.",
        },
        "paths": _paths(),
        "components": {"schemas": definitions["$defs"]},
    }


def _paths() -> dict[str, Any]:
    request_id = _parameter("request_id", "From a reply's `request_id`.")
    return {
        "/v1/images/generations": {
            "post": {
                "summary": "Make pictures",
                "description": "Answers when all of them are done. With `stream`, comment lines "
                "hold the progress as JSON, then one event the picture, or `error`. Closing the "
                "connection cancels what is not done.",
                "requestBody": {"required": True, "content": _json("GenerationBody")},
                "responses": {
                    "200": {
                        "description": "The pictures, or the stream.",
                        "content": {
                            **_json("ImagesReply"),
                            "text/event-stream": {"schema": _ref("CompletedEvent")},
                        },
                    },
                    **_errors("400", "404", "413", "415", "429", "503", "504"),
                },
            }
        },
        "/v1/images/{request_id}": {
            "get": {
                "summary": "A picture by its id",
                "parameters": [request_id],
                "responses": {
                    "200": {
                        "description": "The picture.",
                        "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
                    },
                    "202": {"description": "Not yet.", "content": _json("RequestReply")},
                    **_errors("404", "410"),
                },
            }
        },
        "/v1/requests/{request_id}": {
            "get": {
                "summary": "How a request is doing",
                "parameters": [request_id],
                "responses": {**_ok("RequestReply"), **_errors("404")},
            },
            "delete": {
                "summary": "Cancel a request",
                "description": "One that has its final state keeps it.",
                "parameters": [request_id],
                "responses": {**_ok("RequestReply"), **_errors("404")},
            },
        },
        "/v1/models": {
            "get": {"summary": "Every model that is served", "responses": _ok("ModelList")}
        },
        "/v1/models/{model_id}": {
            "get": {
                "summary": "A model: samplers, sizes, limits, defaults",
                "parameters": [_parameter("model_id", "From the list.")],
                "responses": {**_ok("ModelCard"), **_errors("404", "503")},
            }
        },
        "/healthz": {
            "get": {"summary": "Alive", "responses": {"200": {"description": "It runs."}}}
        },
        "/readyz": {
            "get": {
                "summary": "Can pictures be made now?",
                "responses": {
                    **_ok("ReadinessReply"),
                    "503": {"description": "No, and why.", "content": _json("ReadinessReply")},
                },
            }
        },
        "/metrics": {
            "get": {
                "summary": "Metrics for Prometheus",
                "responses": {"200": {"description": "Text.", "content": {"text/plain": {}}}},
            }
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _ok(name: str) -> dict[str, Any]:
    return {"200": {"description": "As asked.", "content": _json(name)}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {
        status: {"description": _ERRORS[status], "content": _json("ErrorReply")}
        for status in statuses
    }


def _parameter(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string"},
    }
