"""Items on disk in the order of their places, whatever order they came in; memory holds eight bytes an item."""

import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from .files import naming

T = TypeVar("T")
_ABSENT = -1
_CONSEQUENCE = "what was answered is in the ledger: see that the disk has room, and the same command goes on"


def _as_it_is(item: Any) -> Any:
    return item


class Spill(Generic[T]):
    """A file of JSON lines that is written in any order and read by place; it goes with `close`.

    Args:
        path: made anew, with its folder.
        dump: an item as JSON value.   load: an item of its JSON value.
    Raises:
        OSError: the file cannot be written; names it. So does `put`.
    """

    def __init__(
        self, path: Path | str, *, dump: Callable[[T], Any] = _as_it_is, load: Callable[[Any], T] = _as_it_is
    ) -> None:
        self.path, self.dump, self.load = Path(path), dump, load
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path, _CONSEQUENCE):
            self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._starts, self._end = array("q"), 0

    def put(self, place: int, item: T) -> None:
        """Keep an item; a place may be filled once."""
        if place < 0 or (place < len(self._starts) and self._starts[place] != _ABSENT):
            raise ValueError(f"{self.path}: expected an empty place, got {place}; fill each once")
        line = (json.dumps(self.dump(item), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        # Behind the last whole line, so that one which a full disk has cut is written over.
        with naming(self.path, _CONSEQUENCE):
            rest, at = memoryview(line), self._end
            while rest:
                written = os.pwrite(self._file.fileno(), rest, at)
                rest, at = rest[written:], at + written
        while len(self._starts) <= place:
            self._starts.append(_ABSENT)
        self._starts[place], self._end = self._end, at

    def append(self, item: T) -> None:
        """Keep an item behind the last one."""
        self.put(len(self), item)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> T:
        if not 0 <= place < len(self._starts) or self._starts[place] == _ABSENT:
            raise IndexError(f"{self.path}: expected a place with an item, got {place}")
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
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Spill[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
