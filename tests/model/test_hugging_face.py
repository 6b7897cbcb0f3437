"""The transformer against those of transformers, and model directories: bit-equal when read, or refused by name."""

import copy
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wizard_engine.data.chat import CHAT_ATOMS, encode_conversation, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, ScoringModel, Transformer, load_model, save_model
from wizard_engine.model.hugging_face import published_tensors

transformers = pytest.importorskip("transformers")
LENGTHS = [9, 1, 14]
SHAPES = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "rms_norm_eps": 1e-4,
}
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama grouped": ("Llama", {"num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500.0}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 4, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words of text"], vocab_size=300)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def published(request, tokenizer, tmp_path):
    """A random model of transformers, and its directory with a tokenizer beside."""
    kind, fields = request.param
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SHAPES, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 300, (n,), generator=generator) for n in LENGTHS]


def packed(rows):
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return torch.cat(rows), positions, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


def logits(model, rows):
    return model.logits(model(*packed(rows)))


def off(actual, expected):
    """Largest error relative to the largest value."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def gradients(model):
    """Gradients under their published names."""
    moved = copy.deepcopy(model)
    for ours, parameter in zip(moved.parameters(), model.parameters()):
        ours.data = parameter.grad.clone()
    return published_tensors(moved)


def test_model_equals_transformers_in_logits_and_gradients(published):
    theirs, directory = published
    ours, _ = load_model(directory)
    expected = torch.cat([theirs(row[None]).logits[0] for row in rows()])
    actual = logits(ours, rows())
    assert actual.dtype == torch.float32 and off(actual, expected) < 1e-5
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * cotangent).sum().backward()
    (actual * cotangent).sum().backward()
    named = dict(theirs.named_parameters())
    grads = gradients(ours)
    assert grads.keys() == named.keys()
    for name, grad in grads.items():
        assert off(grad, named[name].grad) < 3e-5, name


def test_packed_rows_equal_rows_one_by_one(published):
    model, _ = load_model(published[1])
    single = torch.cat([logits(model, [row]) for row in rows()])
    assert off(logits(model, rows()), single) < 1e-5
    swapped = logits(model, [rows()[0].flip(0), *rows()[1:]])
    assert off(swapped[LENGTHS[0] :], single[LENGTHS[0] :]) < 1e-5 and off(swapped, single) > 0.1


def test_saved_model_comes_back_bit_equal_and_opens_in_transformers(published, tokenizer, tmp_path):
    theirs, directory = published
    ours, _ = load_model(directory)
    saved = save_model(ours, tokenizer, tmp_path / "ours", extra={"note": "kept"})
    again, loaded_tokenizer = load_model(saved)
    assert again.config == ours.config and loaded_tokenizer.fingerprint == tokenizer.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    fields = json.loads((saved / "config.json").read_text())
    assert fields["note"] == "kept" and fields["eos_token_id"] == tokenizer.eos_id
    opened = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert type(opened) is type(theirs)
    row = rows()[2][None]
    assert torch.equal(opened(row).logits, theirs(row).logits)
    tokenizer_again = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer_again("few words", add_special_tokens=False)["input_ids"] == tokenizer.encode("few words")


def small(tokenizer, seed=0, **changes):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=4,
        ffn_width=12,
        **{"tied": False, **changes},
    )
    return Transformer(config, seed=seed)


@pytest.mark.parametrize("outputs", [1, 3])
def test_scoring_model_comes_back_bit_equal(tokenizer, tmp_path, outputs):
    model = ScoringModel.from_language_model(small(tokenizer), outputs)
    assert not logits_of(model).any()
    with torch.no_grad():
        model.score.weight.normal_()
        model.score.bias.normal_()
    again, _ = load_model(save_model(model, tokenizer, tmp_path / "m"))
    assert isinstance(again, ScoringModel) and again.outputs == outputs
    assert torch.equal(logits_of(model), logits_of(again)) and logits_of(again).shape == (sum(LENGTHS), outputs)


def logits_of(model):
    return model(*packed([row % model.config.vocab_size for row in rows()]))


def test_sharded_directory_is_read(tokenizer, tmp_path):
    model = small(tokenizer)
    path = save_model(model, tokenizer, tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, path / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model(path)[0].parameters()))
    (path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors: expected a whole safetensors file"):
        load_model(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../m/a.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: expected file names inside the directory"):
        load_model(path)
    for text in ('{"weight_map": ', "[]", "{}"):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: expected a JSON object with weight_map"):
            load_model(path)


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def without(path):
    rewrite(path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def transposed(path):
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def truncated(path):
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 10)


def emptied(path):
    (path / "model.safetensors").write_bytes(b"")


def pickled(path):
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def without_config(path):
    (path / "config.json").unlink()


def without_tokenizer(path):
    (path / "tokenizer.json").unlink()


DAMAGE = [
    (without, r"m: expected the tensor model\.layers\.0\.mlp\.up_proj\.weight \(and 0 more\), found none"),
    (transposed, r"safetensors: model\.layers\.0\.self_attn\.k_proj\.weight: expected shape \(4, 8\), got \(8, 4\)"),
    (truncated, r"model\.safetensors: expected a whole safetensors file"),
    (emptied, r"model\.safetensors: expected a whole safetensors file"),
    (pickled, r"model\.safetensors: expected safetensors weights, found none; pickled weights are never read"),
    (without_config, r"config\.json: expected a model directory with config\.json, found none"),
    (without_tokenizer, r"m: expected tokenizer\.json or a \*\.model file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damaged_directory_is_refused_by_name(tokenizer, tmp_path, damage, message):
    path = save_model(small(tokenizer), tokenizer, tmp_path / "m")
    damage(path)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures: expected one of .*Llama.*, got GPT2LMHeadModel"),
        ({"architectures": None}, r"architectures: expected one of .*, got none"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, r"rope_scaling: expected none, got"),
        ({"attention_bias": True}, r"attention_bias: expected False, got True"),
        ({"hidden_act": "gelu"}, r"hidden_act: expected silu, got gelu"),
        ({"hidden_size": "wide"}, r"config\.json: "),
        ({"num_key_value_heads": 3}, r"config\.json: kv_heads must divide heads: heads=2, kv_heads=3; choose from"),
    ],
)
def test_config_that_is_not_implemented_is_refused(tokenizer, tmp_path, change, message):
    path = save_model(small(tokenizer), tokenizer, tmp_path / "m")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        load_model(path)
    del fields["hidden_size"]
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json: expected the field hidden_size, found none"):
        load_model(path)
    for text in ("[1]", '{"a": '):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: expected"):
            load_model(path)


def test_full_disk_leaves_the_former_model(tokenizer, tmp_path):
    path = save_model(small(tokenizer, seed=1), tokenizer, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"m: not saved .*what was there is intact"):
            save_model(small(tokenizer, seed=2), tokenizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(tmp_path) == ["m"]
    save_model(small(tokenizer, seed=2), tokenizer, path)
    assert (
        os.listdir(tmp_path) == ["m"] and (Path(path) / "model.safetensors").read_bytes() != before["model.safetensors"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width: expected a positive number, got 0"),
        ({"heads": 6, "kv_heads": 4}, r"heads=6, kv_heads=4; choose from \[1, 2, 3, 6\]"),
        ({"head_width": 5}, "head_width: expected an even number"),
        ({"window": 0}, "window: expected at least 1 or None, got 0"),
    ],
)
def test_model_config_refuses_shapes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_model_starts_from_its_seed_and_counts_its_parameters(tokenizer):
    for tied in (True, False):
        model = small(tokenizer, tied=tied)
        assert model.config.num_parameters == sum(p.numel() for p in model.parameters())
    same, other = small(tokenizer), small(tokenizer, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


# Catches: a space too many between turns; a system prompt that is left out; a closing EOS that is missing.
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_saved_models_name_their_chat_format(tmp_path, system):
    tokenizer = train_tokenizer(["What is two and two? It is four."], vocab_size=400, atoms=CHAT_ATOMS)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=2, head_width=8)
    save_model(Transformer(config, seed=0), tokenizer, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [] if system is None else [Message("system", system)]
    for role, text in (("user", "What is two?"), ("assistant", "It is four."), ("user", "and two?")):
        messages.append(Message(role, text))
        turns = [{"role": m.role, "content": m.content} for m in messages]
        is_asked = role == "user"
        rendered = theirs.apply_chat_template(turns, add_generation_prompt=is_asked, return_dict=False)
        if is_asked:
            assert list(rendered) == encode_prompt(tokenizer, messages)
        else:
            assert list(rendered) == encode_conversation(tokenizer, messages).tokens.tolist()
