"""Pieces of prompts and single tokens over pages, against plain attention in float64; writing pages; C++ levels."""

import random

import pytest
import torch

import kernels
from kernels.attention import attention_reference
from kernels.paged_attention import PagedBatch, paged_attention, write_pages, write_pages_reference
from kernels.paged_rows import LEVELS, attend_rows, write_rows
from kernels.rope import rope_reference, rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(16, 4, 2, 8), (16, 3, 3, 32), (32, 6, 1, 20), (64, 8, 2, 64), (16, 2, 1, 4)]


def problem(sequences, page, heads, kv_heads, width, dtype, seed=0, padding=3):
    """(length, new tokens) of sequences, the first ones with one new token; NaN where nobody's keys stand."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    counts = [-(-length // page) for length, _ in sequences]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    keys, values = (
        torch.full((len(order), page, kv_heads, width), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"
    )
    table, flat = torch.full((len(sequences), max(counts) + 1), -7, dtype=torch.int32), []
    for row, ((length, _), count) in enumerate(zip(sequences, counts)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        pair = normal(length, kv_heads, width), normal(length, kv_heads, width)
        for cache, x in zip((keys, values), pair):
            for at in range(length):
                cache[pages[at // page], at % page] = x[at]
        flat.append(pair)
    new = [n for _, n in sequences]
    decodes = next((i for i, n in enumerate(new) if n > 1), len(new))
    lengths = torch.tensor([length for length, _ in sequences], dtype=torch.int32, device=DEVICE)
    batch = PagedBatch(table.to(DEVICE), lengths, new, int(lengths.max()), decodes, page)
    return normal(sum(new) + padding, heads, width), keys, values, batch, flat


def expected(q, batch, flat, window):
    """Float64, zeros for padding."""
    out, at = torch.zeros(q.shape, dtype=torch.float64, device=q.device), 0
    for n, (k, v) in zip(batch.counts, flat):
        cu_q, cu_k = (torch.tensor([0, x], dtype=torch.int32, device=q.device) for x in (n, len(k)))
        q_n, k, v = q[at : at + n].double(), k.double(), v.double()
        out[at : at + n] = attention_reference(
            q_n, k, v, cu_q, n, cu_seqlens_k=cu_k, max_seqlen_k=len(k), window=window
        )
        at += n
    return out


SEQUENCES = [
    [(1, 1)],
    [(5, 1), (40, 1), (17, 1)],
    [(33, 33)],
    [(70, 1), (16, 1), (50, 17), (9, 9), (64, 2)],
    [(30, 5), (31, 6), (90, 40)],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_tokens_attend_to_the_keys_of_their_sequence(shape, dtype):
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    if DEVICE == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels have no fp64")
    for number, (sequences, window) in enumerate(zip(SEQUENCES, (None, 7, 20, 16, None))):
        q, keys, values, batch, flat = problem(sequences, *shape, dtype, seed=number)
        result = paged_attention(q, keys, values, batch, window=window)
        assert result.dtype == dtype and bool(result.isfinite().all()) and not result[batch.tokens :].any()
        assert float((result.double() - expected(q, batch, flat, window)).abs().max()) < limit


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_agree(backend):
    if backend == "triton" and not (DEVICE == "cuda" or kernels.backend.is_interpreted()):
        pytest.skip("Triton needs a GPU or its interpreter")
    q, keys, values, batch, flat = problem(SEQUENCES[3], 16, 4, 2, 16, torch.float32)
    with kernels.use_backend(backend):
        result = paged_attention(q, keys, values, batch, window=30)
    assert float((result.double() - expected(q, batch, flat, 30)).abs().max()) < 3e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="the order of sums on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_bit_equal_single_in_chunks_and_batched(dtype):
    sequences = [(80, 1), (23, 1), (61, 61), (47, 47)]
    q, keys, values, batch, _ = problem(sequences, 16, 6, 2, 24, dtype)
    whole = paged_attention(q, keys, values, batch)
    at = 2
    for row in (2, 3):
        length, done = sequences[row][0], 0
        while done < length:
            n = min(random.Random(done).choice([1, 2, 5, 30]), length - done)
            piece = PagedBatch(
                batch.page_table[row : row + 1], torch.tensor([done + n], dtype=torch.int32), [n], done + n, 0, 16
            )
            single = paged_attention(q[at + done : at + done + n].contiguous(), keys, values, piece)
            assert torch.equal(single, whole[at + done : at + done + n])
            done += n
        at += length


@pytest.mark.skipif(DEVICE == "cuda", reason="C++ code of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_levels_and_threads_give_the_same_bits(dtype):
    for shape in SHAPES:
        q, keys, values, batch, _ = problem([(70, 1), (16, 1), (600, 500)], *shape, dtype)
        owners, seen = batch.rows(q.shape[0])
        qkv = torch.randn(9, shape[1] + 2 * shape[2], shape[3]).to(dtype)
        cos, sin = rope_tables(torch.arange(9), shape[3], 100.0)
        result, written = [], []
        for level in LEVELS:
            for threads in (1, 2):
                options = {"level": level, "threads": threads}
                try:
                    result.append(attend_rows(q, keys, values, batch.page_table, owners, seen, 90, 0.3, **options))
                except ValueError as error:
                    assert "level: expected one that this processor has" in str(error)
                    continue
                cache = torch.zeros(2, 16, *keys.shape[2:], dtype=dtype)
                other = torch.zeros_like(cache)
                slots = torch.arange(9) * 3
                written.append((write_rows(qkv, cos, sin, cache, other, slots, level=level), cache, other))
        assert len(result) >= 2 and all(torch.equal(result[0], x) for x in result[1:])
        assert all(torch.equal(a, b) for pairs in written[1:] for a, b in zip(pairs, written[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (3, 3, 32), (6, 1, 6)])
def test_pages_get_turned_keys_and_values(heads, kv_heads, width, dtype):
    generator = torch.Generator().manual_seed(width)
    tokens = 11
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator).to(dtype).to(DEVICE)
    cos, sin = (x.to(DEVICE) for x in rope_tables(torch.randint(300, (tokens,), generator=generator), width, 1e4))
    slots = torch.randperm(48, generator=generator)[:tokens].to(DEVICE)
    caches = [torch.zeros(3, 16, kv_heads, width, dtype=dtype, device=DEVICE) for _ in range(4)]
    q = write_pages(qkv, cos, sin, *caches[:2], slots)
    again = write_pages_reference(qkv, cos, sin, *caches[2:], slots)
    turned, k = rope_reference(qkv[:, :heads], qkv[:, heads : heads + kv_heads], cos, sin)
    assert q.is_contiguous() and torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    for result, right in ((q, turned), (again, turned), (caches[0].view(48, kv_heads, width)[slots], k)):
        torch.testing.assert_close(result, right, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
        assert DEVICE == "cuda" or torch.equal(result, right)
    assert torch.equal(caches[1].view(48, kv_heads, width)[slots], qkv[:, heads + kv_heads :])
    assert int(caches[0].view(48, -1).any(1).sum()) == tokens


def wrong(**changes):
    q, keys, values, batch, _ = problem([(20, 1), (18, 4)], 16, 4, 2, 8, torch.float32)
    for name, value in changes.items():
        setattr(batch, name, value)
    return q, keys, values, batch


def test_what_does_not_fit_is_refused():
    q, keys, values, batch = wrong()
    with pytest.raises(ValueError, match=r"q, keys, values: expected \(T, H, C\)"):
        paged_attention(q[..., :4], keys, values, batch)
    with pytest.raises(ValueError, match="keys: expected pages of 32 tokens"):
        paged_attention(q, keys, values, wrong(page=32)[3])
    with pytest.raises(ValueError, match="q: expected at least 5 rows, got 4"):
        paged_attention(q[:4], keys, values, batch)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        paged_attention(q, keys, values, batch, window=0)
    with pytest.raises(ValueError, match="key/value heads that divide 3 heads"):
        paged_attention(q[:, :3].contiguous(), keys, values, batch)
    with pytest.raises(ValueError, match=r"new tokens of 18 in sequence 1, got 19"):
        paged_attention(q.repeat(5, 1, 1), keys, values, wrong(counts=[1, 19])[3])
    with pytest.raises(ValueError, match="batch: expected pages of 0 to"):
        paged_attention(q, keys, values, wrong(page_table=torch.full((2, 2), 99, dtype=torch.int32))[3])
    qkv, cos = torch.zeros(2, 8, 8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="slots: expected 0 to"):
        write_pages(qkv, cos, cos, keys, values, torch.tensor([0, 10_000]))
    with pytest.raises(ValueError, match="qkv: expected"):
        write_pages(qkv[:, :4], cos, cos, keys, values, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slots, cos: expected"):
        write_pages(qkv, cos, cos, keys, values, torch.tensor([0]))


@pytest.mark.skipif(DEVICE == "cuda", reason="C++ code of the CPU")
def test_memory_outside_the_pages_is_not_touched():
    q, keys, values, batch = wrong()
    owners, seen = batch.rows(q.shape[0])
    for table, who, sees in (
        (batch.page_table.clone().fill_(-1), owners, seen),
        (batch.page_table, owners + 2, seen),
        (batch.page_table, owners, seen + 1000),
    ):
        with pytest.raises(ValueError, match="lengths, page_table: expected pages below"):
            attend_rows(q, keys, values, table, who, sees, None, 1.0)
