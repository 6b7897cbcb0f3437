"""Generalised advantage estimation against a slow loop, on CPU and by the kernel; masked whitening."""

import itertools
import math

import pytest
import torch
from table_entries import distinct_entries

import kernels
from kernels.configuration import use_arch, use_config
from kernels.gae import gae, gae_reference, whiten
from tests.closeness import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def marks(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def slow(rewards, values, lengths, gamma, lam):
    """Token by token, as the sum over what follows."""
    expected, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)]
        start += length
    return expected


def test_gae_of_hand_worked_numbers():
    """Rewards 0, 1; values 0.5, 0.25: deltas -0.275 and 0.75, gamma lam = 0.45. Then an answer of one token."""
    inputs = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25, 0.5])
    result = gae(*inputs, marks([2, 1]), gamma=0.9, lam=0.5)
    assert result[0].tolist() == pytest.approx([0.0625, 0.75, 1.5])
    assert result[1].tolist() == pytest.approx([0.5625, 1.0, 2.0])


@pytest.mark.parametrize("lengths", [[1], [5, 1, 3], [4, 0, 2], [0]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_equals_a_slow_loop(lengths, gamma, lam):
    count = sum(lengths)
    values, token_rewards = torch.randn(2, count + 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = slow(token_rewards, values, lengths, gamma, lam)
    token_rewards[count:], values[count:] = math.nan, math.nan
    advantages, returns = gae(token_rewards, values, marks(lengths), gamma=gamma, lam=lam)
    assert advantages[:count].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(returns[:count], (advantages + values)[:count])
    assert not advantages[count:].any() and not returns[count:].any()


# Catches: a carry that is not taken over; the next value read across a sequence's end; a scan from the start.
@pytest.mark.parametrize("lengths", [[], [1], [32], [33], [31, 0, 1, 97, 64], [5, 1, 3]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)])
def test_gae_kernel_equals_the_reference(lengths, gamma, lam):
    lengths = lengths or [0]
    count = sum(lengths)
    values, token_rewards = torch.randn(2, count + 3, generator=torch.Generator().manual_seed(2))
    cu_seqlens = marks(lengths)
    exact = gae_reference(token_rewards[:count].double(), values[:count].double(), cu_seqlens, gamma=gamma, lam=lam)
    base = gae_reference(token_rewards[:count], values[:count], cu_seqlens, gamma=gamma, lam=lam)
    token_rewards[count:], values[count:] = math.nan, math.nan
    with kernels.use_backend("triton"), use_config("gae", BLOCK=32, num_warps=4, num_stages=1):
        runs = [
            gae(token_rewards.to(DEVICE), values.to(DEVICE), cu_seqlens.to(DEVICE), gamma=gamma, lam=lam)
            for _ in range(2)
        ]
    for result, again, ref, near in zip(*runs, exact, base):
        assert torch.equal(result, again) and not result[count:].any()
        assert_close(result[:count].cpu(), near, ref)


@pytest.mark.parametrize("arch", [arch for arch, _ in distinct_entries("gae")])
def test_every_table_entry(arch):
    lengths = [1500, 1, 1024, 0, 300]
    values, token_rewards = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(3))
    exact = gae_reference(token_rewards.double(), values.double(), marks(lengths), lam=0.9)
    base = gae_reference(token_rewards, values, marks(lengths), lam=0.9)
    with kernels.use_backend("triton"), use_arch(arch if DEVICE == "cpu" else None):
        result = gae(token_rewards.to(DEVICE), values.to(DEVICE), marks(lengths).to(DEVICE), lam=0.9)
    for x, near, ref in zip(result, base, exact):
        assert_close(x.cpu(), near, ref)


def test_gae_takes_boundaries_of_any_stride():
    values, token_rewards = torch.randn(2, 7, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    apart = torch.tensor([0, 5, 3, 5, 7, 5], dtype=torch.int32, device=DEVICE)[::2]
    with kernels.use_backend("triton"):
        result, expected = (gae(token_rewards, values, cu_seqlens) for cu_seqlens in (apart, apart.clone()))
    assert all(torch.equal(x, y) for x, y in zip(result, expected))


def test_gae_operation_traces():
    inputs = torch.randn(2, 7).to(DEVICE)
    with kernels.use_backend("triton"):
        torch.library.opcheck(
            torch.ops.wizard_engine.gae,
            (*inputs, marks([4, 3]).to(DEVICE), 1.0, 0.9),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards, values: expected \(N,\) each, got \(4,\), \(3,\)"),
        ({"cu_seqlens": marks([2, 2])}, r"cu_seqlens: expected at most 3 \(the tokens\) last, got 4"),
        ({"cu_seqlens": torch.tensor([0, 2, 1], dtype=torch.int32)}, "cu_seqlens: expected marks that do not decrease"),
        ({"gamma": 1.1}, "gamma: expected 0 to 1, got 1.1"),
        ({"lam": -0.1}, "lam: expected 0 to 1, got -0.1"),
        ({"rewards": torch.zeros(6)[::2]}, "rewards: expected a contiguous last dim"),
        ({"rewards": torch.zeros(3).half()}, "rewards: expected float32 or float64, got float16"),
        (
            {"values": torch.zeros(3).double()},
            "values: expected the dtype of rewards, torch.float32, got torch.float64",
        ),
        ({"values": torch.zeros(3, device="meta")}, "values: expected the device of rewards, cpu, got meta"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: expected int32, got int64"),
    ],
)
def test_gae_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        gae(**{"rewards": torch.zeros(3), "values": torch.zeros(3), "cu_seqlens": marks([2, 1]), **changes})


def test_whiten_of_hand_worked_numbers():
    """1 and 3: mean 2, deviation 1; what the mask leaves out is 0 even if it is NaN."""
    x = torch.tensor([1.0, math.nan, 3.0])
    assert whiten(x, torch.tensor([True, False, True])).tolist() == pytest.approx([-1, 0, 1])
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])
    assert whiten(torch.tensor([5.0])).tolist() == [0]


def test_whiten_without_the_shift_keeps_the_mean():
    """1 and 5: mean 3, deviation 2."""
    x = torch.tensor([1.0, math.inf, 5.0])
    result = whiten(x, torch.tensor([True, False, True]), shift_mean=False)
    assert result.tolist() == pytest.approx([2, 0, 4])


def test_whiten_rounds_as_double_moments_do():
    x = torch.randn(997, generator=torch.Generator().manual_seed(5)) + 3
    mean = float(x.double().sum()) / 997
    std = (float(x.double().square().sum()) / 997 - mean**2) ** 0.5
    assert torch.equal(whiten(x), (x - mean) / (std + 1e-8))


def test_whiten_takes_the_moments_of_all_ranks():
    """With 4 on another rank: mean 8 / 3, variance 26 / 3 - 64 / 9."""
    result = whiten(
        torch.tensor([1.0, 3.0]), moments=lambda total, squares, count: (total + 4, squares + 16, count + 1)
    )
    std = (26 / 3 - 64 / 9) ** 0.5
    assert result.tolist() == pytest.approx([(1 - 8 / 3) / std, (3 - 8 / 3) / std])


def test_whiten_refuses_another_shape_and_nothing():
    with pytest.raises(ValueError, match=r"mask: expected \(2,\), got \(3,\)"):
        whiten(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="mask: expected at least one number that takes part, got none"):
        whiten(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="epsilon: expected >= 0, got -1"):
        whiten(torch.zeros(2), epsilon=-1)
