"""Fields of requests to the OpenAI-compatible server: one table for validation and for the schema."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 16, 256, 20
MAX_SEED = 2**63 - 1


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.   message: text for users.   param: the field.   code: error code.   headers: of the
        answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object of the OpenAI API."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, expected: str, got: Any) -> RequestError:
    """The refusal (400) of a field's value."""
    text = repr(got)
    return RequestError(
        400, f"{param}: expected {expected}, got {text if len(text) <= 80 else text[:77] + '...'}", param=param
    )


@dataclass(frozen=True)
class Field:
    """One field of a request, by its JSON schema."""

    schema: Mapping[str, Any]
    required: bool = False


def _number(low: float, high: float, kind: str = "number", **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "minimum": low, "maximum": high, **more}


_TEXT_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 4096,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, _TEXT_PARTS]},
            "name": {"type": "string"},
        },
    },
}
_STOP = {
    "anyOf": [
        {"type": "null"},
        {"type": "string", "maxLength": MAX_STOP_LENGTH},
        {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "maxLength": MAX_STOP_LENGTH}},
    ]
}
_FLAG = {"type": ["boolean", "null"]}
_STREAM_OPTIONS = {
    "type": ["object", "null"],
    "additionalProperties": False,
    "properties": {"include_usage": {"type": "boolean"}, "include_obfuscation": {"type": "boolean"}},
}


def _shared(most: int, choices: int) -> dict[str, Field]:
    """Fields of both kinds of request."""
    return {
        "model": Field({"type": "string"}, required=True),
        "temperature": Field(_number(0, 10)),
        "top_p": Field({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}),
        "top_k": Field(_number(0, 2**31 - 1, "integer")),
        "n": Field(_number(1, choices, "integer")),
        "max_tokens": Field(_number(1, most, "integer")),
        "stop": Field(_STOP),
        "seed": Field(_number(-MAX_SEED - 1, MAX_SEED, "integer")),
        "stream": Field(_FLAG),
        "stream_options": Field(_STREAM_OPTIONS),
        "user": Field({"type": ["string", "null"]}),
        "presence_penalty": Field({"enum": [0, None]}),
        "frequency_penalty": Field({"enum": [0, None]}),
        "logit_bias": Field({"type": ["object", "null"], "maxProperties": 0}),
    }


def chat_fields(most: int, choices: int) -> dict[str, Field]:
    """Fields of /v1/chat/completions.

    Args:
        most: new tokens of a choice.   choices: of a request.
    """
    return _shared(most, choices) | {
        "messages": Field(MESSAGES, required=True),
        "max_completion_tokens": Field(_number(1, most, "integer")),
        "logprobs": Field(_FLAG),
        "top_logprobs": Field(_number(0, MAX_TOP_LOGPROBS, "integer")),
        "response_format": Field(
            {
                "type": ["object", "null"],
                "properties": {"type": {"const": "text"}},
                "required": ["type"],
                "additionalProperties": False,
            }
        ),
        "tools": Field({"type": ["array", "null"], "maxItems": 0}),
        "store": Field({"enum": [False, None]}),
        "metadata": Field({"type": ["object", "null"]}),
    }


def completion_fields(most: int, choices: int, words: int) -> dict[str, Field]:
    """Fields of /v1/completions; `words`: of the vocabulary."""
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": words - 1}}
    prompts = [{"type": "string"}, ids, {"type": "array", "minItems": 1, "items": {"type": "string"}}]
    return _shared(most, choices) | {
        "prompt": Field({"anyOf": [*prompts, {"type": "array", "minItems": 1, "items": ids}]}, required=True),
        "logprobs": Field(_number(0, 5, "integer")),
        "echo": Field({"enum": [False, None]}),
        "suffix": Field({"enum": ["", None]}),
    }


def schema_of(fields: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a request."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, field in fields.items() if field.required],
        "properties": {name: dict(field.schema) for name, field in fields.items()},
    }


def checked(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a request that are present and not null.

    Raises:
        RequestError: 400, with the field that does not match its schema or is unknown.
    """
    if not isinstance(body, dict):
        raise wrong("body", "a JSON object", body)
    for name in body:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise RequestError(400, f"{name[:80]}: unknown field{hint}", param=name[:80], code="unknown_field")
    for name, field in fields.items():
        if name in body:
            fit(body[name], field.schema, name)
        elif field.required:
            raise RequestError(400, f"{name}: expected one, got none", param=name, code="missing_field")
    return {name: value for name, value in body.items() if value is not None}


_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES[kind])


def fit(value: Any, schema: Mapping[str, Any], path: str) -> None:
    """Raises RequestError unless a value matches a schema. Supports the keywords of the tables above."""
    if "anyOf" in schema:
        return _fit_any(value, schema["anyOf"], path)
    if "const" in schema and value != schema["const"]:
        raise wrong(path, repr(schema["const"]), value)
    if "enum" in schema and not any(value == known and _same_kind(value, known) for known in schema["enum"]):
        raise wrong(path, " or ".join("null" if x is None else repr(x) for x in schema["enum"]), value)
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is(value, kind) for kind in kinds):
            raise wrong(path, " or ".join(kinds), value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _fit_number(value, schema, path)
    elif isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
        raise wrong(path, f"at most {schema['maxLength']} characters", value)
    elif isinstance(value, list):
        _fit_array(value, schema, path)
    elif isinstance(value, dict):
        _fit_object(value, schema, path)


def _fit_any(value: Any, options: Sequence[Mapping[str, Any]], path: str) -> None:
    """Matches one of several schemas; the error is that of the schema with the right type that matches furthest."""
    same = [option for option in options if _is(value, option["type"])]
    if not same:
        raise wrong(path, " or ".join(dict.fromkeys(option["type"] for option in options)), value)
    errors: list[RequestError] = []
    for option in same:
        try:
            return fit(value, option, path)
        except RequestError as error:
            errors.append(error)
    raise max(errors, key=lambda error: len(error.param or ""))


def _same_kind(value: Any, known: Any) -> bool:
    return isinstance(value, bool) == isinstance(known, bool)


def _fit_number(value: float, schema: Mapping[str, Any], path: str) -> None:
    low, high, above = (schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum"))
    fits = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not fits:
        bounds = f"above {above}, at most {high}" if above is not None else f"{low} to {high}"
        raise wrong(path, bounds, value)


def _fit_array(value: list, schema: Mapping[str, Any], path: str) -> None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise wrong(path, f"{schema.get('minItems', 0)} to {schema.get('maxItems', 'any number of')} items", value)
    for index, item in enumerate(value):
        fit(item, schema.get("items", {}), f"{path}[{index}]")


def _fit_object(value: dict, schema: Mapping[str, Any], path: str) -> None:
    properties = schema.get("properties", {})
    if len(value) > schema.get("maxProperties", len(value)):
        raise wrong(path, "an empty object", value)
    for name in schema.get("required", ()):
        if name not in value:
            raise RequestError(
                400, f"{path}.{name}: expected one, got none", param=f"{path}.{name}", code="missing_field"
            )
    for name, item in value.items():
        if name in properties:
            fit(item, properties[name], f"{path}.{name}")
        elif schema.get("additionalProperties", True) is False:
            raise RequestError(
                400, f"{path}.{name[:80]}: unknown field", param=f"{path}.{name[:80]}", code="unknown_field"
            )
