"""The server's interface as an OpenAPI description."""

from collections.abc import Mapping
from typing import Any

from .protocol import Field, schema_of

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}


def _envelope(kind: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    choices = {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["index", "finish_reason", *choice],
            "properties": {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length"]}, **choice},
        },
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": choices,
            "usage": _USAGE,
        },
    }


_CHAT = _envelope(
    "chat.completion",
    {
        "message": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"const": "assistant"}, "content": {"type": "string"}},
        }
    },
)
_COMPLETION = _envelope("text_completion", {"text": {"type": "string"}})
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
    },
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_HEALTH = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ok", "failed"]}, "open": {"type": "integer"}},
}
_MEANINGS = {
    400: "The request is invalid.",
    401: "The key is missing or wrong.",
    403: "Another Host or Origin than the server accepts.",
    415: "The body is no JSON by its Content-Type.",
    500: "The answer to this request failed.",
    404: "No such model.",
    408: "The body took too long.",
    413: "The body is too long.",
    429: "Too many requests; try again later.",
    503: "The server is stopping, or its engine has failed.",
}


def _json(schema: Mapping[str, Any], meaning: str) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): _json(_ERROR, _MEANINGS[status]) for status in statuses}


def description(
    chat: Mapping[str, Field], completion: Mapping[str, Field], *, model: str, needs_key: bool
) -> dict[str, Any]:
    """The OpenAPI description, with the fields that this server accepts."""
    examples = {
        "chat": {"model": model, "messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 16},
        "complete": {"model": model, "prompt": "2 + 3 =", "max_tokens": 16},
    }
    keyed = (401,) if needs_key else ()

    def post(name: str, fields: Mapping[str, Field], answer: Mapping[str, Any]) -> dict[str, Any]:
        good = _json(answer, "The answer; with `stream`, chunks of it as server-sent events.")
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        schema = schema_of(fields)
        schema["properties"]["model"] = {"const": model}
        body = {"required": True, "content": {"application/json": {"schema": schema, "example": examples[name]}}}
        responses = {"200": good, **_errors(400, 403, 404, 408, 413, 415, 429, 500, 503, *keyed)}
        return {"post": {"operationId": name, "requestBody": body, "responses": responses}}

    def get(name: str, responses: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"get": {"operationId": name, "responses": dict(responses), **more}}

    text = {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}
    paths = {
        "/v1/chat/completions": post("chat", chat, _CHAT),
        "/v1/completions": post("complete", completion, _COMPLETION),
        "/v1/models": get("models", {"200": _json(_MODELS, "The model served."), **_errors(*keyed)}),
        "/v1/models/{model}": get(
            "model", {"200": _json(_MODEL, "The model."), **_errors(404, *keyed)}, parameters=[name]
        ),
        "/health": get("health", {"200": _json(_HEALTH, "It works."), "503": _json(_HEALTH, "The engine has failed.")}),
        "/metrics": get("metrics", {"200": text, **_errors(*keyed)}),
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "wizard-engine", "version": "1"},
        "paths": paths,
    }
    if needs_key:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"key": []}]
    return document
