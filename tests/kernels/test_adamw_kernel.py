"""AdamW on flat buffers: bits of torch's fused update on the CPU; slices, rounded gradients and traces in Triton."""

import pytest
import torch
from closeness import assert_close

import kernels
from kernels.adamw import adamw, adamw_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPERPARAMETERS = {"lr": 0.03, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
NAMES = ("master", "exp_avg", "exp_avg_sq", "gradient")


def state(count, device=DEVICE):
    """Buffers of an optimizer in the middle of a run."""
    generator = torch.Generator().manual_seed(count)
    drawn = [torch.randn(count, generator=generator) for _ in NAMES]
    drawn[2] = drawn[2].square()
    return {name: x.to(device) for name, x in zip(NAMES, drawn)}


# Catches: the mask of the last block left out; the copy written behind its end.
@pytest.mark.parametrize("offset", [0, 4, 5])
def test_adamw_of_slices_does_not_change_their_neighbours(offset):
    count = 1500
    near = state(count)
    around = {name: torch.full((3 * count,), 7.0, device=DEVICE) for name in NAMES}
    around["copy"] = torch.full((3 * count,), 7.0, dtype=torch.float16, device=DEVICE)
    inside = {name: x[offset : offset + count] for name, x in around.items()}
    for name, x in near.items():
        inside[name].copy_(x)
    with kernels.use_backend("triton"):
        adamw(**inside, **HYPERPARAMETERS, step=2)
        adamw(**near, **HYPERPARAMETERS, step=2)
    for name, x in around.items():
        assert (x[:offset] == 7).all() and (x[offset + count :] == 7).all()
        assert torch.equal(inside[name], near["master"].half() if name == "copy" else near[name])


# Catches: bias corrections of another step; decay at another rate.
@pytest.mark.parametrize("count", [1, 63, 4099])
def test_adamw_on_the_cpu_has_the_bits_of_torch_fused(count):
    ours = {name: torch.zeros(count) for name in NAMES[1:3]} | {"master": state(count, "cpu")["master"]}
    flat = torch.nn.Parameter(ours["master"].clone())
    theirs = torch.optim.AdamW([flat], betas=HYPERPARAMETERS["betas"], eps=1e-8, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        flat.grad = torch.randn(count, generator=generator)
        theirs.param_groups[0]["lr"] = 0.03 / step
        theirs.step()
        adamw(**ours, gradient=flat.grad, **(HYPERPARAMETERS | {"lr": 0.03 / step}), step=step)
        result = theirs.state[flat]
        assert torch.equal(ours["master"], flat.data) and torch.equal(ours["exp_avg"], result["exp_avg"])
        assert torch.equal(ours["exp_avg_sq"], result["exp_avg_sq"])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_adamw_scales_rounded_gradients_and_writes_a_rounded_copy(backend):
    buffers = state(2050)
    buffers["gradient"] = buffers["gradient"].bfloat16()
    copy, scale = torch.zeros(2050, dtype=torch.float16, device=DEVICE), torch.tensor(0.37, device=DEVICE)
    wide = {name: x.double() for name, x in buffers.items()}
    plain = {name: x.float().clone() for name, x in buffers.items()}
    with kernels.use_backend(backend):
        adamw(**buffers, **HYPERPARAMETERS, step=3, scale=scale, copy=copy)
    adamw_reference(**wide, **HYPERPARAMETERS, step=3, scale=scale.double())
    adamw_reference(**plain, **HYPERPARAMETERS, step=3, scale=scale)
    for name in NAMES[:3]:
        assert_close(buffers[name], plain[name], wide[name], name)
    assert torch.equal(copy, buffers["master"].half())


def test_adamw_of_powers_of_two_is_exact():
    """b2 = 3/4 and step 1 make the corrected root |g|, so that each step is lr in the direction of the gradient."""
    gradient = torch.tensor([1.0, -2.0, 8.0, -0.5] * 512, device=DEVICE)
    master = torch.arange(2048.0, device=DEVICE)
    expected = master * 0.75 - 0.5 * gradient.sign()
    moments = [torch.zeros_like(master) for _ in range(2)]
    with kernels.use_backend("triton"):
        adamw(master, *moments, gradient, lr=0.5, betas=(0.5, 0.75), epsilon=0.0, weight_decay=0.5, step=1)
    assert torch.equal(master, expected) and torch.equal(moments[0], 0.5 * gradient)
    assert torch.equal(moments[1], 0.25 * gradient.square())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_adamw_traces_without_a_graph_break(backend):
    def update(master, exp_avg, exp_avg_sq, gradient, scale, copy):
        adamw(master, exp_avg, exp_avg_sq, gradient, **HYPERPARAMETERS, step=3, scale=scale, copy=copy)
        return master.sum()

    result = []
    with kernels.use_backend(backend):
        for form in (torch.compile(update, fullgraph=True, backend="aot_eager"), update):
            buffers = [*state(1100).values(), torch.tensor(0.5, device=DEVICE)]
            buffers.append(torch.zeros(1100, dtype=torch.float16, device=DEVICE))
            result.append([form(*buffers), *buffers])
    torch._dynamo.reset()
    for traced, eager in zip(*result):
        torch.testing.assert_close(traced, eager)
