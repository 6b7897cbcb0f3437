"""Collectives on an axis of the mesh, and those with a gradient: the gradient of what is gathered is summed and
divided, the gradient of what is summed and divided is gathered. Nothing is ever averaged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis

# torch 2.13 has new names for these two, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """Every rank's rows (n, ...), end to end in the order of the ranks, (size n, ...); and the work to wait for."""
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return out, all_gather(out, x.contiguous(), group=axis.group, async_op=async_op)


def reduce_scatter_rows(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's share of the rows (size n, ...) summed over the ranks, (n, ...); and the work to wait for."""
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, reduce_scatter(out, x.contiguous(), group=axis.group, async_op=async_op)


class AllGather(torch.autograd.Function):
    """Rows of all ranks, each of which then does work of its own with them: gradients are summed."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_rows(grad, ctx.axis)[0], None


class ReduceScatter(torch.autograd.Function):
    """Partial sums of all ranks added up, of which each keeps its share of the rows."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return reduce_scatter_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return all_gather_rows(grad, ctx.axis)[0], None


class AllGatherReplicated(torch.autograd.Function):
    """Rows of all ranks, all of which then do the same with them: every rank knows the gradient and takes its own."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.rows = axis, x.shape[0]
        return all_gather_rows(x, axis)[0]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.axis.index * ctx.rows : (ctx.axis.index + 1) * ctx.rows], None


class AllGatherLinear(torch.autograd.Function):
    """Rows of all ranks times this rank's matrix; this rank's rows alone are kept, and gathered again in the backward,
    beside the product for the rows' gradient; its sum over the ranks goes on beside the product for the matrix's."""

    @staticmethod
    def forward(ctx, x, weight, axis):
        ctx.axis = axis
        ctx.save_for_backward(x, weight)
        return all_gather_rows(x, axis)[0] @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = dweight = rows = arrived = summed = None
        if needs_weight:
            rows, arrived = all_gather_rows(x, ctx.axis, async_op=True)
        if needs_x:
            dx, summed = reduce_scatter_rows(grad @ weight, ctx.axis, async_op=True)
        if needs_weight:
            arrived.wait()
            dweight = grad.T @ rows
        if needs_x:
            summed.wait()
        return dx, dweight, None


class AllToAll(torch.autograd.Function):
    """Rows sent to other ranks: the first `sent[0]` to rank 0, and so on; `received[r]` come from rank r."""

    @staticmethod
    def forward(ctx, x, sent, received, axis):
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return all_to_all_rows(x, sent, received, axis)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all_rows(grad, ctx.received, ctx.sent, ctx.axis), None, None, None


def all_to_all_rows(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """Rows (sum of `sent`, ...) sent as `Exchange` says; those that came, (sum of `received`, ...)."""
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out
