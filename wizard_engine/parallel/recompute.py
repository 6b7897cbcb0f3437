"""What a forward pass keeps for its backward: everything, what is dear to compute, or the inputs of blocks alone; and
where: on the device, or in host memory.

`selective` computes again what takes next to no arithmetic and much memory: outputs of norms and of the activation.
What makes that possible is that a product saves its input before it multiplies, so that recomputing stops there.

A norm that also adds to the residual stream stands in front of what is computed again, not in it: it keeps the sum, and
from that its rows are made once more. Inside, both terms of the sum would have to be kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEAST_BYTES = 1 << 20


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its intermediate results computed again in the backward."""

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return call


def behind_norm(norm: Callable[..., Any], function: Callable[..., Any], *, again: bool) -> Callable[..., Any]:
    """A call that takes the residual stream x, what is to be added to it or None, and more arguments of `function`, and
    gives function(normed, stream, *more) and the stream, the sum of both.

    Args:
        norm: of rows; of rows and what is to be added to them, the normed sum and the sum.
        again: compute what `function` makes, and the normed rows, again in the backward.
    """

    def call(x: Tensor, delta: Tensor | None, *more: Any) -> tuple[Any, Tensor]:
        normed, stream = (norm(x), x) if delta is None else norm(delta, x)
        if not (again and torch.is_grad_enabled()):
            return function(normed, stream, *more), stream
        rows, has_gradient = [normed], normed.requires_grad
        del normed

        def inside(stream: Tensor, *more: Any) -> Any:
            # The first time its rows are there.
            return function(rows.pop() if rows else _normed(norm, stream, has_gradient), stream, *more)

        return recomputed(inside)(stream, *more), stream

    return call


def _normed(norm: Callable[[Tensor], Tensor], stream: Tensor, has_gradient: bool) -> Tensor:
    """Rows of a norm whose own node is there already."""
    with torch.no_grad():
        return norm(stream).requires_grad_(has_gradient)


def recompute_block(block: nn.Module, mode: str) -> None:
    """Make a transformer block forget what it can compute again; `mode` is none, selective or full."""
    block.recompute = mode
    if mode == "selective":
        block.outer = recomputed(block.outer)


class ActivationOffload:
    """Keeps what blocks save for their backward in host memory.

    Each block's tensors leave on a stream of their own while the next block computes, and come back while the block
    behind it goes backward. Parameters, small tensors and tensors already on the way are left alone.

    Args:
        is_weight: whether a tensor's memory holds parameters.
    """

    def __init__(self, device: torch.device, is_weight: Callable[[Tensor], bool]) -> None:
        self.device, self.is_weight = device, is_weight
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.moved_bytes = 0
        self._block: list[_Kept] | None = None
        self._former: list[_Kept] = []
        self._leaving: list[_Kept] = []

    def wrap(self, block: nn.Module) -> None:
        """Keep what a block saves in host memory."""
        inner = block.forward

        def forward(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return inner(*args)
            kept: list[_Kept] = []
            former, self._former = self._former, kept
            for earlier in self._leaving:
                earlier.settle()
            self._leaving = kept

            def pack(tensor: Tensor) -> Any:
                if tensor.nbytes < LEAST_BYTES or self.is_weight(tensor):
                    return tensor
                kept.append(_Kept(self, tensor, former))
                return kept[-1]

            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                return inner(*args)

        block.forward = forward


class _Kept:
    """A tensor in host memory, on its way there, or back."""

    def __init__(self, owner: ActivationOffload, tensor: Tensor, former: "list[_Kept]") -> None:
        self.owner, self.former = owner, former
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.source: Tensor | None = tensor
        self.back: Tensor | None = None
        self.event: Any = None
        owner.moved_bytes += tensor.nbytes
        if owner.stream is None:
            self.host.copy_(tensor)
            self.source = None
            return
        owner.stream.wait_stream(torch.cuda.current_stream(owner.device))
        with torch.cuda.stream(owner.stream):
            self.host.copy_(tensor, non_blocking=True)
            self.event = owner.stream.record_event()

    def settle(self) -> None:
        """Let the device's copy go once the host has it."""
        if self.source is not None and self.event is not None:
            torch.cuda.current_stream(self.owner.device).wait_event(self.event)
        self.source = None

    def fetch(self) -> None:
        """Start the way back."""
        if self.back is not None or self.source is not None:
            return
        if self.owner.stream is None:
            self.back = self.host.clone()
            return
        self.back = torch.empty(self.shape, dtype=self.dtype, device=self.owner.device)
        self.owner.stream.wait_stream(torch.cuda.current_stream(self.owner.device))
        with torch.cuda.stream(self.owner.stream):
            self.back.copy_(self.host, non_blocking=True)
            self.event = self.owner.stream.record_event()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    kept.fetch()
    for earlier in kept.former:
        earlier.fetch()
    if kept.source is not None:
        return kept.source
    if kept.event is not None:
        torch.cuda.current_stream(kept.owner.device).wait_event(kept.event)
    out, kept.back = kept.back, None
    return out
