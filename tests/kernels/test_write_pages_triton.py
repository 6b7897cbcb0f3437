"""Rotation and cache write of a decode step in one launch, against the reference: widths, strides, padding."""

import pytest
import torch
from closeness import scaled
from table_entries import distinct_entries

import kernels
from kernels import configuration
from kernels.launch import record
from kernels.paged_attention import write_pages, write_pages_reference
from kernels.rope import rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 2, 8), (3, 3, 32), (6, 1, 20), (1, 1, 2), (8, 2, 64), (5, 1, 6), (2, 2, 130)]
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not kernels.backend.is_interpreted(), reason="Triton needs a GPU or its interpreter"
)


def inputs(tokens, heads, kv_heads, width, dtype, *, page=16, seed=0):
    """qkv with strides of its own, tables longer than the tokens, free places of pages that are poisoned."""
    qkv = scaled(tokens, heads + 2 * kv_heads, width + 3, seed=seed).to(dtype).to(DEVICE)[..., :width]
    cos, sin = (x.to(DEVICE) for x in rope_tables(torch.arange(50), width, 100.0))
    generator = torch.Generator().manual_seed(seed)
    pages = -(-tokens // page) + 2
    slots = torch.randperm(pages * page, generator=generator)[:tokens].to(DEVICE)
    positions = torch.randint(50, (tokens,), generator=generator).to(DEVICE)
    caches = [torch.full((pages, page, kv_heads, width), torch.nan, dtype=dtype, device=DEVICE) for _ in range(4)]
    return qkv, cos, sin, caches, slots, positions


def near(result, exact, base):
    """At most twice the error of the reference in the tested dtype, NaN where the reference has them."""
    result, exact, base = (x.double() for x in (result, exact, base))
    assert torch.equal(result.isnan(), base.isnan())
    result, exact, base = (x.nan_to_num(0.0) for x in (result, exact, base))
    bound = 2 * (base - exact).abs().max() + 4 * 2.0**-23 * exact.abs().max()
    assert float((result - exact).abs().max()) <= float(bound)


def exactly(qkv, cos, sin, caches, slots, positions=None):
    """In float64 on the CPU."""
    wide = [x.cpu().double() for x in (qkv, *caches)]
    with kernels.use_backend("reference"):
        q = write_pages_reference(
            wide[0], cos.cpu(), sin.cpu(), *wide[1:], slots.cpu(), None if positions is None else positions.cpu()
        )
    return [x.to(DEVICE) for x in (q, *wide[1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 19])
def test_one_launch_rotates_and_stores(tokens, shape, dtype):
    qkv, cos, sin, caches, slots, positions = inputs(tokens, *shape, dtype)
    exact = exactly(qkv, cos, sin, caches[:2], slots, positions)
    with kernels.use_backend("reference"):
        base = write_pages(qkv, cos, sin, *caches[2:], slots, positions)
    with kernels.use_backend("triton"):
        result = write_pages(qkv, cos, sin, *caches[:2], slots, positions)
    assert result.is_contiguous() and result.dtype == dtype
    for ours, right, other in zip((result, *caches[:2]), exact, (base, *caches[2:])):
        near(ours, right, other)
    # Values are copied, not computed with.
    values = caches[1].view(-1, *caches[1].shape[2:])
    assert torch.equal(values[slots], qkv[:, shape[0] + shape[1] :])
    with kernels.use_backend("triton"), record() as launches:
        write_pages(qkv, cos, sin, *caches[:2], slots, positions)
    assert [launch.kernel.__name__ for launch in launches] == ["write_pages_kernel"]


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), distinct_entries("write_pages"), ids=str)
def test_every_table_entry_is_right(arch, shape):
    if DEVICE == "cuda" and configuration.architecture(torch.device(DEVICE)) < arch:
        pytest.skip("an entry of a newer GPU")
    dtype = torch.float16 if shape["bytes"] == 2 else torch.float32
    qkv, cos, sin, caches, slots, positions = inputs(3, 3, 1, 2 * shape["half"], dtype)
    exact = exactly(qkv, cos, sin, caches[:2], slots, positions)
    with kernels.use_backend("reference"):
        base = write_pages(qkv, cos, sin, *caches[2:], slots, positions)
    with kernels.use_backend("triton"), configuration.use_arch(arch):
        result = write_pages(qkv, cos, sin, *caches[:2], slots, positions)
    for ours, right, other in zip((result, *caches[:2]), exact, (base, *caches[2:])):
        near(ours, right, other)


def test_without_positions_each_token_has_a_row_of_the_tables():
    qkv, cos, sin, caches, slots, positions = inputs(7, 4, 2, 16, torch.float32)
    with kernels.use_backend("triton"):
        result = write_pages(qkv, cos[positions], sin[positions], *caches[:2], slots)
        again = write_pages(qkv, cos, sin, *caches[2:], slots, positions.int())
    assert torch.equal(result, again) and torch.equal(caches[0][~caches[0].isnan()], caches[2][~caches[2].isnan()])


def test_padding_goes_to_the_scratch_page_alone():
    qkv, cos, sin, caches, slots, positions = inputs(9, 4, 2, 16, torch.float32)
    scratch = (caches[0].shape[0] - 1) * 16
    slots = torch.arange(9, device=DEVICE) + 3
    slots[5:] = scratch
    positions[5:] = 0
    with kernels.use_backend("triton"):
        write_pages(qkv, cos, sin, *caches[:2], slots, positions)
    for cache in caches[:2]:
        written = (~cache.view(-1, 32).isnan()).all(1).nonzero()[:, 0].tolist()
        assert written == [3, 4, 5, 6, 7, scratch]


# Catches: stores past the pages, positions past the tables.
def test_places_and_positions_that_are_not_there(monkeypatch):
    qkv, cos, sin, caches, slots, positions = inputs(5, 4, 2, 16, torch.float32)
    room = caches[0].shape[0] * 16
    for name, wrong in (("slots", torch.tensor([0, room, 1, -1, 2])), ("positions", torch.tensor([0, 50, 1, -1, 2]))):
        changed = {"slots": slots, "positions": positions} | {name: wrong.to(DEVICE)}
        with pytest.raises(ValueError, match=f"{name}: expected 0 to"), kernels.backend.check_values():
            write_pages(qkv, cos, sin, *caches[:2], **changed)
    monkeypatch.setattr("kernels.paged_attention.values_are_checked", lambda tensor: False)
    bytes_ = [torch.cat((cache.view(-1, 2, 16), torch.full((8, 2, 16), 7.0, device=DEVICE))) for cache in caches[:2]]
    inside = [x[:room].view(-1, 16, 2, 16) for x in bytes_]
    wrong = torch.tensor([0, room, 1, -1, 2], device=DEVICE)
    with kernels.use_backend("triton"):
        write_pages(qkv, cos, sin, *inside, wrong, positions)
        q = write_pages(qkv, cos, sin, *caches[:2], slots, torch.tensor([0, 50, 1, -1, 2], device=DEVICE))
    assert all(bool((x[room:] == 7).all()) and int((~x[:room].isnan()).all(-1).all(-1).sum()) == 3 for x in bytes_)
    assert q[[1, 3]].isnan().all() and not q[[0, 2, 4]].isnan().any()


def test_what_does_not_fit_is_refused():
    qkv, cos, sin, caches, slots, positions = inputs(5, 4, 2, 16, torch.float32)
    keys, values = caches[:2]
    wide = inputs(2, 1, 1, 260, torch.float32)
    with kernels.use_backend("triton"):
        with pytest.raises(ValueError, match="qkv: expected heads of at most 256"):
            write_pages(*wide[:3], *wide[3][:2], *wide[4:])
        with pytest.raises(ValueError, match=r"positions: expected \(5,\) int32 or int64"):
            write_pages(qkv, cos, sin, keys, values, slots, positions[:4])
        with pytest.raises(ValueError, match="slots, cos: expected"):
            write_pages(qkv, cos, sin[:, :3], keys, values, slots, positions)
        with pytest.raises(ValueError, match="keys: expected a contiguous tensor"):
            write_pages(qkv, cos, sin, keys.transpose(0, 1), values.transpose(0, 1), slots, positions)
