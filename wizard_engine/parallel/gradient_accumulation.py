"""Gradient accumulation of an unsharded model: autograd's gradients, parameter by parameter, in one buffer per flat.

The first gradient of a step is copied into the buffer in its own dtype. Only a second one makes the buffer fp32: the
first is converted, which is exact, so the sum equals one in fp32 from the start. A step of one micro-batch thus takes 2
bytes of gradient a parameter in bf16, and no pass that clears the buffer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .flat_layout import Slot
from .fsdp_units import Flat
from .offload import GradientOffload


class Accumulator:
    """The gradient buffers of a step.

    Args:
        flats: trained ones.   wide: dtype of sums.   device: of the buffers.
        narrow: whether a single gradient may stay in its own dtype.
        gradient_offload: moves gradients to buffers in host memory; None: the buffers are on the device.
    Attributes:
        multiple: whether a further backward of this step is known to come.
    """

    def __init__(
        self,
        flats: Iterable[Flat],
        wide: torch.dtype,
        device: torch.device,
        *,
        narrow: bool,
        gradient_offload: GradientOffload | None = None,
    ) -> None:
        self.flats, self.wide, self.device, self.narrow = list(flats), wide, device, narrow
        self.gradient_offload, self.multiple = gradient_offload, False

    def begin(self, *, multiple: bool) -> None:
        """A step starts."""
        self.multiple = multiple
        for flat in self.flats:
            flat.arrived.clear()

    def add(self, flat: Flat, slot: Slot, grad: Tensor) -> None:
        """Add the gradient of one parameter after a backward."""
        again = slot.name in flat.arrived
        view = self._buffer(flat, again)[slot.start : slot.stop].view(slot.shape)
        flat.arrived.add(slot.name)
        if self.gradient_offload is not None:
            flat.grad_copied = (
                self.gradient_offload.add(view, grad) if again else self.gradient_offload.store(view, grad)
            )
        else:
            view.add_(grad) if again else view.copy_(grad)

    def _buffer(self, flat: Flat, again: bool) -> Tensor:
        dtype = flat.dtype if self.narrow and not self.multiple else self.wide
        if flat.gradient is None or (not flat.arrived and flat.gradient.dtype != dtype):
            # Free the old buffer before the new one is allocated, so that they are never there together.
            flat.gradient = None
            flat.gradient = self._zeros(flat, dtype)
        elif again and flat.gradient.dtype != self.wide:
            # The second gradient of a step: widen what has arrived, which is exact.
            self._wait(flat)
            flat.gradient = self._zeros(flat, self.wide).copy_(flat.gradient)
        return flat.gradient

    def _zeros(self, flat: Flat, dtype: torch.dtype) -> Tensor:
        """A buffer of zeros; the gaps between parameters stay zero, so that norms may read them."""
        pinned = self.gradient_offload is not None and self.gradient_offload.pinned
        return torch.zeros(flat.layout.shard_size, dtype=dtype, device=self.device, pin_memory=pinned)

    def settle(self, flat: Flat) -> Tensor:
        """The buffer of a flat, zero where no gradient has come."""
        self._wait(flat)
        if flat.gradient is None:
            flat.gradient = self._zeros(flat, flat.dtype if self.narrow else self.wide)
        if not flat.arrived:
            flat.gradient.zero_()
        elif len(flat.arrived) < len(flat.layout.slots):
            for slot in flat.layout.slots:
                if slot.name not in flat.arrived:
                    flat.gradient[slot.start : slot.stop].zero_()
        return flat.gradient

    def _wait(self, flat: Flat) -> None:
        """Wait until all copies and additions to a flat's buffer in host memory are done."""
        if self.gradient_offload is not None:
            self.gradient_offload.settle()
            flat.grad_copied.synchronize()
