"""Where parameters stand in a flat buffer that is divided evenly among ranks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

# Every parameter begins at a multiple of so many elements: 16 bytes in bf16, what vector loads and TMA ask for.
ALIGNMENT = 8


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a flat buffer: elements [start, stop)."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Span:
    """What one rank has of a parameter: elements [start, stop) of it, from `offset` on in the rank's part."""

    slot: Slot
    start: int
    stop: int
    offset: int


class Layout:
    """Matrices first, then vectors, in the given order; padded so that every part is as long as the others.

    Attributes:
        slots: of each parameter.   size: elements in all, padding included.   part: elements of each part.
        matrices: elements before the first vector.   gaps: what belongs to no parameter.
    """

    def __init__(self, shapes: Sequence[tuple[str, tuple[int, ...]]], num_shards: int) -> None:
        ordered = [item for item in shapes if len(item[1]) >= 2] + [item for item in shapes if len(item[1]) < 2]
        slots, at, self.matrices = [], 0, 0
        for name, shape in ordered:
            slots.append(Slot(name, tuple(shape), at, at + math.prod(shape)))
            at = _aligned(slots[-1].stop)
            if len(shape) >= 2:
                self.matrices = at
        self.slots, self.num_shards = tuple(slots), num_shards
        self.shard_size = _aligned(-(-at // num_shards))
        self.size = self.shard_size * num_shards
        ends = [0, *(slot.stop for slot in slots)]
        starts = [*(slot.start for slot in slots), self.size]
        self.gaps = tuple(slice(a, b) for a, b in zip(ends, starts) if a < b)

    def spans(self, index: int) -> Iterator[Span]:
        """What part `index` has of each parameter; parameters that it has nothing of are left out."""
        first, last = index * self.shard_size, (index + 1) * self.shard_size
        for slot in self.slots:
            start, stop = max(slot.start, first), min(slot.stop, last)
            if start < stop:
                yield Span(slot, start - slot.start, stop - slot.start, start - first)

    def decayed(self, index: int) -> int:
        """Elements at the beginning of part `index` that belong to matrices."""
        return min(max(self.matrices - index * self.shard_size, 0), self.shard_size)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter as a view of a whole flat buffer."""
        return {slot.name: flat[slot.start : slot.stop].view(slot.shape) for slot in self.slots}


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
