"""Resharding of the trainer's weights into the sampler's layout, over the same ranks.

Nothing goes through a disk or a server. The ranks exchange their shard specs once and plan all transfers. Each sync
then packs, exchanges and writes one bucket of parameters after another, in place. A checksum that does not depend on
the layout, taken on both sides, verifies the result.
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

# Bytes of whole parameters in one exchange.
BUCKET_BYTES = 256 * 2**20
# Elements that a checksum reads at once: few launches on a GPU, little memory (32 bytes an element) on a CPU.
CHUNK, CPU_CHUNK = 2**22, 2**18
GOLDEN = -7046029254386353131


@dataclass(frozen=True)
class WeightShard:
    """Elements [start, stop) of a rank's local values of a parameter."""

    name: str
    spec: ShardSpec
    start: int
    stop: int

    def slices(self) -> Iterator[Slice]:
        """The elements as rectangles."""
        return self.spec.slices(self.start, self.stop)


@dataclass(frozen=True)
class Transfer:
    """A rectangle that one rank sends to another.

    source, target: indices of the shards on the sending and the receiving rank.   source_slice, target_slice: their
    rectangles.   overlap: what is sent, the intersection of the two.
    """

    name: str
    source: int
    source_slice: Slice
    target: int
    target_slice: Slice
    overlap: Slice


def plan_transfers(sources: Sequence[WeightShard], targets: Sequence[WeightShard]) -> list[Transfer]:
    """Transfers from the shards of one rank to those of another, in the order of the sources."""
    by_name: dict[str, list[int]] = {}
    for index, shard in enumerate(targets):
        by_name.setdefault(shard.name, []).append(index)
    transfers = []
    for source, shard in enumerate(sources):
        for target in by_name.get(shard.name, ()):
            for source_slice in shard.slices():
                for target_slice in targets[target].slices():
                    overlap = source_slice.overlap(target_slice)
                    if overlap is not None:
                        transfers.append(Transfer(shard.name, source, source_slice, target, target_slice, overlap))
    return transfers


class WeightSync:
    """Copies the weights of a sharded model into tensors of another layout.

    Args:
        trainer: the sharded model.   targets: parameter -> this rank's tensor, contiguous.
        specs: parameter -> the shard of it that the tensor holds.
    Attributes:
        moved_bytes: that this rank has sent so far.
    Raises:
        ValueError: the ranks together do not hold every element of a target exactly once.
    """

    def __init__(self, trainer: Sharded, targets: dict[str, Tensor], specs: dict[str, ShardSpec]) -> None:
        self.trainer, self.targets, self.axis = trainer, targets, trainer.mesh.copy
        self.source_shards = [
            WeightShard(n, trainer.shard_specs[n], at, at + x.numel())
            for n, at, x in trainer.weight_shards(exact=False)
        ]
        self.target_shards = [WeightShard(name, specs[name], 0, target.numel()) for name, target in targets.items()]
        shards_of_ranks = gather_along(self.axis, (self.source_shards, self.target_shards))
        self.outgoing = [plan_transfers(self.source_shards, target_shards) for _, target_shards in shards_of_ranks]
        self.incoming = [plan_transfers(source_shards, self.target_shards) for source_shards, _ in shards_of_ranks]
        covered = dict.fromkeys(targets, 0)
        for transfer in (t for of_rank in self.incoming for t in of_rank):
            covered[transfer.name] += transfer.overlap.size
        for name, target in targets.items():
            if covered[name] != target.numel():
                raise ValueError(
                    f"{name}: expected {target.numel()} elements from all ranks, got {covered[name]}; the trainer's "
                    "division does not hold each element once"
                )
        self.buckets = list(self._buckets())
        self.moved_bytes = 0

    def _buckets(self) -> Iterator[set[str]]:
        """Names of the parameters of each exchange, the same on every rank."""
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
        """Copy all weights; every rank makes the call."""
        values = [x for _, _, x in self.trainer.weight_shards(exact=False)]
        for names in self.buckets:
            for transfer in self.outgoing[self.axis.index]:
                if transfer.name in names:
                    self._target(transfer).copy_(self._source(transfer, values))
            if self.axis.size > 1:
                self._exchange(names, values)

    def _exchange(self, names: set[str], values: list[Tensor]) -> None:
        index = self.axis.index
        sends = [[t for t in ts if t.name in names and r != index] for r, ts in enumerate(self.outgoing)]
        receives = [[t for t in ts if t.name in names and r != index] for r, ts in enumerate(self.incoming)]
        send_sizes, receive_sizes = (
            [sum(t.overlap.size for t in ts) for ts in of_ranks] for of_ranks in (sends, receives)
        )
        like = next(iter(self.targets.values()))
        rectangles = [self._source(t, values).reshape(-1) for ts in sends for t in ts]
        sent = torch.cat(rectangles) if rectangles else like.new_empty(0)
        received = like.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, sent.to(like.dtype), receive_sizes, send_sizes, group=self.axis.group)
        self.moved_bytes += sent.nbytes
        at = 0
        for transfer in (t for ts in receives for t in ts):
            overlap = transfer.overlap
            self._target(transfer).copy_(received[at : at + overlap.size].view(overlap.rows, overlap.columns))
            at += overlap.size

    def _source(self, transfer: Transfer, values: list[Tensor]) -> Tensor:
        """View of the rectangle in the trainer's shard."""
        return transfer.source_slice.crop(transfer.source_slice.of(values[transfer.source]), transfer.overlap)

    def _target(self, transfer: Transfer) -> Tensor:
        """View of the rectangle in the sampler's tensor."""
        tensor = self.targets[transfer.name].view(-1)
        return transfer.target_slice.crop(transfer.target_slice.of(tensor), transfer.overlap)

    def sampler_checksum(self, tp: Axis, ep: Axis) -> int:
        """Checksum of the sampler's weights, over the ranks that share its matrices and experts."""
        # Every rank holds the whole parameters; the first one counts them.
        local_sum = checksum(
            (shard.name, shard.spec, shard.start, self.targets[shard.name].view(-1))
            for shard in self.target_shards
            if not shard.spec.is_whole or max(tp.index, ep.index) == 0
        )
        if tp.size == 1 and ep.size == 1:
            return local_sum
        device = next(iter(self.targets.values())).device
        return _sum_over(local_sum, tp if tp.size > 1 else ep, device)


def trainer_checksum(trainer: Sharded) -> int:
    """Checksum of the weights that a sharded model computes with; every rank of a copy makes the call."""
    local_sum = checksum(
        (name, trainer.shard_specs[name], start, x) for name, start, x in trainer.weight_shards(exact=False)
    )
    copy = trainer.mesh.copy
    return _sum_over(local_sum, copy, trainer.device) if copy.size > 1 else local_sum


def _sum_over(local_sum: int, axis: Axis, device: torch.device) -> int:
    """Sum of a checksum over the ranks of an axis, modulo 2^64."""
    global_sum = torch.tensor([local_sum], dtype=torch.int64, device=device)
    dist.all_reduce(global_sum, group=axis.group)
    return int(global_sum)


@torch.no_grad()
def checksum(shards: Iterable[tuple[str, ShardSpec, int, Tensor]]) -> int:
    """Sum over elements of their bits times an odd number made of the parameter and the position, modulo 2^64.

    The sum over the ranks of any layout equals the sum over whole parameters.

    Args:
        shards: (parameter, spec, start, values): elements from `start` on of the local values that the spec describes.
    """
    result: Tensor | None = None
    for name, spec, start, values in shards:
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        width = as_matrix(spec.shape)[1]
        for tile in spec.slices(start, start + values.numel()):
            matrix = tile.of(values.view(-1))
            rows = max(1, (CPU_CHUNK if values.device.type == "cpu" else CHUNK) // max(1, tile.columns))
            column = torch.arange(tile.column, tile.column + tile.columns, device=values.device)
            for row in range(0, tile.rows, rows):
                chunk = matrix[row : row + rows]
                first = tile.row + row
                position = torch.arange(first, first + chunk.shape[0], device=values.device)[:, None] * width + column
                bits = chunk.contiguous().view(_BITS[chunk.element_size()]).long()
                chunk_sum = (bits * ((position * GOLDEN + salt) | 1)).sum()
                result = chunk_sum if result is None else result + chunk_sum
    return 0 if result is None else int(result)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
