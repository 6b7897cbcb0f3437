"""AdamW in host memory against float64 and torch, on every instruction set that the processor has."""

import math

import pytest
import torch
from closeness import assert_close, scaled

from kernels.offloaded_adamw import LEVELS, offloaded_adamw, offloaded_adamw_reference, widest_level

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-6, "weight_decay": 0.1, "step": 3}
SIZES = (0, 1, 15, 16, 17, 1023, 5000)
HERE = LEVELS[: LEVELS.index(widest_level()) + 1]


def drawn(size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "master": torch.randn(size, generator=generator),
        "exp_avg": 0.1 * torch.randn(size, generator=generator),
        "exp_avg_sq": 0.01 * torch.randn(size, generator=generator).square(),
        "gradient": scaled(max(size, 1), 1, seed=seed)[:size, 0].to(dtype),
    }


def updated(tensors, **options):
    """The buffers after an update, all of them copies."""
    clones = {name: x.clone() for name, x in tensors.items()}
    offloaded_adamw(
        *(clones[n] for n in ("master", "exp_avg", "exp_avg_sq", "gradient")),
        **OPTIONS | options,
        **{name: x for name, x in clones.items() if name in ("accumulated", "copy")},
    )
    return clones


# Catches: a bias correction left out; decay of the old mean; an accumulated gradient scaled twice or not cleared.
@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_update_equals_float64(level, size, dtype, accumulates, scale):
    tensors = drawn(size, dtype, seed=size)
    if accumulates:
        tensors["accumulated"] = torch.randn(size, generator=torch.Generator().manual_seed(9))
    result = updated(tensors, level=level, scale=scale)
    wide = {name: x.double().clone() for name, x in tensors.items()}
    base = {name: x.float().clone() for name, x in tensors.items()}
    for copies in (wide, base):
        offloaded_adamw_reference(
            *(copies[n] for n in ("master", "exp_avg", "exp_avg_sq", "gradient")),
            scale=scale,
            accumulated=copies.get("accumulated"),
            **OPTIONS,
        )
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert_close(result[name], base[name], wide[name], name)
    assert torch.equal(result["gradient"], tensors["gradient"])
    assert not accumulates or not result["accumulated"].any()


# Catches: rounding towards zero; ties away from even; a NaN that becomes an infinity.
@pytest.mark.parametrize("level", HERE)
def test_copies_are_rounded_as_torch_rounds(level):
    tensors = drawn(4000)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.3895e38, 1.00390625, 1.01171875, -1.00390625]
    tensors["master"][: len(special)] = torch.tensor(special)
    # A NaN whose mantissa is all ones: rounding it like a number would carry into the sign.
    tensors["master"][len(special)] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    tensors["copy"] = torch.zeros(4000, dtype=torch.bfloat16)
    result = updated(tensors, level=level, lr=0.0)
    is_number = ~tensors["master"].isnan()
    expected = tensors["master"].bfloat16()
    assert torch.equal(result["copy"].view(torch.int16)[is_number], expected.view(torch.int16)[is_number])
    assert torch.equal(result["copy"].isnan(), ~is_number)
    result = updated(tensors, level=level)
    assert torch.equal(result["copy"].nan_to_num(), result["master"].bfloat16().nan_to_num())


@pytest.mark.parametrize("size", [17, 700_001])
def test_levels_and_threads_give_the_same_bits(size):
    tensors = drawn(size, torch.bfloat16) | {
        "accumulated": torch.randn(size),
        "copy": torch.zeros(size, dtype=torch.bfloat16),
    }
    expected = updated(tensors, level="plain", threads=1)
    for level in HERE:
        for threads in (1, 2, 3, 7):
            result = updated(tensors, level=level, threads=threads)
            assert all(torch.equal(result[name], expected[name]) for name in result), (level, threads)


def test_a_scale_that_is_not_finite_changes_nothing():
    tensors = drawn(100) | {"accumulated": torch.ones(100), "copy": torch.ones(100, dtype=torch.bfloat16)}
    for scale in (math.inf, math.nan):
        result = updated(tensors, scale=scale)
        assert all(torch.equal(result[name], tensors[name]) for name in tensors)


def test_many_steps_follow_torch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, generator=generator))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    theirs = torch.optim.AdamW([weight], **options, fused=True)
    master, exp_avg, exp_avg_sq = weight.detach().clone(), torch.zeros(300), torch.zeros(300)
    for step in range(1, 30):
        weight.grad = torch.randn(300, generator=generator)
        offloaded_adamw(master, exp_avg, exp_avg_sq, weight.grad.clone(), **OPTIONS | {"step": step})
        theirs.step()
        torch.testing.assert_close(master, weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"master": torch.zeros(4, dtype=torch.float64)}, "master: expected float32, got float64"),
        ({"gradient": torch.zeros(4, dtype=torch.float16)}, "gradient: expected float32 or bfloat16, got float16"),
        ({"copy": torch.zeros(4)}, "copy: expected bfloat16, got float32"),
        ({"exp_avg": torch.zeros(5)}, r"exp_avg: expected \(4,\), got \(5,\)"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, "exp_avg_sq: expected a contiguous tensor in host memory"),
        ({"accumulated": torch.zeros(4, device="meta")}, "accumulated: expected a contiguous tensor in host memory"),
        ({"lr": -1.0}, "lr: expected >= 0"),
        ({"epsilon": math.nan}, "epsilon: expected >= 0"),
        ({"weight_decay": math.inf}, "weight_decay: expected >= 0"),
        ({"betas": (0.9, 1.0)}, "betas: expected two"),
        ({"step": 0}, "step: expected >= 1, got 0"),
        ({"level": "sse"}, "level: expected one of plain, avx2, avx512"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {name: torch.zeros(4) for name in ("master", "exp_avg", "exp_avg_sq", "gradient")} | OPTIONS | changes
    with pytest.raises(ValueError, match=message):
        offloaded_adamw(**arguments)
