"""Rows and columns of a parameter on one rank of tensor or expert parallelism.

Every parameter is treated as a matrix whose columns are the last dim. A rank has an even share of each block of rows
(q, k and v of a fused projection; gate and up; experts; vocabulary entries), or an even share of the columns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .mesh import Axis


@dataclass(frozen=True)
class Slice:
    """A rectangle of a parameter: `rows` from `row` on, `columns` from `column` on.

    Its values are contiguous among a rank's local values, row-major, from `offset` on.
    """

    row: int
    rows: int
    column: int
    columns: int
    offset: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def of(self, values: Tensor) -> Tensor:
        """(rows, columns) view of a rank's local values (n,)."""
        return values[self.offset : self.offset + self.size].view(self.rows, self.columns)

    def overlap(self, other: "Slice") -> "Slice | None":
        """The intersection of two rectangles, with offset 0; None where it is empty."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Slice(row, rows, column, columns, 0) if rows > 0 and columns > 0 else None

    def crop(self, values: Tensor, inner: "Slice") -> Tensor:
        """The view of a rectangle inside this one, out of this one's values (rows, columns)."""
        row, column = inner.row - self.row, inner.column - self.column
        return values[row : row + inner.rows, column : column + inner.columns]

    def inside(self, matrix: Tensor) -> Tensor:
        """(rows, columns) view of the whole parameter as a matrix."""
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]


@dataclass(frozen=True)
class ShardSpec:
    """Rows and columns of a parameter on one rank.

    Attributes:
        shape: of the whole parameter.   rows: ranges [first, last) in order.   columns: one range [first, last).
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "ShardSpec":
        """All of a parameter."""
        height, width = as_matrix(shape)
        return cls(tuple(shape), ((0, height),), (0, width))

    @property
    def is_whole(self) -> bool:
        """Whether it covers the whole parameter."""
        return self == ShardSpec.whole(self.shape)

    @property
    def height(self) -> int:
        """Rows."""
        return sum(last - first for first, last in self.rows)

    @property
    def width(self) -> int:
        """Columns."""
        return self.columns[1] - self.columns[0]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local parameter."""
        if len(self.shape) < 2:
            return self.shape
        inner = math.prod(self.shape[1:-1])
        return (self.height // inner, *self.shape[1:-1], self.width)

    def slices(self, start: int, stop: int) -> Iterator[Slice]:
        """Elements [start, stop) of the local parameter, in row-major order, as rectangles."""
        at = start
        while at < stop:
            row, column = divmod(at, self.width)
            count, length = (stop - at) // self.width, self.width
            # A range that starts or ends inside a row gives that row a rectangle of its own.
            if column or not count:
                count, length = 1, min(self.width - column, stop - at)
            for first, height in self._runs(row, count):
                yield Slice(first, height, self.columns[0] + column, length, at - start)
                at += height * length

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The same elements as contiguous ranges of the whole parameter: (first, offset in the local range, length)."""
        width = as_matrix(self.shape)[1]
        for tile in self.slices(start, stop):
            first = tile.row * width + tile.column
            if tile.columns == width:
                yield first, tile.offset, tile.size
            else:
                for row in range(tile.rows):
                    yield first + row * width, tile.offset + row * tile.columns, tile.columns

    def _runs(self, row: int, count: int) -> Iterator[tuple[int, int]]:
        """Local rows [row, row + count) as ranges (first row of the whole parameter, rows)."""
        before = 0
        for first, last in self.rows:
            low, high = max(row, before), min(row + count, before + last - first)
            if low < high:
                yield first + low - before, high - low
            before += last - first

    def of(self, whole: Tensor) -> Tensor:
        """A copy of the local parameter, out of the whole one."""
        matrix = whole.reshape(as_matrix(self.shape))
        values = torch.cat([matrix[first:last, slice(*self.columns)] for first, last in self.rows])
        return values.reshape(self.local_shape)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True)
class Partition:
    """How a parameter is sharded over an axis.

    Attributes:
        shape: of the whole parameter.   axis: of the ranks.
        blocks: heights of the blocks of rows, of each of which a rank has an even share; empty: columns are sharded.
    """

    shape: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    axis: Axis = field(default_factory=Axis)

    def shard(self, index: int) -> ShardSpec:
        """The shard of rank `index` of the axis."""
        height, width = as_matrix(self.shape)
        if not self.blocks:
            share = width // self.axis.size
            return ShardSpec(self.shape, ((0, height),), (index * share, (index + 1) * share))
        rows, at = [], 0
        for block in self.blocks:
            share = block // self.axis.size
            rows.append((at + index * share, at + (index + 1) * share))
            at += block
        return ShardSpec(self.shape, tuple(rows), (0, width))

    @property
    def local(self) -> ShardSpec:
        """This rank's shard."""
        return self.shard(self.axis.index)
