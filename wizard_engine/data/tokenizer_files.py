"""What stands beside a tokenizer's file, and failures of the libraries that read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wizard_engine.runtime.input_files import read_json_object, shown

# Ids may have holes: up to so many, or three for every entry.
MAX_HOLES = 1 << 20
# Files that name BOS and EOS, the first that names BOS deciding it.
ID_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class ListedIds:
    """BOS and all EOS ids that generation_config.json and config.json of a directory name."""

    bos: int | None = None
    eos: tuple[int, ...] = ()


NOTHING_LISTED = ListedIds()


def listed_ids(directory: Path) -> ListedIds:
    """The special ids that a directory's files list; those that are absent list none.

    Raises:
        ValueError: a file is no JSON object, or a field no id or list of ids; names file and field.
    """
    bos, eos = [], []
    for name in ID_FILES:
        fields = read_json_object(directory / name) or {}
        bos += _ids(directory / name, "bos_token_id", fields.get("bos_token_id"))
        eos += _ids(directory / name, "eos_token_id", fields.get("eos_token_id"))
    return ListedIds(bos[0] if bos else None, tuple(dict.fromkeys(eos)))


def _ids(path: Path, name: str, value: Any) -> list[int]:
    """Ids of a field: a number or a list; null and -1 stand for none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or not -1 <= item < 2**31 for item in values):
        raise ValueError(f"{path}: {name}: expected an id or a list of ids, got {shown(value)}")
    return [item for item in values if item >= 0]


def most_ids(entries: int) -> int:
    """Bound of the ids of a vocabulary with so many entries, holes included."""
    return 4 * entries + MAX_HOLES


def check_ids(vocabulary: Any, added: Any, path: Path) -> None:
    """Refuse ids for which a library would make tables larger than the file; it ends the process for want of memory.

    Args:
        vocabulary: token -> id, or a list of entries.   added: entries with ids, or None.
    Raises:
        ValueError: an id is no whole number, or too large for the number of entries; names file and field.
    """
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list | None):
        field, got = ("added_tokens", added) if isinstance(vocabulary, dict | list) else ("model: vocab", vocabulary)
        raise ValueError(f"{path}: {field}: expected entries, got {shown(got)}")
    most = most_ids(len(vocabulary))
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    wrong = next((index for index in ids if type(index) is not int or not 0 <= index < most), None)
    if wrong is not None:
        raise ValueError(f"{path}: model: vocab: expected ids from 0 to {most - 1}, got {shown(wrong)}")
    for entry in added or ():
        index = entry.get("id") if isinstance(entry, dict) else None
        if type(index) is not int or not 0 <= index < most:
            raise ValueError(f"{path}: added_tokens: expected ids from 0 to {most - 1}, got {shown(index)}")


def named_token(config: dict[str, Any], key: str, path: str) -> str | None:
    """Text of `bos_token` or `eos_token` of tokenizer_config.json; None where it names none.

    Raises:
        ValueError: it is no text, or one that UTF-8 cannot write.
    """
    named = config.get(key)
    named = named.get("content") if isinstance(named, dict) else named
    if named is not None and not (isinstance(named, str) and _is_unicode(named)):
        raise ValueError(f"{path}: tokenizer_config.json: {key}: expected a text, got {shown(named)}")
    return named or None


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can name half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def is_library_failure(error: BaseException) -> bool:
    """Whether `tokenizers` raised it: a bare Exception, or a panic of its Rust side, which is no Exception at all."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def library_failures(expected: str) -> Iterator[None]:
    """Failures of `tokenizers` inside the block become a ValueError: `expected`, got the failure."""
    try:
        yield
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise ValueError(f"{expected}, got {shown(str(error), 200)}") from None
