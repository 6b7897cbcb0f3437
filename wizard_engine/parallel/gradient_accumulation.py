"""Gradients of a model that is on one device: what autograd gives, parameter by parameter, in one buffer per flat.

The first gradient of a step is copied into the buffer in the dtype that it came in. Only where a second one is added is
the buffer fp32: the first is converted, which is exact, so the sum is that of fp32 from the start. A step of one
micro-batch thus has 2 bytes of gradient a parameter in bf16, and no pass that clears them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .flat_layout import Slot
from .fsdp_units import Flat
from .offload import Landing


class Accumulator:
    """The gradient buffers of a step.

    Args:
        flats: those that train.   wide: dtype of sums.   device: of the buffers.
        narrow: whether a single gradient may stay in the dtype that it came in.
        landing: moves gradients to buffers in host memory; None: they are on the device.
    Attributes:
        multiple: whether a further backward of this step is known to come.
    """

    def __init__(
        self, flats: Iterable[Flat], wide: torch.dtype, device: torch.device, *, narrow: bool,
        landing: Landing | None = None,
    ) -> None:  # fmt: skip
        self.flats, self.wide, self.device, self.narrow = list(flats), wide, device, narrow
        self.landing, self.multiple = landing, False

    def begin(self, *, multiple: bool) -> None:
        """A step starts."""
        self.multiple = multiple
        for flat in self.flats:
            flat.arrived.clear()

    def add(self, flat: Flat, slot: Slot, grad: Tensor) -> None:
        """The gradient of a parameter after a backward."""
        again = slot.name in flat.arrived
        view = self._buffer(flat, again)[slot.start : slot.stop].view(slot.shape)
        flat.arrived.add(slot.name)
        if self.landing is not None:
            flat.landed = self.landing.add(view, grad) if again else self.landing.store(view, grad)
        else:
            view.add_(grad) if again else view.copy_(grad)

    def _buffer(self, flat: Flat, again: bool) -> Tensor:
        dtype = flat.dtype if self.narrow and not self.multiple else self.wide
        if flat.gradient is None or (not flat.arrived and flat.gradient.dtype != dtype):
            # The old one goes first.
            flat.gradient = None
            flat.gradient = self._zeros(flat, dtype)
        elif again and flat.gradient.dtype != self.wide:
            self._wait(flat)
            flat.gradient = self._zeros(flat, self.wide).copy_(flat.gradient)
        return flat.gradient

    def _zeros(self, flat: Flat, dtype: torch.dtype) -> Tensor:
        """Zeros, which gaps between parameters stay."""
        pinned = self.landing is not None and self.landing.pinned
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
        """Until what goes to a flat's buffer in host memory is there."""
        if self.landing is not None:
            self.landing.settle()
            flat.landed.synchronize()
