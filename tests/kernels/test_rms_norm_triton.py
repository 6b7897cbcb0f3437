"""RMS norm behind a residual sum: which of its two results are used, and traced."""

import pytest
import torch
from closeness import scaled

import kernels
from kernels.rms_norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_backend():
    """Every test of this file runs the kernels."""
    with kernels.use_backend("triton"):
        yield


def inputs():
    drawn = scaled(9, 40, seed=0), scaled(9, 40, seed=1), scaled(40, seed=2)
    return [x.float().to(DEVICE).requires_grad_() for x in drawn]


def both(x, residual, weight):
    return rms_norm(x, weight, residual=residual)


# Catches: the gradient of s scaled like that of y; the residual's gradient left out.
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_rms_norm_gradients_come_from_the_results_that_are_used(used):
    leaves = inputs()
    cotangents = [torch.randn(9, 40, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in used]
    outs = both(*leaves)
    grads = torch.autograd.grad([outs[n] for n in used], leaves, cotangents, allow_unused=True)
    with kernels.use_backend("reference"):
        outs = both(*leaves)
        expected = torch.autograd.grad([outs[n] for n in used], leaves, cotangents, allow_unused=True)
    for result, target in zip(grads, expected):
        target = torch.zeros_like(result) if target is None else target
        torch.testing.assert_close(result, target, rtol=1e-5, atol=1e-5 * float(target.abs().max()))
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("used", [(1,), (0, 1)])
def test_rms_norm_with_a_residual_traces_without_a_graph_break(used):
    def loss(x, residual, weight):
        outs = both(x.view(3, 3, 40), residual.view(3, 3, 40), weight)
        return sum(outs[n].sin().sum() for n in used)

    leaves = inputs()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (traced, loss))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_rms_norm_of_wider_strides_equals_that_of_copies():
    """Rows of a slice between neighbours of NaN, and leading dims that no view can join."""
    _, _, weight = inputs()
    poisoned = torch.full((4, 5, 60), float("nan"), device=DEVICE)
    rows = poisoned[:, :, 7:47].copy_(scaled(20, 40, seed=3).view(4, 5, 40)).transpose(0, 1)
    result, apart = (both(x, x, weight) for x in (rows, rows.contiguous()))
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(result, apart))
