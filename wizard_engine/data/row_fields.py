"""What a record of a row file may hold: fields that are read, fields that rows have no place for, and the others.

A row has no place for tool calls, images or hidden reasoning. Such a field is an error that names it, or, with the
policy "count", is left out of the text, kept in attributes["unread_fields"] and counted. Any other column of a record
(an id, a category, a score) becomes an attribute. Both are named once for each file, see `FieldReader.report`.
"""

import logging
import re
from collections import Counter
from typing import Any, Literal

from .rows import brief

UnknownFields = Literal["refuse", "count"]
POLICIES = ("refuse", "count")
LOG = logging.getLogger("wizard_engine.data")

# Columns that change what an answer is to be, and that no row can say. Other columns are attributes.
_TOOLS = ("tools", "functions", "tool_choice", "tool_calls", "tool_call_id", "function_call")
_REASONING = ("reasoning", "reasoning_content", "thinking", "chat_template_kwargs")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
WITHOUT_PLACE = frozenset((*_TOOLS, *_REASONING, *_MEDIA, "history", "weight", "mask", "loss_mask"))
# Labels of single answers (good or bad): to train on all of them alike would teach the bad ones too.
VERDICTS = frozenset(("label", "kto_tag"))
SYSTEM_COLUMNS = ("system", "system_prompt")
_EMPTY = (None, "", [], {}, "[]", "{}", "null")
_INDEX = re.compile(r"\[\d+\]")


def expect(value: Any, kind: type, name: str) -> Any:
    """`value`, or ValueError when it is not of `kind` (bool is no int here)."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {list: "a list", dict: "an object", str: "text"}.get(kind, kind.__name__)
        raise ValueError(f"{name}: expected {words}, got {type(value).__name__} {brief(value)}")
    return value


def field(record: dict, key: str, kind: type, name: str = "") -> Any:
    """record[key] of the type `kind`; ValueError names a key that is missing or of another type."""
    if key not in record:
        raise ValueError(f"{name}{key}: expected {kind.__name__}, got no such field, or null")
    return expect(record[key], kind, name + key)


def without_nulls(record: dict) -> dict:
    """The record without its null columns, which are absent ones."""
    if None in record.values():
        return {key: value for key, value in record.items() if value is not None}
    return record


def says_nothing(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty text, list or object (also written as text)."""
    return any(value == empty and type(value) is type(empty) for empty in _EMPTY)


class FieldReader:
    """Counts, over the records of a file, the fields that their rows do not say.

    Args:
        policy: "refuse" makes a field without a place an error; "count" keeps it apart and counts it.
        source: name of the file, an attribute of rows in other formats than this project's own.
    Raises:
        ValueError: another policy.
    """

    def __init__(self, policy: UnknownFields = "refuse", source: str = "") -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown_fields: expected refuse or count, got {policy!r}; choose one of them")
        self.policy = policy
        self.source = {"source": source} if source else {}
        self.unread: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        self.dropped_turns = 0
        self._found: dict[str, Any] = {}
        self._kept: list[str] = []
        self._dropped = 0

    def start(self) -> None:
        """Forget what the last record had: a new one begins."""
        if self._found or self._kept or self._dropped:
            self._found, self._kept, self._dropped = {}, [], 0

    def finish(self) -> dict[str, Any]:
        """Count the record's fields, which has become rows; returns the fields without a place, by their place."""
        if self._kept:
            self.columns.update(self._kept)
        if self._found:
            self.unread.update({_INDEX.sub("[]", place) for place in self._found})
        self.dropped_turns += self._dropped
        return self._found

    def drop_turns(self, count: int) -> None:
        """Note turns of the record that its row does not have."""
        self._dropped += count

    def refuse(self, place: str, value: Any, why: str) -> None:
        """Note a field that rows have no place for.

        Raises:
            ValueError: the policy is "refuse".
        """
        if self.policy == "refuse":
            raise ValueError(
                f"{place}: expected no such field ({why}), got {brief(value)}; "
                "remove it, or leave such fields out and count them with --unknown-fields count"
            )
        self._found[place] = value

    def columns_of(self, record: dict, known: tuple[str, ...]) -> dict[str, Any]:
        """Attributes of a record: its "attributes", then every column outside `known` that says something else.

        Raises:
            ValueError: a column that rows have no place for, or one that "attributes" has with another value.
        """
        attributes = dict(expect(record["attributes"], dict, "attributes")) if "attributes" in record else {}
        for key, value in record.items():
            if key in known or key in ("attributes", "id"):
                continue
            if key in WITHOUT_PLACE or key in SYSTEM_COLUMNS or (key in VERDICTS and isinstance(value, bool)):
                if not says_nothing(value):
                    self.refuse(key, value, "a row cannot say it")
            elif key in attributes and attributes[key] != value:
                raise ValueError(
                    f"{key}: expected the value of attributes.{key}, {brief(attributes[key])}, got {brief(value)}"
                )
            else:
                attributes[key] = value
                self._kept.append(key)
        return attributes

    def rest(self, record: dict, *known: str) -> dict[str, Any]:
        """`columns_of` a record in another format, with the file's name as "source" and its id as "source_id"."""
        attributes = self.source | self.columns_of(record, known)
        if "id" in record:
            attributes.setdefault("source_id", record["id"])
        return attributes

    def report(self, path: Any) -> None:
        """Name, in one log line each, what the rows of a file leave out and the columns kept as attributes."""
        if self.dropped_turns:
            LOG.warning("%s: %d turns before the first of the user left out of the rows", path, self.dropped_turns)
        if self.unread:
            LOG.warning(
                "%s: fields that rows have no place for, left out of the text and kept in attributes['unread_fields'] "
                "(records): %s",
                path,
                _table(self.unread),
            )
        if self.columns:
            LOG.warning("%s: columns kept as attributes, not read as text (records): %s", path, _table(self.columns))


def _table(counts: Counter[str]) -> str:
    shown = [f"{brief(name)[1:-1]} {count}" for name, count in counts.most_common(20)]
    return ", ".join(shown) + (f", and {len(counts) - 20} more" if len(counts) > 20 else "")
