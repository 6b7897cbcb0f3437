"""Kernels of the losses' formulas against the reference in float64: loss, every metric, every gradient."""

import itertools
import math

import pytest
import torch
from table_entries import distinct_entries

import kernels
from kernels.configuration import use_arch, use_config
from kernels.dpo import DpoFormula, dpo, sequence_logprobs
from kernels.ppo import PpoFormula, clipped_value_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = slice(None)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def compared(formula, *inputs):
    """Compares the kernel's loss, metrics and gradients in fp32 with the reference's in float64."""
    with kernels.use_backend("triton"):
        result = formula.grads(*inputs, ALL)
        again = formula.grads(*inputs, ALL)
    exact = type(formula)(**{name: wide(value) for name, value in vars(formula).items()})
    with kernels.use_backend("reference"):
        target = exact.grads(*(wide(x) for x in inputs), ALL)
    assert result[1].keys() == target[1].keys()
    pairs = {"loss": (result[0], target[0]), **{name: (result[1][name], target[1][name]) for name in target[1]}}
    grads = [(a, b) for a, b in zip(result[2:], target[2:]) if b is not None]
    for name, (value, expected) in pairs.items():
        torch.testing.assert_close(
            value.double(), expected.double(), rtol=3e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for grad, expected in grads:
        torch.testing.assert_close(grad.double(), expected, rtol=3e-6, atol=1e-7)
    assert torch.equal(result[0], again[0]) and all(torch.equal(a, again[2 + n]) for n, (a, _) in enumerate(grads))


def preference(lengths, padding=3, seed=0, far=1.0):
    """Log-probabilities and weights of packed pairs, NaN behind the last sequence, whose weight counts for nothing."""
    generator = torch.Generator().manual_seed(seed)
    marks = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tokens = int(marks[-1]) + padding
    weights = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) > 0.3)
    logprob = -2 * far * torch.rand(tokens, generator=generator)
    weights[int(marks[-1]) :], logprob[int(marks[-1]) :] = 0.0, 0.0
    reference = -far * torch.rand(len(lengths), generator=generator) * torch.tensor(lengths) / 2
    return [x.to(DEVICE) for x in (logprob, weights, marks, reference)]


DPO = {"beta": 0.3, "num_pairs": 5.0, "variant": "sigmoid", "label_smoothing": 0.0, "mean": False, "nll": 0.0}


# Catches: the sides swapped; the mean's divisor missing in the gradient; a block's tail read as tokens.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.2},
        {"variant": "robust", "label_smoothing": 0.2},
        {"variant": "ipo", "mean": True},
        {"mean": True},
        {"nll": 0.7},
        {"variant": "ipo", "mean": True, "nll": 0.7},
    ],
)
@pytest.mark.parametrize("lengths", [[1, 1], [3, 0, 70, 64, 65, 0], [200, 5, 63, 1, 2, 129]])
def test_dpo_kernel_equals_the_reference(lengths, changes):
    logprob, weights, marks, reference = preference(lengths)
    formula = DpoFormula(reference, weights, marks, **{**DPO, **changes}, num_chosen_tokens=11.0)
    with use_config("dpo", BLOCK=64, num_warps=4, num_stages=1):
        compared(formula, logprob, None)


# Catches: log(1 + exp(-x)) that rounds to 0, or exp(x) that overflows.
@pytest.mark.parametrize("far", [1e-4, 40.0, 4e3])
def test_dpo_kernel_near_and_far_from_the_reference(far):
    logprob, weights, marks, reference = preference([9, 8, 7, 6], far=far, seed=3)
    for variant, smoothing in (("sigmoid", 0.1), ("sigmoid", 0.0), ("robust", 0.1)):
        changes = {"variant": variant, "label_smoothing": smoothing, "beta": 2.0}
        compared(DpoFormula(reference, weights, marks, **{**DPO, **changes}, num_chosen_tokens=1.0), logprob, None)


# Catches: log(1 + exp(-x)) that is 0 where 1 + exp(-x) rounds to 1.
def test_dpo_kernel_of_a_pair_that_is_all_but_certain():
    """Margin 2 * (12 - 0) = 24: the loss is e^-24 and not 0."""
    marks = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    logprob, ones = torch.tensor([0.0, -12.0], device=DEVICE), torch.ones(2, device=DEVICE)
    options = {**DPO, "beta": 2.0, "num_pairs": 1.0}
    formula = DpoFormula(torch.zeros(2, device=DEVICE), ones, marks, **options, num_chosen_tokens=1.0)
    with kernels.use_backend("triton"):
        loss, _, grad, _ = formula.grads(logprob, None, ALL)
    assert loss.item() == pytest.approx(math.exp(-24), rel=1e-5)
    assert grad.tolist() == pytest.approx([-2 * math.exp(-24), 2 * math.exp(-24)], rel=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_sequence_logprobs_kernel_equals_the_reference(mean):
    logprob, weights, marks, _ = preference([3, 0, 700, 64, 65, 1])
    with kernels.use_backend("triton"):
        result = sequence_logprobs(logprob, weights, marks, mean=mean)
        assert torch.equal(result, sequence_logprobs(logprob, weights, marks, mean=mean))
    with kernels.use_backend("reference"):
        expected = sequence_logprobs(logprob.double(), weights.double(), marks, mean=mean)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
def test_dpo_from_two_equal_heads_is_ln_2_exactly(mean):
    generator = torch.Generator().manual_seed(4)
    head = [torch.randn(n, 8, generator=generator).to(DEVICE) for n in (1400, 30)]
    targets = torch.randint(30, (1400,), generator=generator).to(DEVICE)
    _, weights, marks, _ = preference([600, 0, 90, 700, 3, 4], padding=3)
    with kernels.use_backend("triton"):
        out = dpo(*head, targets, weights, marks, tuple(head), beta=0.3, num_pairs=3, length_normalised=mean)
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert out.metrics["margin"] == 0 and out.metrics["accuracy"] == 1.5


def test_dpo_kernel_without_weights_is_ln_2():
    logprob, weights, marks, _ = preference([9, 8, 7, 6])
    nothing, zeros = torch.zeros_like(weights), torch.zeros(4, device=DEVICE)
    formula = DpoFormula(zeros, nothing, marks, **{**DPO, "num_pairs": 2.0}, num_chosen_tokens=1.0)
    with kernels.use_backend("triton"):
        loss, metrics, grad, _ = formula.grads(logprob, None, ALL)
    assert loss.item() == torch.tensor(math.log(2)).item() and metrics["accuracy"] == 1 and not grad.any()


def tokens(count, seed=0):
    """Inputs of `count` tokens near each other, NaN where the scale is 0; some ratios are exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) > 0.2)
    logprob = -3 * torch.rand(count, generator=generator)
    terms = {
        name: torch.randn(count, generator=generator) for name in ("behaviour", "advantages", "reference", "sampled")
    }
    for name in ("behaviour", "reference", "sampled"):
        terms[name] = logprob + 0.5 * terms[name]
    terms["behaviour"][::5] = logprob[::5]
    terms = {name: x.masked_fill(scale == 0, math.nan).to(DEVICE) for name, x in terms.items()}
    entropy = torch.rand(count, generator=generator) * (scale != 0)
    logprob = logprob * (scale != 0)
    return logprob.to(DEVICE), entropy.to(DEVICE), scale.to(DEVICE), terms


PPO = {"clip": (0.2, 0.3), "dual_clip": None, "kl": 0.0, "kl_estimator": "k3", "entropy": 0.0, "importance_cap": 1.3}


# Catches: an interval's ends swapped; no importance weight in the gradient; a KL's sign; NaN not masked.
@pytest.mark.parametrize("count", [1, 63, 64, 65, 331])
@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({}, ()),
        ({"dual_clip": 1.1}, ()),
        ({}, ("sampled",)),
        ({"entropy": 0.1}, ()),
        ({"kl": 0.3, "kl_estimator": "k1"}, ("reference",)),
        ({"kl": 0.3, "kl_estimator": "k2"}, ("reference",)),
        ({"kl": 0.3, "dual_clip": 1.1, "entropy": 0.1}, ("reference", "sampled")),
    ],
)
def test_ppo_kernel_equals_the_reference(count, changes, terms):
    logprob, entropy, scale, inputs = tokens(count, seed=count)
    optional = {name: inputs[name] if name in terms else None for name in ("reference", "sampled")}
    formula = PpoFormula(
        behaviour=inputs["behaviour"], advantages=inputs["advantages"], scale=scale, **optional, **{**PPO, **changes}
    )
    with use_config("ppo", BLOCK=64, num_warps=4, num_stages=1):
        compared(formula, logprob, entropy)


def test_ppo_kernel_on_fresh_samples_has_ratio_1_exactly():
    logprob, entropy, scale, inputs = tokens(100)
    formula = PpoFormula(
        behaviour=logprob.clone(), advantages=inputs["advantages"], scale=scale, reference=None, sampled=None, **PPO
    )
    with kernels.use_backend("triton"):
        _, metrics, grad, _ = formula.grads(logprob, entropy, ALL)
    live = scale != 0
    assert metrics["ratio"] == live.sum() and metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0
    assert torch.equal(grad[live], (-inputs["advantages"] * scale)[live])


def test_ppo_kernel_where_every_token_is_ignored():
    logprob, entropy, scale, inputs = tokens(70)
    nothing = {name: torch.full_like(x, math.nan) for name, x in inputs.items()}
    formula = PpoFormula(scale=torch.zeros_like(scale), **nothing, **{**PPO, "kl": 0.1})
    with kernels.use_backend("triton"):
        loss, metrics, *grads = formula.grads(0 * logprob, 0 * entropy, ALL)
    assert loss == 0 and all(value == 0 for value in metrics.values()) and not any(grad.any() for grad in grads)


# Catches: the clipped side's gradient let through; half a loss.
@pytest.mark.parametrize("count", [1, 64, 65, 331])
def test_value_loss_kernel_equals_the_reference(count):
    values, old, returns = torch.randn(3, count, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    old = values + 0.3 * old
    old[::4] = values[::4]
    with use_config("value_loss", BLOCK=64, num_warps=4, num_stages=1):
        results = []
        for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
            leaf = values.to(kind).requires_grad_()
            with kernels.use_backend(backend):
                loss, metrics = clipped_value_loss(leaf, old.to(kind), returns.to(kind), clip=0.2, num_tokens=7)
                (grad,) = torch.autograd.grad(3 * loss, leaf)
            results.append((loss, grad, *metrics.values()))
    for result, expected in zip(*results):
        torch.testing.assert_close(result.double(), expected.double(), rtol=3e-6, atol=1e-7)


def test_value_loss_kernel_splits_a_tie_as_torch_does():
    """Value 1, old 0, clip 0.5, goal 0.75: both sides are off by 0.25."""
    leaf = torch.ones(1, device=DEVICE, requires_grad=True)
    zero, goal = torch.zeros(1, device=DEVICE), torch.full((1,), 0.75, device=DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        with kernels.use_backend(backend):
            grads.append(torch.autograd.grad(clipped_value_loss(leaf, zero, goal, clip=0.5, num_tokens=1)[0], leaf)[0])
    assert torch.equal(*grads) and grads[0].item() == 0.125


@pytest.mark.parametrize("arch", [arch for arch, _ in distinct_entries("ppo", "dpo", "sequence_logprobs")])
def test_every_table_entry(arch):
    with use_arch(arch if DEVICE == "cpu" else None):
        logprob, weights, marks, reference = preference([700, 3, 1, 600])
        compared(DpoFormula(reference, weights, marks, **DPO, num_chosen_tokens=1.0), logprob, None)
        logprob, entropy, scale, inputs = tokens(1500)
        compared(PpoFormula(scale=scale, **inputs, **{**PPO, "kl": 0.1}), logprob, entropy)


def test_value_loss_operation_traces():
    inputs = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with kernels.use_backend("triton"):
        torch.library.opcheck(
            torch.ops.wizard_engine.value_loss, (*inputs, 0.2, 0.1), test_utils=("test_schema", "test_faketensor")
        )
