"""What the attention kernels share: tile slots of packed sequences, loads of rows, masks."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# Per-token numbers of a sequence start at a multiple of this, so that the backward reads whole blocks, aligned.
ALIGNMENT = 128


def aligned_length(tokens: int, num_sequences: int) -> int:
    """Elements that the per-token numbers of packed sequences take, aligned as `aligned_start` says."""
    return (tokens // ALIGNMENT + num_sequences + 1) * ALIGNMENT


@triton.jit
def aligned_start(start, sequence, ALIGNMENT: tl.constexpr):
    """Where the per-token numbers of a sequence start that starts at token `start`."""
    return (start // ALIGNMENT + sequence) * ALIGNMENT


@triton.jit
def find_tile(cu_seqlens, num_sequences, tokens, slot, BLOCK: tl.constexpr):
    """Sequence, block inside it, first token and length of a tile slot.

    Sequence s owns the slots from cu[s] // BLOCK + s to cu[s + 1] // BLOCK + s, at least as many as it has blocks, so
    that no table is needed: T // BLOCK + S + 1 slots cover every sequence and, as sequence S, the padding behind the
    last one. A block may start at or behind the sequence's end; then the slot has no work.
    """
    low = 0
    high = num_sequences + 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle
    start = tl.load(cu_seqlens + low)
    end = tokens
    if low < num_sequences:
        end = tl.load(cu_seqlens + low + 1)
    return low, slot - (start // BLOCK + low), start, end - start


@triton.jit
def load_rows(
    source, tiles, start, row, limit, head, stride_row, stride_head, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_WIDTH) rows start + row ... of one head; columns behind WIDTH are 0.

    Through the pointer `source`, rows at or behind `limit` are 0. Through the descriptor `tiles` (`TMA`) they hold what
    stands behind the sequence, perhaps NaN: for rows that are all before the limit, or whose use is masked.
    """
    if TMA and WIDTH == BLOCK_WIDTH:
        tile = tiles.load([start + row, head * WIDTH])
    elif TMA:
        tile = tiles.load([start + row, head, 0]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        rows = row + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_WIDTH)
        base = source + start.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
        mask = (rows < limit)[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (columns < WIDTH)[None, :]
        tile = tl.load(base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(
    target, values, start, row, limit, head, stride_row, stride_head, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the rows before `limit` and the columns before WIDTH of a tile."""
    rows = row + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    base = target + start.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    mask = (rows < limit)[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def query_tile(program, slots, GROUP: tl.constexpr):
    """Key head, query head and tile slot of a program over query tiles.

    The query heads of one key head stand side by side, for L2; the tiles at a sequence's end, the longest, come first.
    """
    kv_head = program // (slots * GROUP)
    within = program % (slots * GROUP)
    return kv_head, kv_head * GROUP + within % GROUP, slots - 1 - within // GROUP


@triton.jit
def key_range(
    row, num_queries, num_keys, offset, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys that the queries [row, row + BLOCK_M) walk over: first, whole, last, left, right.

    Keys of [first, last) are seen by some query; blocks of BLOCK_N start at `first`, and those up to `whole` end before
    the last key. Of these, the blocks from `left` to `right` are seen by every query.
    """
    first = 0
    last = num_keys
    left = 0
    right = num_keys
    if CAUSAL:
        last = tl.maximum(tl.minimum(last, tl.minimum(row + BLOCK_M, num_queries) + offset), 0)
        right = tl.maximum(tl.minimum(right, row + offset + 1), 0)
    if WINDOWED:
        first = tl.maximum(row + offset - window + 1, 0)
        left = tl.maximum(row + BLOCK_M + offset - window, 0)
    first = round_down(first, BLOCK_N)
    whole = tl.maximum(tl.minimum(round_down(num_keys, BLOCK_N), tl.cdiv(last, BLOCK_N) * BLOCK_N), first)
    left = tl.minimum(tl.cdiv(left, BLOCK_N) * BLOCK_N, whole)
    right = tl.maximum(tl.minimum(round_down(right, BLOCK_N), whole), left)
    return first, whole, last, left, right


@triton.jit
def is_seen(query, key, num_keys, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Mask of the keys that queries see; offset = keys - queries aligns the last query with the last key."""
    seen = key < num_keys
    if CAUSAL:
        seen = seen & (key <= query + offset)
    if WINDOWED:
        seen = seen & (key > query + offset - window)
    return seen


@triton.jit
def span(cu_seqlens, sequence, num_sequences, tokens):
    """First token and length of a sequence; of the padding behind the last one, its end and 0."""
    start = tokens
    length = 0
    if sequence < num_sequences:
        start = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - start
    return start, length


@triton.jit
def apply_mask(
    scores, rows, column, num_keys, offset, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Scores of queries `rows` (BLOCK_M,) and the keys from `column` on, -inf where a key is not seen."""
    keys = column + tl.arange(0, BLOCK_N)
    seen = is_seen(rows[:, None], keys[None, :], num_keys, offset, window, CAUSAL, WINDOWED)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def round_down(x, BLOCK: tl.constexpr):
    """Largest multiple of BLOCK up to x, x >= 0."""
    return x // BLOCK * BLOCK
