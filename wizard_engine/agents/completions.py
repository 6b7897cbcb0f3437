"""What an OpenAI-compatible endpoint answers: every field of a reply is understood or named."""

import json
import re
from dataclasses import dataclass
from typing import Any

# How endpoints name an answer that ended by itself, one that was cut, and one that has no text to use.
ENDED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "done"})
CUT = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
FILTERED = frozenset({"content_filter", "content-filter", "safety", "recitation", "sensitive"})
TOOLS = frozenset({"tool_calls", "tool_call", "function_call", "tool_use"})
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
# Fields of a message and of a choice that are read; others with a value are named.
MESSAGE_FIELDS = frozenset({"role", "content", "refusal", "tool_calls", "function_call", *REASONING})
CHOICE_FIELDS = frozenset({"index", "message", "finish_reason", "logprobs", "stop_reason", "token_ids", "matched_stop"})
# Tokens of one call, at most: a usage beyond is a mistake of the endpoint, and would end a budget or a ledger.
MAX_USAGE = 1_000_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Answer:
    """A reply of an endpoint as it was read.

    Attributes:
        text: of the answer, without the model's reasoning.   reasoning: that, where the endpoint gives it.
        finish: "stop" or "length".
        error: why there is no text, as of Reply; "" where there is one.
        is_temporary: whether the same call may be answered the next time.
        extras: names of what the reply holds beside its text.
    """

    text: str = ""
    finish: str = "stop"
    error: str = ""
    is_temporary: bool = False
    extras: tuple[str, ...] = ()
    reasoning: str = ""


def read_body(content_type: str, body: bytes) -> Any:
    """The JSON value of an answer's body, or an Answer that says why it is none."""
    text = body.decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    if "event-stream" in content_type or text.startswith("data:"):
        return Answer(error="stream: a stream of events came, and none was asked for")
    try:
        # A stray byte is no character: a replacement for it would stand in rows.
        return json.loads(body.decode().lstrip("\ufeff \r\n\t"))
    except UnicodeDecodeError:
        kind = "HTML" if text[:1] == "<" else "text that is no UTF-8"
    except (ValueError, RecursionError):
        # A ValueError of another kind: an integer with more digits than Python reads.
        kind = "HTML" if text[:1] == "<" else "text that is no JSON" if text else "an empty body"
    return Answer(error=f"no answer: {kind} came with status 200", is_temporary=True)


def read_usage(answer: Any) -> tuple[int, int] | None:
    """Tokens of the prompt and of the reply by an answer's usage; None where it does not give both as sound numbers."""
    usage = _get(answer, "usage")
    tokens = [_get(usage, f"{name}_tokens") for name in ("prompt", "completion")]
    is_sound = all(type(number) is int and 0 <= number <= MAX_USAGE for number in tokens)
    return (tokens[0], tokens[1]) if is_sound else None


def read_answer(answer: Any, limit: int) -> Answer:
    """The text of a chat completion, or the reason why it has none.

    Args:
        answer: JSON object with `choices`, or anything that an endpoint sent instead.
        limit: of the reply's tokens, for the message of one that was cut.
    """
    choices = _get(answer, "choices")
    message = _get(choices[0], "message") if isinstance(choices, list) and choices else None
    if message is None:
        fault = _get(answer, "error")
        if fault:
            return Answer(error=f"error object: {str(_get(fault, 'message') or fault)[:200]}", is_temporary=True)
        return Answer(error="no text: an answer without a message", is_temporary=True)
    text, parts = _content(_get(message, "content"))
    text, thought = _split_reasoning(None if text is None else _joined(text))
    extras = (*_extras(choices, message), *parts, *(("<think>",) if thought else ()))
    finish = str(_get(choices[0], "finish_reason") or "stop")
    error, is_temporary = _fault(message, finish.lower(), text, extras, limit)
    if error:
        return Answer(error=error, is_temporary=is_temporary, extras=extras)
    ending = "length" if finish.lower() in CUT else "stop"
    return Answer(text.strip(), ending, extras=extras, reasoning=_writable(thought or _reasoning(message)))


def _get(item: Any, name: str) -> Any:
    """A field of a JSON object; None for any other value."""
    return item.get(name) if isinstance(item, dict) else None


def _joined(text: str) -> str:
    """The text with surrogate pairs as the characters that they are; a half of one stays."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _writable(text: str) -> str:
    """The text with every half of a surrogate pair replaced: no file can hold it."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _split_reasoning(text: str | None) -> tuple[str | None, str]:
    """The answer, and the reasoning that a model wrote in front of it between `<think>` and `</think>`.

    Some servers send the end of it alone. Reasoning without an end leaves no answer.
    """
    if text is None:
        return None, ""
    before, end, after = text.partition("</think>")
    is_opened = before.lstrip().startswith("<think>")
    # An answer may speak of the mark; one that ends reasoning has a line of its own.
    is_mark = before[-1:] in ("", "\n") and after[:1] in ("", "\n")
    if end and (is_opened or (is_mark and "<think>" not in before)):
        return after, before.lstrip().removeprefix("<think>").strip()
    return ("", before) if is_opened else (text, "")


def _reasoning(message: Any) -> str:
    """The reasoning that a message gives apart from its content, as text."""
    for name in REASONING:
        value = _get(message, name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, list):
            texts = [_get(part, "text") or _get(part, "thinking") or "" for part in value]
            if any(isinstance(text, str) and text for text in texts):
                return "".join(text for text in texts if isinstance(text, str)).strip()
    return ""


def _fault(message: Any, finish: str, text: str | None, extras: tuple[str, ...], limit: int) -> tuple[str, bool]:
    """Why a message is no answer, "" where it is one, and whether another try may give one."""
    refusal = _get(message, "refusal")
    if refusal:
        return f"refusal: {refusal}", False
    if finish in FILTERED:
        return f"content_filter: the endpoint withheld the answer (finish_reason {finish!r})", False
    if finish in TOOLS or "tool_calls" in extras:
        return "tool_calls: the reply calls a tool and none was offered", False
    if finish in CUT and not (text and text.strip()):
        spent = " on reasoning" if {*REASONING, "<think>"} & set(extras) else ""
        return f"length: all of max_tokens={limit} was spent{spent} before the answer began", False
    if finish not in ENDED | CUT:
        return f"finish_reason {finish}: expected stop or length", True
    if text is None or not text.strip():
        # A blank text is what this request gets each time; without the field something went wrong on the way.
        return f"no text: an answer with {', '.join(extras) or 'nothing in it'}", text is None
    if not text.isascii() and _SURROGATE.search(text):
        return "invalid text: an answer with half of a surrogate pair, which UTF-8 cannot write", False
    return "", False


def _content(content: Any) -> tuple[str | None, list[str]]:
    """The text of a message's content, also of a list of parts; and the kinds of parts that are no text."""
    if isinstance(content, str) or content is None:
        return content, []
    if not isinstance(content, list):
        return None, [f"content of type {type(content).__name__}"]
    texts, others = [], []
    for part in content:
        kind, text = _get(part, "type"), _get(part, "text")
        if kind in ("text", "output_text") and isinstance(text, str):
            texts.append(text)
        else:
            others.append(f"content part {kind}")
    return "".join(texts) if texts else None, sorted(set(others))


def _extras(choices: list, message: Any) -> tuple[str, ...]:
    """Names of the fields with a value that are not the answer's text, reasoning among them."""
    said = {name for name, value in _fields(message).items() if value}
    names = [name for name in REASONING if name in said]
    names += ["tool_calls"] if {"tool_calls", "function_call"} & said else []
    names += sorted(name for name in said - MESSAGE_FIELDS)
    names += sorted(name for name, value in _fields(choices[0]).items() if value and name not in CHOICE_FIELDS)
    return (*names, *(["more than one choice"] if len(choices) > 1 else []))


def _fields(item: Any) -> dict[str, Any]:
    return item if isinstance(item, dict) else {}


# Statuses that say nothing of the single request: key, address, payment, method.
ENDPOINT_STATUSES = {
    401: "refuses the key",
    402: "wants a payment",
    403: "refuses the key",
    404: "does not know the model or the address",
    405: "does not take such calls at this address",
    410: "is gone",
    501: "cannot do this",
}
_REFUSED = re.compile(
    r"unsupported|not support(?:ed)?|unknown|unrecogni[sz]ed|not permitted|not allowed|extra.?(?:inputs|forbidden)"
    r"|unexpected|does not exist|not found|invalid.model|deprecated",
    re.IGNORECASE,
)


def wrong_endpoint(status: int, message: str, body: Any, sent: frozenset[str] | set[str]) -> str:
    """Why every call would be refused as this one was: key, address, model, an option; "" where it is this request.

    Args:
        status, message, body: of the refusal.   sent: names of the options that every request carries.
    """
    details = body.get("error", body) if isinstance(body, dict) else {}
    details = details if isinstance(details, dict) else {}
    if status in ENDPOINT_STATUSES:
        return ENDPOINT_STATUSES[status]
    if status == 429:
        spent = "insufficient_quota" in (details.get("code"), details.get("type"))
        return "says that the quota is spent" if spent else ""
    if status not in (400, 422) or not _REFUSED.search(f"{details.get('code')} {message}"):
        return ""
    param = details.get("param")
    options = [param] if param in sent else [name for name in sorted(sent) if re.search(rf"\b{name}\b", message)]
    if not options:
        return ""
    advice = {
        "max_tokens": "; give #token_limit=max_completion_tokens",
        "max_completion_tokens": "; give #token_limit=max_tokens",
        "temperature": "; give #temperature=no",
        "seed": "; give #seed=no",
    }
    return f"refuses the option {options[0]}{advice.get(options[0], '')}"
