"""Parts of the attention kernels: tile slots of packed sequences, loads and stores of rows, key ranges, masks."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# Log-sum-exp and delta of each sequence start at a multiple of this, so that the backward loads whole aligned blocks.
ALIGNMENT = 128


def aligned_length(tokens: int, num_sequences: int) -> int:
    """Elements of a per-token buffer whose sequences start where `aligned_start` says."""
    return (tokens // ALIGNMENT + num_sequences + 1) * ALIGNMENT


@triton.jit
def aligned_start(start, sequence, ALIGNMENT: tl.constexpr):
    """Index in an aligned per-token buffer of the sequence that starts at token `start`."""
    return (start // ALIGNMENT + sequence) * ALIGNMENT


@triton.jit
def find_tile(cu_seqlens, num_sequences, tokens, slot, BLOCK: tl.constexpr):
    """Sequence, block inside it, first token and length of a tile slot.

    Sequence s has the slots cu[s] // BLOCK + s to cu[s + 1] // BLOCK + s, at least one for each of its blocks. So the
    grid needs no table: T // BLOCK + S + 1 slots cover all sequences and, as sequence S, the padding after the last
    one. A slot whose block starts at or after the end of its sequence has no work.
    """
    # Binary search for the last sequence whose first slot is at or before this one.
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
    source,
    tiles,
    start,
    row,
    limit,
    head,
    stride_row,
    stride_head,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """(BLOCK, BLOCK_WIDTH) rows start + row ... of one head; columns from WIDTH on are 0.

    Through the pointer `source`, rows from `limit` on are 0. Through the descriptor `tiles` (`TMA`) they are rows of
    the next sequence, perhaps NaN: use it only where all rows are before the limit, or where the result is masked.
    """
    if TMA and WIDTH == BLOCK_WIDTH:
        tile = tiles.load([start + row, head * WIDTH])
    elif TMA:
        tile = tiles.load([start + row, head, 0]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        rows = row + tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_WIDTH)
        # 64-bit offsets: tokens times the row stride pass 2^31 elements in a long packed row.
        base = source + start.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
        mask = (rows < limit)[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (columns < WIDTH)[None, :]
        tile = tl.load(base + rows.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(
    target,
    values,
    start,
    row,
    limit,
    head,
    stride_row,
    stride_head,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
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

    The query heads of one key head are neighbours, so that its keys and values stay in L2. Slots run backwards: under
    a causal mask the last tiles of a sequence have the most work, and starting them first evens out the end.
    """
    kv_head = program // (slots * GROUP)
    within = program % (slots * GROUP)
    return kv_head, kv_head * GROUP + within % GROUP, slots - 1 - within // GROUP


@triton.jit
def key_range(
    row,
    num_queries,
    num_keys,
    offset,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Keys that a tile of queries [row, row + BLOCK_M) visits: first, whole, last, left, right.

        first        left             right        whole   last
          | window edge | no mask needed | diagonal  | tail  |

    Some query sees each key of [first, last). Blocks of BLOCK_N keys start at `first`; those up to `whole` are full.
    Every query sees all keys of the blocks in [left, right). Keys before `first` and from `last` on are never loaded.
    """
    first = 0
    last = num_keys
    left = 0
    right = num_keys
    # The causal limit is that of the tile's last real query (last) or of its first one (right); the window's is that of
    # its first query (first) or of its last one (left).
    if CAUSAL:
        last = tl.maximum(tl.minimum(last, tl.minimum(row + BLOCK_M, num_queries) + offset), 0)
        right = tl.maximum(tl.minimum(right, row + offset + 1), 0)
    if WINDOWED:
        first = tl.maximum(row + offset - window + 1, 0)
        left = tl.maximum(row + BLOCK_M + offset - window, 0)
    # Inwards to whole blocks for what needs no mask, outwards for what is visited.
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
    """First token and length of a sequence; for the padding after the last one: `tokens` and 0."""
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
    """Scores of queries `rows` (BLOCK_M,) and of the keys from `column` on, -inf where a key is not visible."""
    keys = column + tl.arange(0, BLOCK_N)
    seen = is_seen(rows[:, None], keys[None, :], num_keys, offset, window, CAUSAL, WINDOWED)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def round_down(x, BLOCK: tl.constexpr):
    """Largest multiple of BLOCK up to x, x >= 0."""
    return x // BLOCK * BLOCK
