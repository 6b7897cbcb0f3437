"""Staging of a step's small arrays in one copy to the device, and copies of results to the host."""

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 16


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Staging:
    """A device buffer that `stage` fills from the host with one asynchronous copy.

    The arrays lie end to end after a region that no copy writes. Arrays of the same shapes always have the same
    addresses. Two pinned host buffers alternate; `stage` waits for the copy out of a buffer before it fills it again.

    Args:
        capacity: bytes of all arrays of a step, each rounded up to 16.   kept: bytes of the region in front of them.
    """

    def __init__(self, device: torch.device, capacity: int, kept: int) -> None:
        self.on_gpu, self.kept, self.capacity = device.type == "cuda", aligned(kept), aligned(capacity)
        self.buffer = torch.zeros(self.kept + self.capacity, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(self.capacity, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def stage(self, arrays: Iterable[Tensor]) -> list[Tensor]:
        """Copies of contiguous CPU arrays on the device; valid until the next call."""
        turn, self._turn = self._turn, 1 - self._turn
        copied, host = self._copied[turn], self._hosts[turn]
        if copied is not None:
            copied.synchronize()
        views, end = [], 0
        for array in arrays:
            stop = end + array.nbytes
            assert stop <= self.capacity, f"staging: {stop} bytes of a step, room for {self.capacity}"
            host[end:stop].view(array.dtype).copy_(array.view(-1))
            views.append(self.buffer[self.kept + end : self.kept + stop].view(array.dtype).view(array.shape))
            end = aligned(stop)
        self.buffer[self.kept : self.kept + end].copy_(host[:end], non_blocking=True)
        if self.on_gpu:
            self._copied[turn] = torch.cuda.Event()
            self._copied[turn].record()
        return views


def copy_to_host(x: Tensor) -> Tensor:
    """Host tensor that has the values once the device has finished its work; `x` itself on a CPU."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
