"""Losses that need no vocabulary, on numbers worked by hand; those of a language model stand in tests/kernels."""

import math

import pytest
import torch

from wizard_engine.loss import process_loss, ranking_loss
from wizard_engine.loss.process_reward import step_scores


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def gradient(loss, *leaves):
    """Gradients of all leaves, end to end."""
    return torch.cat(torch.autograd.grad(loss, leaves)).tolist()


def test_ranking_loss_takes_the_margin_off():
    """ln(1 + e^-0.25) and ln(1 + e^0.7), over 4 pairs."""
    better, worse = leaf(1.0, 0.2), leaf(0.5, 0.9)
    loss = ranking_loss(better, worse, torch.tensor([0.25, 0.0]), num_pairs=4)
    assert loss.item() == pytest.approx((0.575939 + 1.103186) / 4, abs=1e-6)
    grads = [0.437823 / 4, 0.668188 / 4]
    assert gradient(loss, better, worse) == pytest.approx([-x for x in grads] + grads, abs=1e-6)


def test_process_loss_and_step_scores_know_the_order_of_labels():
    """Logits of wrong, neutral, right: probabilities 1/4, 1/4, 1/2."""
    scores = torch.tensor([[0.0, 0.0, math.log(2)]])
    for label, expected in ((-1, math.log(4)), (0, math.log(4)), (1, math.log(2))):
        assert process_loss(scores, torch.tensor([label]), num_steps=1).item() == pytest.approx(expected, abs=1e-6)
    both = process_loss(scores.repeat(2, 1), torch.tensor([-1, 1]), num_steps=3)
    assert both.item() == pytest.approx(math.log(8) / 3, abs=1e-6)
    assert step_scores(scores).item() == pytest.approx(0.625)
    assert step_scores(scores, neutral=0.0).item() == pytest.approx(0.5)
