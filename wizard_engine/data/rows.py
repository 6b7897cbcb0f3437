"""The three kinds of training row: content hash, JSON form and validity rules."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Message(NamedTuple):
    """One turn: role is "system", "user" or "assistant"; content is plain text."""

    role: str
    content: str


def content_id(content: Any) -> str:
    """First 16 hex digits of the SHA-256 of `content` written as canonical JSON."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def messages_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a list of {"role", "content"} objects."""
    return [{"role": message.role, "content": message.content} for message in messages]


def last_content(messages: Sequence[Message], role: str) -> str:
    """Content of the last message of `role`; "" where there is none."""
    return next((message.content for message in reversed(messages) if message.role == role), "")


class _Row:
    """Base of the kinds of row: identity by content, changed copies, JSON."""

    attributes: dict[str, Any]
    lineage: dict[str, Any]

    def content(self) -> dict[str, Any]:
        """JSON of the row's text, without attributes and lineage."""
        raise NotImplementedError

    @cached_property
    def id(self) -> str:
        """Hash of `content`, 16 hex digits; attributes and lineage do not change it."""
        return content_id(self.content())

    def replace(self, **changes: Any) -> Self:
        """Copy of the row with changed fields."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """JSON object of the row: id, content, attributes, lineage."""
        return {"id": self.id, **self.content(), "attributes": self.attributes, "lineage": self.lineage}


@dataclass(frozen=True)
class Conversation(_Row):
    """A supervised row: an optional system message, then user and assistant turns that alternate.

    weights: loss weight of each assistant turn, 0 or 1, in order; () trains all of them.
    """

    messages: tuple[Message, ...]
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    lineage: dict[str, Any] = field(default_factory=dict, hash=False)
    weights: tuple[int, ...] = ()

    def content(self) -> dict[str, Any]:
        messages = messages_json(self.messages)
        for message, weight in zip((m for m in messages if m["role"] == "assistant"), self.weights):
            message["weight"] = weight
        return {"messages": messages}

    @property
    def instruction(self) -> str:
        """Text of the last user turn."""
        return last_content(self.messages, "user")

    @property
    def answer(self) -> str:
        """Text of the last assistant turn."""
        return last_content(self.messages, "assistant")


@dataclass(frozen=True)
class Preference(_Row):
    """Two answers to one prompt, or, with an empty prompt, two instructions of which `chosen` is the better."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    lineage: dict[str, Any] = field(default_factory=dict, hash=False)

    def content(self) -> dict[str, Any]:
        return {"prompt": messages_json(self.prompt), "chosen": self.chosen, "rejected": self.rejected}

    @property
    def instruction(self) -> str:
        """Text of the last user turn; "" for a ranking of instructions."""
        return last_content(self.prompt, "user")

    @property
    def answer(self) -> str:
        """The chosen answer."""
        return self.chosen


@dataclass(frozen=True)
class Process(_Row):
    """An answer in steps with a label each: 1 right, 0 neutral, -1 wrong."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    lineage: dict[str, Any] = field(default_factory=dict, hash=False)

    def content(self) -> dict[str, Any]:
        return {"prompt": messages_json(self.prompt), "steps": list(self.steps), "labels": list(self.labels)}

    @property
    def instruction(self) -> str:
        """Text of the last user turn."""
        return last_content(self.prompt, "user")

    @property
    def answer(self) -> str:
        """The steps, one a line."""
        return "\n".join(self.steps)


Row = Conversation | Preference | Process


def row_to_line(row: Row) -> list[Any]:
    """A row as a JSON value that `row_from_line` makes the row of again; shorter than `to_json`, and not for users."""
    match row:
        case Conversation():
            return ["conversation", row.messages, row.attributes, row.lineage, row.weights]
        case Preference():
            return ["preference", row.prompt, row.chosen, row.rejected, row.attributes, row.lineage]
        case Process():
            return ["process", row.prompt, row.steps, row.labels, row.attributes, row.lineage]


def row_from_line(value: list[Any]) -> Row:
    """The row of a value of `row_to_line`."""
    kind, messages, *rest = value
    turns = tuple(Message(*message) for message in messages)
    if kind == "conversation":
        attributes, lineage, weights = rest
        return Conversation(turns, attributes, lineage, tuple(weights))
    if kind == "preference":
        return Preference(turns, *rest)
    steps, labels, attributes, lineage = rest
    return Process(turns, tuple(steps), tuple(labels), attributes, lineage)


KINDS: dict[str, type[_Row]] = {"conversation": Conversation, "preference": Preference, "process": Process}


def conversation(instruction: str, answer: str, **attributes: Any) -> Conversation:
    """Conversation of one user turn and one assistant turn."""
    return Conversation((Message("user", instruction), Message("assistant", answer)), attributes)


def kept_weights(row: Conversation, messages: Sequence[Message]) -> tuple[int, ...]:
    """Loss weights for the answers of `messages`, made from a row: the row's for an answer that it has too, else 1."""
    if not row.weights:
        return ()
    former = [message.content for message in row.messages if message.role == "assistant"]
    answers = [message.content for message in messages if message.role == "assistant"]
    same = [index < len(former) and answer == former[index] for index, answer in enumerate(answers)]
    return tuple(row.weights[index] if same[index] else 1 for index in range(len(answers)))


def texts_of(row: Row) -> list[str]:
    """Every text of a row in order: each turn, and the answers of a pair or the steps."""
    if isinstance(row, Conversation):
        return [message.content for message in row.messages]
    prompt = [message.content for message in row.prompt]
    return prompt + ([row.chosen, row.rejected] if isinstance(row, Preference) else [row.answer])


def user_text(row: Row) -> str:
    """All user turns of a row, a line each; for a ranking of instructions both of them."""
    messages = row.messages if isinstance(row, Conversation) else row.prompt
    turns = [message.content for message in messages if message.role == "user"]
    return "\n".join(turns if turns or not isinstance(row, Preference) else (row.chosen, row.rejected))


def brief(value: Any, length: int = 60) -> str:
    """repr of a value, shortened, for error messages."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def check_text(text: Any, name: str, *, blank: bool = False) -> None:
    """Raises ValueError unless `text` is valid Unicode text, and not blank unless `blank`."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, got {type(text).__name__} {brief(text)}")
    if not blank and not text.strip():
        raise ValueError(f"{name}: expected text, got {brief(text)}")
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError(f"{name}: expected valid Unicode, got a lone surrogate in {brief(text)}")


def check_messages(messages: Sequence[Message], name: str, *, last: str) -> None:
    """Raises ValueError unless the roles are [system] user assistant user ... and end with `last`, none blank."""
    offset = 1 if messages and messages[0].role == "system" else 0
    if len(messages) == offset:
        raise ValueError(f"{name}: expected a user turn, got {len(messages)} messages")
    for index, message in enumerate(messages):
        expected = "system" if index < offset else ROLES[1 + (index - offset) % 2]
        if message.role != expected:
            raise ValueError(f"{name}[{index}].role: expected {expected!r}, got {message.role!r}")
        check_text(message.content, f"{name}[{index}].content", blank=message.role == "system")
    if messages[-1].role != last:
        raise ValueError(f"{name}: expected the last turn to be {last!r}, got {messages[-1].role!r}")


def check_row(row: Row) -> None:
    """Validates a row.

    Raises:
        ValueError: `field: expected X, got Y`, for roles out of order, blank turns, labels that do not fit the steps,
            attributes or lineage that are no objects.
    """
    if isinstance(row, Conversation):
        check_messages(row.messages, "messages", last="assistant")
        if row.weights:
            check_weights(row)
    elif isinstance(row, Preference):
        check_preference(row)
    else:
        check_process(row)
    for name in ("attributes", "lineage"):
        if not isinstance(getattr(row, name), dict):
            raise ValueError(f"{name}: expected an object, got {brief(getattr(row, name))}")


def check_weights(row: Conversation) -> None:
    """Raises ValueError unless every assistant turn has a weight of 0 or 1."""
    answers = sum(message.role == "assistant" for message in row.messages)
    if len(row.weights) != answers or not all(weight in (0, 1) for weight in row.weights):
        raise ValueError(f"weights: expected {answers} of 0 or 1, one for each answer, got {brief(row.weights)}")


def check_preference(row: Preference) -> None:
    """Raises ValueError unless the prompt ends with a user turn (or is empty) and the two answers differ."""
    if row.prompt:
        check_messages(row.prompt, "prompt", last="user")
    check_text(row.chosen, "chosen")
    check_text(row.rejected, "rejected", blank=True)
    if row.chosen == row.rejected:
        raise ValueError(f"rejected: expected a text other than chosen, got {brief(row.rejected)} in both")


def check_process(row: Process) -> None:
    """Raises ValueError unless the prompt ends with a user turn and every step has a label of 1, 0 or -1."""
    check_messages(row.prompt, "prompt", last="user")
    if not row.steps:
        raise ValueError("steps: expected at least one step, got none")
    for index, step in enumerate(row.steps):
        check_text(step, f"steps[{index}]")
    if len(row.labels) != len(row.steps):
        raise ValueError(f"labels: expected {len(row.steps)}, one per step, got {len(row.labels)}")
    for index, label in enumerate(row.labels):
        if type(label) is not int or label not in (1, 0, -1):
            raise ValueError(f"labels[{index}]: expected 1, 0 or -1, got {brief(label)}")
