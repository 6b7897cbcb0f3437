"""Turns of a conversation as the formats write them: {"role", "content"} or {"from", "value"}."""

from typing import Any, NamedTuple

from .row_fields import SYSTEM_COLUMNS, FieldReader, expect, field, says_nothing
from .rows import Message, brief

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
# Turns of tools, which the chat format cannot say; with the policy "count" they are read as these.
TOOL_ROLES = {"observation": "user", "tool": "user", "function": "user", "function_call": "assistant"}
_PLAIN = {"role", "content"}, {"from", "value"}


class Turns(NamedTuple):
    """Messages, and the weight that each states for the loss (None where it states none)."""

    messages: tuple[Message, ...]
    weights: tuple[int | None, ...]

    @property
    def answer_weights(self) -> tuple[int, ...]:
        """Loss weight of every assistant turn, 1 where none is stated; () where all are 1."""
        stated = [weight for message, weight in zip(self.messages, self.weights) if message.role == "assistant"]
        return tuple(1 if weight is None else weight for weight in stated) if 0 in stated else ()

    def joined(self, other: "Turns") -> "Turns":
        """These turns, then the others."""
        return Turns(self.messages + other.messages, self.weights + other.weights)


def read_turns(value: Any, name: str, reader: FieldReader) -> Turns:
    """Turns of a list of objects; a plain text is one user turn.

    Raises:
        ValueError: `name[index].field: ...` for a turn that is none, a role that is none, or a field without a place.
    """
    if isinstance(value, str):
        return Turns((Message("user", value),), (None,))
    messages, weights = [], []
    for index, turn in enumerate(expect(value, list, name)):
        message, weight = read_turn(turn, f"{name}[{index}]", reader)
        messages.append(message)
        weights.append(weight)
    return Turns(tuple(messages), tuple(weights))


def read_turn(turn: Any, where: str, reader: FieldReader) -> tuple[Message, int | None]:
    """The message of one turn, and the loss weight that it states."""
    turn = expect(turn, dict, where)
    role_key, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    role = _role(field(turn, role_key, str, where + "."), f"{where}.{role_key}", reader)
    message = Message(role, _text(turn, text_key, where, reader))
    if turn.keys() in _PLAIN:
        return message, None
    weight = None
    for key, item in turn.items():
        if key in (role_key, text_key) or says_nothing(item):
            continue
        if key == "weight":
            weight = _weight(item, role, where, reader)
        else:
            reader.refuse(f"{where}.{key}", item, "a turn has role, content and weight")
    return message, weight


def _role(role: str, where: str, reader: FieldReader) -> str:
    if role in ROLES:
        return ROLES[role]
    if role not in TOOL_ROLES:
        raise ValueError(f"{where}: expected one of {', '.join(ROLES)}, got {brief(role)}")
    reader.refuse(where, role, "the chat format has no tools")
    return TOOL_ROLES[role]


def _text(turn: dict, key: str, where: str, reader: FieldReader) -> str:
    """Content of a turn: a text, or a list of text parts, which are joined."""
    if not isinstance(turn.get(key), list):
        return field(turn, key, str, where + ".")
    texts = []
    for index, part in enumerate(turn[key]):
        place = f"{where}.{key}[{index}]"
        kind = field(expect(part, dict, place), "type", str, place + ".")
        if kind != "text":
            reader.refuse(place, part, "content is text")
            continue
        texts.append(field(part, "text", str, place + "."))
        for name, item in part.items():
            if name not in ("type", "text") and not says_nothing(item):
                reader.refuse(f"{place}.{name}", item, "a part has type and text")
    return "".join(texts)


def _weight(value: Any, role: str, where: str, reader: FieldReader) -> int | None:
    """Loss weight 0 or 1 of a turn; a user's or system turn is never trained."""
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"{where}.weight: expected 0 or 1, got {brief(value)}")
    if value and role != "assistant":
        reader.refuse(f"{where}.weight", value, f"a {role} turn is never trained")
        return None
    return int(value)


def with_system(turns: Turns, record: dict) -> Turns:
    """The turns behind the record's system column, if it has one.

    Raises:
        ValueError: the column is no text, two columns differ, or the turns begin with another system message.
    """
    for key in SYSTEM_COLUMNS:
        if key not in record or says_nothing(record[key]):
            continue
        system = Message("system", field(record, key, str))
        if turns.messages[:1] and turns.messages[0].role == "system":
            if turns.messages[0] != system:
                got = brief(turns.messages[0].content)
                raise ValueError(f"{key}: expected the system message of the turns, {got}, got {brief(system.content)}")
        else:
            turns = Turns((system, *turns.messages), (None, *turns.weights))
    return turns


def drop_leading(turns: Turns, reader: FieldReader) -> tuple[Turns, int]:
    """The turns from the first of the user on, behind a system message, and how many were dropped and noted between."""
    messages = turns.messages
    start = 1 if messages and messages[0].role == "system" else 0
    users = (index for index, message in enumerate(messages) if message.role == "user")
    first = next(users, len(messages))
    if first <= start:
        return turns, 0
    reader.drop_turns(first - start)
    return Turns(messages[:start] + messages[first:], turns.weights[:start] + turns.weights[first:]), first - start


def refuse_weights(turns: Turns, reader: FieldReader) -> None:
    """Note every turn that states weight 1 although rows of its kind train their last answer alone."""
    for index, weight in enumerate(turns.weights):
        if weight:
            reader.refuse(f"prompt[{index}].weight", weight, "only the last answer of such a row is trained")
