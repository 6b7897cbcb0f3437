"""Activation recomputation and offload: what a forward pass saves for its backward, and where.

`none` saves everything, `selective` recomputes cheap activations that take much memory (outputs of norms and of the
activation function), `full` saves the inputs of blocks alone. Selective recomputation stops early: a product saves its
input before it multiplies, so that the product itself is not repeated.

A norm that also adds to the residual stream is outside of the recomputed function. It saves the sum, and its rows are
computed again from that. Inside, both terms of the sum would have to be saved.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Smaller tensors stay on the device: they would be many copies for little memory.
LEAST_BYTES = 1 << 20


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its intermediate results recomputed in the backward."""

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        # Blocks draw no random numbers, so there is no generator state to restore.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return call


def behind_norm(norm: Callable[..., Any], function: Callable[..., Any], *, again: bool) -> Callable[..., Any]:
    """A norm followed by a function: (x, delta or None, *more) -> (function(normed, stream, *more), stream).

    stream = x + delta, or x.

    Args:
        norm: norm(rows) -> normed rows; norm(delta, x) -> normed sum and sum.
        again: recompute the function's intermediate results and the normed rows in the backward.
    """

    def call(x: Tensor, delta: Tensor | None, *more: Any) -> tuple[Any, Tensor]:
        normed, stream = (norm(x), x) if delta is None else norm(delta, x)
        if not (again and torch.is_grad_enabled()):
            return function(normed, stream, *more), stream
        # The first run takes the normed rows out of this list, so that nothing keeps them until the backward.
        rows, has_gradient = [normed], normed.requires_grad
        del normed

        def inside(stream: Tensor, *more: Any) -> Any:
            # The recomputation finds the list empty and applies the norm again.
            return function(rows.pop() if rows else _normed(norm, stream, has_gradient), stream, *more)

        return recomputed(inside)(stream, *more), stream

    return call


def _normed(norm: Callable[[Tensor], Tensor], stream: Tensor, has_gradient: bool) -> Tensor:
    """Normed rows as a leaf: the graph already has the norm's node, from the first run."""
    with torch.no_grad():
        return norm(stream).requires_grad_(has_gradient)


def recompute_block(block: nn.Module, mode: str) -> None:
    """Set a transformer block's recomputation; `mode` is none, selective or full."""
    block.recompute = mode
    if mode == "selective":
        block.outer = recomputed(block.outer)


class Copies:
    """Copies between host and device memory, for a CPU where both are the same: synchronous."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy after all work queued so far; returns an event for `wait`."""
        target.copy_(source)
        return None

    def wait(self, event: Any) -> None:
        """Make all work queued from now on wait for a copy."""


class CudaCopies(Copies):
    """Copies on a side stream that overlap the computation; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


class ActivationOffload:
    """Keeps tensors that blocks save for their backward in host memory.

    Tensors of block i are copied out while blocks i and i + 1 compute, and freed on the device when block i + 2 starts.
    They are copied back during the backward of block i + 1. So the device holds the tensors of at most two blocks, and
    a copy has the time of a whole block. Parameters, small tensors and inputs that all blocks share stay on the device.
    A tensor that a block saves twice is copied once.

    Args:
        is_weight: whether a tensor's memory holds parameters.   copies: moves tensors; default: by the device.
    """

    def __init__(self, device: torch.device, is_weight: Callable[[Tensor], bool], copies: Copies | None = None) -> None:
        self.device, self.is_weight = device, is_weight
        self.copies = copies or (CudaCopies(device) if device.type == "cuda" else Copies())
        self.moved_bytes = 0
        # Saved tensors of the last two blocks. Weak: the autograd graph owns them and decides when they go.
        self._leaving: list[list[weakref.ref[_Kept]]] = []

    def wrap(self, block: nn.Module) -> None:
        """Offload what a block saves. Its arguments after the stream and the delta are shared by all blocks."""
        inner = block.forward

        def forward(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return inner(*args)
            shared = {_storage(x) for x in args[2:] if isinstance(x, Tensor)}
            former, kept = self._next()
            known: dict[Any, tuple[_Kept, Tensor]] = {}

            # Autograd calls `pack` for every tensor that it saves, and `_unpack` when the backward needs it.
            def pack(tensor: Tensor) -> Any:
                if tensor.nbytes < LEAST_BYTES or _storage(tensor) in shared or self.is_weight(tensor):
                    return tensor
                key = _place(tensor)
                if key not in known:
                    # Holding the tensor keeps its address from being reused, which the key relies on.
                    known[key] = _Kept(self, tensor, former), tensor
                    kept.append(weakref.ref(known[key][0]))
                known[key][0].uses += 1
                return known[key][0], tensor.shape

            try:
                with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                    return inner(*args)
            finally:
                # Saved tensors keep the hooks alive, and those keep `known`: cleared, the device memory can go.
                known.clear()

        block.forward = forward

    def _next(self) -> tuple[list["weakref.ref[_Kept]"], list["weakref.ref[_Kept]"]]:
        """Tensors of the former block, and a list for the next one's; the block before the former frees its memory."""
        # Their copies had the time of a whole block, so the device hardly waits for them here.
        for kept in (ref() for leaving in self._leaving[:-1] for ref in leaving):
            if kept is not None:
                kept.settle()
        self._leaving = [*self._leaving[-1:], []]
        return (self._leaving[0] if len(self._leaving) > 1 else []), self._leaving[-1]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors with the same elements in the same memory order."""
    form = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return _storage(tensor), tensor.storage_offset(), tensor.dtype, form


class _Kept:
    """A saved tensor in host memory, or in flight to or from it; autograd saved it `uses` times."""

    def __init__(self, owner: ActivationOffload, tensor: Tensor, former: "list[weakref.ref[_Kept]]") -> None:
        self.owner, self.former = owner, former
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.source: Tensor | None = tensor
        self.back: Tensor | None = None
        self.uses = self.taken = 0
        owner.moved_bytes += tensor.nbytes
        self.event = owner.copies.start(self.host, tensor)

    def settle(self) -> None:
        """Free the device's copy once the host has the data."""
        if self.source is not None:
            self.owner.copies.wait(self.event)
        self.source = None

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self.back is None and self.source is None:
            self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.owner.device)
            self.event = self.owner.copies.start(self.back, self.host)

    def load(self) -> Tensor:
        """The tensor on the device; also prefetches the tensors of the block before."""
        # The blocks' backwards run in reverse: what the block before saved is needed next.
        self.fetch()
        for earlier in (ref() for ref in self.former):
            if earlier is not None:
                earlier.fetch()
        # The last blocks' tensors are still on the device when the backward starts.
        if self.source is not None:
            return self.source
        self.owner.copies.wait(self.event)
        # After the last use the device memory goes; the host copy stays for a second backward.
        out, self.taken = self.back, self.taken + 1
        if self.taken == self.uses:
            self.back, self.taken = None, 0
        return out


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    kept, shape = saved
    return kept.load().view(shape)
