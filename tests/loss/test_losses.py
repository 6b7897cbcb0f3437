"""Losses on numbers worked by hand."""

import math

import pytest
import torch

from wizard_engine.loss import dpo_loss, policy_loss, process_loss, ranking_loss, sft_loss, value_loss
from wizard_engine.loss.ppo import kl_estimates
from wizard_engine.loss.process_reward import step_scores


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def gradient(loss, *leaves):
    """Gradients of all leaves, end to end."""
    return torch.cat(torch.autograd.grad(loss, leaves)).tolist()


def test_sft_loss_weighs_and_divides_by_the_global_count():
    logprob = leaf(-1.0, -2.0, -4.0)
    loss = sft_loss(logprob, torch.tensor([1.0, 0.0, 0.5]), num_tokens=6)
    assert loss.item() == 0.5
    assert gradient(loss, logprob) == pytest.approx([-1 / 6, 0, -1 / 12])


def pairs():
    return leaf(-1.0), leaf(-2.0), torch.tensor([-1.5]), torch.tensor([-1.0])


def test_dpo_loss_of_hand_worked_numbers():
    """delta = (-1 + 1.5) - (-2 + 1) = 1.5, margin = 0.75, loss = ln(1 + e^-0.75)."""
    chosen, rejected, *ref = pairs()
    loss, metrics = dpo_loss(chosen, rejected, *ref, beta=0.5, num_pairs=2)
    assert loss.item() == pytest.approx(0.386871 / 2, abs=1e-6)
    slope = 0.5 * (1 - 0.679179) / 2
    assert gradient(loss, chosen, rejected) == pytest.approx([-slope, slope], abs=1e-6)
    expected = {"chosen_reward": 0.25, "rejected_reward": -0.5, "accuracy": 1, "margin": 0.75, "chosen_logprob": -1}
    assert {name: value.item() for name, value in metrics.items()} == expected


def test_dpo_loss_with_label_smoothing():
    """0.9 ln(1 + e^-0.75) + 0.1 ln(1 + e^0.75) = 0.386871 + 0.1 * 0.75."""
    loss, _ = dpo_loss(*pairs(), beta=0.5, num_pairs=1, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.461871, abs=1e-6)


def test_dpo_loss_ipo():
    """(1.5 - 1 / (2 * 0.25))^2 = 0.25, slope 2 * (1.5 - 2) = -1."""
    chosen, rejected, *ref = pairs()
    loss, _ = dpo_loss(chosen, rejected, *ref, beta=0.25, num_pairs=1, variant="ipo")
    assert loss.item() == pytest.approx(0.25)
    assert gradient(loss, chosen, rejected) == [-1.0, 1.0]


def test_dpo_loss_is_ln_2_where_policy_is_reference():
    chosen, rejected = torch.tensor([-3.7, -0.1, -250.3, -9.0]), torch.tensor([-8.25, -0.3, -12.5, -9.0])
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, num_pairs=4)
    assert loss.item() == torch.tensor(math.log(2)).item()
    assert metrics["accuracy"].item() == 2 and metrics["margin"].item() == 0


def test_dpo_loss_stays_finite_far_out():
    chosen, rejected = leaf(-1e4), leaf(0.0)
    loss, _ = dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=1.0, num_pairs=1)
    assert loss.item() == 1e4 and gradient(loss, chosen, rejected) == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected > 0, got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected in \[0, 0.5\), got 0.5"),
        ({"variant": "hinge"}, "variant: expected one of .*ipo.*, got hinge"),
        ({"ref_rejected": torch.zeros(2)}, r"expected four tensors of one shape \(B,\)"),
    ],
)
def test_dpo_loss_refuses_bad_arguments(options, message):
    tensors = {name: torch.zeros(1) for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")}
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{**tensors, "beta": 0.1, "num_pairs": 1, **options})


def test_ranking_loss_takes_the_margin_off():
    """ln(1 + e^-0.25) and ln(1 + e^0.7), over 4 pairs."""
    better, worse = leaf(1.0, 0.2), leaf(0.5, 0.9)
    loss = ranking_loss(better, worse, torch.tensor([0.25, 0.0]), num_pairs=4)
    assert loss.item() == pytest.approx((0.575939 + 1.103186) / 4, abs=1e-6)
    slopes = [0.437823 / 4, 0.668188 / 4]
    assert gradient(loss, better, worse) == pytest.approx([-x for x in slopes] + slopes, abs=1e-6)


def test_process_loss_and_step_scores_know_the_order_of_labels():
    """Logits of wrong, neutral, right: probabilities 1/4, 1/4, 1/2."""
    scores = torch.tensor([[0.0, 0.0, math.log(2)]])
    for label, expected in ((-1, math.log(4)), (0, math.log(4)), (1, math.log(2))):
        assert process_loss(scores, torch.tensor([label]), num_steps=1).item() == pytest.approx(expected, abs=1e-6)
    both = process_loss(scores.repeat(2, 1), torch.tensor([-1, 1]), num_steps=3)
    assert both.item() == pytest.approx(math.log(8) / 3, abs=1e-6)
    assert step_scores(scores).item() == pytest.approx(0.625)
    assert step_scores(scores, neutral=0.0).item() == pytest.approx(0.5)


def test_policy_loss_clips_both_sides():
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1: -1.2 (clipped), 1.5, -0.5, 0.8 (clipped)."""
    logprob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_loss(logprob, torch.zeros(4), advantages, clip=0.2, num_tokens=4)
    assert loss.item() == pytest.approx(0.15)
    assert gradient(loss, logprob) == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])
    assert metrics["clip_fraction"].item() == 2 and metrics["ratio"].item() == pytest.approx(4)
    assert metrics["approx_kl"].item() == pytest.approx(2 * (0.5 - math.log(1.5)) + 2 * (-0.5 + math.log(2)), abs=1e-6)


def test_policy_loss_on_fresh_samples_is_minus_the_advantage():
    logprob = leaf(-2.0, -0.3)
    loss, metrics = policy_loss(logprob, logprob.detach(), torch.tensor([3.0, -1.0]), clip=0.2, num_tokens=2)
    assert loss.item() == -1.0 and gradient(loss, logprob) == [-1.5, 0.5]
    assert metrics["clip_fraction"].item() == 0
    with pytest.raises(ValueError, match="clip: expected > 0, got 0"):
        policy_loss(logprob, logprob, logprob, clip=0, num_tokens=1)


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    """V 1 (old 0.5, R 2): (0.7 - 2)^2 = 1.69; V 0.6 (0.5, 0): 0.36; V 3 (0, 0.1): 2.9^2 = 8.41 though clipped 0.01."""
    values = leaf(1.0, 0.6, 3.0)
    old, returns = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2.0, 0.0, 0.1])
    loss, metrics = value_loss(values, old, returns, clip=0.2, num_tokens=3)
    assert loss.item() == pytest.approx(10.46 / 6, rel=1e-6)
    assert gradient(loss, values) == pytest.approx([0, 0.2, 2.9 / 3])
    assert metrics["value_clip_fraction"].item() == 1
    assert metrics["value_error"].item() == pytest.approx(1 + 0.36 + 8.41, rel=1e-6)


def test_kl_estimates_of_hand_worked_numbers():
    found = kl_estimates(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    assert found["k1"].item() == pytest.approx(math.log(2))
    assert found["k3"].item() == pytest.approx(0.5 - 1 + math.log(2))


def test_kl_estimates_are_unbiased_and_k3_is_never_negative():
    p, r = (torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2).softmax(-1)
    exact = (p * (p / r).log()).sum().item()
    found = kl_estimates(p.log(), r.log())
    for estimate in found.values():
        assert (p * estimate).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (found["k1"] < 0).any() and (found["k3"] >= 0).all()
