"""Reading and writing of training rows.

Reading recognises the project's own JSONL, Alpaca, ShareGPT, preference pairs, question and answer, solutions with
checked arithmetic, and self-instruct files, each as JSONL or as one JSON array. A bad record is an error that names
file, line and field, or, with on_error="skip", is counted, logged and written to a reject file.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from wizard_engine.runtime.files import replacing

from .formats import convert
from .rows import (
    KINDS,
    Conversation,
    Message,
    Preference,
    Process,
    Row,
    brief,
    check_row,
    check_text,
    content_id,
    conversation,
    texts_of,
    user_text,
)

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
LOG = logging.getLogger("wizard_engine.data")


class Reject(NamedTuple):
    """A record that could not be read: where, why (`path:line: field: ...`), and the start of its text."""

    path: str
    line: int
    error: str
    text: str


class Piece(NamedTuple):
    """One JSON value of a file, or its error, with its first line (counted from 1)."""

    line: int
    value: Any
    error: str | None
    text: str


def read_rows(
    path: Path | str,
    *,
    kind: Kind | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> list[Row]:
    """Rows of a file, in file order.

    Args:
        path: .json (an array) or .jsonl, in any of the formats above; the content decides which.
        kind: the only accepted kind of row; None accepts all.
        on_error: "raise" stops at the first bad record; "skip" skips bad records, logs their number, and writes them to
            `rejects`.
        rejects: JSONL file of the skipped records, written only if there are any; one object a record with path, line,
            error, text.
        allow_empty: return [] for an empty file instead of an error.
    Raises:
        ValueError: `path:line: field: expected X, got Y`.
        FileNotFoundError: no such file.
    """
    return read_files([path], kind=kind, on_error=on_error, rejects=rejects, allow_empty=allow_empty)[0]


def read_files(
    paths: Iterable[Path | str],
    *,
    kind: Kind | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> tuple[list[Row], list[Reject]]:
    """Rows of several files in order, and the skipped records. Arguments and errors as in `read_rows`."""
    located, bad = read_located(paths, kind=kind, on_error=on_error, rejects=rejects, allow_empty=allow_empty)
    return [row for _, row in located], bad


def read_located(
    paths: Iterable[Path | str],
    *,
    kind: Kind | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    rejects: Path | None = None,
    allow_empty: bool = False,
) -> tuple[list[tuple[str, Row]], list[Reject]]:
    """As `read_files`, each row with its place `path:line`."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}; choose one of them")
    rows: list[tuple[str, Row]] = []
    bad: list[Reject] = []
    for path in paths:
        before = len(rows), len(bad)
        for line, item in _scan(Path(path), kind, allow_empty):
            if not isinstance(item, Reject):
                rows.append((f"{path}:{line}", item))
            elif on_error == "raise":
                raise ValueError(item.error)
            else:
                bad.append(item)
        kept, lost = len(rows) - before[0], len(bad) - before[1]
        if lost:
            LOG.warning("%s: %d records rejected, %d rows kept; first: %s", path, lost, kept, bad[before[1]].error)
    if bad and rejects is not None:
        _write_lines(Path(rejects), [_line(reject._asdict()) for reject in bad])
    return rows, bad


def read_prompts(path: Path | str) -> list[str]:
    """Prompts of an evaluation file: the user turns of each row as one text, or each of the `turns` of a question file.

    Raises:
        ValueError: `path:line: field: expected X, got Y`; any bad record is an error here.
    """
    prompts: list[str] = []
    for piece in _pieces(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")):
        try:
            turns = piece.value.get("turns") if isinstance(piece.value, dict) else None
            if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
                prompts += turns
            else:
                prompts += map(user_text, _rows_of(piece, Path(path), None))
        except ValueError as error:
            raise ValueError(f"{path}:{piece.line}: {error}") from None
    return prompts


def scan_rows(path: Path | str, *, kind: Kind | None = None, allow_empty: bool = False) -> Iterator[Row | Reject]:
    """Yields every row of a file, and a Reject for each bad record.

    Raises:
        ValueError: the file is empty (unless allow_empty), or `kind` is unknown.
    """
    return (item for _, item in _scan(Path(path), kind, allow_empty))


def _scan(path: Path, kind: Kind | None, allow_empty: bool) -> Iterator[tuple[int, Row | Reject]]:
    """Items of `scan_rows`, each with the first line of its record."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}; choose one of them")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    empty = True
    for piece in _pieces(data):
        empty = False
        try:
            yield from ((piece.line, row) for row in _rows_of(piece, path, kind))
        except ValueError as error:
            yield piece.line, Reject(str(path), piece.line, f"{path}:{piece.line}: {error}", piece.text)
        except RecursionError:
            reason = f"{path}:{piece.line}: record: expected at most a few hundred levels of brackets, got more"
            yield piece.line, Reject(str(path), piece.line, reason, piece.text)
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


def _rows_of(piece: Piece, path: Path, kind: Kind | None) -> list[Row]:
    """The valid rows of one JSON value, all or none; a row in another format gets the file's name as "source"."""
    if piece.error is not None:
        raise ValueError(piece.error)
    _check_unicode(piece.value, "record")
    row_kind, rows = convert(piece.value)
    if kind not in (None, row_kind):
        raise ValueError(f"record: expected a {kind} row, got a {row_kind} row")
    is_native = "messages" in piece.value or "prompt" in piece.value
    for row in rows:
        check_row(row)
    return (
        rows if is_native else [row.replace(attributes={"source": source_name(path)} | row.attributes) for row in rows]
    )


def source_name(path: Path) -> str:
    """Name of a file as a source: its stem, prefixed with its folder if the stem only names a split."""
    return f"{path.parent.name}/{path.stem}" if path.stem in SPLITS and path.parent.name else path.stem


def _check_unicode(value: Any, name: str) -> None:
    """Raises ValueError if any text in a JSON value cannot be written as UTF-8."""
    if isinstance(value, str):
        check_text(value, name, blank=True)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, name, blank=True)
            _check_unicode(item, key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_unicode(item, f"{name}[{index}]")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a JSON value, got {name}")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _pieces(data: bytes) -> Iterator[Piece]:
    """The JSON values of a file: the elements of an array, or one value a line."""
    return _array_pieces(data) if data.lstrip()[:1] == b"[" else _line_pieces(data)


def _line_pieces(data: bytes) -> Iterator[Piece]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        text = line.decode("utf-8", "replace").strip()
        try:
            value, end = _decode(line.decode("utf-8").strip(), 0)
            if end != len(text):
                raise ValueError(f"expected the end of the line, got {brief(text[end:])}")
            yield Piece(number, value, None, text[:200])
        except ValueError as error:
            yield Piece(number, None, f"json: {_reason(error)}", text[:200])


def _array_pieces(data: bytes) -> Iterator[Piece]:
    """Elements of a JSON array with their first lines; the text from the first broken one on is one bad piece."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Piece(data[: error.start].count(b"\n") + 1, None, f"json: {_reason(error)}", "")
        return
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    more = text[position : position + 1] != "]"
    while more:
        line, counted, start = line + text.count("\n", counted, position), position, position
        try:
            value, position, more = _element(text, start)
        except ValueError as error:
            yield Piece(line, None, f"json: {_reason(error)}", text[start : start + 200])
            return
        yield Piece(line, value, None, text[start : start + 200])
    end = _skip(text, position + 1) if counted == 0 else position
    if end != len(text):
        got = brief(text[end : end + 40])
        yield Piece(
            text.count("\n", 0, end) + 1, None, f"json: expected the end of the file, got {got}", text[end:][:200]
        )


def _element(text: str, start: int) -> tuple[Any, int, bool]:
    """An array's element at `start`, the position after it and its comma or bracket, and whether another follows."""
    value, position = _decode(text, start)
    position = _skip(text, position)
    following = text[position : position + 1]
    if following not in (",", "]") or not following:
        raise ValueError(f"expected ',' or ']' after the record, got {brief(text[position : position + 20])}")
    return value, _skip(text, position + 1), following == ","


def _decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError:
        raise ValueError("expected a record, got brackets nested too deeply") from None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"expected UTF-8, got byte 0x{byte:02x} at byte {error.start + 1}"
    if isinstance(error, json.JSONDecodeError):
        return f"expected a complete JSON value, got {error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
    return str(error)
