"""Collectives on an axis of the mesh, and differentiable ones: the backward of an all-gather is a reduce-scatter, and
the other way round. Nothing is averaged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis

# torch 2.13 renames these two and warns about the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """Rows (n, ...) of all ranks in rank order, (size n, ...); and with `async_op` the work to wait for."""
    # Collectives read memory, not strides: a transposed or sliced tensor must be copied first.
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return out, all_gather(out, x.contiguous(), group=axis.group, async_op=async_op)


def reduce_scatter_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's rows (n, ...) of the sum over ranks of (size n, ...); and with `async_op` the work to wait for."""
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, reduce_scatter(out, x.contiguous(), group=axis.group, async_op=async_op)


class AllGather(torch.autograd.Function):
    """All-gather of rows from which each rank computes something different. Backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_rows(grad, ctx.axis)[0], None


class ReduceScatter(torch.autograd.Function):
    """Reduce-scatter of partial sums: each rank keeps its rows of the total. Backward: all-gather."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return reduce_scatter_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return all_gather_rows(grad, ctx.axis)[0], None


class AllGatherReplicated(torch.autograd.Function):
    """All-gather of rows from which all ranks compute the same. Every rank then has the full gradient, so the backward
    takes this rank's rows of it; a reduce-scatter would count it once per rank."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.rows = axis, x.shape[0]
        return all_gather_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.axis.index * ctx.rows : (ctx.axis.index + 1) * ctx.rows], None


class AllGatherLinear(torch.autograd.Function):
    """All-gather of rows times this rank's matrix, the column-parallel product. Only the local rows are saved.

    The backward hides both collectives behind products: gather x again || dx = grad @ W; reduce-scatter dx || dW.
    """

    @staticmethod
    def forward(ctx, x, weight, axis):
        ctx.axis = axis
        # Saving the gathered rows would take tp times the memory; the backward gathers them again instead.
        ctx.save_for_backward(x, weight)
        return all_gather_rows(x, axis)[0] @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = dweight = rows = gathered = summed = None
        # dW needs all rows, dx does not: the gather runs while dx is computed.
        if needs_weight:
            rows, gathered = all_gather_rows(x, ctx.axis, async_op=True)
        if needs_x:
            # The reduce-scatter of dx runs while dW is computed.
            dx, summed = reduce_scatter_rows(grad @ weight, ctx.axis, async_op=True)
        if needs_weight:
            gathered.wait()
            dweight = grad.T @ rows
        if needs_x:
            summed.wait()
        return dx, dweight, None


class AllToAll(torch.autograd.Function):
    """All-to-all of rows: the first `sent[0]` go to rank 0, and so on; `received[r]` come from rank r. Backward: the
    same with both lists swapped."""

    @staticmethod
    def forward(ctx, x, sent, received, axis):
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return all_to_all_rows(x, sent, received, axis)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all_rows(grad, ctx.received, ctx.sent, ctx.axis), None, None, None


def all_to_all_rows(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """Rows (sum of `sent`, ...) exchanged as in `AllToAll`; returns those received, (sum of `received`, ...)."""
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out
