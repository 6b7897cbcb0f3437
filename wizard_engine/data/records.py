"""Reading and writing of training rows.

Reading recognises the formats of `formats.FORMATS`, each as JSONL, as one JSON array (both also as .gz) or as Parquet.
A bad record is an error that names file, line and field, or, with on_error="skip", is counted, logged and written to a
reject file. What becomes of fields that rows have no place for is said in `row_fields`.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wizard_engine.runtime.files import replacing

from .formats import convert
from .row_fields import FieldReader, UnknownFields
from .rows import (
    KINDS,
    Conversation,
    Message,
    Preference,
    Process,
    Row,
    check_row,
    check_text,
    content_id,
    conversation,
    kept_weights,
    texts_of,
    user_text,
)
from .text_files import OnError, Piece, read_values

__all__ = [
    "Conversation",
    "Message",
    "Preference",
    "Process",
    "Reject",
    "Row",
    "check_row",
    "content_id",
    "conversation",
    "kept_weights",
    "read_files",
    "read_located",
    "read_prompts",
    "read_rows",
    "scan_rows",
    "texts_of",
    "user_text",
    "write_rows",
]

Kind = Literal["conversation", "preference", "process"]
SPLITS = ("train", "test", "validation", "dev", "data")
MAX_DEPTH = 100
LOG = logging.getLogger("wizard_engine.data")


class Reject(NamedTuple):
    """A record that could not be read: where, why (`path:line: field: ...`), and the start of its text."""

    path: str
    line: int
    error: str
    text: str


def read_rows(
    path: Path | str,
    *,
    kind: Kind | None = None,
    on_error: OnError = "raise",
    unknown_fields: UnknownFields = "refuse",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> list[Row]:
    """Rows of a file, in file order.

    Args:
        path: in any of the formats above; the content decides which.
        kind: the only accepted kind of row; None accepts all.
        on_error: "raise" stops at the first bad record; "skip" skips bad records, logs their number, and writes them to
            `rejects`.
        unknown_fields: "refuse" makes a field that rows have no place for (tool calls, images) the error of its record;
            "count" leaves it out of the text, keeps it in attributes["unread_fields"] and logs how many there are.
        rejects: JSONL file of the skipped records, written only if there are any; one object a record with path, line,
            error, text.
        allow_empty: return [] for an empty file instead of an error.
    Raises:
        ValueError: `path:line: field: expected X, got Y`.
        FileNotFoundError: no such file.
    """
    options = {"on_error": on_error, "unknown_fields": unknown_fields, "rejects": rejects, "allow_empty": allow_empty}
    return read_files([path], kind=kind, **options)[0]


def read_files(
    paths: Iterable[Path | str],
    *,
    kind: Kind | None = None,
    on_error: OnError = "raise",
    unknown_fields: UnknownFields = "refuse",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> tuple[list[Row], list[Reject]]:
    """Rows of several files in order, and the skipped records. Arguments and errors as in `read_rows`."""
    options = {"on_error": on_error, "unknown_fields": unknown_fields, "rejects": rejects, "allow_empty": allow_empty}
    located, bad = read_located(paths, kind=kind, **options)
    return [row for _, row in located], bad


def read_located(
    paths: Iterable[Path | str],
    *,
    kind: Kind | None = None,
    on_error: OnError = "raise",
    unknown_fields: UnknownFields = "refuse",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> tuple[list[tuple[str, Row]], list[Reject]]:
    """As `read_files`, each row with its place `path:line`."""
    bad: list[Reject] = []
    options = {"on_error": on_error, "unknown_fields": unknown_fields, "rejects": rejects, "allow_empty": allow_empty}
    return list(stream_located(paths, bad, kind=kind, **options)), bad


def stream_located(
    paths: Iterable[Path | str],
    bad: list[Reject],
    *,
    kind: Kind | None = None,
    on_error: OnError = "raise",
    unknown_fields: UnknownFields = "refuse",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> Iterator[tuple[str, Row]]:
    """Yields what `read_located` returns, row by row; the skipped records are added to `bad`.

    Reports and rejects are written when the last row has been taken.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}; choose one of them")
    for path in paths:
        kept, before = 0, len(bad)
        reader = FieldReader(unknown_fields, source_name(Path(path)))
        for line, item in _scan(Path(path), kind, allow_empty, reader):
            if not isinstance(item, Reject):
                kept += 1
                yield f"{path}:{line}", item
            elif on_error == "raise":
                raise ValueError(item.error)
            else:
                bad.append(item)
        lost = len(bad) - before
        if lost:
            LOG.warning("%s: %d records rejected, %d rows kept; first: %s", path, lost, kept, bad[before].error)
        reader.report(path)
    if bad and rejects is not None:
        _write_lines(Path(rejects), [_line(reject._asdict()) for reject in bad])


def read_prompts(path: Path | str, *, on_error: OnError = "raise") -> list[str]:
    """Prompts of an evaluation file: the user turns of each row as one text, or each of the `turns` of a question file.

    Fields beside the user turns, also those that rows have no place for, do not matter here.

    Args:
        on_error: "raise", or "skip" to leave out bad records and log their number.
    Raises:
        ValueError: `path:line: field: expected X, got Y`; no prompt at all.
    """
    prompts: list[str] = []
    bad: list[str] = []
    reader = FieldReader("count")
    for piece in read_values(path):
        turns = piece.value.get("turns") if isinstance(piece.value, dict) else None
        try:
            if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
                prompts += turns
            else:
                prompts += map(user_text, _rows_of(piece, None, reader))
        except ValueError as error:
            bad.append(f"{path}:{piece.line}: {error}")
            if on_error == "raise":
                raise ValueError(bad[0]) from None
    if bad:
        LOG.warning("%s: %d records rejected, %d prompts kept; first: %s", path, len(bad), len(prompts), bad[0])
    if not prompts:
        raise ValueError(f"{path}:1: file: expected at least one prompt, got none; give a file with rows or questions")
    return prompts


def scan_rows(
    path: Path | str, *, kind: Kind | None = None, unknown_fields: UnknownFields = "refuse", allow_empty: bool = False
) -> Iterator[Row | Reject]:
    """Yields every row of a file, and a Reject for each bad record.

    Raises:
        ValueError: the file is empty (unless allow_empty), or `kind` is unknown.
    """
    return (
        item for _, item in _scan(Path(path), kind, allow_empty, FieldReader(unknown_fields, source_name(Path(path))))
    )


def _scan(path: Path, kind: Kind | None, allow_empty: bool, reader: FieldReader) -> Iterator[tuple[int, Row | Reject]]:
    """Items of `scan_rows`, each with the first line of its record."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}; choose one of them")
    empty = True
    for piece in read_values(path):
        empty = False
        try:
            rows = _rows_of(piece, kind, reader)
        except ValueError as error:
            yield piece.line, Reject(str(path), piece.line, f"{path}:{piece.line}: {error}", piece.text)
        else:
            for row in rows:
                yield piece.line, row
    if empty and not allow_empty:
        raise ValueError(f"{path}:1: file: expected at least one record, got none; give a file with rows")


def write_rows(path: Path | str, rows: Iterable[Row]) -> None:
    """Writes rows as JSONL, one object a line, atomically; the file is on disk on return.

    Raises:
        ValueError: a row is invalid or holds a value that JSON cannot hold, such as NaN (the row's number is named).
            The former file is unchanged.
        OSError: the disk is full or the folder cannot be written. The former file is unchanged.
    """
    _write_lines(Path(path), _checked(rows))


def _checked(rows: Iterable[Row]) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        try:
            check_row(row)
            line = _line(row.to_json())
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number}: {error}") from None
        yield line


def _line(value: dict) -> bytes:
    """One line of JSONL; ValueError or TypeError for a value that JSON in UTF-8 cannot hold."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with replacing(path) as file:
        file.writelines(lines)


def _rows_of(piece: Piece, kind: Kind | None, reader: FieldReader) -> list[Row]:
    """The valid rows of one JSON value, all or none."""
    if piece.error is not None:
        raise ValueError(piece.error)
    _check_unicode(piece.value, "record")
    row_kind, rows = convert(piece.value, reader, kind)
    if kind not in (None, row_kind):
        raise ValueError(f"record: expected a {kind} row, got a {row_kind} row")
    for row in rows:
        check_row(row)
    unread = reader.finish()
    return [row.replace(attributes=_with_unread(row.attributes, unread)) for row in rows] if unread else rows


def _with_unread(attributes: dict[str, Any], unread: dict[str, Any]) -> dict[str, Any]:
    """Attributes with the fields that the row has no place for, by their place in the record."""
    earlier = attributes.get("unread_fields")
    return attributes | {"unread_fields": (earlier if isinstance(earlier, dict) else {}) | unread}


def source_name(path: Path) -> str:
    """Name of a file as a source: its stem, prefixed with its folder if the stem only names a split."""
    stem = Path(path.stem).stem if path.suffix == ".gz" else path.stem
    return f"{path.parent.name}/{stem}" if stem in SPLITS and path.parent.name else stem


def _check_unicode(value: Any, name: str, depth: int = 0) -> None:
    """Raises ValueError if a text in a JSON value cannot be written as UTF-8, or brackets are nested too deeply."""
    if isinstance(value, str):
        check_text(value, name, blank=True)
    elif isinstance(value, dict | list) and depth == MAX_DEPTH:
        raise ValueError(f"{name}: expected at most {MAX_DEPTH} levels of brackets, got more")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, name, blank=True)
            _check_unicode(item, key, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_unicode(item, f"{name}[{index}]", depth + 1)
