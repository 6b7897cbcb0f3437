"""What a forward pass keeps for its backward: everything, what is dear to compute, or the inputs of blocks alone; and
where: on the device, or in host memory.

`selective` computes again what takes next to no arithmetic and much memory: outputs of norms and of the activation.
What makes that possible is that a product saves its input before it multiplies, so that recomputing stops there.

A norm that also adds to the residual stream stands in front of what is computed again, not in it: it keeps the sum, and
from that its rows are made once more. Inside, both terms of the sum would have to be kept.
"""

import weakref
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


class Copies:
    """Copies between the memories of host and device, where they are one: at once."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy behind what has been computed so far; something to `wait` for."""
        target.copy_(source)
        return None

    def wait(self, event: Any) -> None:
        """Have what is computed from now on wait for a copy."""


class CudaCopies(Copies):
    """Copies on a stream of their own, beside the computation; nothing waits on the host."""

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
    """Keeps what blocks save for their backward in host memory.

    A block's tensors leave while it and the next block compute, and the device lets them go when the block behind that
    starts; they come back while the block behind their own goes backward. So the device holds those of two blocks at
    most, and a copy has the time of a whole block before anything waits for it. Parameters, small tensors and what all
    blocks share are left alone; what a block saves twice travels once.

    Args:
        is_weight: whether a tensor's memory holds parameters.   copies: what moves tensors; default: by the device.
    """

    def __init__(
        self, device: torch.device, is_weight: Callable[[Tensor], bool], copies: Copies | None = None
    ) -> None:  # fmt: skip
        self.device, self.is_weight = device, is_weight
        self.copies = copies or (CudaCopies(device) if device.type == "cuda" else Copies())
        self.moved_bytes = 0
        # Of the last two blocks. Who needs them keeps them alive: the graph.
        self._leaving: list[list[weakref.ref[_Kept]]] = []

    def wrap(self, block: nn.Module) -> None:
        """Keep what a block saves in host memory; what it takes behind the stream and the delta all blocks share."""
        inner = block.forward

        def forward(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return inner(*args)
            shared = {_storage(x) for x in args[2:] if isinstance(x, Tensor)}
            former, kept = self._next()
            known: dict[Any, tuple[_Kept, Tensor]] = {}

            def pack(tensor: Tensor) -> Any:
                if tensor.nbytes < LEAST_BYTES or _storage(tensor) in shared or self.is_weight(tensor):
                    return tensor
                key = _place(tensor)
                if key not in known:
                    # The tensor itself, so that no other takes its place in memory while the block runs.
                    known[key] = _Kept(self, tensor, former), tensor
                    kept.append(weakref.ref(known[key][0]))
                known[key][0].uses += 1
                return known[key][0], tensor.shape

            try:
                with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                    return inner(*args)
            finally:
                # What is saved keeps its hooks.
                known.clear()

        block.forward = forward

    def _next(self) -> tuple[list["weakref.ref[_Kept]"], list["weakref.ref[_Kept]"]]:
        """What the former block saved, and a list for what the next one saves; those before let their memory go."""
        for kept in (ref() for leaving in self._leaving[:-1] for ref in leaving):
            if kept is not None:
                kept.settle()
        self._leaving = [*self._leaving[-1:], []]
        return (self._leaving[0] if len(self._leaving) > 1 else []), self._leaving[-1]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors with the same elements in the same order in memory have in common."""
    form = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return _storage(tensor), tensor.storage_offset(), tensor.dtype, form


class _Kept:
    """A tensor in host memory, on its way there, or back; saved `uses` times."""

    def __init__(self, owner: ActivationOffload, tensor: Tensor, former: "list[weakref.ref[_Kept]]") -> None:
        self.owner, self.former = owner, former
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.source: Tensor | None = tensor
        self.back: Tensor | None = None
        self.uses = self.taken = 0
        owner.moved_bytes += tensor.nbytes
        self.event = owner.copies.start(self.host, tensor)

    def settle(self) -> None:
        """Let the device's copy go once the host has it."""
        if self.source is not None:
            self.owner.copies.wait(self.event)
        self.source = None

    def fetch(self) -> None:
        """Start the way back."""
        if self.back is None and self.source is None:
            self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.owner.device)
            self.event = self.owner.copies.start(self.back, self.host)

    def load(self) -> Tensor:
        """The tensor on the device; those of the block before start their way back."""
        self.fetch()
        for earlier in (ref() for ref in self.former):
            if earlier is not None:
                earlier.fetch()
        if self.source is not None:
            return self.source
        self.owner.copies.wait(self.event)
        out, self.taken = self.back, self.taken + 1
        if self.taken == self.uses:
            self.back, self.taken = None, 0
        return out


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    kept, shape = saved
    return kept.load().view(shape)
