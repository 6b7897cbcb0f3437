"""Items on disk in the order of their places, whatever order they came in; memory holds eight bytes an item."""

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from .files import naming

T = TypeVar("T")
_ABSENT = -1
_PIECE = 1 << 13
_CONSEQUENCE = "what was answered is in the ledger: see that the disk has room, and the same command goes on"


def _as_it_is(item: Any) -> Any:
    return item


class Spill(Generic[T]):
    """A temporary file of JSON lines that is written in any order and read by place. It ends with this object.

    Args:
        folder: on the disk that it shall take room of; made if it is absent. None: the system's folder for such files.
        dump: an item as JSON value.   load: an item of its JSON value.
    Raises:
        OSError: the file cannot be written; names the folder. So does `put`.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        dump: Callable[[T], Any] = _as_it_is,
        load: Callable[[Any], T] = _as_it_is,
    ) -> None:
        self.folder, self.dump, self.load = Path(folder or tempfile.gettempdir()), dump, load
        self.folder.mkdir(parents=True, exist_ok=True)
        with naming(self.folder, _CONSEQUENCE):
            # It has no name, so a killed process leaves nothing behind.
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - ends with this object
        self._starts, self._end = array("q"), 0

    def put(self, place: int, item: T) -> None:
        """Keep an item; a place may be filled once."""
        if place < 0 or place in self:
            raise ValueError(f"{self.folder}: expected an empty place, got {place}; fill each once")
        line = (json.dumps(self.dump(item), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        # Behind the last whole line, so that one which a full disk has cut is written over.
        with naming(self.folder, _CONSEQUENCE):
            rest, at = memoryview(line), self._end
            while rest:
                written = os.pwrite(self._file.fileno(), rest, at)
                rest, at = rest[written:], at + written
        if place >= len(self._starts):
            self._starts.extend([_ABSENT] * (place + 1 - len(self._starts)))
        self._starts[place], self._end = self._end, at

    def append(self, item: T) -> None:
        """Keep an item behind the last one."""
        self.put(len(self), item)

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, place: object) -> bool:
        """Whether a place has an item."""
        return isinstance(place, int) and 0 <= place < len(self._starts) and self._starts[place] != _ABSENT

    def __getitem__(self, place: int) -> T:
        if place not in self:
            raise IndexError(f"{self.folder}: expected a place with an item, got {place}")
        return self.load(json.loads(self._line(self._starts[place]).decode("utf-8", "surrogatepass")))

    def __iter__(self) -> Iterator[T]:
        """The items by place; empty places are left out."""
        return (self[place] for place in range(len(self._starts)) if place in self)

    def _line(self, start: int) -> bytes:
        pieces, size = [], 0
        while True:
            piece = os.pread(self._file.fileno(), _PIECE, start + size)
            end = piece.find(b"\n")
            if end >= 0:
                return b"".join([*pieces, piece[:end]])
            if not piece:
                raise ValueError(f"{self.folder}: expected a whole line, got the end of a file; run the stage again")
            pieces.append(piece)
            size += len(piece)
