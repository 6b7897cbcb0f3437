"""Reduction of gradients: a unit's full gradients are summed over its axis into the shards of their owners.

One reduction is in flight at a time. It overlaps the backward of the next unit. All units share its buffers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import reduce_scatter
from .fsdp_units import Flat, Unit
from .offload import DONE, Event, GradientOffload


class GradientReducer:
    """Reduces the gradients of units, and adds the results to the gradients of the shards.

    Args:
        units: all of them.   dtype: of sums.   device: of the reductions.
        gradient_offload: moves the results to host memory; None: they stay on the device.
        whole: keep full gradients between the micro-batches of a step, and reduce them once, in the last one.
    Attributes:
        is_last_backward: whether the coming backward is the step's last.   reduced_bytes: full sizes of all reductions.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        dtype: torch.dtype,
        device: torch.device,
        gradient_offload: GradientOffload | None,
        *,
        whole: bool,
    ) -> None:
        self.units, self.dtype, self.device = units, dtype, device
        self.gradient_offload, self.whole = gradient_offload, whole
        self.is_last_backward, self.reduced_bytes = True, 0
        self._grad_buffer: Tensor | None = None
        self._reduce_out: Tensor | None = None
        self._reduce_out_copied: Event = DONE
        self._reduction: tuple[Any, Flat, Tensor | None, Tensor] | None = None

    def send(self, unit: Unit) -> None:
        """Start to reduce a unit's gradients, unless they wait for the step's last micro-batch."""
        unit.grads_sent = True
        # The flat gradient buffer is shared: the reduction before this one must have read it.
        self.wait()
        grads = unit.full_grads or self._buffers(unit)
        for flat, whole in zip(unit.flats, grads):
            if not flat.trains:
                continue
            for parameter, slot in zip(flat.parameters, flat.layout.slots):
                view = whole[slot.start : slot.stop].view(slot.shape)
                if parameter.grad is not None:
                    view.add_(parameter.grad) if unit.full_grads else view.copy_(parameter.grad)
                    parameter.grad = None
                elif not unit.full_grads:
                    view.zero_()
            for gap in flat.layout.gaps:
                whole[gap].zero_()
        if self.whole and not self.is_last_backward:
            unit.full_grads = grads
            return
        unit.full_grads = []
        for flat, whole in zip(unit.flats, grads):
            if flat.trains:
                self._reduce(flat, whole)

    def wait(self) -> None:
        """Wait for the reduction in flight, and add its result to the shard's gradient."""
        if self._reduction is None:
            return
        work, flat, out, _ = self._reduction
        self._reduction = None
        if work is not None:
            work.wait()
        if out is not None:
            if self.gradient_offload is not None:
                flat.grad_copied = (self.gradient_offload.store if flat.fresh else self.gradient_offload.add)(
                    flat.gradient, out
                )
                self._reduce_out_copied = flat.grad_copied
            else:
                flat.gradient.copy_(out) if flat.fresh else flat.gradient.add_(out)
            flat.fresh = False

    def release(self) -> None:
        """Free the shared buffers; the reductions must be done."""
        self._grad_buffer = self._reduce_out = None

    def _buffers(self, unit: Unit) -> list[Tensor]:
        """Buffers for a unit's full gradients: new ones if they are kept, otherwise one that all units share."""
        sizes = [flat.layout.size if flat.trains else 0 for flat in unit.flats]
        options = {"dtype": self.dtype, "device": self.device}
        if self.whole:
            return list(torch.empty(sum(sizes), **options).split(sizes))
        if self._grad_buffer is None:
            self._grad_buffer = torch.empty(self._largest(lambda flat: flat.layout.size), **options)
        return list(self._grad_buffer[: sum(sizes)].split(sizes))

    def _largest(self, size: Callable[[Flat], int]) -> int:
        return max(sum(size(flat) for flat in unit.flats if flat.trains) for unit in self.units)

    def _reduce(self, flat: Flat, grads: Tensor) -> None:
        if flat.gradient is None:
            flat.gradient = torch.empty(flat.layout.shard_size, dtype=self.dtype, device=self.device)
        # The first reduction of a step writes the shard's gradient itself; later ones need a buffer to be added from.
        direct = flat.fresh and self.gradient_offload is None
        if not direct and self._reduce_out is None:
            size = self._largest(lambda flat: flat.layout.shard_size)
            self._reduce_out = torch.empty(size, dtype=self.dtype, device=self.device)
        out = flat.gradient if direct else self._reduce_out[: flat.layout.shard_size]
        # With offload, the copy of the former contents to host memory must be over.
        self._reduce_out_copied.wait()
        work = None
        if flat.axis.size == 1:
            out.copy_(grads)
        else:
            self.reduced_bytes += grads.numel() * grads.element_size()
            work = reduce_scatter(out, grads, group=flat.axis.reduce, async_op=True)
        self._reduction = work, flat, None if direct else out, grads
        if direct:
            flat.fresh = False
