"""The mixture layer: routing recorded and replayed, the load, and the model around it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from wizard_engine.model import PRESETS, ModelConfig, ScoringModel, Transformer
from wizard_engine.model.mixture import Mixture, Routes, load_metrics

CONFIG = PRESETS["tiny-mixtral"]
LENGTHS = (9, 1, 14)


def packed(lengths=LENGTHS, seed=0, padding=0):
    """Tokens, positions, cu_seqlens and the longest length of random documents, and padding behind them."""
    count = sum(lengths) + padding
    tokens = torch.randint(CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return tokens, positions, cu_seqlens, max(lengths)


@pytest.fixture
def model():
    return Transformer(CONFIG, seed=0)


def test_layer_equals_a_loop_over_tokens():
    layer = Mixture(CONFIG, 0).double()
    x_TD = torch.randn(20, CONFIG.width, dtype=torch.float64)
    expected = torch.zeros_like(x_TD)
    for token, x_D in enumerate(x_TD):
        logits = layer.router.weight @ x_D
        best = logits.topk(CONFIG.experts_per_token)
        for gate, expert in zip(best.values.softmax(0), best.indices):
            first, second = (layer.experts.gate_up[expert] @ x_D).chunk(2)
            expected[token] += gate * (layer.experts.down[expert] @ (torch.nn.functional.silu(first) * second))
    torch.testing.assert_close(layer(x_TD), expected, rtol=1e-12, atol=1e-12)


def test_parameters_are_counted(model):
    assert CONFIG.num_parameters == sum(p.numel() for p in model.parameters())
    idle = 3 * CONFIG.width * CONFIG.ffn_width * (CONFIG.experts - CONFIG.experts_per_token) * CONFIG.layers
    assert CONFIG.active_parameters == CONFIG.num_parameters - idle
    big = PRESETS["8x22b"]
    assert round(big.num_parameters / 1e9, 1) == 140.6 and round(big.active_parameters / 1e9, 1) == 39.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": -1}, "experts_per_token"),
        ({"experts": 4, "experts_per_token": 5}, "expected 1 to experts=4, got 5"),
        ({"experts": 4, "experts_per_token": 0}, "expected 1 to experts=4, got 0"),
        ({"balance_loss": -1.0}, "balance_loss: expected >= 0"),
        ({"z_loss": float("nan")}, "z_loss: expected >= 0"),
    ],
)
def test_configuration_refuses_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_initialisation_scales_what_writes_to_the_residual_stream(model):
    std_by_name = {name: p.std().item() for name, p in model.named_parameters() if "feed_forward." in name}
    for name, std in std_by_name.items():
        expected = CONFIG.init_std * (0.5 if name.endswith("down") else 1.0)
        assert std == pytest.approx(expected, rel=0.15), name


# Catches: a route that depends on the neighbours; documents that see each other through an expert's rows.
def test_packed_documents_equal_each_by_itself(model):
    tokens, positions, cu_seqlens, longest = packed()
    together = model(tokens, positions, cu_seqlens, longest)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        single = model(tokens[start:end], positions[start:end], torch.tensor([0, end - start]).int(), end - start)
        torch.testing.assert_close(together[start:end], single, rtol=1e-5, atol=1e-6)


def test_recorded_routes_are_replayed_by_another_router(model):
    batch, routes = packed(), Routes()
    hidden = model(*batch, routes=routes)
    experts = routes.stacked()
    assert experts.shape == (24, CONFIG.layers, CONFIG.experts_per_token) and experts.dtype == torch.int32
    assert torch.equal(model(*batch, routes=Routes(experts)), hidden)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.weight.copy_(block.feed_forward.router.weight.flip(0))
    recorded, replayed = Routes(), Routes(experts)
    changed = model(*batch, routes=recorded)
    model(*batch, routes=replayed)
    assert not torch.equal(recorded.stacked(), experts) and torch.equal(replayed.stacked(), experts)
    assert not torch.equal(changed, hidden)


def test_replay_uses_the_recorded_experts_with_current_gates():
    layer, x_TD = Mixture(CONFIG, 0), torch.randn(5, CONFIG.width)
    torch.nn.init.zeros_(layer.router.weight)
    experts = torch.tensor([[3, 2]] * 5)
    first, second = (
        torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, layer.experts.down[expert])
        for expert in (3, 2)
        for gate, up in [(x_TD @ layer.experts.gate_up[expert].T).chunk(2, -1)]
    )
    torch.testing.assert_close(layer(x_TD, Routes(experts[:, None])), (first + second) / 2)
    assert Routes(experts[:, None]).stacked().tolist() == [[[3, 2]]] * 5


# Catches: a second pass that chooses again, or that puts its logits over those of the first.
def test_recomputation_replays_the_choice_though_the_router_has_changed(model):
    layer, routes = model.blocks[0].feed_forward, Routes()
    x_TD = torch.randn(24, CONFIG.width, requires_grad=True)
    out = checkpoint(layer, x_TD, routes, use_reentrant=False)
    chosen, logits = routes.experts[0].clone(), routes.logits[0]
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight.flip(0))
    replayed, anew = (torch.autograd.grad(layer(x_TD, r).sum(), x_TD)[0] for r in (Routes(chosen[:, None]), Routes()))
    (dx,) = torch.autograd.grad(out.sum(), x_TD)
    assert torch.equal(dx, replayed) and not torch.equal(dx, anew)
    assert torch.equal(routes.experts[0], chosen) and routes.logits[0] is logits


def test_router_losses_count_real_tokens_only(model):
    whole, padded = Routes(), Routes()
    model(*packed(), routes=whole)
    tokens, positions, cu_seqlens, longest = packed(padding=7)
    tokens[:24] = packed()[0]
    model(tokens, positions, cu_seqlens, longest, padded)
    assert padded.real.tolist() == [True] * 24 + [False] * 7
    loss, other = (routes.loss(CONFIG, num_tokens=24) for routes in (whole, padded))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert torch.equal(padded.load(), whole.load()) and whole.load().sum(1).tolist() == [48, 48]


def test_router_loss_is_the_mean_over_layers(model):
    routes = Routes()
    model(*packed(), routes=routes)
    config = ModelConfig(experts=4, balance_loss=0.0, z_loss=2.0)
    expected = torch.stack([routes.logits[layer].logsumexp(-1).square().sum() for layer in (0, 1)]).mean() / 50
    torch.testing.assert_close(routes.loss(config, num_tokens=50), 2 * expected)
    assert Routes().loss(CONFIG, num_tokens=3) == 0.0 and Routes().load() is None
    with pytest.raises(ValueError, match="routes: expected those of a forward pass"):
        Routes().stacked()


def test_router_loss_reaches_the_router_and_the_embedding(model):
    routes = Routes()
    model(*packed(), routes=routes)
    routes.loss(CONFIG, num_tokens=24).backward()
    assert model.blocks[0].feed_forward.router.weight.grad.abs().sum() > 0
    assert model.embedding.weight.grad.abs().sum() > 0
    assert model.blocks[-1].feed_forward.experts.gate_up.grad is None


def test_dense_models_take_routes_and_leave_them_empty():
    routes = Routes()
    hidden = Transformer(PRESETS["tiny"], seed=0)(*packed(), routes=routes)
    assert hidden.shape == (24, 32) and not routes.experts and routes.loss(PRESETS["tiny"], 24) == 0.0


def test_scoring_models_have_experts_too(model):
    scoring = ScoringModel.from_language_model(model, 3)
    routes = Routes()
    assert scoring(*packed(), routes=routes).shape == (24, 3)
    assert routes.stacked().shape == (24, 2, 2)


def test_load_metrics_are_relative_to_the_mean():
    load = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    assert load_metrics(load) == {"expert_load_max": [3.0, 1.0], "expert_load_min": [0.0, 1.0]}
