"""Files that somebody else wrote: opened only if they are regular, read up to a limit, and shown in short."""

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

# A JSON text takes up to 25 times its size in memory: these bound what a refusal costs.
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 16 << 20

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = (
    4,
    8,
    12,
    100,
    80,
    60,
)


def shown(value: Any, most: int = 80) -> str:
    """A value for a message, at most `most` characters: nested and long values are cut, control characters escaped."""
    text = repr(value[:most])[1:-1] if isinstance(value, str) else _SHORT.repr(value)
    return text[:most]


def open_regular(path: Path) -> BinaryIO:
    """A regular file opened for reading; a FIFO or a device, whose reader would wait, is refused.

    Raises:
        ValueError: it is of another kind, or its name cannot be one.
        OSError: it is missing or cannot be read.
    """
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))}: expected a file name, got one with a NUL")
    _check_regular(path, os.stat(path))
    # Without waiting, should a FIFO have come in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_regular(path: Path, status: os.stat_result) -> None:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{path}: expected a regular file, got {kinds.get(kind, 'a device')}")


def read_regular(path: Path, most: int) -> bytes:
    """Content of a regular file of at most `most` bytes.

    Raises:
        ValueError: it is larger, or of another kind.   OSError: it is missing or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if max(size, len(content)) > most:
        raise ValueError(f"{path}: expected at most {most} bytes, got {size}")
    return content


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a file's content.

    Raises:
        ValueError: names the file.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got values nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {shown(str(error), 200)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The JSON object in a regular file of at most `most` bytes; None where there is no file.

    Raises:
        ValueError: names the file, which is another kind, too large, unreadable or no JSON object.
    """
    try:
        content = read_regular(path, most)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise ValueError(f"{path}: expected a readable file, got {error.strerror or error}") from None
    return parse_object(content, path)
