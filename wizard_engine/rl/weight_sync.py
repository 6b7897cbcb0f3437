"""Weights from a trainer that is divided over ranks to a sampler that is divided otherwise, over the same ranks.

Nothing goes through a disk or a server. What every rank sends to whom is planned once, from what all of them have said
of their parts; then each bucket of parameters is packed, exchanged, and written in place. A checksum of both sides that
does not depend on the division says whether it arrived.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from wizard_engine.parallel.fsdp import Sharded
from wizard_engine.parallel.mesh import Axis
from wizard_engine.parallel.reductions import gather_along
from wizard_engine.parallel.shard_spec import ShardSpec, Slice, as_matrix

# Bytes of whole parameters that move at once.
BUCKET_BYTES = 256 * 2**20
# Elements that a checksum looks at at once.
CHUNK = 2**22
GOLDEN = -7046029254386353131


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of what a cut says of a parameter."""

    name: str
    cut: ShardSpec
    start: int
    stop: int

    def slices(self) -> Iterator[Slice]:
        """The elements as rectangles."""
        return self.cut.slices(self.start, self.stop)


@dataclass(frozen=True)
class Move:
    """A rectangle that one rank has and another wants: where it stands in the part that it is of, and in the other."""

    name: str
    source: int
    held: Slice
    target: int
    wanted: Slice
    common: Slice


def moves(have: Sequence[Part], want: Sequence[Part]) -> list[Move]:
    """What of some parts others want, in the order of the parts."""
    by_name: dict[str, list[int]] = {}
    for target, part in enumerate(want):
        by_name.setdefault(part.name, []).append(target)
    found = []
    for source, mine in enumerate(have):
        for target in by_name.get(mine.name, ()):
            for held in mine.slices():
                for wanted in want[target].slices():
                    common = held.overlap(wanted)
                    if common is not None:
                        found.append(Move(mine.name, source, held, target, wanted, common))
    return found


class HandOver:
    """Moves the weights of a divided model into tensors that another division of it has.

    Args:
        trainer: what divides the model.   targets: parameter -> this rank's tensor, contiguous.
        cuts: parameter -> what that is of the whole one.
    Raises:
        ValueError: the ranks do not have, together, what one of them wants.
    """

    def __init__(self, trainer: Sharded, targets: dict[str, Tensor], cuts: dict[str, ShardSpec]) -> None:
        self.trainer, self.targets, self.axis = trainer, targets, trainer.mesh.copy
        self.have = [
            Part(n, trainer.shard_specs[n], at, at + x.numel()) for n, at, x in trainer.weight_shards(exact=False)
        ]
        self.want = [Part(name, cuts[name], 0, target.numel()) for name, target in targets.items()]
        everyone = gather_along(self.axis, (self.have, self.want))
        self.outgoing = [moves(self.have, want) for _, want in everyone]
        self.incoming = [moves(have, self.want) for have, _ in everyone]
        covered = dict.fromkeys(targets, 0)
        for move in (m for row in self.incoming for m in row):
            covered[move.name] += move.common.size
        for name, target in targets.items():
            if covered[name] != target.numel():
                raise ValueError(
                    f"{name}: expected {target.numel()} elements from all ranks, got {covered[name]}; the trainer's "
                    "division does not hold each element once"
                )
        self.buckets = list(self._buckets())
        self.moved_bytes = 0

    def _buckets(self) -> Iterator[set[str]]:
        """Parameters that move together, the same on every rank."""
        names: set[str] = set()
        size = 0
        for name, shape in self.trainer.shapes.items():
            bytes_ = math.prod(shape) * self.targets[name].element_size()
            if names and size + bytes_ > BUCKET_BYTES:
                yield names
                names, size = set(), 0
            names.add(name)
            size += bytes_
        if names:
            yield names

    @torch.no_grad()
    def run(self) -> None:
        """Move all weights; every rank makes the call."""
        values = [x for _, _, x in self.trainer.weight_shards(exact=False)]
        for names in self.buckets:
            for move in self.outgoing[self.axis.index]:
                if move.name in names:
                    self._place(move).copy_(self._found(move, values))
            if self.axis.size > 1:
                self._exchange(names, values)

    def _exchange(self, names: set[str], values: list[Tensor]) -> None:
        own = self.axis.index
        sent = [[m for m in row if m.name in names and r != own] for r, row in enumerate(self.outgoing)]
        came = [[m for m in row if m.name in names and r != own] for r, row in enumerate(self.incoming)]
        sizes, counts = ([sum(m.common.size for m in row) for row in rows] for rows in (sent, came))
        like = next(iter(self.targets.values()))
        pieces = [self._found(m, values).reshape(-1) for row in sent for m in row]
        packed = torch.cat(pieces) if pieces else like.new_empty(0)
        arrived = like.new_empty(sum(counts))
        dist.all_to_all_single(arrived, packed.to(like.dtype), counts, sizes, group=self.axis.group)
        self.moved_bytes += packed.nbytes
        at = 0
        for move in (m for row in came for m in row):
            box = move.common
            self._place(move).copy_(arrived[at : at + box.size].view(box.rows, box.columns))
            at += box.size

    def _found(self, move: Move, values: list[Tensor]) -> Tensor:
        """Where this rank has a rectangle."""
        return move.held.crop(move.held.of(values[move.source]), move.common)

    def _place(self, move: Move) -> Tensor:
        """Where this rank wants it."""
        return move.wanted.crop(move.wanted.of(self.targets[move.name].view(-1)), move.common)

    def stamp_of_sampler(self, tp: Axis, ep: Axis) -> int:
        """Checksum of the weights that this rank's sampler has, with those of the ranks that divide it."""
        own = checksum(
            (part.name, part.cut, part.start, self.targets[part.name].view(-1))
            for part in self.want
            if not part.cut.is_whole or max(tp.index, ep.index) == 0
        )
        if tp.size > 1 or ep.size > 1:
            total = torch.tensor([own], dtype=torch.int64, device=next(iter(self.targets.values())).device)
            dist.all_reduce(total, group=(tp if tp.size > 1 else ep).group)
            own = int(total)
        return own


def trainer_checksum(trainer: Sharded) -> int:
    """Checksum of a divided model's weights as it computes with them; every rank of a copy makes the call."""
    own = checksum((name, trainer.shard_specs[name], start, x) for name, start, x in trainer.weight_shards(exact=False))
    if trainer.mesh.copy.size > 1:
        total = torch.tensor([own], dtype=torch.int64, device=trainer.device)
        dist.all_reduce(total, group=trainer.mesh.copy.group)
        own = int(total)
    return own


@torch.no_grad()
def checksum(parts: Iterable[tuple[str, ShardSpec, int, Tensor]]) -> int:
    """Sum over elements of their bits times an odd number made of parameter and place, modulo 2^64.

    Sums over ranks, whatever each of them has, are the same as one over whole parameters.

    Args:
        parts: (parameter, cut, start, values): elements from `start` on of what the cut says of the parameter.
    """
    total: Tensor | None = None
    for name, cut, start, values in parts:
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        width = as_matrix(cut.shape)[1]
        for box in cut.slices(start, start + values.numel()):
            own = box.of(values.view(-1))
            rows = max(1, CHUNK // max(1, box.columns))
            column = torch.arange(box.column, box.column + box.columns, device=values.device)
            for row in range(0, box.rows, rows):
                part = own[row : row + rows]
                first = box.row + row
                place = torch.arange(first, first + part.shape[0], device=values.device)[:, None] * width + column
                bits = part.contiguous().view(_BITS[part.element_size()]).long()
                partial = (bits * ((place * GOLDEN + salt) | 1)).sum()
                total = partial if total is None else total + partial
    return 0 if total is None else int(total)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
