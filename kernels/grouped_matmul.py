"""Grouped products: one matrix per expert over its own rows, and the experts' whole feed-forward block as one node."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype
from .expert_tiles import TILE_ROWS, num_slots
from .moe_route import Routing


def grouped_matmul_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """(R, N): rows offsets[e] to offsets[e + 1] of x (R, K) times weight[e]^T, weight (E, N, K)."""
    bounds = offsets.tolist()
    parts = [x[a:b] @ matrix.T for a, b, matrix in zip(bounds, bounds[1:], weight) if b > a]
    return torch.cat(parts) if parts else x.new_zeros((0, weight.shape[1])) + 0 * (x.sum() + weight.sum())


def expert_mlp_reference(
    x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, rows: Tensor, positions: Tensor, offsets: Tensor
) -> Tensor:
    """sum_k gate_tk down_e (silu(gate) * up) of gate, up = gate_up_e x_t, e the token's k-th expert."""
    inner = grouped_matmul_reference(x[rows.long() // positions.shape[1]], gate_up, offsets)
    gate, up = inner.chunk(2, dim=-1)
    outer = grouped_matmul_reference(F.silu(gate) * up, down, offsets)
    return (gates.to(x.dtype)[..., None] * outer[positions.long()]).sum(1)


@torch.library.custom_op("wizard_engine::expert_mlp_forward", mutates_args=())
def _forward(
    x: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    from ._expert_rows import moe_combine
    from ._grouped_matmul import Layout, grouped_matmul, grouped_swiglu

    layout = Layout(rows, positions, offsets, tiles)
    hidden, inner = grouped_swiglu(x, gate_up, layout, keep)
    out = moe_combine(grouped_matmul(hidden, down, layout), gates, positions)
    return out, x.new_empty(0) if inner is None else inner


@_forward.register_fake
def _(x, gates, gate_up, down, rows, positions, offsets, tiles, keep):
    return torch.empty_like(x), x.new_empty((rows.shape[0], gate_up.shape[1]) if keep else (0,))


@torch.library.custom_op("wizard_engine::expert_mlp_backward", mutates_args=())
def _backward(
    dout: Tensor,
    x: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    inner: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """dx, dgates, dgate_up, ddown; empty where they are not needed."""
    from ._expert_rows import moe_combine
    from ._grouped_matmul import Layout, grouped_dswiglu, grouped_dweight, grouped_matmul

    layout, experts = Layout(rows, positions, offsets, tiles), gate_up.shape[0]
    grads = [t.new_empty(0) for t in (x, gates, gate_up, down)]
    dinner, gated, dgate_R = grouped_dswiglu(dout, down, inner, gates, layout)
    if needed[1]:
        grads[1] = dgate_R[positions.long()]
    if needed[3]:
        grads[3] = grouped_dweight(dout, gated, layout, experts, gathered="left")
    del gated
    if needed[2]:
        grads[2] = grouped_dweight(dinner, x, layout, experts, gathered="right")
    if needed[0]:
        grads[0] = moe_combine(grouped_matmul(dinner, gate_up, layout, transposed=True), None, positions)
    return grads


@_backward.register_fake
def _(dout, x, gates, gate_up, down, inner, rows, positions, offsets, tiles, needed):
    operands = (x, gates, gate_up, down)
    return [t.new_empty(t.shape if is_needed else (0,)) for t, is_needed in zip(operands, needed)]


class _ExpertMlp(torch.autograd.Function):
    """Keeps the tokens and the products with `gate_up`; the backward computes the activations again."""

    @staticmethod
    def forward(ctx, x, gates, gate_up, down, rows, positions, offsets, tiles, keep):
        out, inner = _forward(x, gates, gate_up, down, rows, positions, offsets, tiles, keep)
        ctx.save_for_backward(x, gates, gate_up, down, inner, rows, positions, offsets, tiles)
        return out

    @staticmethod
    def backward(ctx, dout):
        needed = list(ctx.needs_input_grad[:4])
        grads = _backward(dout.contiguous(), *ctx.saved_tensors, needed)
        return *(grad if is_needed else None for grad, is_needed in zip(grads, needed)), None, None, None, None, None


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of the outputs of each token's experts, gated feed-forward blocks.

    out_t = sum_k gate_tk down_e (silu(g) * u),   (g, u) = gate_up_e x_t,   e = experts_tk

    The first product gathers tokens in its load and applies the activation in registers; the sum over a token's experts
    gathers its rows: no atomics, bit-equal between runs. The backward keeps x and (g, u), which is (R, 2 F). An expert
    without rows costs nothing, and the gradients of its weights are zero.

    Args:
        x: (T, D) fp32, fp16 or bf16 (CPU: fp64 too).   gate_up: (E, 2 F, D), the gate in the first F rows of an expert.
        down: (E, D, F); dtypes of x, contiguous.   routing: of these tokens, by `moe_route`.
    Returns:
        (T, D), dtype of x. Differentiable in x, routing.gates, gate_up and down.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or a matrix of an expert has 2^31 elements.
    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1.
    """
    _check(x, gate_up, down, routing)
    index = routing.rows, routing.positions, routing.offsets
    if not (x.is_meta or runs_triton(x, "x")):
        return expert_mlp_reference(x, routing.gates, gate_up, down, *index)
    # Inside an autograd function it cannot be told whether a backward will come.
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, routing.gates, gate_up, down))
    return _ExpertMlp.apply(x, routing.gates, gate_up, down, *index, routing.tiles, keep)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> None:
    experts, width, ffn_width = down.shape if down.dim() == 3 else (0, 0, 0)
    if x.dim() != 2 or not experts or tuple(gate_up.shape) != (experts, 2 * ffn_width, x.shape[1]) or not ffn_width:
        raise ValueError(
            f"x, gate_up, down: expected (T, D), (E, 2 F, D), (E, D, F), got {tuple(x.shape)}, {tuple(gate_up.shape)}, "
            f"{tuple(down.shape)}"
        )
    if width != x.shape[1]:
        raise ValueError(f"down: expected ({experts}, {x.shape[1]}, {ffn_width}), got {tuple(down.shape)}")
    tokens, choices = routing.positions.shape
    if tokens != x.shape[0] or routing.offsets.shape[0] != experts + 1:
        raise ValueError(
            f"routing: expected that of {x.shape[0]} tokens and {experts} experts, got {tokens} and "
            f"{routing.offsets.shape[0] - 1}"
        )
    assert routing.tiles.shape[1] == num_slots(tokens * choices, experts), f"a tile table of {TILE_ROWS} rows each"
    if not x.is_floating_point():
        raise ValueError(f"x: expected a float dtype, got {str(x.dtype).removeprefix('torch.')}")
    same_dtype(x=x, gate_up=gate_up, down=down)
    same_device(x=x, gate_up=gate_up, down=down, gates=routing.gates)
    contiguous_rows(x=x)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not weight.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(weight.stride())}")
        if weight[0].numel() >= 2**31:
            raise ValueError(f"{name}: expected below 2^31 elements of an expert, got {weight[0].numel()}")
