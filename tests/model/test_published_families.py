"""Random models of three families against transformers: logits, gradients, tensors there and back, full presets."""

import random

import pytest
import torch

from wizard_engine.model import PRESETS, Transformer, load_hf, save_hf
from wizard_engine.model.published import pieces, published_tensors

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
FAMILIES = ("Llama", "Mistral", "Mixtral")
SEEDS = range(20)


def random_fields(family, seed):
    """Fields of config.json: GQA ratios, tied heads, windows shorter than the text, head widths, odd vocabularies."""
    draw = random.Random(f"{family}{seed}")
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    heads = kv_heads * group
    head_width = draw.choice([2, 6, 8, 10])
    explicit = draw.random() < 0.5
    fields = {
        "vocab_size": draw.choice([61, 97, 128, 255]),
        "hidden_size": heads * (draw.choice([3, 5, 8]) if explicit else head_width),
        "intermediate_size": draw.choice([12, 31, 40]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "rope_theta": draw.choice([100.0, 1e4, 1e6]),
        "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": draw.choice([0.05, 0.1]),
    }
    if explicit:
        fields["head_dim"] = head_width
    if family != "Llama":
        fields["sliding_window"] = draw.choice([None, 1, 3, 7, 40])
    if family == "Mixtral":
        experts = draw.choice([2, 3, 5, 8])
        fields |= {"num_local_experts": experts, "num_experts_per_tok": draw.randint(2, min(3, experts))}
    return fields


def eager(family):
    """Options of transformers: plain attention, and experts in a loop, which takes sizes of any number of bytes."""
    return {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if family == "Mixtral" else {})


def made(family, fields, seed=0):
    """A random model of transformers with weights of its norms that are not one."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**fields, **eager(family))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    return model


def documents(vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in (11, 1, 5)]


def packed(rows):
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return torch.cat(rows), positions, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


def off(actual, expected):
    """Largest error relative to the largest value."""
    scale = float(expected.detach().abs().max())
    return float((actual - expected).detach().abs().max()) / scale if scale else float(actual.detach().abs().max())


def logits_and_gradients(model, rows, published=False):
    """Logits of the rows, and gradients of a fixed weighted sum of them by transformers' names."""
    if published:
        logits = torch.cat([model(row[None]).logits[0] for row in rows])
    else:
        logits = model.logits(model(*packed(rows)))
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(rows[0]))).to(logits.dtype)
    (logits * cotangent).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()} if published else published_gradients(model)
    return logits.detach(), grads


# Catches: softmax before top-k; a window off by one; w1 and w3 exchanged; a tied head's gradient added once only.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_transformers(family, seed, tmp_path):
    theirs = made(family, random_fields(family, seed), seed)
    theirs.save_pretrained(tmp_path)
    ours, rows = load_hf(tmp_path), documents(theirs.config.vocab_size, seed)
    actual, grads = logits_and_gradients(ours, rows)
    expected, named = logits_and_gradients(theirs, rows, published=True)
    assert actual.dtype == torch.float32 and off(actual, expected) < 1e-5
    single = torch.cat([ours.logits(ours(*packed([row]))) for row in rows])
    assert off(actual, single) < 1e-5
    assert grads.keys() == named.keys()
    for name, gradient in grads.items():
        assert off(gradient, named[name]) < 1e-5, name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_large_weights_are_as_near_to_float64_as_those_of_transformers(family, seed, tmp_path):
    """Weights so large that rounding alone sets two right models more than 1e-5 apart: both against float64."""
    theirs = made(family, random_fields(family, seed) | {"initializer_range": 0.3}, seed)
    theirs.save_pretrained(tmp_path)
    rows = documents(theirs.config.vocab_size, seed)
    actual, ref = (logits_and_gradients(load_hf(tmp_path, dtype=d), rows) for d in (torch.float32, torch.float64))
    base = logits_and_gradients(theirs, rows, published=True)
    assert off(actual[0].double(), ref[0]) < 2 * off(base[0].double(), ref[0]) + 1e-5
    # The float64 numbers are this engine's: they serve only because transformers' are near them (7e-5 at most, seen).
    worst = max(off(base[1][name].double(), grad) for name, grad in ref[1].items())
    assert off(base[0].double(), ref[0]) < 2e-5 and worst < 2e-4
    for name, grad in ref[1].items():
        assert off(actual[1][name].double(), grad) < 2 * worst + 1e-5, name


def test_one_expert_per_token_leaves_the_router_without_a_gradient(tmp_path):
    """Its gate is one whatever the logits: transformers' gradient there is what its division rounds to."""
    theirs = made("Mixtral", random_fields("Mixtral", 1) | {"num_experts_per_tok": 1}, 1)
    theirs.save_pretrained(tmp_path)
    ours, rows = load_hf(tmp_path), documents(theirs.config.vocab_size, 1)
    actual, grads = logits_and_gradients(ours, rows)
    expected, named = logits_and_gradients(theirs, rows, published=True)
    assert off(actual, expected) < 1e-5
    for name, gradient in grads.items():
        if name.endswith("mlp.gate.weight"):
            assert not gradient.any()
        else:
            assert off(gradient, named[name]) < 1e-5, name


def published_gradients(model):
    """Gradients by the names that transformers has in memory: experts stacked."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        piece.name: grads[piece.parameter][piece.region].reshape(piece.shape)
        for piece in pieces(model.config, stacked=True)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_back_bit_equal(family, dtype, tmp_path):
    theirs = made(family, random_fields(family, 3) | {"tie_word_embeddings": False}, 3).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs", dtype=dtype)
    save_hf(ours, tmp_path / "ours", max_shard_bytes=3000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    kind = getattr(transformers, f"{family}ForCausalLM")
    opened, original = (
        kind.from_pretrained(tmp_path / name, dtype="auto", **eager(family)) for name in ("ours", "theirs")
    )
    state = opened.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert state[name].dtype == dtype and torch.equal(state[name], tensor), name
    row = documents(theirs.config.vocab_size, 0)[0][None]
    assert torch.equal(opened(row).logits, original(row).logits)
    again = load_hf(tmp_path / "ours", dtype=dtype)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


# Catches: files of the classic layout written in another order of names or bytes than transformers writes them.
@pytest.mark.parametrize("family", FAMILIES)
def test_written_files_hold_what_transformers_writes(family, tmp_path):
    from safetensors.torch import load_file

    theirs = made(family, random_fields(family, 5), 5)
    theirs.save_pretrained(tmp_path / "theirs")
    save_hf(load_hf(tmp_path / "theirs"), tmp_path / "ours")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_stacked_experts_are_read(tmp_path):
    from safetensors.torch import save_file

    theirs = made("Mixtral", random_fields("Mixtral", 1) | {"tie_word_embeddings": False}, 1)
    theirs.save_pretrained(tmp_path / "classic")
    theirs.config.save_pretrained(tmp_path / "stacked")
    save_file(dict(theirs.state_dict()), tmp_path / "stacked" / "model.safetensors")
    config = tmp_path / "stacked" / "config.json"
    config.write_text((tmp_path / "classic" / "config.json").read_text())
    one, other = (load_hf(tmp_path / name) for name in ("classic", "stacked"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_dtype_is_the_callers(tmp_path):
    model = Transformer(PRESETS["tiny-mixtral"], seed=0).to(torch.bfloat16)
    save_hf(model, tmp_path / "m")
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "m" / "config.json").read_text()
    wide = load_hf(tmp_path / "m")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), wide.parameters()))


PUBLISHED = {
    "7b": ("Mistral", {"sliding_window": 4096, "max_position_embeddings": 32_768}, 7_241_732_096),
    "70b": (
        "Llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "max_position_embeddings": 4096,
        },
        68_976_648_192,
    ),
    "8x22b": (
        "Mixtral",
        {
            "hidden_size": 6144,
            "intermediate_size": 16_384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
            "max_position_embeddings": 65_536,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
        },
        140_620_634_112,
    ),
}
COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_models(preset, tmp_path):
    """The presets' shapes are written out above, as the models' own config.json files have them."""
    family, fields, count = PUBLISHED[preset]
    config = getattr(transformers, f"{family}Config")(**COMMON | fields)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(config)
        ours = Transformer(PRESETS[preset])
    shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert {name: tuple(t.shape) for name, t in published_tensors(ours, stacked=True).items()} == shapes
    total = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == total == PRESETS[preset].num_parameters
    assert total == count
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    from wizard_engine.model.published import read_config

    assert read_config(tmp_path)[0] == PRESETS[preset]
