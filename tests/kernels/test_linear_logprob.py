"""Log-probabilities and entropies of targets against full logits."""

import math

import pytest
import torch
from closeness import check, scaled

from kernels import linear_logprob as module
from kernels.linear_logprob import linear_logprob


def eager(hidden, weight, targets, temperature):
    wide = [x if x.dtype == torch.float64 else x.float() for x in (hidden, weight)]
    logits = wide[0] @ wide[1].T / temperature
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    rows = torch.arange(len(targets))
    keep = (targets >= 0).to(logits.dtype)
    return keep * logprobs[rows, targets.clamp(min=0)], -keep * (logprobs.exp() * logprobs).sum(-1)


def drawn(rows, width, vocabulary, seed=0):
    inputs = {
        "hidden": scaled(max(rows, 1), width, seed=seed)[:rows],
        "weight": 0.3 * scaled(vocabulary, width, seed=seed + 1),
    }
    targets = torch.randint(-1, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    return inputs, targets


@pytest.fixture(params=["kept", "again", "chunks"])
def path(request, monkeypatch):
    """One chunk kept for the backward, one computed again, and chunks of two rows."""
    if request.param != "kept":
        monkeypatch.setattr(module, "KEPT_BYTES", 0)
    if request.param == "chunks":
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 8 * 11 * 2)
    return request.param


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprob_equals_full_logits(path, rows, temperature):
    inputs, targets = drawn(rows, 5, 11, seed=rows)
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True),
        lambda hidden, weight: eager(hidden, weight, targets, temperature),
        inputs,
    )
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, temperature=temperature)[0],
        lambda hidden, weight: eager(hidden, weight, targets, temperature)[0],
        inputs,
    )


def test_linear_logprob_of_bfloat16(path):
    inputs, targets = drawn(9, 5, 11)
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets)[0],
        lambda hidden, weight: eager(hidden, weight, targets, 1.0)[0],
        inputs,
        torch.bfloat16,
    )


def test_linear_logprob_ignores_rows_even_of_nan(path):
    inputs, targets = drawn(6, 5, 11)
    hidden = inputs["hidden"].float().requires_grad_()
    weight = inputs["weight"].float()
    targets = torch.tensor([1, -1, 4, 4, -1, 10])
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    assert torch.equal(logprob == 0, targets < 0) and torch.equal(entropy == 0, targets < 0)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal((hidden.grad == 0).all(-1), targets < 0)


def test_linear_logprob_of_a_uniform_and_of_a_certain_distribution():
    hidden = torch.tensor([[0.0], [1e4]])
    weight = torch.arange(4.0)[:, None]
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([2, 3]), entropy=True)
    torch.testing.assert_close(logprob, torch.tensor([-math.log(4), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), 0.0]))
    assert linear_logprob(hidden, weight, torch.tensor([2, 3]))[1] is None


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((3, 4), (7, 5), 3), 1.0, r"hidden, weight: expected \(T, D\), \(V, D\), got \(3, 4\), \(7, 5\)"),
        (((3, 4, 1), (7, 1), 3), 1.0, r"hidden, weight: expected"),
        (((3, 4), (7, 4), 2), 1.0, r"targets: expected \(3,\), got \(2,\)"),
        (((3, 4), (7, 4), 3), 0.0, r"temperature: expected > 0, got 0.0"),
    ],
)
def test_linear_logprob_refuses_what_does_not_fit(shapes, temperature, message):
    hidden, weight, count = shapes
    with pytest.raises(ValueError, match=message):
        linear_logprob(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(count, dtype=torch.int64), temperature=temperature
        )
