"""Copies between a device and pinned host memory that neither of them waits for, and gradients that land there.

Copies run in the order in which they are asked for, on a stream of their own, behind what the device has been told so
far. Each gives an event: nothing reads a target, and nothing overwrites a source, before the event of its copy.
"""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Let the host wait for it."""

    def wait(self) -> None:
        """Let what the device is told from now on wait for it."""


class Link(Protocol):
    """What copies."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Start to copy; dtypes may differ."""


class Done:
    """The event of a copy that is over."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""


DONE = Done()


class DirectLink:
    """Copies at once: device and host are the same."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """target = source."""
        target.copy_(source)
        return DONE


class StreamLink:
    """Copies on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Start to copy, one side on the device, the other pinned."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event


class Landing:
    """Gradients on their way to host memory: the first of a step goes to its place, later ones are added to it there.

    Args:
        link: what copies.   pinned: whether the rooms for what is to be added are pinned.
    """

    def __init__(self, link: Link, *, pinned: bool) -> None:
        self.link, self.pinned = link, pinned
        self._rooms: deque[Tensor] = deque([torch.empty(0), torch.empty(0)])
        self._adding: deque[tuple[Event, Tensor, Tensor]] = deque()

    def store(self, target: Tensor, source: Tensor) -> Event:
        """target = source, once the event has come."""
        return self.link.copy(target, source)

    def add(self, target: Tensor, source: Tensor) -> Event:
        """target += source, once `settle` has been called; the event frees the source."""
        if len(self._adding) == len(self._rooms):
            self._add_first()
        room = self._rooms.popleft()
        if room.numel() < source.numel() or room.dtype != source.dtype:
            room = torch.empty(source.numel(), dtype=source.dtype, pin_memory=self.pinned)
        self._rooms.append(room)
        staged = room[: source.numel()].view(source.shape)
        event = self.link.copy(staged, source)
        self._adding.append((event, target, staged))
        return event

    def _add_first(self) -> None:
        event, target, staged = self._adding.popleft()
        event.synchronize()
        target.add_(staged)

    def settle(self) -> None:
        """Add all that is to be added."""
        while self._adding:
            self._add_first()
