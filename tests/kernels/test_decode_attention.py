"""Attention over pages against plain attention in float64: page sizes, groups, windows, shares, foreign pages."""

import itertools
import re

import pytest
import torch
from table_entries import distinct_entries

import kernels
from kernels.configuration import use_arch, use_config
from kernels.decode_attention import PAGE_SIZES, decode_attention, decode_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
SMALL = {"BLOCK_N": 16, "SHARE": 32, "num_warps": 4, "num_stages": 1}


def problem(lengths, page, heads, kv_heads, width, dtype, seed=0, spare=3):
    """Sequences in pages dealt out at random, NaN wherever nobody's keys stand; and their keys end to end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    counts = [-(-n // page) for n in lengths]
    columns = max([*counts, 1]) + 1
    order = torch.randperm(sum(counts) + spare, generator=generator).tolist()
    keys, values = (
        torch.full((len(order), page, kv_heads, width), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"
    )
    table, flat = torch.full((len(lengths), columns), -7, dtype=torch.int32), []
    for row, (length, count) in enumerate(zip(lengths, counts)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        k, v = normal(length, kv_heads, width), normal(length, kv_heads, width)
        for at in range(length):
            keys[pages[at // page], at % page], values[pages[at // page], at % page] = k[at], v[at]
        flat.append((k, v))
    q = normal(len(lengths), heads, width)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return (q, keys, values, table.to(DEVICE), sizes, max([*lengths, 0])), flat


def expected(q, flat, window, scale):
    """Plain attention of every sequence, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row, (k, v) in enumerate(flat):
        if not len(k):
            continue
        k, v = (x.double()[-window if window else 0 :].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("hc,nhc->hn", q[row].double(), k) * (scale or q.shape[-1] ** -0.5)
        out[row] = torch.einsum("hn,nhc->hc", scores.softmax(-1), v)
    return out


def close(result, right, dtype):
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert result.dtype == dtype and bool(result.isfinite().all())
    assert float((result.double() - right).abs().max()) <= limit * max(1.0, float(right.abs().max()))


LENGTHS = [1, 16, 33, 0, 71, 5]


@pytest.mark.every(3)
@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (8, 2, 32), (6, 1, 24), (32, 1, 64)])
def test_pages_groups_and_widths(page, heads, kv_heads, width):
    for dtype in (torch.float32, *HALVES):
        arguments, flat = problem(LENGTHS, page, heads, kv_heads, width, dtype)
        with kernels.use_backend("triton"), use_config("decode_attention", **SMALL):
            close(decode_attention(*arguments), expected(arguments[0], flat, None, None), dtype)
        close(decode_attention_reference(*arguments), expected(arguments[0], flat, None, None), dtype)


@pytest.mark.parametrize(("window", "scale"), [(1, None), (17, None), (40, 0.3), (1000, None), (None, 0.05)])
def test_windows_and_scales(window, scale):
    arguments, flat = problem(LENGTHS, 16, 4, 2, 16, torch.float32, seed=1)
    right = expected(arguments[0], flat, window, scale)
    with kernels.use_backend("triton"), use_config("decode_attention", **SMALL):
        close(decode_attention(*arguments, window=window, scale=scale), right, torch.float32)
    wide, flat = problem(LENGTHS, 16, 4, 2, 16, torch.float64, seed=1)
    result = decode_attention(*wide, window=window, scale=scale) if DEVICE == "cpu" else None
    if result is not None:
        close(result, expected(wide[0], flat, window, scale), torch.float64)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("arch", "shape"),
    distinct_entries("decode_attention"),
    ids=str,
)
def test_every_entry_of_the_tables(arch, shape):
    dtype = torch.float32 if shape["bytes"] == 4 else HALVES[-1]
    for page in (16, 256):
        arguments, flat = problem([3, 700, 512, 513], page, 4, 2, 32, dtype, seed=2)
        with kernels.use_backend("triton"), use_arch(arch):
            close(decode_attention(*arguments), expected(arguments[0], flat, None, None), dtype)


# Catches: shares that depend on how many sequences there are, or on the longest.
def test_a_sequence_is_bit_equal_in_any_batch():
    lengths = [70, 1, 33, 0, 129]
    arguments, _ = problem(lengths, 16, 4, 2, 16, torch.float32, seed=3)
    q, keys, values, table, sizes, _ = arguments
    with kernels.use_backend("triton"), use_config("decode_attention", **SMALL):
        together = decode_attention(*arguments)
        assert torch.equal(together, decode_attention(*arguments))
        for row, length in enumerate(lengths):
            for longest in (length, table.shape[1] * 16):
                one = slice(row, row + 1)
                single = decode_attention(q[one], keys, values, table[one].contiguous(), sizes[one], longest)
                assert torch.equal(single[0], together[row]), (row, longest)


def test_far_pages_are_reached():
    """Offsets beyond 2^31 elements; the pages between are never touched, so that they cost no memory."""
    if DEVICE == "cuda":
        pytest.skip("the pages would take 8 GiB")
    page, kv_heads, width = 256, 8, 256
    pages = 2**31 // (page * kv_heads * width) + 2
    keys, values = (torch.empty(pages, page, kv_heads, width, dtype=torch.float16) for _ in "kv")
    small, flat = problem([5], page, 8, 8, 256, torch.float16, seed=4)
    q, k, v, table, sizes, longest = small
    keys[-1], values[-1] = k[table[0, 0]], v[table[0, 0]]
    table = torch.full_like(table, pages - 1)
    with kernels.use_backend("triton"), use_config("decode_attention", **SMALL):
        close(decode_attention(q, keys, values, table, sizes, longest), expected(q, flat, None, None), torch.float16)


def test_bad_arguments_are_named():
    (q, keys, values, table, sizes, longest), _ = problem([5, 20], 16, 4, 2, 16, torch.float32)
    if DEVICE == "cuda":
        pytest.skip("values are not looked at on a GPU")
    for change, text in (
        ({"q": q[:, :3]}, "key/value heads that divide 3 heads"),
        ({"keys": keys[:, :8].contiguous(), "values": values[:, :8].contiguous()}, "pages of 16, 32, 64, 128, 256"),
        ({"q": q[0]}, "expected (B, H, C), (P, page, K, C) twice"),
        ({"lengths": sizes.long()}, "lengths: expected (B,) int32"),
        ({"lengths": sizes + 1}, "lengths: expected 0 to 20, got 21 of sequence 1"),
        ({"page_table": torch.full_like(table, 99)}, "page_table: expected pages of 0 to"),
        ({"max_length": 1000}, "max_length: expected 0 to"),
        ({"values": values.half()}, "values"),
        ({"keys": keys.transpose(0, 1).contiguous().transpose(0, 1)}, "keys: expected a contiguous tensor"),
        ({"window": 0}, "window: expected at least 1"),
    ):
        arguments = {
            "q": q,
            "keys": keys,
            "values": values,
            "page_table": table,
            "lengths": sizes,
            "max_length": longest,
        } | change
        with pytest.raises(ValueError, match=re.escape(text)):
            decode_attention(**arguments)


def test_no_sequence_gives_nothing():
    arguments, _ = problem([], 16, 4, 2, 16, torch.float32)
    for backend in itertools.repeat("reference", 1):
        with kernels.use_backend(backend):
            assert decode_attention(*arguments).shape == (0, 4, 16)
    with kernels.use_backend("triton"):
        assert decode_attention(*arguments).shape == (0, 4, 16)
