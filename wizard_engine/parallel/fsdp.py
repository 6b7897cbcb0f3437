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

from .collectives import all_gather, all_gather_rows, reduce_scatter
from .context import ParallelContext
from .flat_layout import Slot
from .fsdp_state import ShardedState
from .fsdp_units import Flat, Unit, UnitSpec
from .mesh import Mesh
from .offload import DONE, Event, Link
from .shard_spec import Partition, as_matrix

T = TypeVar("T")
FORWARD, BACKWARD = "forward", "backward"


class Sharded(ShardedState):
    """A module whose parameters are divided over the ranks of a mesh; `parallelize` makes it.

    Args:
        units, divisions, host, link: as in ShardedState.
        spread: what else the model divides among ranks.   dummy: a pass of the model over a row of no weight, backward
            too if told so.
        whole: keep gradients of whole units between the micro-batches of a step, and reduce in the last alone.
    Attributes:
        last: whether the coming backward is the step's last (see `paced`).
        gathered_bytes, reduced_bytes, replicated_bytes: sizes of the whole buffers of all collectives so far.
    """

    def __init__(
        self, units: Sequence[UnitSpec], mesh: Mesh, *, whole: bool = False, host: bool = False,
        partitions: Mapping[str, Partition] | None = None, parallel: ParallelContext | None = None,
        dummy: Callable[[bool], None] | None = None, link: Link | None = None,
    ) -> None:  # fmt: skip
        super().__init__(units, mesh, host=host, partitions=partitions, link=link)
        self.whole, self.parallel, self.dummy = whole, parallel, dummy
        self.last, self.gathered_bytes, self.reduced_bytes, self.replicated_bytes = True, 0, 0, 0
        self._phase, self._is_gathered = FORWARD, False
        self._flat: Tensor | None = None
        self._spare: Tensor | None = None
        self._spare_sent: Event = DONE
        self._reducing: tuple[Any, Flat, Tensor | None, Tensor] | None = None
        # The output of every other unit says when its backward comes.
        for unit in (*self.resident, *self.units[-1:]):
            for flat in unit.flats:
                self._hook_gradients(flat)
        self._place_views()
        self.publish()

    def _hook_gradients(self, flat: Flat) -> None:
        if not flat.trains:
            return
        if self.keeps_gradients:
            for parameter, view in flat.pairs(flat.gradient):
                parameter.grad = view
            return
        # Parameters keep their hooks alive: through references to what holds the parameters, nothing would ever go.
        sharded_ref, flat_ref = weakref.ref(self), weakref.ref(flat)

        def hook_of(slot: Slot) -> Callable[[nn.Parameter], None]:
            def hook(parameter: nn.Parameter) -> None:
                sharded = sharded_ref()
                if sharded is not None and sharded.is_sharded:
                    sharded._start_backward()
                elif sharded is not None:
                    grad, parameter.grad = parameter.grad, None
                    sharded._accumulator.add(flat_ref(), slot, grad)

            return hook

        for parameter, slot in zip(flat.parameters, flat.layout.slots):
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(hook_of(slot))

    # All at once

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter whole and readable inside the block, which takes the model's own size; every rank enters."""
        if not self.is_sharded or self._is_gathered:
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
                [(p, self._assemble(slot.name, view)) for (p, view), slot in zip(flat.pairs(whole), flat.layout.slots)]
            )
        if self.parallel is not None:
            self.parallel.is_gathered = True
        self._is_gathered = True
        try:
            yield
        finally:
            self._is_gathered = False
            if self.parallel is not None:
                self.parallel.is_gathered = False
            self.forget()

    def _assemble(self, name: str, local: Tensor) -> Tensor:
        """A whole parameter from what each rank of its axis has."""
        partition = self.partitions.get(name)
        if partition is None or partition.axis.size == 1:
            return local
        shards, _ = all_gather_rows(local.reshape(1, -1), partition.axis)
        whole = local.new_empty(partition.shape)
        matrix = whole.view(as_matrix(partition.shape))
        for index, values in enumerate(shards):
            for tile in partition.shard(index).slices(0, values.numel()):
                tile.inside(matrix).copy_(tile.of(values))
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
        if not self.is_sharded:
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
            if unit.trains and not unit.passed and self.is_sharded:
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
        grads = unit.grads or self._room(unit)
        for flat, whole in zip(unit.flats, grads):
            if not flat.trains:
                continue
            for parameter, slot in zip(flat.parameters, flat.layout.slots):
                view = whole[slot.start : slot.stop].view(slot.shape)
                if parameter.grad is not None:
                    view.add_(parameter.grad) if unit.grads else view.copy_(parameter.grad)
                    parameter.grad = None
                elif not unit.grads:
                    view.zero_()
            for gap in flat.layout.gaps:
                whole[gap].zero_()
        if self.whole and not self.last:
            unit.grads = grads
            return
        unit.grads = []
        for flat, whole in zip(unit.flats, grads):
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

    def _reduce(self, flat: Flat, grads: Tensor) -> None:
        if flat.gradient is None:
            flat.gradient = torch.empty(flat.layout.shard_size, dtype=self.master_dtype, device=self.device)
        direct = flat.fresh and not self.offloads
        if not direct and self._spare is None:
            size = self._largest(lambda flat: flat.layout.shard_size)
            self._spare = torch.empty(size, dtype=self.master_dtype, device=self.device)
        out = flat.gradient if direct else self._spare[: flat.layout.shard_size]
        # What was there before has left for host memory.
        self._spare_sent.wait()
        work = None
        if flat.axis.size == 1:
            out.copy_(grads)
        else:
            self.reduced_bytes += grads.numel() * grads.element_size()
            work = reduce_scatter(out, grads, group=flat.axis.reduce, async_op=True)
        self._reducing = work, flat, None if direct else out, grads
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
        if self.is_sharded and not self._is_gathered:
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
            elif self.is_sharded and not self.offloads:
                flat.gradient = None
        for unit in (*self.units, *self.resident):
            unit.grads = []
            for parameter in (p for flat in unit.flats for p in flat.parameters if self.is_sharded):
                parameter.grad = None

    def expect(self, backwards: int) -> None:
        """So many backward passes come next."""
        if self._accumulator is not None and backwards > 1:
            self._accumulator.multiple = True

    def finish(self) -> None:
        """The step's last backward is done: sum the gradients over the copies of the model."""
        for flat in self.training:
            if self.is_sharded and flat.fresh:
                if flat.gradient is None:
                    flat.gradient = torch.empty(flat.layout.shard_size, dtype=self.master_dtype, device=self.device)
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


def sharded(module: nn.Module) -> Sharded | None:
    """What `parallelize` made of a module; None for a plain one."""
    return getattr(module, "_sharded", None)


def lockstep(items: Iterable[T], *modules: nn.Module, backward: bool) -> Iterator[T]:
    """The items, one pass over each module for each; a rank with fewer of them takes part in the others' collectives.

    Args:
        backward: whether a pass has a backward.   modules: those that every item runs through, in this order.
    """
    items = list(items)
    all_engines = [engine for engine in map(sharded, modules) if engine is not None]
    for engine in all_engines if backward else ():
        engine.expect(len(items))
    engines = [engine for engine in all_engines if engine.is_sharded]
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
