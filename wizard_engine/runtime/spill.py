"""Items on disk in the order of their places, whatever order they came in; memory holds eight bytes an item."""

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from .files import naming

T = TypeVar("T")
_ABSENT = -1
_CONSEQUENCE = "what was answered is in the ledger: see that the disk has room, and the same command goes on"


def _as_it_is(item: Any) -> Any:
    return item


def _remove(file: IO[bytes], path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)


def _temporary() -> str:
    descriptor, name = tempfile.mkstemp(prefix="wizard-", suffix=".spill")
    os.close(descriptor)
    return name


class Spill(Generic[T]):
    """A file of JSON lines that is written in any order and read by place; it goes with `close`, or with this object.

    Args:
        path: made anew, with its folder; None for a temporary file.
        dump: an item as JSON value.   load: an item of its JSON value.
    Raises:
        OSError: the file cannot be written; names it. So does `put`.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        dump: Callable[[T], Any] = _as_it_is,
        load: Callable[[Any], T] = _as_it_is,
    ) -> None:
        self.path, self.dump, self.load = Path(path or _temporary()), dump, load
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path, _CONSEQUENCE):
            self._file = open(self.path, "w+b")  # noqa: SIM115 - closed by close()
        self._starts, self._end, self._is_flushed = array("q"), 0, True
        self._close = weakref.finalize(self, _remove, self._file, self.path)

    def put(self, place: int, item: T) -> None:
        """Keep an item; a place may be filled once."""
        line = (json.dumps(self.dump(item), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        with naming(self.path, _CONSEQUENCE):
            self._file.write(line)
        while len(self._starts) <= place:
            self._starts.append(_ABSENT)
        if self._starts[place] != _ABSENT:
            raise ValueError(f"{self.path}: expected an empty place {place}, got one with an item")
        self._starts[place], self._end, self._is_flushed = self._end, self._end + len(line), False

    def append(self, item: T) -> None:
        """Keep an item behind the last one."""
        self.put(len(self), item)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> T:
        if not 0 <= place < len(self._starts) or self._starts[place] == _ABSENT:
            raise IndexError(f"{self.path}: expected a place with an item, got {place}")
        if not self._is_flushed:
            with naming(self.path, _CONSEQUENCE):
                self._file.flush()
            self._is_flushed = True
        return self.load(json.loads(self._line(self._starts[place]).decode("utf-8", "surrogatepass")))

    def __iter__(self) -> Iterator[T]:
        """The items by place; empty places are left out."""
        for place in range(len(self._starts)):
            if self._starts[place] != _ABSENT:
                yield self[place]

    def _line(self, start: int, size: int = 1 << 13) -> bytes:
        piece = b""
        while not piece.endswith(b"\n"):
            more = os.pread(self._file.fileno(), size, start + len(piece))
            end = more.find(b"\n")
            piece += more if end < 0 else more[: end + 1]
            if not more:
                raise ValueError(f"{self.path}: expected a whole line, got the end of the file; run the stage again")
        return piece

    def close(self) -> None:
        """Close and remove the file."""
        self._close()

    def __enter__(self) -> "Spill[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
