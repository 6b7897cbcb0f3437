"""Asynchronous copies between a device and pinned host memory, and gradients that are accumulated there.

Copies run in request order on a side stream, each after the work that was queued on the device before it. Each returns
an event. Nobody may read the target or overwrite the source before that event.
"""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Block the host until the copy is done."""

    def wait(self) -> None:
        """Make work queued on the device from now on wait for the copy."""


class Link(Protocol):
    """Copies tensors between two memories."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Start to copy; dtypes may differ."""


class Done:
    """The event of a copy that is done."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""


DONE = Done()


class DirectLink:
    """Synchronous copies, where device and host memory are the same."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """target = source."""
        target.copy_(source)
        return DONE


class StreamLink:
    """Copies on a separate CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Start to copy; one side is on the device, the other pinned."""
        # The source may still be computed on the current stream.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                # The allocator must not give this memory away before the copy on the side stream is done.
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event


class GradientOffload:
    """Accumulates gradients in host memory: the first of a step is copied to its target, later ones are added there.

    The host adds one gradient while the next one is copied, out of two staging buffers.

    Args:
        link: copies tensors.   pinned: whether the staging buffers are pinned.
    """

    def __init__(self, link: Link, *, pinned: bool) -> None:
        self.link, self.pinned = link, pinned
        self._staging: deque[Tensor] = deque([torch.empty(0), torch.empty(0)])
        self._adding: deque[tuple[Event, Tensor, Tensor]] = deque()

    def store(self, target: Tensor, source: Tensor) -> Event:
        """target = source, when the event has passed."""
        return self.link.copy(target, source)

    def add(self, target: Tensor, source: Tensor) -> Event:
        """target += source, when `settle` has been called; after the event the source may change."""
        # Both staging buffers are in use: the older one must be added before it is overwritten.
        if len(self._adding) == len(self._staging):
            self._add_first()
        buffer = self._staging.popleft()
        if buffer.numel() < source.numel() or buffer.dtype != source.dtype:
            buffer = torch.empty(source.numel(), dtype=source.dtype, pin_memory=self.pinned)
        self._staging.append(buffer)
        staged = buffer[: source.numel()].view(source.shape)
        # The addition waits for the copy, so it is put off until the staging buffer is needed or all must be complete.
        event = self.link.copy(staged, source)
        self._adding.append((event, target, staged))
        return event

    def _add_first(self) -> None:
        event, target, staged = self._adding.popleft()
        # In request order, and on the host: a sum must not depend on which copy is done first.
        event.synchronize()
        target.add_(staged)

    def settle(self) -> None:
        """Wait for all copies, and do the additions that are left."""
        while self._adding:
            self._add_first()
