"""Fully sharded data parallelism over flat buffers: when units are gathered, and when their gradients are reduced.

A unit is the set of parameters that is gathered at once: a transformer block, its experts, the embedding, the last norm
with the head. The parameters of a unit are views of one flat buffer. Every rank of an axis keeps an equal shard of it:
fp32 master, fp32 gradient and, where the model computes in another dtype, a copy in that dtype. Two gather buffers hold
the gathered units in turn, so that unit i computes while unit i + 1 arrives:

    forward    wait for unit i, start to gather unit i + 1 (into the buffer of i - 1, which is done), compute i
    backward   wait for unit i, start to gather unit i - 1 (into the buffer of i + 1), reduce the gradients of i + 1,
               compute i

Once all gradients of a unit exist, they are copied into a flat fp32 buffer and summed by a reduce-scatter, which
overlaps the backward of the next unit. Nothing is averaged: the losses know their denominator. Gathers and reductions
have separate communicators. Small units that the whole pass needs (a tied embedding, the scores of a reward model) are
resident: they stay gathered.

With tensor or expert parallelism, the flat buffers hold this rank's rows, columns or experts, and their axis joins the
ranks that have the same ones. Parameters that every rank of a copy uses with different tokens (norms, routers) are
sharded over all ranks of the copy. So each element has one owner, its gradient is the sum over all tokens, and a norm
over all owners counts it once.

Peak memory of a rank: its shards, two gathered units, the gradients of a unit in fp32 and of one in the compute dtype,
the resident units, and the activations (planning/estimate.py adds them up). A parameter whose unit is not gathered
reads as NaN.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import all_gather, all_gather_rows
from .context import ParallelContext
from .flat_layout import Slot
from .fsdp_reduce import GradientReducer
from .fsdp_state import ShardedState
from .fsdp_units import Flat, Unit, UnitSpec
from .mesh import Mesh
from .offload import Link
from .shard_spec import Partition, as_matrix

T = TypeVar("T")
FORWARD, BACKWARD = "forward", "backward"


class Sharded(ShardedState):
    """A module whose parameters are sharded over the ranks of a mesh; `parallelize` makes it.

    Args:
        units, partitions, host, link: as in ShardedState.
        parallel: the model's tensor, context and expert parallelism.   dummy: runs a forward, and on request a
            backward, over a pack without weight in the loss.
        whole: as in GradientReducer.
    Attributes:
        reducer: of this module's gradients; `lockstep` tells it which backward is the step's last.
        gathered_bytes, replicated_bytes: full buffer sizes of all collectives so far.
    """

    def __init__(
        self,
        units: Sequence[UnitSpec],
        mesh: Mesh,
        *,
        whole: bool = False,
        host: bool = False,
        partitions: Mapping[str, Partition] | None = None,
        parallel: ParallelContext | None = None,
        dummy: Callable[[bool], None] | None = None,
        link: Link | None = None,
    ) -> None:
        super().__init__(units, mesh, host=host, partitions=partitions, link=link)
        self.parallel, self.dummy, self.gathered_bytes, self.replicated_bytes = parallel, dummy, 0, 0
        every_unit = (*self.units, *self.resident)
        self.reducer = GradientReducer(every_unit, self.master_dtype, self.device, self._gradient_offload, whole=whole)
        self._phase, self._is_gathered = FORWARD, False
        # A gradient hook on the output of every other unit starts its backward. Resident units have no such moment,
        # and the last unit's backward comes first, so their parameters announce it.
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
        # Parameters keep their hooks alive. A strong reference back to the engine would be a cycle through autograd,
        # which the garbage collector cannot see, and the model would never be freed.
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

    # All units at once

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside the block every parameter is whole and readable, at the memory of the full model; collective."""
        if not self.is_sharded or self._is_gathered:
            yield
            return
        self.forget()
        works, views = [], []
        # All gathers start before the first wait, so that they run back to back.
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
        """A whole parameter out of the tp or ep shards of the ranks of its axis."""
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
            self._require_gathered(unit)

    def enter(self, unit: Unit) -> None:
        """The forward of a unit is about to run: wait for it, and prefetch the next unit."""
        if self._is_gathered:
            return
        self._require_gathered(unit)
        # A recomputed forward runs in the backward, where the next unit to prefetch is the one before.
        if self._phase is FORWARD and unit.index + 1 < len(self.units):
            self._start_gather(self.units[unit.index + 1])

    def _start_gather(self, unit: Unit) -> None:
        """Start to gather a unit, unless its buffer already has it."""
        gather_buffer = unit.gather_buffer
        if gather_buffer.owner is unit:
            return
        # A gather that nobody has waited for may still write into the buffer.
        for work in gather_buffer.works:
            work.wait()
        # The former owner is done with its weights; its parameters read as NaN from here on.
        if gather_buffer.owner is not None:
            gather_buffer.owner.detach()
        gather_buffer.owner = unit
        works = [self._gather(whole, flat) for flat, whole in zip(unit.flats, unit.full_tensors())]
        gather_buffer.works = [work for work in works if work is not None]

    def _require_gathered(self, unit: Unit) -> None:
        """Wait until a unit is gathered, and point its parameters at the buffer."""
        if not self.is_sharded:
            return
        self._start_gather(unit)
        for work in unit.gather_buffer.works:
            work.wait()
        unit.gather_buffer.works = []
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
        """The gradient of a unit's output has arrived, so the backward of all later units is done.

        Args:
            also: a second unit, which the recomputation of this unit's block needs.
        """
        if self._is_gathered:
            return
        self._start_backward()
        done = [u for u in self.units[unit.index + 1 :] if u.trains and not u.grads_sent]
        # Gathers are queued before reductions: this unit's backward waits for them, and for no reduction.
        for needed in (unit, also):
            if needed is not None and needed.spec.needs_weights:
                self._require_gathered(needed)
        # With `also`, both buffers hold units that are in use, and there is none to prefetch into.
        if unit.index > 0 and also is None:
            former = self.units[unit.index - 1]
            if former.spec.needs_weights and former.index >= self.first_trained:
                self._start_gather(former)
        for u in reversed(done):
            self.reducer.send(u)

    @property
    def first_trained(self) -> int:
        """The first unit whose output has a gradient."""
        return next((unit.index for unit in self.units if unit.trains), len(self.units))

    def _start_backward(self) -> None:
        if self._phase is not BACKWARD:
            self._phase = BACKWARD
            # Autograd calls back when the whole graph is done; the last units have no later hook to send them.
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def end_backward(self) -> None:
        """The backward is over: reduce the gradients that are left, and wait for all reductions."""
        for unit in (*reversed(self.units), *self.resident):
            if unit.trains and not unit.grads_sent and self.is_sharded:
                self.reducer.send(unit)
        self.reducer.wait()
        self.reducer.release()
        for unit in (*self.units, *self.resident):
            unit.grads_sent = False
        self._phase = FORWARD

    def idle(self, *, backward: bool) -> None:
        """Take part in the collectives of a forward, and with `backward` of a backward, without a batch."""
        if self.is_sharded and not self._is_gathered:
            self.dummy(backward)

    # The step

    def zero_grad(self, *, multiple: bool = False) -> None:
        """Begin a step.

        Args:
            multiple: more than one backward will come, although `lockstep` does not know: gradients are summed in the
                master dtype from the first one on, so that buffers of both dtypes never exist at once.
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
            unit.full_grads = []
            for parameter in (p for flat in unit.flats for p in flat.parameters if self.is_sharded):
                parameter.grad = None

    def expect(self, backwards: int) -> None:
        """Announce the number of backward passes of this step."""
        if self._accumulator is not None and backwards > 1:
            self._accumulator.multiple = True

    def finish(self) -> None:
        """The step's last backward is done: sum the gradients over the replicas of the model."""
        # A flat that no backward of this step reached: its buffer may hold old values.
        for flat in self.training:
            if self.is_sharded and flat.fresh:
                if flat.gradient is None:
                    flat.gradient = torch.empty(flat.layout.shard_size, dtype=self.master_dtype, device=self.device)
                flat.gradient.zero_()
                flat.fresh = False
        if self.mesh.replicate.size == 1:
            return
        for flat, gradient in self._ready_grads():
            self.replicated_bytes += gradient.nbytes
            if self.offloads:
                self._sum_over_copies(flat, gradient)
            else:
                dist.all_reduce(gradient, group=self.mesh.replicate.group)

    def _sum_over_copies(self, flat: Flat, gradient: Tensor) -> None:
        """Sum a gradient in host memory over the replicas, on the device."""
        there = torch.empty_like(gradient, device=self.device)
        self.link.copy(there, gradient).wait()
        dist.all_reduce(there, group=self.mesh.replicate.group)
        flat.grad_copied = self.link.copy(gradient, there)


def sharded(module: nn.Module) -> Sharded | None:
    """The engine that `parallelize` attached to a module; None for a plain module."""
    return getattr(module, "_sharded", None)


def lockstep(items: Iterable[T], *modules: nn.Module, backward: bool) -> Iterator[T]:
    """Yield the items, and keep ranks with fewer of them in step: they run dummy passes for the others' collectives.

    Args:
        items: each stands for one pass over every module.   modules: in the order in which a pass runs through them.
        backward: whether a pass has a backward.
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
    # Every rank runs as many passes as the one with the most items: a missing pass would hang its gathers.
    most = int(count)
    for number in range(most):
        for engine in engines:
            engine.reducer.is_last_backward = number + 1 == most
        if number < len(items):
            yield items[number]
        else:
            for engine in engines:
                engine.idle(backward=backward)
    for engine in engines:
        engine.reducer.is_last_backward = True
