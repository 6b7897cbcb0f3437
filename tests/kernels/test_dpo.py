"""DPO: pairs on numbers worked by hand, and the node from hidden states against float64 eager PyTorch."""

import math

import pytest
import torch
from closeness import check, scaled

from kernels import _linear_logprob_chunks as chunks
from kernels.dpo import dpo, preference_loss, sequence_logprobs
from kernels.linear_logprob import linear_logprob_reference
from kernels.packed import sequence_ids


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def gradient(loss, *leaves):
    """Gradients of all leaves, end to end."""
    return torch.cat(torch.autograd.grad(loss, leaves)).tolist()


def pairs():
    return leaf(-1.0), leaf(-2.0), torch.tensor([-1.5]), torch.tensor([-1.0])


def test_sigmoid_of_hand_worked_numbers():
    """delta = (-1 + 1.5) - (-2 + 1) = 1.5, h = 0.75, loss = ln(1 + e^-0.75)."""
    chosen, rejected, *ref = pairs()
    loss, metrics = preference_loss(chosen, rejected, *ref, beta=0.5, num_pairs=2)
    assert loss.item() == pytest.approx(0.386871 / 2, abs=1e-6)
    grad = 0.5 * (1 - 0.679179) / 2
    assert gradient(loss, chosen, rejected) == pytest.approx([-grad, grad], abs=1e-6)
    expected = {"chosen_reward": 0.25, "rejected_reward": -0.5, "accuracy": 1, "margin": 0.75, "chosen_logprob": -1}
    assert {name: value.item() for name, value in metrics.items()} == expected | {"rejected_logprob": -2}


def test_cdpo_of_hand_worked_numbers():
    """0.9 ln(1 + e^-0.75) + 0.1 ln(1 + e^0.75) = 0.386871 + 0.1 * 0.75."""
    loss, _ = preference_loss(*pairs(), beta=0.5, num_pairs=1, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.461871, abs=1e-6)


def test_robust_of_hand_worked_numbers():
    """(0.9 ln(1 + e^-0.75) - 0.1 ln(1 + e^0.75)) / 0.8 = (0.348184 - 0.113687) / 0.8; gradient as in sigmoid where
    weighed out: -(0.9 * 0.320821 + 0.1 * 0.679179) * 0.5 / 0.8."""
    chosen, rejected, *ref = pairs()
    loss, _ = preference_loss(chosen, rejected, *ref, beta=0.5, num_pairs=1, variant="robust", label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.293121, abs=1e-6)
    grad = 0.5 * (0.9 * 0.320821 + 0.1 * 0.679179) / 0.8
    assert gradient(loss, chosen, rejected) == pytest.approx([-grad, grad], abs=1e-6)


def test_ipo_of_hand_worked_numbers():
    """(1.5 - 1 / (2 * 0.25))^2 = 0.25, gradient 2 * (1.5 - 2) = -1."""
    chosen, rejected, *ref = pairs()
    loss, _ = preference_loss(chosen, rejected, *ref, beta=0.25, num_pairs=1, variant="ipo")
    assert loss.item() == pytest.approx(0.25)
    assert gradient(loss, chosen, rejected) == [-1.0, 1.0]


def test_preference_loss_stays_finite_far_out():
    chosen, rejected = leaf(-1e4), leaf(0.0)
    loss, _ = preference_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=1.0, num_pairs=1)
    assert loss.item() == 1e4 and gradient(loss, chosen, rejected) == [-1.0, 1.0]


def test_sequence_logprobs_sum_or_average_each_sequence():
    """Weights 1, 0.5, 0 | none | 1, 1; the last token is padding, whatever its weight."""
    logprob = torch.tensor([-1.0, -2.0, -4.0, -3.0, -5.0, -9.0])
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 7.0])
    marks = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert sequence_ids(marks, 6).tolist() == [0, 0, 0, 2, 2, 3]
    assert sequence_logprobs(logprob, weights, marks).tolist() == [-2.0, 0.0, -8.0]
    assert sequence_logprobs(logprob, weights, marks, mean=True).tolist() == pytest.approx([-2 / 1.5, 0.0, -4.0])


MARKS = torch.tensor([0, 7, 8, 8, 19, 20, 26], dtype=torch.int32)
TOKENS, WIDTH, VOCAB_SIZE = 29, 6, 13


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {"hidden": scaled(TOKENS, WIDTH, seed=seed), "weight": 0.3 * scaled(VOCAB_SIZE, WIDTH, seed=seed + 1)}
    targets = torch.randint(-1, VOCAB_SIZE, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) > 0.3)
    weights[26:] = 0
    return inputs, targets, weights


def eager(hidden, weight, targets, weights, reference, *, beta, variant, smoothing=0.0, mean=False, nll=0.0):
    """Written apart from the engine: one sequence at a time, full logits."""
    logprob = (
        hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        @ weight.to(torch.promote_types(weight.dtype, torch.float32)).T
    ).log_softmax(-1)
    scores, chosen = [], 0.0
    for start, end in zip(MARKS[:-1].tolist(), MARKS[1:].tolist()):
        rows = [i for i in range(start, end) if targets[i] >= 0 and weights[i] != 0]
        logprob_sum = sum(
            (weights[i].to(logprob.dtype) * logprob[i, targets[i]] for i in rows), start=logprob.new_zeros(())
        )
        chosen = chosen - logprob_sum if len(scores) < 3 else chosen
        over = max(sum(float(weights[i]) for i in rows), 1.0)
        scores.append(logprob_sum / over if mean or variant == "ipo" else logprob_sum)
    loss = 0.0
    for b in range(3):
        delta = scores[b] - reference[b].to(logprob.dtype) - scores[b + 3] + reference[b + 3].to(logprob.dtype)
        win, lose = -torch.log(torch.sigmoid(beta * delta)), -torch.log(torch.sigmoid(-beta * delta))
        loss = (
            loss
            + {
                "sigmoid": (1 - smoothing) * win + smoothing * lose,
                "robust": ((1 - smoothing) * win - smoothing * lose) / (1 - 2 * smoothing),
                "ipo": (delta - 0.5 / beta) ** 2,
            }[variant]
        )
    return loss / 5 + nll * chosen / 11


@pytest.fixture(params=["one chunk", "chunks"])
def path(request, monkeypatch):
    """All rows in one chunk, whose gradients are made in the forward; and chunks of two rows, made anew."""
    if request.param == "chunks":
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 4 * VOCAB_SIZE * 2)
    return request.param


# Catches: ignored tokens in a mean; the likelihood of rejected answers; the gradient that comes in left out.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("variant", "smoothing", "mean", "nll"),
    [
        ("sigmoid", 0.0, False, 0.0),
        ("sigmoid", 0.2, False, 0.7),
        ("robust", 0.2, False, 0.0),
        ("ipo", 0.0, False, 0.3),
        ("sigmoid", 0.0, True, 0.0),
    ],
)
def test_dpo_equals_eager_with_full_logits(path, dtype, variant, smoothing, mean, nll):
    inputs, targets, weights = drawn()
    reference = -5 * torch.rand(6, generator=torch.Generator().manual_seed(5))
    options = {"beta": 0.3, "variant": variant}

    def node(hidden, weight):
        return dpo(
            hidden,
            weight,
            targets,
            weights,
            MARKS,
            reference,
            **options,
            num_pairs=5,
            label_smoothing=smoothing,
            length_normalised=mean,
            nll=nll,
            num_chosen_tokens=11,
        ).loss

    check(
        node,
        lambda hidden, weight: eager(
            hidden, weight, targets, weights, reference, **options, smoothing=smoothing, mean=mean, nll=nll
        ),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("mean", [False, True])
def test_dpo_where_policy_is_reference_is_ln_2_exactly(path, mean):
    inputs, targets, weights = drawn(3)
    head = [x.float() for x in inputs.values()]
    out = dpo(*head, targets, weights, MARKS, tuple(head), beta=0.3, num_pairs=3, length_normalised=mean)
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert out.metrics["margin"] == 0 and out.metrics["accuracy"] == 1.5 and out.metrics["chosen_reward"] == 0


def test_dpo_takes_the_reference_from_a_second_head(path):
    inputs, targets, weights = drawn(4)
    hidden, weight = (x.float() for x in inputs.values())
    other = hidden.flip(1), 2 * weight
    kept = torch.where(weights != 0, targets, -1)
    ref_logprobs = sequence_logprobs(linear_logprob_reference(*other, kept)[0], weights, MARKS)
    options = {"beta": 0.3, "num_pairs": 3}
    inside = dpo(hidden, weight, targets, weights, MARKS, other, **options)
    outside = dpo(hidden, weight, targets, weights, MARKS, ref_logprobs, **options)
    torch.testing.assert_close(inside.loss, outside.loss)
    assert inside.metrics.keys() == outside.metrics.keys()
    for name, value in inside.metrics.items():
        torch.testing.assert_close(value, outside.metrics[name], msg=name)


def test_dpo_metrics_are_those_of_its_sums(path):
    inputs, targets, weights = drawn(6)
    hidden, weight = (x.float() for x in inputs.values())
    reference = torch.linspace(-9, -3, 6)
    out = dpo(hidden.requires_grad_(), weight, targets, weights, MARKS, reference, beta=0.3, num_pairs=3)
    kept = torch.where(weights != 0, targets, -1)
    policy = sequence_logprobs(linear_logprob_reference(hidden, weight, kept)[0].detach(), weights, MARKS)
    expected = preference_loss(*policy.chunk(2), *reference.chunk(2), beta=0.3, num_pairs=3)[1]
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name], value, msg=name)
    torch.testing.assert_close(out.metrics["chosen_nll"], -policy[:3].sum())
    assert not any(value.requires_grad for value in out.metrics.values())


def test_dpo_without_a_supervised_token_is_that_of_the_references_and_has_zero_gradients():
    inputs, targets, _ = drawn()
    hidden, weight = (x.float().requires_grad_() for x in inputs.values())
    reference = torch.zeros(6)
    out = dpo(hidden, weight, targets, torch.zeros(TOKENS), MARKS, reference, beta=0.3, num_pairs=3)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2))
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta: expected > 0 and finite, got 0.0"),
        ({"beta": math.nan}, "beta: expected > 0 and finite, got nan"),
        ({"num_pairs": 0}, "num_pairs: expected > 0 and finite, got 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "variant": "ipo"}, "label_smoothing: expected 0 with variant ipo, got 0.1"),
        ({"variant": "hinge"}, "variant: expected one of sigmoid, robust, ipo, got hinge"),
        ({"nll": -1.0}, "nll: expected >= 0 and finite, got -1.0"),
        ({"nll": 1.0}, "num_chosen_tokens: expected the chosen tokens of the step where nll > 0, got None"),
        ({"nll": 1.0, "num_chosen_tokens": 0}, "num_chosen_tokens: expected > 0 and finite, got 0"),
        ({"cu_seqlens": MARKS[:-1]}, r"cu_seqlens: expected an even number of sequences .*, got 5"),
        ({"cu_seqlens": MARKS + 4}, "cu_seqlens: expected 0 first, got 4"),
        ({"reference": torch.zeros(3)}, r"reference: expected \(6,\), got \(3,\)"),
        ({"weights": torch.zeros(3)}, r"weights: expected \(29,\), got \(3,\)"),
        ({"targets": torch.full((TOKENS,), 13), "weights": torch.ones(TOKENS)}, "targets: .* got 13 at token 0"),
    ],
)
def test_dpo_refuses_what_does_not_fit(changes, message):
    inputs, targets, weights = drawn()
    arguments = {
        **{name: x.float() for name, x in inputs.items()},
        "targets": targets,
        "weights": weights,
        "cu_seqlens": MARKS,
        "reference": torch.zeros(6),
        "beta": 0.1,
        "num_pairs": 3,
    }
    with pytest.raises(ValueError, match=message):
        dpo(**{**arguments, **changes})
