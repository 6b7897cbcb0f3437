"""The one reader of files that people bring: text, JSON and JSON lines, also as .gz, and Parquet.

UTF-8, or UTF-16 and UTF-32 with a byte order mark. A line ends with LF, CRLF or CR, here and in every line number of an
error. Other separators of Unicode (NEL, U+2028, U+2029) are text inside a string, and blanks between records.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from .parquet import parquet_values, plain
from .rows import brief

OnError = Literal["raise", "skip"]

# UTF-32 before UTF-16: its little-endian mark begins with the other's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_FILES = (
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"PK\x03\x04", "a zip file"),
    (b"ARROW1", "an Arrow file"),
)
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
BLANKS = r"[\s\ufeff]*"
_BLANKS = re.compile(BLANKS)
# The same in UTF-8, before the first record: blanks of ASCII, NEL, no-break space, U+2028, U+2029, the mark.
_BLANK_BYTES = re.compile(rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe2\x80[\xa8\xa9]|\xef\xbb\xbf)*")
# Blanks that JSON does not know; they are plain ones outside of strings, which the first half of the pattern skips.
_FOREIGN = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_FOREIGN_BLANK = re.compile(f"[{_FOREIGN}]")
_STRING_OR_FOREIGN = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*"?|[{_FOREIGN}]', re.DOTALL)
_LINE_END = re.compile(r"\r\n|\r|\n")


class Piece(NamedTuple):
    """One JSON value of a file, or its error, with its first line (counted from 1)."""

    line: int
    value: Any
    error: str | None
    text: str


def read_data(path: Path | str) -> bytes:
    """Content of a text file in UTF-8, without mark, decompressed; Parquet as it is.

    Raises:
        ValueError: `path:line: file: ...` where it is no regular file, no whole .gz file, no UTF-16 behind its mark, or
            packed with another program.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}:1: file: expected a regular file, got a folder or a pipe; give a file")
    data = path.read_bytes()
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:1: file: expected a whole gzip file, got {error}; copy it again") from None
    for start, name in _OTHER_FILES:
        if data.startswith(start):
            raise ValueError(f"{path}:1: file: expected text, .gz or Parquet, got {name}; decompress or convert it")
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _transcoded(path, data, encoding)
    return data.removeprefix(codecs.BOM_UTF8)


def _transcoded(path: Path, data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        line = count_lines(data[: error.start].decode(encoding, "ignore")) + 1
        raise ValueError(
            f"{path}:{line}: file: expected {encoding.upper()}, as its mark says, got {error.reason} at byte "
            f"{error.start + 1}; save it as UTF-8"
        ) from None


def count_lines(text: str) -> int:
    """Line ends in a text."""
    return text.count("\n") + (text.count("\r") - text.count("\r\n") if "\r" in text else 0)


def split_lines(text: str) -> list[str]:
    """Lines of a text; unlike `str.splitlines`, only LF, CRLF and CR end one."""
    return _LINE_END.split(text) if "\r" in text else text.split("\n")


def read_text(path: Path | str) -> str:
    """A text file as one string, its lines ended by LF.

    Raises:
        ValueError: `path:line: text: expected UTF-8, ...`, or as `read_data`.
    """
    data = read_data(path)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        lines = data[: error.start].splitlines(keepends=True)
        line = len(lines) + (not lines or lines[-1].endswith((b"\n", b"\r")))
        raise ValueError(f"{path}:{line}: text: {reason_of(error)}; save it as UTF-8") from None


def read_lines(path: Path | str) -> list[tuple[int, str]]:
    """(line number, text without blanks at both ends) of every line that is not blank; errors as `read_text`."""
    lines = enumerate(split_lines(read_text(path)), 1)
    return [(number, text) for number, line in lines if (text := strip(line))]


def strip(text: str) -> str:
    """The text without blanks, separators and marks at both ends."""
    return text.strip().strip("\ufeff").strip()


def read_json(path: Path | str) -> Any:
    """The JSON value of a file.

    Raises:
        ValueError: `path:line: json: ...`, or as `read_text`.
    """
    text = with_plain_blanks(read_text(path))
    start = skip_blanks(text, 0)
    try:
        value, end = decode(text, start)
        end = skip_blanks(text, end)
        if end != len(text):
            raise ValueError(f"expected the end of the file, got {brief(text[end : end + 40])}")
    except ValueError as error:
        place = getattr(error, "pos", start)
        raise ValueError(f"{path}:{count_lines(text[:place]) + 1}: json: {reason_of(error)}; correct it") from None
    return value


def read_objects(path: Path | str, on_error: OnError = "raise", bad: list[str] | None = None) -> list[tuple[str, dict]]:
    """(`path:line`, object) of every record of a JSON lines file (or array, or Parquet).

    Args:
        on_error: "raise", or "skip" to leave out what is no object and add the error to `bad`.
    Raises:
        ValueError: `path:line: json: ...`.
    """
    objects = []
    for piece in read_values(path):
        error = piece.error
        if error is None and not isinstance(piece.value, dict):
            error = f"json: expected an object, got {type(piece.value).__name__} {brief(piece.value)}"
        if error is None:
            objects.append((f"{path}:{piece.line}", piece.value))
        elif on_error == "raise":
            raise ValueError(f"{path}:{piece.line}: {error}; correct it")
        elif bad is not None:
            bad.append(f"{path}:{piece.line}: {error}")
    return objects


def keeping(on_error: OnError, bad: list[str], read: Callable[[], Any], where: str = "") -> list[Any]:
    """[read()], or [] where that is a ValueError and on_error is "skip": the error is then added to `bad`.

    Raises:
        ValueError: that of `read` behind `where`, with on_error="raise".
    """
    try:
        return [read()]
    except ValueError as error:
        if on_error == "raise":
            raise ValueError(f"{where}{error}") from None
        bad.append(f"{where}{error}")
        return []


def read_values(path: Path | str) -> Iterator[Piece]:
    """Every JSON value of a file, good or bad: the elements of an array, one value a line, or the rows of Parquet.

    A file that is one object over several lines is one value.

    Raises:
        ValueError: as `read_data`; or Parquet that cannot be read.
    """
    data = read_data(path)
    if data.startswith(PARQUET):
        yield from _parquet_pieces(Path(path))
        return
    start = _BLANK_BYTES.match(data).end()
    yield from _array_pieces(data) if data[start : start + 1] == b"[" else _line_pieces(data)


def _parquet_pieces(path: Path) -> Iterator[Piece]:
    for number, row in enumerate(parquet_values(path), 1):
        try:
            yield Piece(number, plain(row), None, brief(row, 200))
        except ValueError as error:
            yield Piece(number, None, str(error), brief(row, 200))


def _line_pieces(data: bytes) -> Iterator[Piece]:
    is_first = True
    for number, line in enumerate(data.splitlines(), start=1):
        if line.isspace() or not line:
            continue
        try:
            text = strip(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Piece(number, None, f"json: {reason_of(error)}", line.decode("utf-8", "replace").strip()[:200])
            continue
        if is_first and text.startswith("{") and (whole := _whole(data, text)) is not None:
            yield Piece(number, whole, None, text[:200])
            return
        is_first = is_first and not text
        yield from _values_of_line(number, text)


def _whole(data: bytes, first: str) -> Any:
    """The object that the whole file is; None where the first line is a value, or the file is no single one."""
    try:
        decode(with_plain_blanks(first), 0)
        return None
    except ValueError:
        pass
    try:
        text = strip(data.decode("utf-8"))
        value, end = decode(with_plain_blanks(text), 0)
    except ValueError:
        return None
    return value if end == len(text) else None


def _values_of_line(number: int, text: str) -> Iterator[Piece]:
    """The values of a line: one, or several with a separator such as U+2028 between them."""
    start, json_text = 0, text
    while start < len(text):
        try:
            value, end = decode(json_text, start)
            position = skip_blanks(text, end)
            if position < len(text) and not _has_separator(text[end:position]):
                raise ValueError(f"expected the end of the line, got {brief(text[position:])}")
        except ValueError as error:
            if (plain_text := with_plain_blanks(json_text)) != json_text:
                json_text = plain_text
                continue
            yield Piece(number, None, f"json: {reason_of(error)}", text[start : start + 200])
            return
        yield Piece(number, value, None, text[start : start + 200])
        start = position


def _has_separator(blanks: str) -> bool:
    """Whether blanks between two values hold what some programs end a line with."""
    return len(blanks.splitlines()) > 1 or blanks[-1:].splitlines() == [""] or "\ufeff" in blanks


def _array_pieces(data: bytes) -> Iterator[Piece]:
    """Elements of a JSON array with their first lines; the text from the first broken one on is one bad piece."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Piece(len((data[: error.start] + b"x").splitlines()), None, f"json: {reason_of(error)}", "")
        return
    position, line, counted = skip_blanks(text, text.index("[") + 1), 1, 0
    more = text[position : position + 1] != "]"
    end = position if more else skip_blanks(text, position + 1)
    while more:
        line, counted, start = line + count_lines(text[counted:position]), position, position
        try:
            value, position, more = _element(text, start)
        except ValueError as error:
            if (plain_text := with_plain_blanks(text)) != text:
                text = plain_text
                continue
            yield Piece(line, None, f"json: {reason_of(error)}", text[start : start + 200])
            return
        yield Piece(line, value, None, text[start : start + 200])
        end = position
    if end != len(text):
        got = brief(text[end : end + 40])
        line = count_lines(text[:end]) + 1
        yield Piece(line, None, f"json: expected the end of the file, got {got}", text[end:][:200])


def _element(text: str, start: int) -> tuple[Any, int, bool]:
    """An array's element at `start`, the position after it and its comma or bracket, and whether another follows."""
    value, position = decode(text, start)
    position = skip_blanks(text, position)
    following = text[position : position + 1]
    if following not in (",", "]") or not following:
        raise ValueError(f"expected ',' or ']' after the record, got {brief(text[position : position + 20])}")
    return value, skip_blanks(text, position + 1), following == ","


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a JSON value, got {name}")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"expected a number that a double can hold, got {brief(text)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of the pairs; a key that stands twice would lose one of its values."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise ValueError(f"expected each key of an object once, got {brief(twice)} twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def decode(text: str, position: int) -> tuple[Any, int]:
    """The JSON value at a position of a text, and the position after it; ValueError where there is none."""
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError:
        raise ValueError("expected a record, got brackets nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("expected a number of at most 4300 digits, got a longer one") from None


def with_plain_blanks(text: str) -> str:
    """JSON text of the same length in which every blank outside of strings is one that JSON knows."""
    if text.isascii() or not _FOREIGN_BLANK.search(text):
        return text
    return _STRING_OR_FOREIGN.sub(lambda match: match[0] if match[0][0] == '"' else " ", text)


def skip_blanks(text: str, position: int) -> int:
    """The first position from `position` on that is neither blank, separator nor mark."""
    return _BLANKS.match(text, position).end()


def reason_of(error: ValueError) -> str:
    """What was expected and what was there instead, for an error of decoding."""
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start]
        column = error.start - max(before.rfind(b"\n"), before.rfind(b"\r"))
        return f"expected UTF-8, got byte 0x{error.object[error.start]:02x} at byte {column}"
    if isinstance(error, json.JSONDecodeError):
        return f"expected a complete JSON value, got {error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
    return str(error)
