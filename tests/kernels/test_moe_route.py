"""Routing against float64 and against a plain loop over tokens, on the reference and on the kernels."""

import pytest
import torch
from closeness import check, scaled
from table_entries import distinct_entries

import kernels
from benchmarks.moe_problem import LOADS, chosen
from kernels.configuration import table, use_arch, use_config
from kernels.expert_tiles import TILE_ROWS, num_slots
from kernels.moe_route import moe_route, moe_route_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK_T": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True, params=["reference", "triton"])
def backend(request):
    """Every test runs on both; the kernels with small tiles."""
    with (
        kernels.use_backend(request.param),
        use_config("moe_route", **SMALL),
        use_config("moe_offsets", BLOCK_N=16, num_warps=4, num_stages=1),
    ):
        yield request.param


def drawn(tokens, width, experts, seed=0):
    inputs = {
        "hidden": scaled(max(tokens, 1), width, seed=seed)[:tokens],
        "router": torch.randn(experts, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64),
    }
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def assert_layout(routing, experts, num_experts):
    """offsets, rows, positions and tiles are those of a loop over pairs that appends each to its expert's list."""
    per_token = experts.shape[1]
    lists = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(experts.flatten().tolist()):
        lists[expert].append(pair)
    rows = [pair for members in lists for pair in members]
    bounds = [sum(len(members) for members in lists[:e]) for e in range(num_experts + 1)]
    assert routing.offsets.tolist() == bounds and routing.rows.tolist() == rows
    assert routing.counts.tolist() == [len(members) for members in lists]
    assert [rows[p] for p in routing.positions.flatten().tolist()] == list(range(len(rows)))
    tiles = [(e, first) for e in range(num_experts) for first in range(bounds[e], bounds[e + 1], TILE_ROWS)]
    assert routing.tiles.shape == (2, num_slots(len(rows), num_experts)) and len(tiles) <= routing.tiles.shape[1]
    owner, first = routing.tiles.tolist()
    assert list(zip(owner, first))[: len(tiles)] == tiles
    assert owner[len(tiles) :] == [-1] * (len(owner) - len(tiles))
    assert per_token == routing.positions.shape[1]


# Catches: softmax before top-k; a gate's gradient without the sum over the chosen experts; padded experts not masked.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "per_token"),
    [(0, 8, 4, 2), (1, 16, 8, 2), (17, 33, 8, 2), (50, 24, 3, 1), (37, 16, 17, 4), (16, 8, 5, 5)],
)
def test_logits_and_gates_equal_float64(tokens, width, experts, per_token, dtype):
    def ours(hidden, router):
        routing = moe_route(hidden, router, experts_per_token=per_token)
        return routing.logits, routing.gates

    def eager(hidden, router):
        return moe_route_reference(hidden, router, per_token)[:2]

    def rounded(hidden, router):
        """Gradients of the logits, rounded before the products as documented."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ router.to(wide).T
        if logits.requires_grad:
            logits.register_hook(lambda grad: grad.to(hidden.dtype).to(wide))
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
        return logits, logits.gather(1, chosen).softmax(-1)

    check(ours, eager, drawn(tokens, width, experts, seed=tokens), dtype, also=rounded)


@pytest.mark.every(5)
@pytest.mark.parametrize("pattern", LOADS)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 129, 300])
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (5, 1), (20, 3)])
def test_rows_stand_by_expert_then_token(pattern, tokens, experts, per_token):
    replayed = chosen(pattern, tokens, experts, per_token, seed=tokens).to(DEVICE)
    inputs = {name: x.float() for name, x in drawn(tokens, 8, experts).items()}
    routing = moe_route(*inputs.values(), experts_per_token=per_token, replayed_experts=replayed)
    assert torch.equal(routing.experts, replayed)
    assert_layout(routing, replayed, experts)
    logits = inputs["hidden"] @ inputs["router"].T
    torch.testing.assert_close(routing.gates, logits.gather(1, replayed.long()).softmax(-1), rtol=1e-5, atol=1e-6)


# Catches: choices read as if they stood together, where a replay gives one layer's of many.
def test_replayed_experts_may_be_strided():
    inputs = [x.float() for x in drawn(40, 8, 6).values()]
    layers = torch.stack([chosen("uniform", 40, 6, 2, seed=s).to(DEVICE) for s in (1, 2, 3)], dim=1)
    for layer, replayed in enumerate(layers.unbind(1)):
        routing = moe_route(*inputs, experts_per_token=2, replayed_experts=replayed)
        assert torch.equal(routing.experts, layers[:, layer]) and not replayed.is_contiguous()
        assert_layout(routing, replayed, 6)


def test_best_experts_are_chosen_in_falling_order():
    inputs = {name: x.float() for name, x in drawn(100, 16, 8, seed=3).items()}
    routing = moe_route(*inputs.values(), experts_per_token=3)
    expected = (inputs["hidden"].double() @ inputs["router"].double().T).topk(3).indices
    assert torch.equal(routing.experts.long(), expected)
    assert_layout(routing, expected, 8)


# Catches: ties that go to the higher expert, or twice to the same one.
def test_ties_go_to_the_lower_expert():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], device=DEVICE)
    router = torch.tensor([[1.0, 2.0], [3.0, 2.0], [3.0, 2.0], [1.0, 0.0]], device=DEVICE)
    routing = moe_route(hidden, router, experts_per_token=2)
    assert routing.experts.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert routing.gates.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_extreme_token_does_not_change_the_others(value):
    inputs = {name: x.float() for name, x in drawn(20, 16, 8, seed=4).items()}
    clean = moe_route(*inputs.values(), experts_per_token=2)
    inputs["hidden"][7] = value
    broken = moe_route(*inputs.values(), experts_per_token=2)
    others = torch.arange(20, device=DEVICE) != 7
    assert torch.equal(clean.experts[others], broken.experts[others])
    assert torch.equal(clean.gates[others], broken.gates[others])
    first, second = broken.experts[7].tolist()
    assert first != second and {first, second} <= set(range(8))
    assert_layout(broken, broken.experts, 8)


def test_two_runs_are_bit_equal():
    inputs = [x.float().requires_grad_() for x in drawn(150, 24, 8, seed=5).values()]

    def result():
        routing = moe_route(*inputs, experts_per_token=2)
        grads = torch.autograd.grad(routing.gates[:, 0].sum() + routing.logits.square().sum(), inputs)
        return routing.logits, routing.gates, routing.experts, routing.rows, routing.positions, routing.tiles, *grads

    assert all(torch.equal(a, b) for a, b in zip(result(), result()))


def test_frozen_inputs_get_no_gradient():
    hidden, router = (x.float() for x in drawn(9, 8, 4).values())
    routing = moe_route(hidden.requires_grad_(), router, experts_per_token=2)
    (grad,) = torch.autograd.grad(routing.gates[:, 0].sum(), hidden)
    assert grad.abs().sum() > 0
    assert not moe_route(hidden.detach(), router, experts_per_token=2).gates.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden, router: expected \(T, D\), \(E, D\)"),
        ({"router": torch.zeros(0, 4)}, "E >= 1"),
        ({"experts_per_token": 0}, "experts_per_token: expected 1 to 6, got 0"),
        ({"experts_per_token": 7}, "experts_per_token: expected 1 to 6, got 7"),
        ({"router": torch.zeros(6, 4, dtype=torch.float16)}, "router: expected the dtype of hidden"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden: expected a float dtype, got int64"),
        ({"hidden": torch.zeros(4, 3).T}, "hidden: expected a contiguous last dim"),
        ({"replayed_experts": torch.zeros(3, 1, dtype=torch.int64)}, r"replayed_experts: expected \(3, 2\)"),
        ({"replayed_experts": torch.zeros(3, 2)}, "int32 or int64"),
        (
            {"replayed_experts": torch.tensor([[0, 1], [2, 2], [0, 1]])},
            r"different experts of 0 to 5, got \[2, 2\] at token 1",
        ),
        ({"replayed_experts": torch.tensor([[0, 1], [0, 1], [0, 6]])}, r"got \[0, 6\] at token 2"),
        ({"replayed_experts": torch.tensor([[0, -1], [0, 1], [0, 5]])}, r"got \[0, -1\] at token 0"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"hidden": torch.zeros(3, 4), "router": torch.zeros(6, 4), "experts_per_token": 2}
    arguments |= changes
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with kernels.check_values(), pytest.raises(ValueError, match=message):
        moe_route(moved.pop("hidden"), moved.pop("router"), **moved)


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), distinct_entries("moe_route"), ids=str)
def test_every_table_entry(arch, shape, backend):
    if backend == "reference":
        pytest.skip("the tables are those of the kernels")
    dtype = torch.float16 if shape["bytes"] == 2 else torch.float32
    config, offsets = (
        next(e["config"] for e in table(name) if e["arch"] == arch and e["class"] in (shape, {}))
        for name in ("moe_route", "moe_offsets")
    )
    inputs = [x.to(dtype) for x in drawn(150, 200, 8, seed=6).values()]
    here = use_arch(arch if DEVICE == "cpu" else None)
    with here, use_config("moe_route", **config), use_config("moe_offsets", **offsets):
        routing = moe_route(*inputs, experts_per_token=2)
    logits = inputs[0].double() @ inputs[1].double().T
    assert torch.allclose(routing.logits.double(), logits, rtol=1e-4, atol=1e-4)
    assert_layout(routing, routing.experts, 8)
