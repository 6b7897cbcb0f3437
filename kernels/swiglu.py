"""SwiGLU: the gated activation of the feed-forward block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import contiguous_rows, runs_triton


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    """One node for the fused product; the gradient of silu is torch's own kernel."""

    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, dy):
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * silu), dim=-1)


@torch.library.custom_op("wizard_engine::swiglu_forward", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    from ._swiglu import swiglu_forward

    return swiglu_forward(gate_up)


@_forward.register_fake
def _(gate_up):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.custom_op("wizard_engine::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    from ._swiglu import swiglu_backward

    return swiglu_backward(dy, gate_up)


@_backward.register_fake
def _(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    (gate_up,) = ctx.saved_tensors
    return _backward(dy if dy.stride(-1) == 1 else dy.contiguous(), gate_up)


_forward.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves.

    silu(x) = x / (1 + exp(-x))

    Args:
        gate_up: (..., 2F), the gate in the first F columns, F >= 1; fp32, fp16 or bf16 (CPU: fp64 too), last dim
            contiguous.
    Returns:
        (..., F), dtype of gate_up. Differentiable; bit-equal between runs on one device.
    Raises:
        ValueError: an odd number of columns or none, another dtype, or strided columns.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or not gate_up.shape[-1]:
        raise ValueError(f"gate_up: expected an even number of columns, got {tuple(gate_up.shape)}")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up: expected a float dtype, got {str(gate_up.dtype).removeprefix('torch.')}")
    contiguous_rows(gate_up=gate_up)
    if not runs_triton(gate_up, "gate_up"):
        return _SwiGlu.apply(gate_up) if torch.is_grad_enabled() else swiglu_reference(gate_up)
    width = gate_up.shape[-1]
    return _forward(gate_up.reshape(-1, width)).view(*gate_up.shape[:-1], width // 2)
