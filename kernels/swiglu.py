"""SwiGLU: the gated activation of the feed-forward block."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    """One node for the fused product; the slope of silu comes from torch's own kernel."""

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


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves.

    Args:
        gate_up: (T, 2F), the gate in the first F columns.
    Returns:
        (T, F).
    Raises:
        ValueError: an odd number of columns.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even number of columns, got {gate_up.shape[-1]}")
    return _SwiGlu.apply(gate_up)
