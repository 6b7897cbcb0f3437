"""Expert permutation: tokens copied to the sorted rows of their experts, and the weighted sum of a token's rows."""

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton
from .moe_route import Routing

VECTOR_BYTES = 16


def permute_reference(x: Tensor, index: Tensor, choices: int) -> Tensor:
    """x[index // choices]."""
    return x[index.long() // choices]


def permute(x: Tensor, index: Tensor, choices: int) -> Tensor:
    """(R, D) rows of x: row r is token index[r] // choices. Exact; no gradient.

    On CUDA by the library of csrc/cuda where nvcc built it and rows are whole 16-byte vectors, else by Triton.

    Args:
        x: (T, D), last dim contiguous.   index: (R,) int32, `Routing.rows`.   choices: experts per token.
    """
    contiguous_rows(x=x)
    if x.is_cuda and fits_vectors(x):
        import csrc.cuda

        library = csrc.cuda.library()
        if library is not None:
            return _permute_cuda(library, x, index, choices)
    if x.is_meta or runs_triton(x, "x"):
        from ._expert_rows import moe_permute

        return moe_permute(x, index, choices)
    return permute_reference(x, index, choices)


def fits_vectors(x: Tensor) -> bool:
    """True if every row of x starts and ends at a multiple of 16 bytes."""
    sizes = (x.shape[1] * x.element_size(), x.stride(0) * x.element_size(), x.data_ptr())
    return all(size % VECTOR_BYTES == 0 for size in sizes)


def _permute_cuda(library, x: Tensor, index: Tensor, choices: int) -> Tensor:
    import csrc.cuda

    out = torch.empty((index.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    vectors, stride = (n * x.element_size() // VECTOR_BYTES for n in (x.shape[1], x.stride(0)))
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        status = library.wizard_permute_rows(
            x.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), vectors, stride, choices, stream
        )
    csrc.cuda.check(status, "wizard_permute_rows")
    return out


@torch.library.custom_op("wizard_engine::permute_rows", mutates_args=())
def _permute(x: Tensor, rows: Tensor, choices: int) -> Tensor:
    """Rows of tokens, sorted by expert."""
    return permute(x, rows, choices)


@_permute.register_fake
def _(x, rows, choices):
    return x.new_empty((rows.shape[0], x.shape[1]))


@torch.library.custom_op("wizard_engine::combine_rows", mutates_args=())
def _combine(rows: Tensor, gates: Tensor | None, positions: Tensor) -> Tensor:
    """The sum over a token's choices of its rows, each times its gate unless gates is None."""
    if runs_triton(rows, "rows"):
        from ._expert_rows import moe_combine

        return moe_combine(rows, gates, positions)
    rows_TAD = rows[positions.long()]
    return (rows_TAD if gates is None else gates.to(rows.dtype)[..., None] * rows_TAD).sum(1)


@_combine.register_fake
def _(rows, gates, positions):
    return rows.new_empty((positions.shape[0], rows.shape[1]))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, positions):
        ctx.save_for_backward(positions)
        return _permute(x, rows, positions.shape[1])

    @staticmethod
    def backward(ctx, dout):
        return _combine(dout.contiguous(), None, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, gates, rows, positions):
        ctx.save_for_backward(out, gates, rows, positions)
        return _combine(out, gates, positions)

    @staticmethod
    def backward(ctx, dcombined):
        out, gates, rows, positions = ctx.saved_tensors
        dcombined_RD = _permute(dcombined.contiguous(), rows, positions.shape[1])
        dout = dgates = None
        if ctx.needs_input_grad[0]:
            dout = dcombined_RD * gates.flatten()[rows.long(), None].to(dcombined.dtype)
        if ctx.needs_input_grad[1]:
            sum_dtype = torch.promote_types(gates.dtype, dcombined.dtype)
            dgates = (out * dcombined_RD).sum(-1, dtype=sum_dtype)[positions.long()].to(gates.dtype)
        return dout, dgates, None, None


def permute_rows(x: Tensor, routing: Routing) -> Tensor:
    """(R, D) rows of the tokens x (T, D), sorted by expert; differentiable in x."""
    return _Permute.apply(x, routing.rows, routing.positions)


def combine(out: Tensor, routing: Routing) -> Tensor:
    """(T, D): the sum over a token's choices of its sorted rows `out` (R, D), each times its gate; differentiable in
    both."""
    return _Combine.apply(out, routing.gates, routing.rows, routing.positions)
