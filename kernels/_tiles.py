"""Parts of kernels with tiled products: the order of programs, products through pointers, and TMA descriptors."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def place(program, blocks, columns, GROUP: tl.constexpr):
    """Block of rows and block of columns of a program: one group of GROUP row blocks after the other, rows fastest.

    Programs that run at the same time then use few different rows and columns, which stay in L2.
    """
    # The last group may have fewer row blocks.
    group = program // (GROUP * columns)
    inside = program % (GROUP * columns)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def pointer_products(
    x,
    weight,
    rows,
    columns,
    stride_x,
    stride_weight,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32 products of rows of x and rows of weight.

    rows, columns: indices that all exist; int64 where an offset may pass 2^31 elements.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    depth = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * stride_x + depth[None, :]
    w_at = weight + columns[:, None] * stride_weight + depth[None, :]
    for k in tl.range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            x_MK = tl.load(x_at + k)
            w_NK = tl.load(w_at + k)
        else:
            mask = (depth < WIDTH - k)[None, :]
            x_MK = tl.load(x_at + k, mask=mask, other=0.0)
            w_NK = tl.load(w_at + k, mask=mask, other=0.0)
        acc = tl.dot(x_MK, w_NK.T, acc, input_precision=PRECISION)
    return acc


def fits_tma(x: Tensor) -> bool:
    """True if TMA can read tiles of x (..., rows, columns): 16-byte aligned rows with contiguous columns."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(-2) * x.element_size() % 16 == 0
    return x.shape[0] > 0 and x.stride(-1) == 1 and aligned


def descriptor(x: Tensor, rows: int, columns: int):
    """A TMA descriptor of (rows, columns) tiles of x (..., D), with its leading dims as one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = x.flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])
