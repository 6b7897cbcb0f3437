"""Kernels of linear log-probabilities: the product with the head feeds an online log-sum-exp, and no logit is stored.

Forward: one program of `linear_logprob_statistics_kernel` takes BLOCK_T tokens and one split of the vocabulary.

1. Find the tile of tokens and the split.
2. Walk over the split: a (BLOCK_T, BLOCK_V) block of logits, its online log-sum-exp, the target's logit.
3. Store four numbers per token: row_max, row_sum of exp(z - row_max), the target's logit, sum of (z - row_max) exp(..).

`linear_logprob_merge_kernel` combines the splits of each token. There are as many splits as fill the device.

Backward: one program of `linear_logprob_dlogits_kernel` computes a block of logits again, turns it into its gradient in
registers, and stores that for a slice of the vocabulary in the dtype of the inputs. Then cuBLAS makes two products: one
completes the slice of the weight's gradient, the other is added to the gradient of the hidden states in fp32.

Logits and sums are fp32. Both kernels sum a logit in the same order (their tables have the same BLOCK_D). This matters
where a token has a probability near 1: its gradient is the small difference of two equal logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rms_norm import multiprocessors
from ._tiles import descriptor, fits_tma, place, pointer_products
from .configuration import configuration
from .launch import launch, named

LOG2_E = 1.4426950408889634
# Programs per multiprocessor that the splits aim at: several waves, so that the last one leaves few processors idle.
WAVES = 4
# Token tiles that run at the same time: their hidden states stay in L2 while they walk over the vocabulary.
GROUP = 16
WORKSPACE_BYTES = 256 * 2**20


@triton.jit
def _logits(
    hidden,
    weight,
    hidden_tiles,
    weight_tiles,
    row,
    entry,
    tokens,
    vocab_size,
    stride_hidden,
    stride_weight,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_T, BLOCK_V) logits of the tokens from `row` on and the vocabulary entries from `entry` on, fp32.

    Those after the last token or entry are undefined: the caller masks them.
    """
    if TMA:
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for column in tl.range(0, WIDTH, BLOCK_D):
            h_TD = hidden_tiles.load([row, column])
            w_VD = weight_tiles.load([entry, column])
            acc = tl.dot(h_TD, w_VD.T, acc, input_precision=PRECISION)
    else:
        # Indices after the ends are clamped instead of masked, so that the inner loop needs no masks for rows. 64-bit:
        # vocabulary entries times width may pass 2^31 elements.
        rows = tl.minimum(row + tl.arange(0, BLOCK_T), tokens - 1).to(tl.int64)
        entries = tl.minimum(entry + tl.arange(0, BLOCK_V), vocab_size - 1).to(tl.int64)
        acc = pointer_products(
            hidden, weight, rows, entries, stride_hidden, stride_weight, WIDTH, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION
        )
    return acc


@triton.jit
def _store(target, stride, rows, tokens, row_max, row_sum, target_logit, weighted_sum):
    """Store the four statistics of a tile of tokens into (4, T)."""
    mask = rows < tokens
    tl.store(target + rows, row_max, mask=mask)
    tl.store(target + stride + rows, row_sum, mask=mask)
    tl.store(target + 2 * stride + rows, target_logit, mask=mask)
    tl.store(target + 3 * stride + rows, weighted_sum, mask=mask)


@triton.jit(
    repr=named("linear_logprob_statistics", "WIDTH", "BLOCK_T", "BLOCK_V", "ENTROPY"),
    do_not_specialize=["tokens", "vocab_size", "split_entries", "start"],
)
def linear_logprob_statistics_kernel(
    hidden,
    weight,
    hidden_tiles,
    weight_tiles,
    targets,
    partial,
    tokens,
    vocab_size,
    split_entries,
    start,
    scale,
    stride_hidden,
    stride_weight,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. The tile of tokens and the split. `start` is the first entry of this rank's shard of the vocabulary.
    tile, split = place(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(vocab_size, split_entries), GROUP)
    row = tile * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    target = (tl.load(targets + rows, mask=rows < tokens, other=-1) - start).to(tl.int32)
    end = tl.minimum((split + 1) * split_entries, vocab_size)
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    target_logit = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    weighted_sum = tl.zeros([BLOCK_T], tl.float32)
    # 2. The blocks of the split. Only the inner loop over the width, in `_logits`, is pipelined.
    for entry in tl.range(split * split_entries, end, BLOCK_V, num_stages=1):
        logits = _logits(
            hidden,
            weight,
            hidden_tiles,
            weight_tiles,
            row,
            entry,
            tokens,
            vocab_size,
            stride_hidden,
            stride_weight,
            WIDTH,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
            TMA,
            PRECISION,
        )
        entries = entry + tl.arange(0, BLOCK_V)
        logits = tl.where((entries < end)[None, :], logits * scale, float("-inf"))
        # At most one column is the target: the maximum picks it, and keeps -inf where another split has it.
        target_logit = tl.maximum(
            target_logit, tl.max(tl.where(entries[None, :] == target[:, None], logits, float("-inf")), 1)
        )
        # Where all logits so far are -inf, a shift of 0 avoids -inf - -inf.
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        shifted = logits - shift[:, None]
        exponential = tl.math.exp2(shifted * 1.4426950408889634)
        rescale = tl.math.exp2((row_max - shift) * 1.4426950408889634)
        if ENTROPY:
            # Changing the maximum from m to n turns sum (z - m) e^(z - m) into e^(m - n) (sum .. + (m - n) row_sum).
            # A term of weight 0 is 0, also where z is -inf.
            max_change = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
            terms = tl.where(exponential > 0.0, exponential * shifted, 0.0)
            weighted_sum = rescale * (weighted_sum + row_sum * max_change) + tl.sum(terms, 1)
        row_sum = row_sum * rescale + tl.sum(exponential, 1)
        row_max = new_max
    # 3. Four numbers per token, (splits, 4, T).
    _store(
        partial + split.to(tl.int64) * 4 * tokens,
        tokens.to(tl.int64),
        rows,
        tokens,
        row_max,
        row_sum,
        target_logit,
        weighted_sum,
    )


@triton.jit(repr=named("linear_logprob_merge", "BLOCK_T", "BLOCK_S"), do_not_specialize=["tokens", "splits"])
def linear_logprob_merge_kernel(partial, out, tokens, splits, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    # The same online update as in the forward, BLOCK_S splits at a time, in the order of the splits.
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    stride = tokens.to(tl.int64)
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    target_logit = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    weighted_sum = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & (rows < tokens)[None, :]
        at = partial + split.to(tl.int64)[:, None] * (4 * stride) + rows[None, :]
        split_max = tl.load(at, mask=mask, other=float("-inf"))
        split_sum = tl.load(at + stride, mask=mask, other=0.0)
        split_target = tl.load(at + 2 * stride, mask=mask, other=float("-inf"))
        split_weighted = tl.load(at + 3 * stride, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(split_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        max_change = tl.where(row_max == float("-inf"), 0.0, row_max - shift)
        split_change = tl.where(split_max == float("-inf"), 0.0, split_max - shift[None, :])
        rescale, split_rescale = (
            tl.math.exp2(max_change * 1.4426950408889634),
            tl.math.exp2(split_change * 1.4426950408889634),
        )
        weighted_sum = rescale * (weighted_sum + row_sum * max_change) + tl.sum(
            split_rescale * (split_weighted + split_sum * split_change), 0
        )
        row_sum = row_sum * rescale + tl.sum(split_sum * split_rescale, 0)
        target_logit = tl.maximum(target_logit, tl.max(split_target, 0))
        row_max = new_max
    _store(out, stride, rows, tokens, row_max, row_sum, target_logit, weighted_sum)


@triton.jit(
    repr=named("linear_logprob_dlogits", "WIDTH", "BLOCK_T", "BLOCK_V", "ENTROPY"),
    do_not_specialize=["tokens", "vocab_size", "first", "blocks", "start"],
)
def linear_logprob_dlogits_kernel(
    hidden,
    weight,
    hidden_tiles,
    weight_tiles,
    targets,
    statistics,
    dlogprob,
    dentropy,
    dlogits,
    tokens,
    vocab_size,
    first,
    blocks,
    start,
    scale,
    stride_hidden,
    stride_weight,
    stride_dlogits,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Logits of the block: `column` counts inside the slice, `entry` inside the vocabulary.
    tile, block = place(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), blocks, GROUP)
    row, column = tile * BLOCK_T, block * BLOCK_V
    entry = first + column
    logits = _logits(
        hidden,
        weight,
        hidden_tiles,
        weight_tiles,
        row,
        entry,
        tokens,
        vocab_size,
        stride_hidden,
        stride_weight,
        WIDTH,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        TMA,
        PRECISION,
    )
    # Numbers of the tokens.
    rows = row + tl.arange(0, BLOCK_T)
    entries = entry + tl.arange(0, BLOCK_V)
    mask = rows < tokens
    stride = tokens.to(tl.int64)
    target = tl.load(targets + rows, mask=mask, other=-1)
    has_target = target >= 0
    row_max = tl.load(statistics + rows, mask=mask, other=0.0)
    inverse_sum = 1.0 / tl.load(statistics + stride + rows, mask=mask, other=1.0)
    dtarget = tl.load(dlogprob + rows, mask=mask, other=0.0) * scale
    # dlogit = p (-dlogprob - dentropy (log p + H)) + [target] dlogprob, all times `scale`. The division by row_sum is
    # done for each row here, not for each element.
    base = 0.0 - dtarget * inverse_sum
    shifted = logits * scale - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None]
    exponential = tl.math.exp2(shifted * 1.4426950408889634)
    if ENTROPY:
        # log p + H = (z - row_max) - weighted_sum / row_sum
        dentropy_scaled = tl.load(dentropy + rows, mask=mask, other=0.0) * inverse_sum * scale
        base += dentropy_scaled * inverse_sum * tl.load(statistics + 3 * stride + rows, mask=mask, other=0.0)
        dlogit = tl.where(exponential > 0.0, exponential * (base[:, None] - dentropy_scaled[:, None] * shifted), 0.0)
    else:
        dlogit = exponential * base[:, None]
    dlogit += tl.where(entries[None, :] == (target - start).to(tl.int32)[:, None], dtarget[:, None], 0.0)
    dlogit = tl.where(has_target[:, None], dlogit, 0.0)
    # 32-bit offsets inside the tile: 64-bit offsets of every element would spill. Rows of the workspace are whole tiles
    # long, so columns after the last entry need no mask.
    tile_offset = tl.arange(0, BLOCK_T)[:, None] * stride_dlogits + tl.arange(0, BLOCK_V)[None, :]
    at = dlogits + row.to(tl.int64) * stride_dlogits + column + tile_offset
    tl.store(at, dlogit.to(dlogits.dtype.element_ty), mask=mask[:, None])


def shape_class(x: Tensor) -> dict[str, int]:
    """Keys of the tables: bytes of an element."""
    return {"bytes": x.element_size()}


def _operands(table: str, hidden: Tensor, weight: Tensor) -> tuple[dict, tuple]:
    """Configuration of a product of tokens and vocabulary entries, and the kernel's first four arguments."""
    config = dict(configuration(table, hidden.device, **shape_class(hidden)))
    config["TMA"] = config["TMA"] and fits_tma(hidden) and fits_tma(weight)
    tiles = [
        descriptor(x, config[block], config["BLOCK_D"]) if config["TMA"] else None
        for x, block in ((hidden, "BLOCK_T"), (weight, "BLOCK_V"))
    ]
    return config, (hidden, weight, *tiles)


def linear_logprob_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, start: int
) -> Tensor:
    """(4, T) fp32: row_max of the logits z, sum e^(z - row_max), the target's z, sum (z - row_max) e^(z - row_max)."""
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    config, operands = _operands("linear_logprob_statistics", hidden, weight)
    tiles, blocks = triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(vocab_size, config["BLOCK_V"])
    split_entries = _split_blocks(tiles, blocks, multiprocessors(hidden.device)) * config["BLOCK_V"]
    splits = triton.cdiv(vocab_size, split_entries)
    partial = torch.empty((splits, 4, tokens), dtype=torch.float32, device=hidden.device)
    launch(
        linear_logprob_statistics_kernel,
        (tiles * splits,),
        *operands,
        targets,
        partial,
        tokens,
        vocab_size,
        split_entries,
        start,
        1.0 / temperature,
        hidden.stride(0),
        weight.stride(0),
        WIDTH=hidden.shape[1],
        ENTROPY=entropy,
        PRECISION="ieee",
        GROUP=GROUP,
        **config,
    )
    if splits == 1:
        return partial[0]
    out = torch.empty((4, tokens), dtype=torch.float32, device=hidden.device)
    config = configuration("linear_logprob_merge", hidden.device)
    launch(
        linear_logprob_merge_kernel, (triton.cdiv(tokens, config["BLOCK_T"]),), partial, out, tokens, splits, **config
    )
    return out


def _split_blocks(tiles: int, blocks: int, processors: int) -> int:
    """Vocabulary blocks of a split: WAVES programs per multiprocessor, also where one group has all token tiles."""
    splits = max(WAVES * processors // max(1, tiles), triton.cdiv(processors, GROUP))
    return triton.cdiv(blocks, min(blocks, splits))


def linear_logprob_gradients(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    start: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden (T, D) and dweight (V, D) from the gradients of log-probabilities and entropies and the statistics."""
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    config, operands = _operands("linear_logprob_dlogits", hidden, weight)
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    step = _slice_entries(tokens, vocab_size, config["BLOCK_V"], hidden.element_size())
    tiles = triton.cdiv(tokens, config["BLOCK_T"])
    workspace = torch.empty((tokens, step), dtype=hidden.dtype, device=hidden.device)
    for first in range(0, vocab_size, step):
        width = min(step, vocab_size - first)
        blocks = triton.cdiv(width, config["BLOCK_V"])
        launch(
            linear_logprob_dlogits_kernel,
            (tiles * blocks,),
            *operands,
            targets,
            statistics,
            dlogprob,
            dentropy,
            workspace,
            tokens,
            vocab_size,
            first,
            blocks,
            start,
            1.0 / temperature,
            hidden.stride(0),
            weight.stride(0),
            step,
            WIDTH=hidden.shape[1],
            ENTROPY=dentropy is not None,
            PRECISION="ieee",
            GROUP=GROUP,
            **config,
        )
        dlogits, entries = workspace[:, :width], slice(first, first + width)
        if needs_weight:
            _product(dlogits.T, hidden, dweight[entries])
        if needs_hidden:
            _add_product(dlogits, weight[entries], dhidden)
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight


def _slice_entries(tokens: int, vocab_size: int, block: int, size: int) -> int:
    """Entries of a slice: whole blocks, so that the (T, slice) gradient fits the workspace; slices are about equal."""
    most = max(1, WORKSPACE_BYTES // (max(1, tokens) * size * block))
    blocks = triton.cdiv(vocab_size, block)
    return triton.cdiv(blocks, triton.cdiv(blocks, most)) * block


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in fp32; on CPUs, under the interpreter, torch sums halves in halves unless widened."""
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, added up in fp32 inside the product; widened as above."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
