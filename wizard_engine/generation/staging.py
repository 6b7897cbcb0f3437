"""The small arrays that a step takes from the host, in one copy to the device, and results on their way back."""

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 16


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Staging:
    """A buffer of the device that `put` fills from the host with one copy that nobody waits for.

    Arrays stand in it end to end, behind a region that no copy writes: those of the same shapes always at the same
    addresses. Two pinned buffers of the host take turns; before one is filled again, the copy out of it has ended.

    Args:
        capacity: bytes of all arrays of a step, each rounded up to 16.   kept: bytes of the region in front of them.
    """

    def __init__(self, device: torch.device, capacity: int, kept: int) -> None:
        self.on_gpu, self.kept, self.capacity = device.type == "cuda", aligned(kept), aligned(capacity)
        self.buffer = torch.zeros(self.kept + self.capacity, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(self.capacity, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def put(self, arrays: Iterable[Tensor]) -> list[Tensor]:
        """The arrays, contiguous ones of the CPU, on the device; they hold until the next call."""
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


def on_its_way(x: Tensor) -> Tensor:
    """A tensor of the host that has the values once the device has done what it was told; `x` itself on a CPU."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
