"""What a rank keeps of a sharded module: masters, copies in the compute dtype, gradients, and the flats they stand in.

A unit is what is gathered at once; its parameters are views of flat buffers, of which every rank of an axis keeps an
equal part. When anything is gathered or reduced is the business of fsdp.py.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.grad_norm import grad_norm

from .flat_layout import Layout
from .fsdp_units import Flat, Place, Unit, UnitSpec, is_absent, merged
from .gradient_accumulation import Accumulator
from .mesh import Mesh
from .offload import DirectLink, Landing, Link, StreamLink
from .shard_spec import Partition, ShardSpec


class ShardedState:
    """This rank's parts of the parameters of a module, and numbers into and out of them.

    Args:
        units: in the order of the forward pass, resident ones anywhere; of parameters as this rank has them.
        divisions: of the parameters of which each rank of an axis has other rows or columns.
        host: keep master, gradient and (in the optimizer) moments in host memory.   link: copies between it and the
            device; None: on a CUDA stream, or none where the device is the host.
    Attributes:
        master: this rank's parts of all that trains, end to end, (P,).   training: the flats that it is made of.
        shapes: of whole parameters.   cuts: what this rank and those that divide it further have of them.
    """

    def __init__(
        self, units: Sequence[UnitSpec], mesh: Mesh, *, host: bool = False,
        partitions: Mapping[str, Partition] | None = None, link: Link | None = None,
    ) -> None:  # fmt: skip
        self.mesh, self.host = mesh, host
        self.partitions = dict(partitions or {})
        self.is_sharded = mesh.copy.size > 1
        first = next(iter(units[0].parameters.values()))
        self.device = first.device
        self.offloads = host and (link is not None or self.device.type == "cuda")
        if not (self.is_sharded or self.offloads):
            units = merged(units)
        self.link = link or (StreamLink(self.device) if self.offloads else DirectLink())
        self._landing = Landing(self.link, pinned=self.device.type == "cuda") if self.offloads else None
        self.master_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.units, self.resident = self._make_units(units)
        self.flats = [flat for unit in (*self.resident, *self.units) for flat in unit.flats]
        local = {slot.name: slot.shape for flat in self.flats for slot in flat.layout.slots}
        self.shard_specs = {
            n: self.partitions[n].local if n in self.partitions else ShardSpec.whole(s) for n, s in local.items()
        }
        self.shapes = {name: spec.shape for name, spec in self.shard_specs.items()}
        values = {name: p.detach() for spec in units for name, p in spec.parameters.items()}
        self._allocate()
        for name, value in values.items():
            if not is_absent(value):
                self._load_local(name, value)

    # Construction

    def _make_units(self, specs: Sequence[UnitSpec]) -> tuple[list[Unit], list[Unit]]:
        places = Place(), Place()
        rotating: list[Unit] = []
        resident: list[Unit] = []
        for spec in specs:
            axis = getattr(self.mesh, spec.over)
            flats = []
            for trains in (True, False):
                named = {n: p for n, p in spec.parameters.items() if p.requires_grad == trains}
                if named:
                    layout = Layout([(n, tuple(p.shape)) for n, p in named.items()], axis.size)
                    ordered = [named[slot.name] for slot in layout.slots]
                    flats.append(Flat(layout, ordered, axis, spec.dtype, trains))
            stays = spec.resident or not self.is_sharded
            index = -1 if stays else len(rotating)
            place = Place() if stays else places[index % 2]
            (resident if stays else rotating).append(Unit(spec, index, flats, place))
        return rotating, resident

    def _allocate(self) -> None:
        """This rank's parts of all flats; masters of those that train end to end."""
        storage = torch.device("cpu") if self.host and self.device.type != "meta" else self.device
        pinned = storage.type == "cpu" and self.device.type == "cuda"
        self.training = [flat for flat in self.flats if flat.trains]
        sizes = [flat.layout.shard_size for flat in self.training]
        options = {"dtype": self.master_dtype, "device": storage, "pin_memory": pinned}
        self.master = torch.zeros(sum(sizes), **options)
        # Gradients of divided models come and go, those of others stay where they are added up.
        keeps_buffer = self.keeps_gradients or (self.is_sharded and self.offloads)
        gradients = torch.zeros(sum(sizes), **options).split(sizes) if keeps_buffer else [None] * len(sizes)
        for flat, master, gradient in zip(self.training, self.master.split(sizes), gradients):
            flat.master, flat.gradient, flat.weights = master, gradient, master
            if self.offloads and flat.dtype == torch.bfloat16:
                flat.staged = torch.zeros(flat.layout.shard_size, dtype=flat.dtype, pin_memory=pinned)
        self._accumulator = None
        if not (self.is_sharded or self.keeps_gradients):
            # The sum over copies of the model is one in the master dtype.
            narrow = self.mesh.replicate.size == 1
            self._accumulator = Accumulator(
                self.training, self.master_dtype, storage, narrow=narrow, landing=self._landing
            )  # fmt: skip
        for flat in self.flats:
            if not flat.trains or self._has_copy(flat):
                flat.weights = torch.zeros(flat.layout.shard_size, dtype=flat.dtype, device=self.device)

    @property
    def copies(self) -> list[Tensor]:
        """This rank's parts in the compute dtype, of what trains and has other masters."""
        return [flat.weights for flat in self.training if self._has_copy(flat)]

    def _has_copy(self, flat: Flat) -> bool:
        return flat.dtype != self.master_dtype or self.offloads

    def _place_views(self) -> None:
        """Whole buffers, and every parameter's view in them."""
        if not self.is_sharded:
            for unit in self.resident:
                unit.views = [pair for flat in unit.flats for pair in flat.pairs(flat.weights)]
                unit.attach()
            return
        for unit in (*self.resident, *self.units):
            unit.place.size = max(unit.place.size, sum(unit.sizes))
        for unit in (*self.resident, *self.units):
            if unit.place.buffer is None:
                unit.place.buffer = torch.zeros(unit.place.size, dtype=unit.spec.dtype, device=self.device)
            unit.views = [pair for flat, whole in zip(unit.flats, unit.wholes()) for pair in flat.pairs(whole)]
            unit.detach()

    @property
    def keeps_gradients(self) -> bool:
        """Whether parameters keep their own `grad`: nothing is divided or converted."""
        return not self.is_sharded and not any(self._has_copy(flat) for flat in self.flats if flat.trains)

    # Numbers in and out

    def load(self, name: str, value: Tensor, start: int = 0) -> None:
        """Take what this rank keeps of elements [start, start + n) of a parameter; `publish` when all are there.

        Of one whose matrices are divided over ranks, the elements are all of them.
        """
        spec = self.shard_specs[name]
        if spec.is_whole:
            self._load_local(name, value, start)
        else:
            self._load_local(name, spec.of(value.view(spec.shape)))

    def _load_local(self, name: str, value: Tensor, start: int = 0) -> None:
        """The same of what this rank and those that divide it further have."""
        values = value.reshape(-1)
        for flat in self.flats:
            for span in flat.spans():
                if span.slot.name != name:
                    continue
                first, last = max(span.start, start), min(span.stop, start + values.numel())
                if first < last:
                    target = flat.master if flat.trains else flat.weights
                    at = span.offset + first - span.start
                    target[at : at + last - first].copy_(values[first - start : last - start])

    def publish(self) -> None:
        """Make the masters what the model computes with: after `put`, and after an update without `copy`."""
        for flat in self.training:
            if self._has_copy(flat):
                flat.sent.synchronize()
                flat.weights.copy_(flat.master)
        self.forget()

    def updated(self) -> None:
        """The masters have changed, and those copies with them that `segments` gave."""
        for flat in self.training if self.offloads else ():
            flat.sent.wait()
            if flat.staged is None:
                # The masters themselves are on their way.
                flat.sent.synchronize()
        self.forget()

    def forget(self) -> None:
        """Drop what is gathered: the parts have changed."""
        if not self.is_sharded:
            return
        for unit in (*self.resident, *self.units):
            for work in unit.place.works:
                work.wait()
            unit.place.works = []
            unit.place.owner = None
            unit.detach()

    def shards(self, buffer: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, start, values) in a buffer that stands like `master`: values are elements from start on of what
        `cuts` says of the parameter."""
        at = 0
        for flat in self.training:
            for span in flat.spans():
                yield span.slot.name, span.start, buffer[at + span.offset : at + span.offset + span.stop - span.start]
            at += flat.layout.shard_size

    def weight_shards(self, *, exact: bool = True) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, start, values) of every parameter, frozen ones too: masters, or (not exact) what computes."""
        for flat in self.flats:
            source = flat.master if exact and flat.trains else flat.weights
            for span in flat.spans():
                yield span.slot.name, span.start, source[span.offset : span.offset + span.stop - span.start]

    def segments(self) -> Iterator[tuple[slice, Tensor, bool, Tensor | None]]:
        """(where in `master`, the gradient there, whether of matrices, the copy to write): all that trains.

        From host memory, a flat's new weights leave for the device while the next one is updated.
        """
        at = 0
        for flat, gradient in self._landed():
            flat.sent.synchronize()
            copy = (flat.staged if self.offloads else flat.weights) if self._has_copy(flat) else None
            first = 0
            for size, decayed in zip(flat.halves(), (True, False)):
                where = slice(first, first + size)
                if size:
                    there = None if copy is None else copy[where]
                    yield slice(at + first, at + first + size), gradient[where], decayed, there
                first += size
            if self.offloads:
                flat.sent = self.link.copy(flat.weights, flat.master if flat.staged is None else flat.staged)
            at += flat.layout.shard_size

    # Gradients

    def _landed(self, *, last_first: bool = False) -> Iterator[tuple[Flat, Tensor]]:
        """Every flat that trains with its gradient, as soon as that is whole and here."""
        for flat in reversed(self.training) if last_first else self.training:
            if self._accumulator is not None:
                self._accumulator.settle(flat)
            elif self.offloads:
                self._landing.settle()
                flat.landed.synchronize()
            yield flat, flat.gradient

    @property
    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradient, of each flat in `training`, between `finish` and `zero_grad`."""
        return [gradient for _, gradient in self._landed()]

    def gradient(self) -> Tensor:
        """A copy of them that stands like `master`."""
        wide = [gradient.to(self.master_dtype) for gradient in self.gradients]
        return torch.cat(wide) if wide else self.master.clone()

    def norm(self, buffer: Tensor | None = None) -> Tensor:
        """() fp64 on the device: Euclidean norm over all ranks of a buffer that stands like `master`; default: of the
        gradient. Nothing waits for the device, but where the gradient is in host memory."""
        if not self.master.numel():
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norm = grad_norm(self._norm_pieces(buffer), reduce=self._sum_over_copy if self.is_sharded else None)
        return norm.to(self.device, non_blocking=True)

    def _norm_pieces(self, buffer: Tensor | None) -> Iterator[Tensor]:
        if buffer is None:
            # In the order in which they come to host memory.
            pieces = self._landed(last_first=self.offloads)
        else:
            pieces = zip(self.training, buffer.split([flat.layout.shard_size for flat in self.training]))
        for flat, piece in pieces:
            # Chunks of the CPU's sums begin with the matrices and with the vectors.
            yield from piece.split([n for n in flat.halves() if n]) if piece.device.type == "cpu" else (piece,)

    def _sum_over_copy(self, total: Tensor) -> None:
        """Add a sum of squares up over the ranks of a copy of the model: no element is in the parts of two of them."""
        there = total.to(self.device)
        dist.all_reduce(there, group=self.mesh.copy.group)
        if there is not total:
            total.copy_(there)
