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
    assert rows == 0 or float((tables[0] - exact.cos()).abs().max()) < 1e-5
    cos, sin = exact.cos().float(), exact.sin().float()

    def eager(x):
        first, second = x.chunk(2, -1)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((first * c - second * s, first * s + second * c), -1)

    x = scaled(max(rows, 1), 3, width, seed=rows)[:rows]
    for dtype in DTYPES:
        check(lambda x: rope(x, cos.to(x.dtype), sin.to(x.dtype)), eager, {"x": x}, dtype)
    assert rows == 0 or float((rope(x.float(), *tables) - turned(x.float(), positions, 10_000.0)).abs().max()) < 1e-3


def test_rope_keeps_position_zero_and_scores_by_distance():
    x, y = scaled(1, 1, 8, seed=1).float(), scaled(1, 1, 8, seed=2).float()

    def at(tensor, position):
        return rope(tensor, *rope_tables(torch.tensor([position]), 8, 100.0))

    assert torch.equal(at(x, 0), x)
    scores = [float((at(x, i) * at(y, i + 3)).sum()) for i in (0, 5, 21)]
    assert max(scores) - min(scores) < 1e-4 * max(map(abs, scores))
    assert abs(float((at(x, 0) * at(y, 7)).sum()) - scores[0]) > 1e-3 * abs(scores[0])


def test_rope_refuses_odd_widths_and_other_lengths():
    tables = rope_tables(torch.arange(3), 4, 100.0)
    with pytest.raises(ValueError, match=r"x: expected \(T, H, even C\) with T = 3, got \(3, 1, 5\)"):
        rope(torch.zeros(3, 1, 5), *tables)
    with pytest.raises(ValueError, match=r"with T = 3, got \(2, 1, 4\)"):
        rope(torch.zeros(2, 1, 4), *tables)


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
    with pytest.raises(ValueError, match="gate_up: expected an even number of columns, got 3"):
        swiglu(torch.zeros(2, 3))
