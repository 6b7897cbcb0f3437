"""State of a sharded module on one rank: masters, copies in the compute dtype, gradients, and their flat buffers.

A unit is gathered at once. Its parameters are views of flat buffers, of which every rank of an axis keeps an equal
shard. fsdp.py decides when units are gathered and gradients reduced.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.grad_norm import grad_norm

from .flat_layout import Layout
from .fsdp_units import Flat, GatherBuffer, Unit, UnitSpec, is_absent, merged
from .gradient_accumulation import Accumulator
from .mesh import Mesh
from .offload import DirectLink, GradientOffload, Link, StreamLink
from .shard_spec import Partition, ShardSpec


class ShardedState:
    """This rank's shards of the parameters of a module, with access to their values.

    Args:
        units: in the order of the forward pass, resident ones anywhere. Their parameters are already local: tp and ep
            have sharded them.
        partitions: of the parameters that tp or ep shards.
        host: keep masters, gradients and (in the optimizer) moments in host memory.   link: copies between host memory
            and the device; None: a CUDA stream on a GPU, a plain copy on the CPU.
    Attributes:
        master: (P,) this rank's shards of all trained parameters, end to end.   training: the flats that it covers.
        shapes: of whole parameters.   shard_specs: rows and columns that this rank has, before the flat sharding.
    """

    def __init__(
        self,
        units: Sequence[UnitSpec],
        mesh: Mesh,
        *,
        host: bool = False,
        partitions: Mapping[str, Partition] | None = None,
        link: Link | None = None,
    ) -> None:
        self.mesh, self.host = mesh, host
        self.partitions = dict(partitions or {})
        self.is_sharded = mesh.copy.size > 1
        first = next(iter(units[0].parameters.values()))
        self.device = first.device
        self.offloads = host and (link is not None or self.device.type == "cuda")
        if not (self.is_sharded or self.offloads):
            # Without gathers there is nothing to overlap: one flat per dtype makes the update one launch.
            units = merged(units)
        self.link = link or (StreamLink(self.device) if self.offloads else DirectLink())
        self._gradient_offload = (
            GradientOffload(self.link, pinned=self.device.type == "cuda") if self.offloads else None
        )
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
        # Two buffers in turn: while one holds the unit that computes, the next unit is gathered into the other.
        gather_buffers = GatherBuffer(), GatherBuffer()
        rotating: list[Unit] = []
        resident: list[Unit] = []
        for spec in specs:
            axis = getattr(self.mesh, spec.over)
            flats = []
            for trains in (True, False):
                named = {n: p for n, p in spec.parameters.items() if p.requires_grad == trains}
                # Frozen and trained parameters have separate flats: only the latter have masters and gradients.
                if named:
                    layout = Layout([(n, tuple(p.shape)) for n, p in named.items()], axis.size)
                    ordered = [named[slot.name] for slot in layout.slots]
                    flats.append(Flat(layout, ordered, axis, spec.dtype, trains))
            stays = spec.resident or not self.is_sharded
            index = -1 if stays else len(rotating)
            gather_buffer = GatherBuffer() if stays else gather_buffers[index % 2]
            (resident if stays else rotating).append(Unit(spec, index, flats, gather_buffer))
        return rotating, resident

    def _allocate(self) -> None:
        """Allocate this rank's shards of all flats; the masters stand end to end in one buffer."""
        storage = torch.device("cpu") if self.host and self.device.type != "meta" else self.device
        pinned = storage.type == "cpu" and self.device.type == "cuda"
        self.training = [flat for flat in self.flats if flat.trains]
        sizes = [flat.layout.shard_size for flat in self.training]
        options = {"dtype": self.master_dtype, "device": storage, "pin_memory": pinned}
        self.master = torch.zeros(sum(sizes), **options)
        # A sharded model on the device allocates each gradient at the first reduction of a step, and frees it after the
        # step. Gradients in host memory, and those that parameters keep, stay in place.
        keeps_buffer = self.keeps_gradients or (self.is_sharded and self.offloads)
        gradients = torch.zeros(sum(sizes), **options).split(sizes) if keeps_buffer else [None] * len(sizes)
        for flat, master, gradient in zip(self.training, self.master.split(sizes), gradients):
            flat.master, flat.gradient, flat.weights = master, gradient, master
            if self.offloads and flat.dtype == torch.bfloat16:
                flat.staged = torch.zeros(flat.layout.shard_size, dtype=flat.dtype, pin_memory=pinned)
        self._accumulator = None
        if not (self.is_sharded or self.keeps_gradients):
            # With replicas, the all-reduce sums in the master dtype, so a single gradient must be in it too.
            narrow = self.mesh.replicate.size == 1
            self._accumulator = Accumulator(
                self.training, self.master_dtype, storage, narrow=narrow, gradient_offload=self._gradient_offload
            )
        for flat in self.flats:
            if not flat.trains or self._has_copy(flat):
                flat.weights = torch.zeros(flat.layout.shard_size, dtype=flat.dtype, device=self.device)

    @property
    def copies(self) -> list[Tensor]:
        """This rank's shards in the compute dtype, of trained parameters whose masters are separate."""
        return [flat.weights for flat in self.training if self._has_copy(flat)]

    def _has_copy(self, flat: Flat) -> bool:
        return flat.dtype != self.master_dtype or self.offloads

    def _place_views(self) -> None:
        """Allocate the gather buffers, and make every parameter's view in them."""
        if not self.is_sharded:
            for unit in self.resident:
                unit.views = [pair for flat in unit.flats for pair in flat.pairs(flat.weights)]
                unit.attach()
            return
        for unit in (*self.resident, *self.units):
            unit.gather_buffer.size = max(unit.gather_buffer.size, sum(unit.sizes))
        for unit in (*self.resident, *self.units):
            if unit.gather_buffer.data is None:
                unit.gather_buffer.data = torch.zeros(
                    unit.gather_buffer.size, dtype=unit.spec.dtype, device=self.device
                )
            unit.views = [pair for flat, whole in zip(unit.flats, unit.full_tensors()) for pair in flat.pairs(whole)]
            unit.detach()

    @property
    def keeps_gradients(self) -> bool:
        """Whether each parameter's `grad` is a view of the flat gradient: nothing is sharded or converted."""
        return not self.is_sharded and not any(self._has_copy(flat) for flat in self.flats if flat.trains)

    # Access to values

    def load(self, name: str, value: Tensor, start: int = 0) -> None:
        """Load this rank's elements out of [start, start + n) of a whole parameter; call `publish` after the last.

        A parameter that tp or ep shards must come whole, in one call.
        """
        spec = self.shard_specs[name]
        if spec.is_whole:
            self._load_local(name, value, start)
        else:
            self._load_local(name, spec.of(value.view(spec.shape)))

    def _load_local(self, name: str, value: Tensor, start: int = 0) -> None:
        """`load`, of the parameter as tp and ep leave it."""
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
        """Copy the masters to the weights that compute: after `load`, and after an update without `copy`."""
        for flat in self.training:
            if self._has_copy(flat):
                flat.weights_copied.synchronize()
                flat.weights.copy_(flat.master)
        self.forget()

    def updated(self) -> None:
        """The optimizer has updated the masters, and the copies that `segments` yielded."""
        for flat in self.training if self.offloads else ():
            flat.weights_copied.wait()
            if flat.staged is None:
                # Without a staging buffer the copy reads the masters, which the next step overwrites.
                flat.weights_copied.synchronize()
        self.forget()

    def forget(self) -> None:
        """Drop all gathered weights: the shards have changed."""
        if not self.is_sharded:
            return
        for unit in (*self.resident, *self.units):
            for work in unit.gather_buffer.works:
                work.wait()
            unit.gather_buffer.works = []
            unit.gather_buffer.owner = None
            unit.detach()

    def shards(self, buffer: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, start, values) of a buffer with the layout of `master`; `start` counts elements of the parameter
        as `shard_specs` leaves it."""
        at = 0
        for flat in self.training:
            for span in flat.spans():
                yield span.slot.name, span.start, buffer[at + span.offset : at + span.offset + span.stop - span.start]
            at += flat.layout.shard_size

    def weight_shards(self, *, exact: bool = True) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, start, values) of every parameter, frozen ones too: masters, or (not exact) compute weights."""
        for flat in self.flats:
            source = flat.master if exact and flat.trains else flat.weights
            for span in flat.spans():
                yield span.slot.name, span.start, source[span.offset : span.offset + span.stop - span.start]

    def segments(self) -> Iterator[tuple[slice, Tensor, bool, Tensor | None]]:
        """(slice of `master`, its gradient, whether weight decay applies, the copy to write), over all trained flats.

        With offload, the new weights of a flat are copied to the device while the next flat is updated.
        """
        at = 0
        for flat, gradient in self._ready_grads():
            # The last step's copy to the device must have read the buffer that this update writes.
            flat.weights_copied.synchronize()
            copy = (flat.staged if self.offloads else flat.weights) if self._has_copy(flat) else None
            first = 0
            for size, decayed in zip(flat.decay_split(), (True, False)):
                where = slice(first, first + size)
                if size:
                    there = None if copy is None else copy[where]
                    yield slice(at + first, at + first + size), gradient[where], decayed, there
                first += size
            if self.offloads:
                flat.weights_copied = self.link.copy(flat.weights, flat.master if flat.staged is None else flat.staged)
            at += flat.layout.shard_size

    # Gradients

    def _ready_grads(self, *, last_first: bool = False) -> Iterator[tuple[Flat, Tensor]]:
        """Every trained flat with its gradient, each as soon as it is complete in its memory."""
        for flat in reversed(self.training) if last_first else self.training:
            if self._accumulator is not None:
                self._accumulator.settle(flat)
            elif self.offloads:
                self._gradient_offload.settle()
                flat.grad_copied.synchronize()
            yield flat, flat.gradient

    @property
    def gradients(self) -> list[Tensor]:
        """This rank's gradient shards, one per flat in `training`; valid between `finish` and `zero_grad`."""
        return [gradient for _, gradient in self._ready_grads()]

    def gradient(self) -> Tensor:
        """A copy of the gradient shards with the layout and dtype of `master`."""
        wide = [gradient.to(self.master_dtype) for gradient in self.gradients]
        return torch.cat(wide) if wide else self.master.clone()

    def norm(self, buffer: Tensor | None = None) -> Tensor:
        """() fp64 on the device: Euclidean norm over all ranks of a buffer with the layout of `master`; default: of the
        gradient. The host waits only for gradients in host memory."""
        if not self.master.numel():
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norm = grad_norm(self._norm_pieces(buffer), reduce=self._sum_over_copy if self.is_sharded else None)
        return norm.to(self.device, non_blocking=True)

    def _norm_pieces(self, buffer: Tensor | None) -> Iterator[Tensor]:
        if buffer is None:
            # The order of the backward is that in which gradients reach host memory.
            pieces = self._ready_grads(last_first=self.offloads)
        else:
            pieces = zip(self.training, buffer.split([flat.layout.shard_size for flat in self.training]))
        for flat, piece in pieces:
            # On the CPU the chunks of the sum start anew where the vectors begin.
            yield from piece.split([n for n in flat.decay_split() if n]) if piece.device.type == "cpu" else (piece,)

    def _sum_over_copy(self, total: Tensor) -> None:
        """All-reduce a sum of squares over the ranks of one copy of the model, where each element has one owner."""
        there = total.to(self.device)
        dist.all_reduce(there, group=self.mesh.copy.group)
        if there is not total:
            total.copy_(there)
