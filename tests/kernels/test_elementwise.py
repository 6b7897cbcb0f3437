"""RMS norm, rotary embedding and SwiGLU against their formulas."""

import pytest
import torch
from closeness import check, scaled

from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 2, 67]


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def plain_norm(x, weight, epsilon=1e-5):
    normed = wide(x) / (wide(x).pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    return normed.to(x.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 8, 31])
def test_rms_norm_equals_its_formula(rows, width, dtype):
    tensors = {"x": scaled(max(rows, 1), width, seed=rows)[:rows], "weight": scaled(width, seed=9)}
    check(rms_norm, plain_norm, tensors, dtype)


def test_rms_norm_of_more_dims_and_strides():
    x = scaled(3, 5, 8, seed=1)
    check(rms_norm, plain_norm, {"x": x, "weight": scaled(8, seed=2)})
    strided = x.float().transpose(0, 1)
    weight = scaled(8, seed=2).float()
    assert torch.equal(rms_norm(strided, weight), rms_norm(strided.contiguous(), weight))


def test_rms_norm_epsilon_decides_small_rows():
    x = torch.tensor([[3e-3, 4e-3]])
    expected = x / (12.5e-6 + 1e-4) ** 0.5
    torch.testing.assert_close(rms_norm(x, torch.ones(2), 1e-4), expected)
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4)), torch.zeros(2, 4))


def test_rms_norm_refuses_a_weight_of_another_width():
    with pytest.raises(ValueError, match=r"weight: expected \(4,\), got \(3,\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3))


def turned(x, positions, base):
    """Rotation as a product of complex numbers."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    unit = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    product = torch.complex(x[..., :half].double(), x[..., half:].double()) * unit
    return torch.cat((product.real, product.imag), -1).to(x.dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [2, 10])
def test_rope_turns_each_pair_by_its_angle(rows, width):
    positions = torch.randint(0, 40, (rows,), generator=torch.Generator().manual_seed(rows))
    tables = rope_tables(positions, width, 10_000.0)
    exact = positions[:, None, None] * 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    exact = exact[:, 0]
    assert rows == 0 or float((tables[0] - exact.cos()).abs().max()) < 1e-5
    cos, sin = exact.cos().float(), exact.sin().float()

    def eager(q, k):
        def one(x):
            first, second = x.chunk(2, -1)
            c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
            return torch.cat((first * c - second * s, first * s + second * c), -1)

        return one(q), one(k)

    q, k = (scaled(max(rows, 1), heads, width, seed=rows + heads)[:rows] for heads in (3, 2))
    for dtype in DTYPES:
        check(lambda q, k: rope(q, k, cos, sin), eager, {"q": q, "k": k}, dtype)
    for x, y in zip((q.float(), k.float()), rope(q.float(), k.float(), *tables)):
        assert rows == 0 or float((y - turned(x, positions, 10_000.0)).abs().max()) < 1e-3
    if rows:
        by_table = rope(q.float(), k.float(), *rope_tables(torch.arange(40), width, 10_000.0), positions)
        assert all(torch.equal(a, b) for a, b in zip(by_table, rope(q.float(), k.float(), *tables)))


def test_rope_of_slices_of_one_projection_is_that_of_copies():
    qkv = scaled(7, 6, 8, seed=0).float()
    tables = rope_tables(torch.arange(7), 8, 100.0)
    joint = rope(qkv[:, :3], qkv[:, 3:5], *tables)
    apart = rope(qkv[:, :3].contiguous(), qkv[:, 3:5].contiguous(), *tables)
    exchanged = rope(qkv[:, 3:5], qkv[:, :3], *tables)
    assert all(torch.equal(a, b) for a, b in zip(joint, apart))
    assert all(torch.equal(a, b) for a, b in zip(joint, exchanged[::-1]))


def test_rope_keeps_position_zero_and_scores_by_distance():
    x, y = scaled(1, 1, 8, seed=1).float(), scaled(1, 1, 8, seed=2).float()

    def at(tensor, position):
        return rope(tensor, tensor, *rope_tables(torch.tensor([position]), 8, 100.0))[0]

    assert torch.equal(at(x, 0), x)
    scores = [float((at(x, i) * at(y, i + 3)).sum()) for i in (0, 5, 21)]
    assert max(scores) - min(scores) < 1e-4 * max(map(abs, scores))
    assert abs(float((at(x, 0) * at(y, 7)).sum()) - scores[0]) > 1e-3 * abs(scores[0])


@pytest.mark.parametrize(
    ("shapes", "rows", "message"),
    [
        (((3, 1, 5), (3, 1, 5)), 3, r"q, k: expected \(T, H, C\), \(T, K, C\) with C even, got \(3, 1, 5\)"),
        (((3, 1, 4), (3, 1, 6)), 3, r"q, k: expected"),
        (((3, 1, 6), (3, 1, 6)), 3, r"cos, sin: expected \(P, 3\), got \(3, 2\)"),
        (((3, 1, 4), (3, 1, 4)), 2, r"cos, sin: expected a row for each of 3 tokens, got 2"),
    ],
)
def test_rope_refuses_shapes_that_do_not_fit(shapes, rows, message):
    with pytest.raises(ValueError, match=message):
        rope(*(torch.zeros(shape) for shape in shapes), *rope_tables(torch.arange(rows), 4, 100.0))


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return (wide(gate) * torch.sigmoid(wide(gate))).to(gate.dtype) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 13])
def test_swiglu_equals_its_formula(rows, width, dtype):
    check(swiglu, plain_swiglu, {"gate_up": scaled(max(rows, 1), 2 * width, seed=rows)[:rows]}, dtype)


def test_swiglu_of_hand_worked_numbers_and_odd_columns():
    out = swiglu(torch.tensor([[0.0, 100.0, -100.0, 3.0, 2.0, 5.0]]))
    assert torch.equal(out, torch.tensor([[0.0, 200.0, 0.0]]))
    with pytest.raises(ValueError, match=r"gate_up: expected an even number of columns, got \(2, 3\)"):
        swiglu(torch.zeros(2, 3))
