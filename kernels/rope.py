"""Rotary position embedding of queries and keys, half-split layout."""

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype, values_are_checked

MAX_HEAD_WIDTH = 256


def rope_tables(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, each (T, C/2) fp32, angle = position * base^(-2i/C)."""
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions[:, None].float() * (1.0 / base**exponent)[None, :]
    return angles.cos(), angles.sin()


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each pair (x_i, x_{i + C/2}) of q and k rotated by its angle."""
    cos, sin = _angles(cos, sin, positions, q.shape[0])
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _angles(cos: Tensor, sin: Tensor, positions: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """(T, 1, C/2) rows of the tables."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    elif cos.shape[0] != tokens:
        cos, sin = cos[:tokens], sin[:tokens]
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rope(torch.autograd.Function):
    """Rotation of q and k together; its gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        rotated = _rotated(_joined(q, k), cos, sin)
        return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        rotated = _rotated(_joined(dq, dk), cos, -sin)
        return rotated[:, : dq.shape[1]], rotated[:, dq.shape[1] :], None, None


def _joined(q: Tensor, k: Tensor) -> Tensor:
    """(T, H + K, C): a view where k follows q in one buffer, as slices of one projection do; else a copy."""
    if not torch.compiler.is_compiling():
        distance = k.storage_offset() - q.storage_offset()
        same_buffer = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        if same_buffer and q.stride() == k.stride() and distance == q.shape[1] * q.stride(1):
            return q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride())
    return torch.cat((q, k), dim=1)


@torch.library.custom_op("wizard_engine::rope", mutates_args=())
def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    from ._rope import rope_forward

    return rope_forward(q, k, cos, sin, positions, inverse)


@_rotate.register_fake
def _(q, k, cos, sin, positions, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    *_, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx, dq, dk):
    dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
    return *_rotate(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("wizard_engine::rope_joined", mutates_args=())
def _joined_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from ._rope import rope_joined

    return rope_joined(dq, dk, dv, cos, sin)


@_joined_gradient.register_fake
def _(dq, dk, dv, cos, sin):
    return dq.new_empty((dq.shape[0], dq.shape[1] + 2 * dk.shape[1], dq.shape[2]))


class _RopeOfProduct(torch.autograd.Function):
    """q, k and v out of one product; their gradients go to one buffer, without a concatenation."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, kv_heads):
        ctx.save_for_backward(cos, sin)
        ctx.runs_triton = runs_triton(qkv, "qkv")
        q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        if ctx.runs_triton:
            return *_rotate(q, k, cos, sin, None, False), v
        rotated = _rotated(qkv[:, : q.shape[1] + kv_heads], *_angles(cos, sin, None, qkv.shape[0]))
        return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :], v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        if ctx.runs_triton:
            grads = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
            return _joined_gradient(*grads, cos, sin), None, None, None
        cos, sin = _angles(cos, sin, None, dq.shape[0])
        return torch.cat((_rotated(_joined(dq, dk), cos, -sin), dv), dim=1), None, None, None


def rope_of_product(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads out of one product, queries and keys rotated as `rope` does.

    Args:
        qkv: (T, H + 2 K, C): the heads of q, k and v side by side, H >= 1; else as q of `rope`.
        cos, sin: (P, C/2) fp32, P >= T, as `rope_tables` gives them.   kv_heads: K >= 1.
    Returns:
        q' (T, H, C), k' (T, K, C) and v (T, K, C), the last a view of qkv. Differentiable in qkv; bit-equal to `rope`
        of slices, and so is the gradient.
    Raises:
        ValueError: as `rope`, or kv_heads that leave no query head.
    """
    if qkv.dim() != 3 or not 1 <= kv_heads <= (qkv.shape[1] - 1) // 2:
        raise ValueError(f"qkv: expected (T, H + 2 K, C) with H, K >= 1, got {tuple(qkv.shape)} and K = {kv_heads}")
    _check(qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads], cos, sin, None)
    if runs_triton(qkv, "qkv") and qkv.shape[-1] > MAX_HEAD_WIDTH:
        raise ValueError(f"qkv: expected heads of at most {MAX_HEAD_WIDTH} elements, got {qkv.shape[-1]}")
    return _RopeOfProduct.apply(qkv, cos, sin, kv_heads)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotated query and key heads.

    (x_i, x_{i + C/2}) -> (x_i cos_i - x_{i + C/2} sin_i, x_{i + C/2} cos_i + x_i sin_i)

    Args:
        q: (T, H, C), k: (T, K, C), C even, at most 256 on CUDA; fp32, fp16 or bf16 (CPU: fp64 too), last dim
            contiguous.
        cos, sin: (P, C/2) fp32, as `rope_tables` gives them.
        positions: (T,) int32 or int64, the row of the tables that each token takes; None: token t takes row t.
    Returns:
        q' (T, H, C) and k' (T, K, C), dtype of q. Differentiable in q and k.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or a position is negative or not in the tables
            (values are checked on CPU, and on CUDA inside kernels.check_values(); elsewhere the token becomes NaN).
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Llama checkpoints.
    """
    _check(q, k, cos, sin, positions)
    if runs_triton(q, "q"):
        if q.shape[-1] > MAX_HEAD_WIDTH:
            raise ValueError(f"q: expected heads of at most {MAX_HEAD_WIDTH} elements, got {q.shape[-1]}")
        return _rotate(q, k, cos, sin, positions, False)
    return _Rope.apply(q, k, *_angles(cos, sin, positions, q.shape[0]))


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2] or q.shape[-1] % 2 or not q.shape[-1]:
        raise ValueError(f"q, k: expected (T, H, C), (T, K, C) with C even, got {tuple(q.shape)}, {tuple(k.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a float dtype, got {str(q.dtype).removeprefix('torch.')}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != q.shape[-1] // 2:
        raise ValueError(f"cos, sin: expected (P, {q.shape[-1] // 2}), got {tuple(cos.shape)}, {tuple(sin.shape)}")
    if (cos.dtype, sin.dtype) != (torch.float32, torch.float32):
        raise ValueError(
            f"cos, sin: expected float32, got {cos.dtype}, {sin.dtype}; round the products, not the angles"
        )
    same_dtype(q=q, k=k)
    same_device(q=q, k=k, cos=cos, sin=sin, positions=positions)
    contiguous_rows(q=q, k=k)
    if positions is None:
        if cos.shape[0] < q.shape[0]:
            raise ValueError(f"cos, sin: expected a row for each of {q.shape[0]} tokens, got {cos.shape[0]}")
        return
    if positions.shape != q.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions: expected ({q.shape[0]},) int32 or int64, got {tuple(positions.shape)} {positions.dtype}"
        )
    if values_are_checked(positions) and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions: expected 0 to {cos.shape[0] - 1} (rows of cos), got {low} to {high}")
