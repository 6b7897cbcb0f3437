"""The router's losses: by hand, and against transformers."""

import pytest
import torch

from kernels.moe_route import load_balancing_loss, router_z_loss


def test_load_balancing_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1e9]], requires_grad=True)
    experts = torch.tensor([[0], [1], [1]])
    loss = load_balancing_loss(logits, experts, num_tokens=3)
    # f = (1/3, 2/3), sum P = (1, 2)
    assert loss.item() == pytest.approx(2 * (1 / 3 * 1 + 2 / 3 * 2) / 3)
    padded = load_balancing_loss(logits, experts, num_tokens=2, real=torch.tensor([True, True, False]))
    assert padded.item() == pytest.approx(2 * (0.5 * 1 + 0.5 * 1) / 2)
    (grad,) = torch.autograd.grad(padded, logits)
    assert not grad[2].any()


def test_load_balancing_loss_is_the_number_of_choices_where_the_load_is_even():
    logits = torch.zeros(8, 4)
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    assert float(load_balancing_loss(logits, experts, num_tokens=8)) == pytest.approx(2.0)
    empty = load_balancing_loss(logits, experts, num_tokens=8, real=torch.zeros(8, dtype=torch.bool))
    assert float(empty) == 0.0


# Catches: f or P over another number of tokens; the loss without its factor E.
def test_load_balancing_loss_is_that_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is absent")
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    experts = logits.topk(2).indices
    theirs = mixtral.load_balancing_loss_func((logits,), 8, 2)
    ours = load_balancing_loss(logits, experts, num_tokens=50)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)
    mask = torch.ones(2, 25, dtype=torch.int64)
    mask[1, 20:] = 0
    theirs = mixtral.load_balancing_loss_func((logits,), 8, 2, mask)
    ours = load_balancing_loss(logits, experts, num_tokens=45, real=mask.flatten().bool())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1e9]], requires_grad=True)
    loss = router_z_loss(logits, num_tokens=4)
    assert loss.item() == pytest.approx((torch.log(torch.tensor(2.0)) ** 2 + 9) / 4)
    real = torch.tensor([True, False])
    assert router_z_loss(logits, num_tokens=1, real=real).item() == pytest.approx(
        float(torch.log(torch.tensor(2.0))) ** 2
    )
    (grad,) = torch.autograd.grad(router_z_loss(logits, num_tokens=1, real=real), logits)
    assert not grad[1].any()
