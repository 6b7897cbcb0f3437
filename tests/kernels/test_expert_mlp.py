"""The experts' feed-forward block against float64: every load pattern, every table entry, on kernels and reference."""

import itertools
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from closeness import check, scaled
from table_entries import distinct_entries

import kernels
from benchmarks.moe_problem import LOADS, chosen
from kernels import _grouped_matmul as grouped
from kernels.configuration import table, use_arch, use_config
from kernels.expert_permute import permute, permute_reference
from kernels.grouped_matmul import expert_mlp
from kernels.moe_route import Routing, layout_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = ("grouped_swiglu", "grouped_matmul", "grouped_dswiglu", "grouped_dweight")


@contextmanager
def tiles(**changes):
    """Small tiles in all four tables, with TMA and gathers unless the changes say otherwise."""
    config = {"BLOCK_M": 32, "BLOCK_N": 32, "TMA": True, "num_warps": 4, "num_stages": 1, **changes}
    gather = {"GATHER": config.pop("GATHER", True)}
    with (
        use_config("grouped_swiglu", BLOCK_K=16, **gather, **config),
        use_config("grouped_matmul", BLOCK_K=16, **config),
        use_config("grouped_dswiglu", BLOCK_K=16, **gather, **config),
        use_config("grouped_dweight", BLOCK_R=16, **gather, **config),
    ):
        yield


@pytest.fixture(autouse=True)
def triton_backend():
    """Every test runs the kernels, with small tiles unless it says otherwise."""
    with kernels.use_backend("triton"), tiles():
        yield


def routing_of(gates, experts, num_experts):
    """A Routing of given choices and gates."""
    layout = layout_reference(experts, num_experts)
    return Routing(torch.zeros(len(experts), num_experts, device=DEVICE), gates, experts, *layout)


def drawn(tokens, width, ffn_width, experts, per_token, seed=0):
    """Inputs in float64; gates that add up to one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": scaled(max(tokens, 1), width, seed=seed)[:tokens].to(DEVICE),
        "gates": torch.randn(tokens, per_token, generator=generator, dtype=torch.float64).softmax(-1).to(DEVICE),
        "gate_up": (scaled(experts, 2 * ffn_width, width, seed=seed + 1, dim=1) * width**-0.5).to(DEVICE),
        "down": (scaled(experts, width, ffn_width, seed=seed + 2, dim=1) * ffn_width**-0.5).to(DEVICE),
    }


def plain(experts, x, gates, gate_up, down):
    """Each pair by itself: the specification, written another way than the code's own reference."""
    local = experts.flatten().long()
    rows = x.repeat_interleave(experts.shape[1], 0)
    gate, up = torch.einsum("rfd,rd->rf", gate_up[local], rows).chunk(2, -1)
    outer = torch.einsum("rdf,rf->rd", down[local], F.silu(gate) * up)
    return (gates.flatten().to(outer.dtype)[:, None] * outer).view(*experts.shape, x.shape[1]).sum(1)


class Stored(torch.autograd.Function):
    """Each pair by itself in fp32, rounded wherever the kernels store: it is as far off as storing in x's dtype is."""

    @staticmethod
    def forward(ctx, experts, x, gates, gate_up, down):
        ctx.save_for_backward(experts, x, gates, gate_up, down)
        local, rows = experts.flatten().long(), x.repeat_interleave(experts.shape[1], 0).float()
        gate, up = torch.einsum("rfd,rd->rf", gate_up[local].float(), rows).to(x.dtype).float().chunk(2, -1)
        hidden = (F.silu(gate) * up).to(x.dtype).float()
        outer = torch.einsum("rdf,rf->rd", down[local].float(), hidden).to(x.dtype).float()
        return (gates.flatten().float()[:, None] * outer).view(*experts.shape, -1).sum(1).to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        experts, x, gates, gate_up, down = ctx.saved_tensors
        local, count = experts.flatten().long(), experts.shape[1]
        rows, grad = (t.repeat_interleave(count, 0).float() for t in (x, dout))
        weight = gates.flatten().float()[:, None]
        gate, up = torch.einsum("rfd,rd->rf", gate_up[local].float(), rows).to(x.dtype).float().chunk(2, -1)
        sigmoid, dhidden = gate.sigmoid(), torch.einsum("rdf,rd->rf", down[local].float(), grad)
        silu = gate * sigmoid
        gated = (weight * silu * up).to(x.dtype).float()
        dgate = dhidden * weight * up * (sigmoid + silu * (1 - sigmoid))
        dinner = torch.cat((dgate, dhidden * weight * silu), -1).to(x.dtype).float()
        dx = torch.einsum("rfd,rf->rd", gate_up[local].float(), dinner).to(x.dtype).float()
        dgate_up, ddown = torch.zeros_like(gate_up).float(), torch.zeros_like(down).float()
        dgate_up.index_add_(0, local, torch.einsum("rf,rd->rfd", dinner, rows))
        ddown.index_add_(0, local, torch.einsum("rd,rf->rdf", grad, gated))
        dgates = (dhidden * silu * up).sum(-1).view_as(experts).to(gates.dtype)
        dx = dx.view(*experts.shape, -1).sum(1).to(x.dtype)
        return None, dx, dgates, dgate_up.to(x.dtype), ddown.to(x.dtype)


def against_float64(pattern, tokens, width, ffn_width, num_experts, per_token, dtype, seed=0):
    experts = chosen(pattern, tokens, num_experts, per_token, seed).to(DEVICE)

    def ours(x, gates, gate_up, down):
        return expert_mlp(x, gate_up, down, routing_of(gates.float(), experts, num_experts))

    def eager(x, gates, gate_up, down):
        return plain(experts, x, gates, gate_up, down)

    def other(x, gates, gate_up, down):
        return Stored.apply(experts, x, gates, gate_up, down)

    check(ours, eager, drawn(tokens, width, ffn_width, num_experts, per_token, seed), dtype, also=other)


# Catches: a gate missing or twice in the weights' gradients; the wrong expert's rows; a mask of the last rows left out.
@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pattern", LOADS)
@pytest.mark.parametrize("tokens", [1, 33, 70])
def test_loads(pattern, tokens, dtype):
    against_float64(pattern, tokens, 48, 32, 8, 2, dtype, seed=tokens)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "ffn_width"), [(1, 1), (17, 5), (64, 48), (40, 72), (33, 130)])
def test_widths(width, ffn_width, dtype):
    against_float64("zipf", 37, width, ffn_width, 5, 2, dtype)


@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (3, 3), (17, 4)])
def test_numbers_of_experts(experts, per_token):
    against_float64("uniform", 50, 24, 40, experts, per_token, torch.float32)


@pytest.mark.every(8)
@pytest.mark.parametrize(("arch", "shape"), distinct_entries(*TABLES), ids=str)
def test_every_table_entry(arch, shape):
    """All four tables of an architecture at once, and gathers as they say."""
    dtype = torch.float16 if shape["bytes"] == 2 else torch.float32
    with ExitStack() as stack:
        stack.enter_context(use_arch(arch if DEVICE == "cpu" else None))
        for name in TABLES:
            entry = next(e for e in table(name) if (e["arch"], e["class"]) == (arch, shape))
            stack.enter_context(use_config(name, **entry["config"]))
        against_float64("zipf", 150, 192, 128, 4, 2, dtype, seed=3)
        against_float64("idle", 90, 72, 104, 4, 2, dtype, seed=4)


def result_of(inputs, experts, num_experts):
    """Output and all gradients."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = expert_mlp(leaves["x"], leaves["gate_up"], leaves["down"], routing_of(leaves["gates"], experts, num_experts))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return out, *torch.autograd.grad((out * grad).sum(), list(leaves.values()))


def floats(*shape, seed=0):
    return {name: x.float() for name, x in drawn(*shape, seed=seed).items()}


@pytest.mark.every(3)
@pytest.mark.parametrize(("tma", "gather"), [(True, False), (False, True), (False, False)])
def test_descriptors_pointers_gathers_and_copies_give_the_same_bits(tma, gather):
    inputs, experts = floats(41, 48, 64, 4, 2), chosen("zipf", 41, 4, 2, seed=0).to(DEVICE)
    expected = result_of(inputs, experts, 4)
    with tiles(TMA=tma, GATHER=gather):
        assert all(torch.equal(a, b) for a, b in zip(result_of(inputs, experts, 4), expected))
    with grouped.use_gather(gather):
        assert all(torch.equal(a, b) for a, b in zip(result_of(inputs, experts, 4), expected))


def test_two_runs_are_bit_equal():
    inputs, experts = floats(50, 40, 24, 3, 2, seed=1), chosen("uniform", 50, 3, 2, seed=0).to(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(result_of(inputs, experts, 3), result_of(inputs, experts, 3)))


# Catches: gradients of idle experts that are left as they were allocated; a tile that reads the next expert's weights.
def test_idle_experts_get_zero_gradients_and_their_weights_are_never_read():
    inputs, experts = floats(70, 40, 24, 6, 2, seed=2), chosen("idle", 70, 6, 2, seed=0).to(DEVICE)
    expected = result_of(inputs, experts, 6)
    for name in ("gate_up", "down"):
        inputs[name] = inputs[name].clone()
        inputs[name][::4] = float("nan")
    result = result_of(inputs, experts, 6)
    for a, b in zip(result, expected):
        assert torch.equal(a, b)
    for grad in result[3:]:
        idle = torch.arange(6, device=DEVICE) % 4 == 0
        assert not grad[idle].any() and grad[~idle].flatten(1).any(1).all()


def test_nan_token_does_not_change_the_other_tokens():
    inputs, experts = floats(50, 40, 24, 3, 2, seed=3), chosen("uniform", 50, 3, 2, seed=0).to(DEVICE)
    out, dx, dgates, *_ = result_of(inputs, experts, 3)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][11] = float("nan")
    broken, broken_dx, broken_dgates, *_ = result_of(inputs, experts, 3)
    others = torch.arange(50, device=DEVICE) != 11
    for a, b in ((out, broken), (dx, broken_dx), (dgates, broken_dgates)):
        assert torch.equal(a[others], b[others])
    assert broken[11].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_numbers_are_exact(dtype):
    """Gates of 64 have a sigmoid of one, weights are powers of two: every sum is a whole number."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator).to(DEVICE)

    tokens, width, ffn_width, num_experts = 70, 8, 16, 4
    experts = chosen("zipf", tokens, num_experts, 2, seed=0).to(DEVICE)
    x = F.one_hot(draw(0, width - 1, tokens), width).to(dtype)
    gate_up = torch.cat(
        (torch.full((num_experts, ffn_width, width), 64), draw(-2, 2, num_experts, ffn_width, width)), 1
    )
    down = draw(-1, 1, num_experts, width, ffn_width)
    inputs = {
        "x": x,
        "gates": torch.tensor([0.5, 0.25], device=DEVICE).expand(tokens, 2).contiguous(),
        "gate_up": gate_up.to(dtype),
        "down": down.to(dtype),
    }
    out = expert_mlp(inputs["x"], inputs["gate_up"], inputs["down"], routing_of(inputs["gates"], experts, num_experts))
    expected = plain(experts, *(inputs[name].double() for name in ("x", "gates", "gate_up", "down")))
    assert torch.equal(out.double(), expected)


def test_only_required_inputs_have_a_gradient():
    inputs, experts = floats(17, 16, 8, 2, 1), chosen("uniform", 17, 2, 1, seed=0).to(DEVICE)
    whole = dict(zip(inputs, result_of(inputs, experts, 2)[1:]))
    for size in (1, 2):
        for names in itertools.combinations(inputs, size):
            leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
            routing = routing_of(leaves["gates"], experts, 2)
            out = expert_mlp(leaves["x"], leaves["gate_up"], leaves["down"], routing)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
            grads = torch.autograd.grad((out * grad).sum(), [leaves[name] for name in names])
            assert all(torch.equal(a, whole[name]) for a, name in zip(grads, names))


# Catches: products kept for a backward that never comes.
def test_nothing_is_kept_without_gradients(monkeypatch):
    inputs, experts = floats(9, 16, 8, 4, 2), chosen("uniform", 9, 4, 2, seed=0).to(DEVICE)
    kept, right = [], grouped.grouped_swiglu
    monkeypatch.setattr(grouped, "grouped_swiglu", lambda *a: kept.append(a[3]) or right(*a))
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    routing = routing_of(leaves["gates"], experts, 4)
    with torch.no_grad():
        out = expert_mlp(leaves["x"], leaves["gate_up"], leaves["down"], routing)
    assert torch.equal(out, expert_mlp(leaves["x"], leaves["gate_up"], leaves["down"], routing))
    assert kept == [False, True]


def test_no_tokens():
    inputs, experts = floats(0, 16, 8, 4, 2), torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    out, dx, dgates, dgate_up, ddown = result_of(inputs, experts, 4)
    assert out.shape == dx.shape == (0, 16) and dgates.shape == (0, 2)
    assert dgate_up.shape == (4, 16, 16) and ddown.shape == (4, 16, 8) and not dgate_up.any() and not ddown.any()


def test_reference_is_the_specification():
    with kernels.use_backend("reference"):
        for pattern, tokens in itertools.product(("uniform", "idle"), (0, 1, 40)):
            inputs, experts = drawn(tokens, 12, 10, 6, 2), chosen(pattern, tokens, 6, 2, seed=0).to(DEVICE)
            leaves = [x.requires_grad_() for x in inputs.values()]
            out = expert_mlp(leaves[0], *leaves[2:], routing_of(leaves[1], experts, 6))
            expected = plain(experts, *leaves)
            assert torch.allclose(out, expected, rtol=1e-12)
            grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)]
            assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*grads))


@pytest.mark.parametrize("pattern", ["uniform", "one"])
@pytest.mark.parametrize("width", [1, 24, 2050])
def test_permutation_copies_rows(pattern, width):
    routing = routing_of(torch.ones(50, 2, device=DEVICE), chosen(pattern, 50, 4, 2, seed=0).to(DEVICE), 4)
    x = torch.randn(50, width + 3, device=DEVICE)[:, :width]
    assert torch.equal(permute(x, routing.rows, 2), permute_reference(x, routing.rows, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x, gate_up, down: expected \(T, D\), \(E, 2 F, D\), \(E, D, F\)"),
        ({"gate_up": torch.zeros(4, 5, 8)}, "x, gate_up, down: expected"),
        ({"down": torch.zeros(4, 7, 3)}, r"down: expected \(4, 8, 3\)"),
        ({"x": torch.zeros(2, 8)}, "routing: expected that of 2 tokens and 4 experts, got 3 and 4"),
        ({"x": torch.zeros(3, 8, dtype=torch.float16)}, "gate_up: expected the dtype of x"),
        ({"x": torch.zeros(8, 3).T}, "x: expected a contiguous last dim"),
        ({"gate_up": torch.zeros(4, 8, 6).mT}, "gate_up: expected a contiguous tensor"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"x": torch.zeros(3, 8), "gate_up": torch.zeros(4, 6, 8), "down": torch.zeros(4, 8, 3)} | changes
    routing = routing_of(torch.ones(3, 2, device=DEVICE), chosen("uniform", 3, 4, 2, seed=0).to(DEVICE), 4)
    with pytest.raises(ValueError, match=message):
        expert_mlp(*(x.to(DEVICE) for x in arguments.values()), routing)
