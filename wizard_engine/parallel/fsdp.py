"""Fully sharded data parallelism over flat buffers.

A unit is what is gathered at once: a transformer block, its experts apart, the embedding, the last norm with the head.
The parameters of a unit are views of one flat buffer, of which every rank of an axis keeps an equal part: fp32 master,
fp32 gradient and, where the model computes in another dtype, a copy in that. Two buffers take the gathered units in
turn:

    forward    wait for unit i, ask for unit i + 1 (into the buffer of i - 1, which is done), compute i
    backward   wait for unit i, ask for unit i - 1 (into the buffer of i + 1), send i + 1's gradients off, compute i

When a unit's gradients are all there they are copied into a flat fp32 buffer and summed by a reduce-scatter, which has
the next unit's backward to end; nothing is ever divided, for the losses know their denominator. Gathers and reductions
have communicators of their own. Small units that are needed from the first operation to the last (a tied embedding, the
scores of a reward model) stay gathered.

Where tensor-parallel ranks divide matrices, or expert-parallel ones experts, this rank's rows or columns are what its
flats hold, and the axes of the flats are the ranks that have the same; what every rank of a copy of the model uses with
tokens of its own is divided over all of them. So each element has one owner, whose gradient is the sum over all tokens,
and one norm over all owners counts it once.

Peak memory of a rank: its parts, two gathered units, a unit of gradients in fp32 and one as they come, what stays, and
the activations (planning/estimate.py adds them up). A parameter whose unit is not gathered reads as NaN.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.grad_norm import grad_norm

from .collectives import all_gather, gathered_rows, reduce_scatter
from .context import Spread
from .flat_layout import Layout, Slot
from .fsdp_units import Flat, Place, Unit, UnitSpec, is_absent, merged
from .gradient_accumulation import Accumulator
from .mesh import Mesh
from .offload import DONE, DirectLink, Event, Landing, Link, StreamLink
from .shard_spec import Cut, Division, as_matrix

T = TypeVar("T")
FORWARD, BACKWARD = "forward", "backward"


class Sharded:
    """A module whose parameters are divided over the ranks of a mesh; `parallelize` makes it.

    Args:
        units: in the order of the forward pass, resident ones anywhere; of parameters as this rank has them.
        divisions: of the parameters of which each rank of an axis has other rows or columns.
        spread: what else the model divides among ranks.   dummy: a pass of the model over a row of no weight, backward
            too if told so.
        whole: keep gradients of whole units between the micro-batches of a step, and reduce in the last alone.
        host: keep master, gradient and (in the optimizer) moments in host memory.   link: copies between it and the
            device; None: on a CUDA stream, or none where the device is the host.
    Attributes:
        master: this rank's parts of all that trains, end to end, (P,).   training: the flats that it is made of.
        shapes: of whole parameters.   cuts: what this rank and those that divide it further have of them.
        last: whether the coming backward is the step's last (see `paced`).
        gathered_bytes, reduced_bytes, replicated_bytes: sizes of the whole buffers of all collectives so far.
    """

    def __init__(
        self, units: Sequence[UnitSpec], mesh: Mesh, *, whole: bool = False, host: bool = False,
        divisions: Mapping[str, Division] | None = None, spread: Spread | None = None,
        dummy: Callable[[bool], None] | None = None, link: Link | None = None,
    ) -> None:  # fmt: skip
        self.mesh, self.whole, self.host = mesh, whole, host
        self.divisions, self.spread, self.dummy = dict(divisions or {}), spread, dummy
        self.is_divided = mesh.copy.size > 1
        self.last, self.gathered_bytes, self.reduced_bytes, self.replicated_bytes = True, 0, 0, 0
        self._phase, self._is_gathered = FORWARD, False
        self._flat: Tensor | None = None
        self._spare: Tensor | None = None
        self._reducing: tuple[Any, Flat, Tensor | None, Tensor] | None = None
        first = next(iter(units[0].parameters.values()))
        self.device = first.device
        self.offloads = host and (link is not None or self.device.type == "cuda")
        if not (self.is_divided or self.offloads):
            units = merged(units)
        self.link = link or (StreamLink(self.device) if self.offloads else DirectLink())
        self._landing = Landing(self.link, pinned=self.device.type == "cuda") if self.offloads else None
        self._spare_sent: Event = DONE
        self.master_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.units, self.resident = self._make_units(units)
        self.flats = [flat for unit in (*self.resident, *self.units) for flat in unit.flats]
        local = {slot.name: slot.shape for flat in self.flats for slot in flat.layout.slots}
        self.cuts = {n: self.divisions[n].own if n in self.divisions else Cut.whole(s) for n, s in local.items()}
        self.shapes = {name: cut.shape for name, cut in self.cuts.items()}
        values = {name: p.detach() for spec in units for name, p in spec.parameters.items()}
        self._allocate()
        for name, value in values.items():
            if not is_absent(value):
                self._put(name, value)
        self._place_views()
        self.publish()

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
            stays = spec.resident or not self.is_divided
            index = -1 if stays else len(rotating)
            place = Place() if stays else places[index % 2]
            (resident if stays else rotating).append(Unit(spec, index, flats, place))
        return rotating, resident

    def _allocate(self) -> None:
        """This rank's parts of all flats; masters of those that train end to end."""
        storage = torch.device("cpu") if self.host and self.device.type != "meta" else self.device
        pinned = storage.type == "cpu" and self.device.type == "cuda"
        self.training = [flat for flat in self.flats if flat.trains]
        sizes = [flat.layout.part for flat in self.training]
        options = {"dtype": self.master_dtype, "device": storage, "pin_memory": pinned}
        self.master = torch.zeros(sum(sizes), **options)
        # Gradients of divided models come and go, those of others stay where they are added up.
        keeps_buffer = self.keeps_gradients or (self.is_divided and self.offloads)
        gradients = torch.zeros(sum(sizes), **options).split(sizes) if keeps_buffer else [None] * len(sizes)
        for flat, master, gradient in zip(self.training, self.master.split(sizes), gradients):
            flat.master, flat.gradient, flat.weights = master, gradient, master
            if self.offloads and flat.dtype == torch.bfloat16:
                flat.staged = torch.zeros(flat.layout.part, dtype=flat.dtype, pin_memory=pinned)
        self._accumulator = None
        if not (self.is_divided or self.keeps_gradients):
            # The sum over copies of the model is one in the master dtype.
            narrow = self.mesh.replicate.size == 1
            self._accumulator = Accumulator(
                self.training, self.master_dtype, storage, narrow=narrow, landing=self._landing
            )  # fmt: skip
        for flat in self.flats:
            if not flat.trains or self._has_copy(flat):
                flat.weights = torch.zeros(flat.layout.part, dtype=flat.dtype, device=self.device)

    @property
    def copies(self) -> list[Tensor]:
        """This rank's parts in the compute dtype, of what trains and has other masters."""
        return [flat.weights for flat in self.training if self._has_copy(flat)]

    def _has_copy(self, flat: Flat) -> bool:
        return flat.dtype != self.master_dtype or self.offloads

    def _place_views(self) -> None:
        """Whole buffers, and every parameter's view in them."""
        # The output of every other unit says when its backward comes.
        for unit in (*self.resident, *self.units[-1:]):
            for flat in unit.flats:
                self._hook_gradients(flat)
        if not self.is_divided:
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
        return not self.is_divided and not any(self._has_copy(flat) for flat in self.flats if flat.trains)

    def _hook_gradients(self, flat: Flat) -> None:
        if not flat.trains:
            return
        if self.keeps_gradients:
            for parameter, view in flat.pairs(flat.gradient):
                parameter.grad = view
            return
        # Parameters keep their hooks alive: through references to what holds the parameters, nothing would ever go.
        own, flat_ref = weakref.ref(self), weakref.ref(flat)

        def hook_of(slot: Slot) -> Callable[[nn.Parameter], None]:
            def hook(parameter: nn.Parameter) -> None:
                sharded = own()
                if sharded is not None and sharded.is_divided:
                    sharded._start_backward()
                elif sharded is not None:
                    grad, parameter.grad = parameter.grad, None
                    sharded._accumulator.add(flat_ref(), slot, grad)

            return hook

        for parameter, slot in zip(flat.parameters, flat.layout.slots):
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(hook_of(slot))

    # Numbers in and out

    def put(self, name: str, value: Tensor, start: int = 0) -> None:
        """Take what this rank keeps of elements [start, start + n) of a parameter; `publish` when all are there.

        Of one whose matrices are divided over ranks, the elements are all of them.
        """
        cut = self.cuts[name]
        if cut.is_whole:
            self._put(name, value, start)
        else:
            self._put(name, cut.of(value.view(cut.shape)))

    def _put(self, name: str, value: Tensor, start: int = 0) -> None:
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
        if not self.is_divided:
            return
        for unit in (*self.resident, *self.units):
            for work in unit.place.works:
                work.wait()
            unit.place.works = []
            unit.place.owner = None
            unit.detach()

    def parts(self, buffer: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter, start, values) in a buffer that stands like `master`: values are elements from start on of what
        `cuts` says of the parameter."""
        at = 0
        for flat in self.training:
            for span in flat.spans():
                yield span.slot.name, span.start, buffer[at + span.offset : at + span.offset + span.stop - span.start]
            at += flat.layout.part

    def weight_parts(self, *, exact: bool = True) -> Iterator[tuple[str, int, Tensor]]:
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
                own = slice(first, first + size)
                if size:
                    there = None if copy is None else copy[own]
                    yield slice(at + first, at + first + size), gradient[own], decayed, there
                first += size
            if self.offloads:
                flat.sent = self.link.copy(flat.weights, flat.master if flat.staged is None else flat.staged)
            at += flat.layout.part

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter whole and readable inside the block, which takes the model's own size; every rank enters."""
        if not self.is_divided or self._is_gathered:
            yield
            return
        self.forget()
        works, views = [], []
        for unit in (*self.resident, *self.units):
            for flat in unit.flats:
                whole = torch.empty(flat.layout.size, dtype=flat.dtype, device=self.device)
                works.append(self._gather(whole, flat))
                views.append((unit, flat, whole))
        for work in works:
            if work is not None:
                work.wait()
        for unit, flat, whole in views:
            unit.attach(
                [
                    (p, self._put_together(slot.name, view))
                    for (p, view), slot in zip(flat.pairs(whole), flat.layout.slots)
                ]
            )
        if self.spread is not None:
            self.spread.whole = True
        self._is_gathered = True
        try:
            yield
        finally:
            self._is_gathered = False
            if self.spread is not None:
                self.spread.whole = False
            self.forget()

    def _put_together(self, name: str, own: Tensor) -> Tensor:
        """A whole parameter from what each rank of its axis has."""
        division = self.divisions.get(name)
        if division is None or division.axis.size == 1:
            return own
        parts, _ = gathered_rows(own.reshape(1, -1), division.axis)
        whole = own.new_empty(division.shape)
        matrix = whole.view(as_matrix(division.shape))
        for index, values in enumerate(parts):
            for box in division.cut(index).boxes(0, values.numel()):
                box.inside(matrix).copy_(box.of(values))
        return whole

    # Forward

    def begin(self) -> None:
        """A forward pass starts."""
        if self._is_gathered:
            return
        self._phase = FORWARD
        for unit in self.resident:
            self._need(unit)

    def enter(self, unit: Unit) -> None:
        """A unit's own forward is about to run."""
        if self._is_gathered:
            return
        self._need(unit)
        if self._phase is FORWARD and unit.index + 1 < len(self.units):
            self._ask(self.units[unit.index + 1])

    def _ask(self, unit: Unit) -> None:
        """Start to gather a unit, unless its place has it."""
        place = unit.place
        if place.owner is unit:
            return
        for work in place.works:
            work.wait()
        if place.owner is not None:
            place.owner.detach()
        place.owner = unit
        works = [self._gather(whole, flat) for flat, whole in zip(unit.flats, unit.wholes())]
        place.works = [work for work in works if work is not None]

    def _need(self, unit: Unit) -> None:
        """Have a unit gathered."""
        if not self.is_divided:
            return
        self._ask(unit)
        for work in unit.place.works:
            work.wait()
        unit.place.works = []
        if not unit.attached:
            unit.attach()

    def _gather(self, whole: Tensor, flat: Flat) -> Any:
        if flat.axis.size == 1:
            if whole is not flat.weights:
                whole.copy_(flat.weights)
            return None
        self.gathered_bytes += whole.numel() * whole.element_size()
        return all_gather(whole, flat.weights, group=flat.axis.group, async_op=True)

    # Backward

    def before_backward(self, unit: Unit, also: Unit | None = None) -> None:
        """The gradient of a unit's output is there: all units behind it are done.

        Args:
            also: a further unit that the recomputation of this one's block needs.
        """
        if self._is_gathered:
            return
        self._start_backward()
        done = [u for u in self.units[unit.index + 1 :] if u.trains and not u.passed]
        for needed in (unit, also):
            if needed is not None and needed.spec.needs_weights:
                self._need(needed)
        if unit.index > 0 and also is None:
            former = self.units[unit.index - 1]
            if former.spec.needs_weights and former.index >= self.first_trained:
                self._ask(former)
        for u in reversed(done):
            self._pass(u)

    @property
    def first_trained(self) -> int:
        """The first unit whose output has a gradient."""
        return next((unit.index for unit in self.units if unit.trains), len(self.units))

    def _start_backward(self) -> None:
        if self._phase is not BACKWARD:
            self._phase = BACKWARD
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def end_backward(self) -> None:
        """Nothing more comes: send what has not been sent, and wait for all of it."""
        for unit in (*reversed(self.units), *self.resident):
            if unit.trains and not unit.passed and self.is_divided:
                self._pass(unit)
        self._drain()
        self._flat = self._spare = None
        for unit in (*self.units, *self.resident):
            unit.passed = False
        self._phase = FORWARD

    def _pass(self, unit: Unit) -> None:
        """Send a unit's gradients off, unless they wait for the step's last micro-batch."""
        unit.passed = True
        self._drain()
        slopes = unit.slopes or self._room(unit)
        for flat, whole in zip(unit.flats, slopes):
            if not flat.trains:
                continue
            for parameter, slot in zip(flat.parameters, flat.layout.slots):
                own = whole[slot.start : slot.stop].view(slot.shape)
                if parameter.grad is not None:
                    own.add_(parameter.grad) if unit.slopes else own.copy_(parameter.grad)
                    parameter.grad = None
                elif not unit.slopes:
                    own.zero_()
            for gap in flat.layout.gaps:
                whole[gap].zero_()
        if self.whole and not self.last:
            unit.slopes = slopes
            return
        unit.slopes = []
        for flat, whole in zip(unit.flats, slopes):
            if flat.trains:
                self._reduce(flat, whole)

    def _room(self, unit: Unit) -> list[Tensor]:
        """For a unit's whole gradients: its own where they stay, otherwise what all units use in turn."""
        sizes = [flat.layout.size if flat.trains else 0 for flat in unit.flats]
        options = {"dtype": self.master_dtype, "device": self.device}
        if self.whole:
            return list(torch.empty(sum(sizes), **options).split(sizes))
        if self._flat is None:
            self._flat = torch.empty(self._largest(lambda flat: flat.layout.size), **options)
        return list(self._flat[: sum(sizes)].split(sizes))

    def _largest(self, size: Callable[[Flat], int]) -> int:
        units = (*self.units, *self.resident)
        return max(sum(size(flat) for flat in unit.flats if flat.trains) for unit in units)

    def _reduce(self, flat: Flat, slopes: Tensor) -> None:
        if flat.gradient is None:
            flat.gradient = torch.empty(flat.layout.part, dtype=self.master_dtype, device=self.device)
        direct = flat.fresh and not self.offloads
        if not direct and self._spare is None:
            size = self._largest(lambda flat: flat.layout.part)
            self._spare = torch.empty(size, dtype=self.master_dtype, device=self.device)
        out = flat.gradient if direct else self._spare[: flat.layout.part]
        # What was there before has left for host memory.
        self._spare_sent.wait()
        work = None
        if flat.axis.size == 1:
            out.copy_(slopes)
        else:
            self.reduced_bytes += slopes.numel() * slopes.element_size()
            work = reduce_scatter(out, slopes, group=flat.axis.reduce, async_op=True)
        self._reducing = work, flat, None if direct else out, slopes
        if direct:
            flat.fresh = False

    def _drain(self) -> None:
        """Wait for the reduction that is under way."""
        if self._reducing is None:
            return
        work, flat, out, _ = self._reducing
        self._reducing = None
        if work is not None:
            work.wait()
        if out is not None:
            if self.offloads:
                flat.landed = (self._landing.store if flat.fresh else self._landing.add)(flat.gradient, out)
                self._spare_sent = flat.landed
            else:
                flat.gradient.copy_(out) if flat.fresh else flat.gradient.add_(out)
            flat.fresh = False

    def idle(self, *, backward: bool) -> None:
        """Take part in the collectives of a pass without one's own rows; `backward`: of a backward pass too."""
        if self.is_divided and not self._is_gathered:
            self.dummy(backward)

    # The step

    def zero_grad(self, *, multiple: bool = False) -> None:
        """Begin a step.

        Args:
            multiple: more than one backward will come, though `paced` is not told so: gradients are added up in the
                master dtype from the first on, which spares the memory of both kinds at once.
        """
        if self._accumulator is not None:
            self._accumulator.begin(multiple=multiple)
        for flat in self.training:
            flat.fresh = True
            if self.keeps_gradients:
                flat.gradient.zero_()
            elif self.is_divided and not self.offloads:
                flat.gradient = None
        for unit in (*self.units, *self.resident):
            unit.slopes = []
            for parameter in (p for flat in unit.flats for p in flat.parameters if self.is_divided):
                parameter.grad = None

    def expect(self, backwards: int) -> None:
        """So many backward passes come next."""
        if self._accumulator is not None and backwards > 1:
            self._accumulator.multiple = True

    def finish(self) -> None:
        """The step's last backward is done: sum the gradients over the copies of the model."""
        for flat in self.training:
            if self.is_divided and flat.fresh:
                if flat.gradient is None:
                    flat.gradient = torch.empty(flat.layout.part, dtype=self.master_dtype, device=self.device)
                flat.gradient.zero_()
                flat.fresh = False
        if self.mesh.replicate.size == 1:
            return
        for flat, gradient in self._landed():
            self.replicated_bytes += gradient.nbytes
            if self.offloads:
                self._sum_over_copies(flat, gradient)
            else:
                dist.all_reduce(gradient, group=self.mesh.replicate.group)

    def _sum_over_copies(self, flat: Flat, gradient: Tensor) -> None:
        """The same of a gradient in host memory."""
        there = torch.empty_like(gradient, device=self.device)
        self.link.copy(there, gradient).wait()
        dist.all_reduce(there, group=self.mesh.replicate.group)
        flat.landed = self.link.copy(gradient, there)

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
        norm = grad_norm(self._norm_pieces(buffer), reduce=self._sum_over_copy if self.is_divided else None)
        return norm.to(self.device, non_blocking=True)

    def _norm_pieces(self, buffer: Tensor | None) -> Iterator[Tensor]:
        if buffer is None:
            # In the order in which they come to host memory.
            pieces = self._landed(last_first=self.offloads)
        else:
            pieces = zip(self.training, buffer.split([flat.layout.part for flat in self.training]))
        for flat, piece in pieces:
            # Chunks of the CPU's sums begin with the matrices and with the vectors.
            yield from piece.split([n for n in flat.halves() if n]) if piece.device.type == "cpu" else (piece,)

    def _sum_over_copy(self, total: Tensor) -> None:
        """Add a sum of squares up over the ranks of a copy of the model: no element is in the parts of two of them."""
        there = total.to(self.device)
        dist.all_reduce(there, group=self.mesh.copy.group)
        if there is not total:
            total.copy_(there)


def sharded(module: nn.Module) -> Sharded | None:
    """What `parallelize` made of a module; None for a plain one."""
    return getattr(module, "_sharded", None)


def paced(items: Iterable[T], *modules: nn.Module, backward: bool) -> Iterator[T]:
    """The items, one pass over each module for each; a rank with fewer of them takes part in the others' collectives.

    Args:
        backward: whether a pass has a backward.   modules: those that every item runs through, in this order.
    """
    items = list(items)
    known = [found for found in map(sharded, modules) if found is not None]
    for engine in known if backward else ():
        engine.expect(len(items))
    engines = [engine for engine in known if engine.is_divided]
    if not engines:
        yield from items
        return
    count = torch.tensor([len(items)], device=engines[0].device)
    dist.all_reduce(count, dist.ReduceOp.MAX, group=engines[0].mesh.copy.group)
    most = int(count)
    for number in range(most):
        for engine in engines:
            engine.last = number + 1 == most
        if number < len(items):
            yield items[number]
        else:
            for engine in engines:
                engine.idle(backward=backward)
    for engine in engines:
        engine.last = True
