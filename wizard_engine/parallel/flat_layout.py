"""Layout of parameters in a flat buffer that is sharded evenly over ranks."""

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
    """One rank's range of a parameter: its elements [start, stop), at `offset` in the rank's shard."""

    slot: Slot
    start: int
    stop: int
    offset: int


class Layout:
    """Matrices first, then vectors, each in the order of `shapes`; padded so that all shards have the same size.

    Attributes:
        slots: of each parameter.   size: elements with padding.   shard_size: elements of each shard.
        matrices: elements before the first vector.   gaps: ranges that belong to no parameter.
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
        """Ranges of the parameters that intersect shard `index`."""
        first, last = index * self.shard_size, (index + 1) * self.shard_size
        for slot in self.slots:
            start, stop = max(slot.start, first), min(slot.stop, last)
            if start < stop:
                yield Span(slot, start - slot.start, stop - slot.start, start - first)

    def decayed(self, index: int) -> int:
        """Elements at the start of shard `index` that belong to matrices."""
        return min(max(self.matrices - index * self.shard_size, 0), self.shard_size)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter as a view of a full flat buffer."""
        return {slot.name: flat[slot.start : slot.stop].view(slot.shape) for slot in self.slots}


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
