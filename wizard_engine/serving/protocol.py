"""Fields of requests to the OpenAI-compatible server: one table for validation and for the schema."""

import difflib
import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS, MAX_BIASES = 16, 256, 20, 1024
MAX_SEED = 2**63 - 1


class _FirstEntries(reprlib.Repr):
    """Short texts of values, in a time that does not depend on their size."""

    def repr_dict(self, value: dict, level: int) -> str:
        """Of a mapping the first entries: the library sorts all of them."""
        return super().repr_dict(dict(itertools.islice(value.items(), self.maxdict + 1)), level)


_REPR = _FirstEntries()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


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
    # Of a list of a million ids only the first are written.
    text = _REPR.repr(got)
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


def _neutral(hint: str, *values: Any) -> dict[str, Any]:
    """A field of which only values without an effect are accepted; `hint` says why."""
    return {"enum": [*values, None], "x-hint": hint}


_NO_TOOLS = "the chat format of this server has no tools"
_TEXT_ONLY = "images, audio and files are not served, text is"
_ANYTHING = {"type": ["object", "string", "null"]}
_TEXT_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["type", "text"],
        "properties": {
            "type": {"enum": ["text"], "x-hint": _TEXT_ONLY},
            "text": {"type": "string"},
            "cache_control": _ANYTHING,
            "annotations": _neutral("annotations are not served", []),
        },
    },
}
# Every field of the messages that this server sends, and of those that clients make of them.
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 4096,
    "items": {
        "type": "object",
        "required": ["role"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"], "x-hint": _NO_TOOLS},
            "content": {"anyOf": [{"type": "string"}, _TEXT_PARTS, {"type": "null"}]},
            "name": {"type": ["string", "null"]},
            "refusal": _neutral("the chat format of this server has no refusals", ""),
            "tool_calls": _neutral(_NO_TOOLS, []),
            "tool_call_id": _neutral(_NO_TOOLS),
            "function_call": _neutral(_NO_TOOLS),
            "audio": _neutral(_TEXT_ONLY),
            "annotations": _neutral("annotations are not served", []),
            "reasoning": _neutral("the chat format of this server has no reasoning", ""),
            "reasoning_content": _neutral("the chat format of this server has no reasoning", ""),
            "parsed": _neutral("the chat format of this server has text only"),
            "cache_control": _ANYTHING,
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
    "properties": {
        "include_usage": _FLAG,
        "include_obfuscation": _FLAG,
        "continuous_usage_stats": _neutral("usage comes with the last chunk", False),
    },
}
_BIAS = {
    "type": ["object", "null"],
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_LABEL = {"type": ["string", "null"]}


def _without_effect() -> dict[str, Field]:
    """Fields of both kinds of request that change nothing here, and values of others that change nothing."""
    unknown_sampling = "this server does not sample that way"
    return {
        "user": Field(_LABEL),
        "safety_identifier": Field(_LABEL),
        "prompt_cache_key": Field(_LABEL),
        "prompt_cache_retention": Field(_LABEL),
        "service_tier": Field(_LABEL),
        "metadata": Field({"type": ["object", "null"]}),
        "store": Field(_FLAG),
        "cache_control": Field(_ANYTHING),
        "priority": Field(_neutral("requests are served in the order of their arrival", 0)),
        "prompt_logprobs": Field(_neutral("use `echo` with `logprobs` of /v1/completions")),
        "truncate_prompt_tokens": Field(_neutral("prompts are not truncated")),
        "min_p": Field(_neutral(unknown_sampling, 0)),
        "typical_p": Field(_neutral(unknown_sampling, 1)),
        "repetition_penalty": Field(_neutral(unknown_sampling, 1)),
        "length_penalty": Field(_neutral(unknown_sampling, 1)),
        "use_beam_search": Field(_neutral(unknown_sampling, False)),
        "min_tokens": Field(_neutral(unknown_sampling, 0)),
        "early_stopping": Field(_neutral(unknown_sampling, False)),
        "ignore_eos": Field(_neutral(unknown_sampling, False)),
        "stop_token_ids": Field(_neutral("name texts in `stop`", [])),
        "include_stop_str_in_output": Field(_neutral("an answer ends before a stop string", False)),
        "skip_special_tokens": Field(_neutral("special tokens have no text", True)),
        "spaces_between_special_tokens": Field(_neutral("special tokens have no text", True, False)),
    }


def _shared(choices: int) -> dict[str, Field]:
    """Fields of both kinds of request."""
    return {
        "model": Field({"type": "string"}, required=True),
        "temperature": Field(_number(0, 10)),
        "top_p": Field({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1}),
        "top_k": Field(_number(-1, 2**31 - 1, "integer")),
        "n": Field(_number(1, choices, "integer")),
        "stop": Field(_STOP),
        "seed": Field(_number(-MAX_SEED - 1, MAX_SEED, "integer")),
        "stream": Field(_FLAG),
        "stream_options": Field(_STREAM_OPTIONS),
        "presence_penalty": Field(_number(-2, 2)),
        "frequency_penalty": Field(_number(-2, 2)),
        "logit_bias": Field(_BIAS),
    } | _without_effect()


def chat_fields(most: int, choices: int) -> dict[str, Field]:
    """Fields of /v1/chat/completions.

    Args:
        most: new tokens of a choice.   choices: of a request.
    """
    return _shared(choices) | {
        "messages": Field(MESSAGES, required=True),
        "max_tokens": Field(_number(1, most, "integer")),
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
        "tools": Field(_neutral(_NO_TOOLS, [])),
        "tool_choice": Field(_neutral(_NO_TOOLS, "none", "auto")),
        "parallel_tool_calls": Field(_FLAG),
        "functions": Field(_neutral(_NO_TOOLS, [])),
        "function_call": Field(_neutral(_NO_TOOLS, "none", "auto")),
        "modalities": Field(_neutral(_TEXT_ONLY, ["text"])),
        "audio": Field(_neutral(_TEXT_ONLY)),
        "moderation": Field(_neutral("moderation is not served")),
        "prediction": Field(_neutral("predicted outputs are not served")),
        "prompt_cache_options": Field({"type": ["object", "null"]}),
        "reasoning_effort": Field(_neutral("the chat format of this server has no reasoning", "none")),
        "verbosity": Field(_neutral("this server knows no verbosity", "medium")),
        "web_search_options": Field(_neutral("this server does not search")),
        "best_of": Field(_number(1, choices, "integer")),
        "echo": Field(_neutral("echo is a field of /v1/completions", False)),
        "add_generation_prompt": Field(_neutral("every request asks for an answer", True)),
        "continue_final_message": Field(_FLAG),
        "chat_template_kwargs": Field(_neutral("the chat format of this server has no options", {})),
    }


def completion_fields(most: int, choices: int, vocab_size: int, context: int) -> dict[str, Field]:
    """Fields of /v1/completions.

    Args:
        most: new tokens of a choice.   choices: of a request.   context: most tokens of a prompt.
    """
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    ids = {"type": "array", "minItems": 1, "maxItems": context, "items": token, "x-code": "context_length_exceeded"}
    several = {"type": "array", "minItems": 1, "maxItems": choices}
    prompts = [{"type": "string"}, ids, several | {"items": {"type": "string"}}, several | {"items": ids}]
    no_logprobs = {"type": "boolean", "const": False}
    return _shared(choices) | {
        "prompt": Field({"anyOf": prompts}, required=True),
        "max_tokens": Field(_number(0, most, "integer")),
        "logprobs": Field({"anyOf": [_bounded_integer(0, MAX_TOP_LOGPROBS), {"type": "null"}, no_logprobs]}),
        "echo": Field(_FLAG),
        "suffix": Field(_neutral("text is continued, not filled in", "")),
        "best_of": Field(_number(1, choices, "integer")),
    }


def _bounded_integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


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
            near = difflib.get_close_matches(name[:80], fields, n=1)
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
    try:
        _fit(value, schema, path)
    except RequestError as error:
        # Of nested schemas the innermost hint stays.
        if schema.get("x-hint") and error.param == path:
            error.message += f"; {schema['x-hint']}"
        if isinstance(value, list) and len(value) > schema.get("maxItems", len(value)):
            error.code = schema.get("x-code")
        raise


def _fit(value: Any, schema: Mapping[str, Any], path: str) -> None:
    if "anyOf" in schema:
        return _fit_any(value, schema["anyOf"], path)
    if "const" in schema and not _equal(value, schema["const"]):
        raise wrong(path, repr(schema["const"]), value)
    if "enum" in schema and not any(_equal(value, known) for known in schema["enum"]):
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


def _equal(value: Any, known: Any) -> bool:
    """Equality of JSON values: 0 is 0.0, but not false."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


def _fit_number(value: float, schema: Mapping[str, Any], path: str) -> None:
    low, high, above = (schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum"))
    fits = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not fits:
        bounds = f"above {above}, at most {high}" if above is not None else f"{low} to {high}"
        raise wrong(path, bounds, value)


def _fit_array(value: list, schema: Mapping[str, Any], path: str) -> None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise wrong(path, f"{schema.get('minItems', 0)} to {schema.get('maxItems', 'any number of')} items", value)
    items = schema.get("items", {})
    are_ids = items.get("type") == "integer" and set(map(type, value)) == {int}
    # Ids of a prompt may be many.
    if are_ids and items["minimum"] <= min(value) and max(value) <= items["maximum"]:
        return
    for index, item in enumerate(value):
        fit(item, items, f"{path}[{index}]")


def _fit_object(value: dict, schema: Mapping[str, Any], path: str) -> None:
    properties = schema.get("properties", {})
    if len(value) > schema.get("maxProperties", len(value)):
        raise wrong(path, f"at most {schema['maxProperties']} entries", value)
    if "type" in properties and "type" in value:
        # What kind of object it is comes before what it has.
        fit(value["type"], properties["type"], f"{path}.type")
    others = schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            raise RequestError(
                400, f"{path}.{name}: expected one, got none", param=f"{path}.{name}", code="missing_field"
            )
    for name, item in value.items():
        if name in properties:
            fit(item, properties[name], f"{path}.{name}")
        elif isinstance(others, Mapping):
            fit(item, others, f"{path}.{name[:80]}")
        elif others is False:
            raise RequestError(
                400, f"{path}.{name[:80]}: unknown field", param=f"{path}.{name[:80]}", code="unknown_field"
            )
