"""What a directory claims is compared with what is there: read as transformers reads it, or refused by name."""

import json
import os
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

from wizard_engine.model import PRESETS, ModelConfig, Transformer, load_hf, save_hf
from wizard_engine.model.published import read_config

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def changed(folder, changes, preset="tiny-mixtral"):
    """A saved model whose config.json has other fields; "gone" removes one."""
    path = save_hf(Transformer(PRESETS[preset], seed=0), folder / "m")
    fields = json.loads((path / "config.json").read_text()) | changes
    text = json.dumps({name: value for name, value in fields.items() if value != "gone"})
    (path / "config.json").write_text(text)
    return path


bases = st.none() | st.sampled_from([100.0, 10_000, 5e5, 1e6])
scalings = st.none() | st.fixed_dictionaries({}, optional={"rope_theta": bases, "rope_type": st.just("default")})


# Catches: the top's base before the inner one; rope_parameters before rope_scaling; another default of a family.
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["llama", "mistral", "mixtral"]),
    base=bases,
    parameters=scalings,
    scaling=scalings,
)
def test_the_rope_base_is_the_one_that_transformers_takes(tmp_path_factory, kind, base, parameters, scaling):
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
    fields = {"architectures": [names[kind]], "model_type": kind, "vocab_size": 64, "hidden_size": 32}
    fields |= {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_theta": base, "rope_parameters": parameters, "rope_scaling": scaling}
    # transformers has no base where a null stands in the place of one.
    inner = [value for value in (parameters, scaling) if value is not None]
    if any(value.get("rope_theta", 1) is None for value in inner):
        return
    fields |= {name: value for name, value in rope.items() if value is not None}
    folder = tmp_path_factory.mktemp("rope")
    (folder / "config.json").write_text(json.dumps(fields))
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert read_config(folder)[0].rope_base == theirs.rope_parameters["rope_theta"]


def test_logits_follow_the_inner_rope_base(tmp_path):
    path = changed(
        tmp_path, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 100.0}, "tiny-llama"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ours, ids = load_hf(path), torch.arange(24)
    logits = ours.logits(ours(ids, ids, torch.tensor([0, 24], dtype=torch.int32), 24))
    torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


# Catches: modules, names or divisors of a billion that are made before the headers are asked.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: expected no more than the \d+ tensors"),
        ({"num_local_experts": 10**8}, r"num_local_experts: expected no more than the \d+ tensors"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, r"q_proj\.weight: expected shape"),
        ({"num_attention_heads": 2**31 - 1, "num_key_value_heads": 10**9}, r"num_key_value_heads|kv_heads must divide"),
        ({"num_attention_heads": 2**63}, r"num_attention_heads: expected 1 to 2147483647, got 9223372036854775808"),
        ({"hidden_size": 2**31}, r"hidden_size: expected 1 to"),
        ({"hidden_size": 2**30}, r"embed_tokens\.weight: expected shape"),
        ({"vocab_size": 10**400}, r"vocab_size: expected 1 to 2147483647, got 1000"),
        ({"vocab_size": -1}, r"vocab_size: expected 1 to"),
        ({"max_position_embeddings": 10**9}, r"max_position_embeddings: expected at most 16777216"),
        ({"head_dim": 0}, r"head_dim: expected 1 to"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps: expected a positive number"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: expected a positive number .*, got nan"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps: expected a positive number .*, got 1000"),
        ({"rms_norm_eps": 1e-46}, r"rms_norm_eps: expected a positive number that fp32 can hold"),
        ({"rms_norm_eps": True}, r"rms_norm_eps: expected a positive number"),
        ({"rope_theta": 0}, r"rope_theta: expected a positive number"),
        ({"rope_theta": float("inf")}, r"rope_theta: expected a positive number"),
        ({"rope_theta": "1e4"}, r"rope_theta: expected a positive number"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_parameters: rope_theta: expected a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected none, got \[1\]"),
        ({"rope_parameters": {"rope_type": {}}}, r"rope_parameters: expected none"),
        ({"router_aux_loss_coef": []}, r"router_aux_loss_coef: expected a number >= 0"),
        ({"initializer_range": -1}, r"initializer_range: expected a number >= 0"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings: expected true or false, got false"),
        ({"sliding_window": 1.5}, r"sliding_window: expected a whole number"),
        ({"model_type": "llama"}, r"model_type: expected mixtral, as architectures says, got llama"),
        ({"num_experts": 8}, r"num_experts: expected num_local_experts, got 8"),
        ({"wizard_outputs": 10**9}, r"wizard_outputs: expected 1 to 1024, got 1000000000"),
        ({"wizard_outputs": []}, r"wizard_outputs: expected 1 to 1024"),
        ({"wizard_surprise": 1}, r"wizard_surprise: expected true or false"),
        ({"architectures": ["x" * 10**6]}, r"architectures: expected one of .*, got x{80}$"),
        ({"hidden_act": "a\n\x1b[31m"}, r"hidden_act: expected silu, got a\\n\\x1b\[31m"),
        ({"hidden_size": "gone"}, r"expected the field hidden_size, found none"),
    ],
)  # fmt: skip
def test_claims_of_a_configuration_are_refused_at_once(tmp_path, changes, message):
    path = changed(tmp_path, changes)
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_hf(path)
    assert time.process_time() - began < 2
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 50_000, '{"a": ' + "1" * 5000 + "}", "\ufeff{}", "\0", "", "3"]
)
def test_configurations_that_are_no_object_are_refused(tmp_path, text):
    path = changed(tmp_path, {})
    (path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected (JSON|a JSON object), got"):
        load_hf(path)


def test_a_huge_configuration_is_not_read(tmp_path):
    path = changed(tmp_path, {})
    with open(path / "config.json", "ab") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match=r"config\.json: expected at most \d+ bytes, got 1000000000000"):
        load_hf(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "socket"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, name, kind):
    path = changed(tmp_path, {})
    (path / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "directory":
        (path / name).mkdir()
    else:
        # Of a socket, the file alone.
        os.mknod(path / name, 0o140600)
    with pytest.raises(ValueError, match=rf"{name}: .*expected a regular file, got a"):
        load_hf(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": []}, r"x: dtype: expected one of the format's, got \[\]"),
        ({"dtype": None}, r"x: dtype: expected one of the format's, got None"),
        ({"shape": [2**62] * 100_000}, r"x: shape: expected at most 8 dims, got 100000"),
        ({"shape": [10**400]}, r"x: expected whole numbers for shape"),
        ({"data_offsets": [0, 2**70]}, r"x: expected whole numbers for shape"),
        ({"data_offsets": [2**62, 2**62 + 4]}, r"x: expected its bytes to begin at 0"),
        ({"data_offsets": [4, 0]}, r"x: expected 4 bytes"),
    ],
)
def test_headers_are_refused_before_they_are_computed_with(tmp_path, entry, message):
    path = changed(tmp_path, {})
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    began = time.process_time()
    with pytest.raises(ValueError, match=r"model\.safetensors: " + message):
        load_hf(path)
    assert time.process_time() - began < 2


def test_many_names_twice_are_refused_in_time(tmp_path):
    path = changed(tmp_path, {})
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{i}":{entry}' for i in [*range(90_000), 89_999]) + "}").encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"the name '89999' twice"):
        load_hf(path)
    assert time.process_time() - began < 2
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 9_000_000) + b" " * 9_000_000)
    with pytest.raises(
        ValueError, match=r"a header of 9000000 bytes in a file of 9000008 \(at most 8388608 are read\)"
    ):
        load_hf(path)


def tied_pair(folder, tied):
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(folder)
    return model


# Catches: only one of the two names is looked for; the header's aliases are thrown away.
def test_tied_weights_load_under_either_name(tmp_path):
    model = tied_pair(tmp_path, True)
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    tensors = load_file(tmp_path / "model.safetensors")
    table = model.get_input_embeddings().weight
    assert "lm_head.weight" in tensors and "model.embed_tokens.weight" not in tensors
    assert torch.equal(load_hf(tmp_path).embedding.weight, table)
    # Without the header's word for it, too, and as the embedding, and under both names.
    for names in (["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        save_file(rest | {name: table.detach().clone() for name in names}, tmp_path / "model.safetensors")
        assert torch.equal(load_hf(tmp_path).embedding.weight, table)


def test_aliases_of_the_header_are_followed_and_missing_heads_refused(tmp_path):
    model = tied_pair(tmp_path, False)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    head = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected the tensor lm_head\.weight \(and 0 more\), found none"):
        load_hf(tmp_path)
    alias = {"lm_head.weight": "model.embed_tokens.weight", "more": "nothing"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"} | alias)
    again = load_hf(tmp_path)
    assert torch.equal(again.head.weight, tensors["model.embed_tokens.weight"])
    assert not torch.equal(again.head.weight, head)
    wrong = {"lm_head.weight": "model.norm.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata=wrong)
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected shape \(128, 32\), got \(32,\)"):
        load_hf(tmp_path)


def test_an_explicit_null_of_key_value_heads_is_as_many_as_heads(tmp_path):
    path = changed(tmp_path, {"num_key_value_heads": None}, "tiny-llama")
    assert read_config(path)[0].kv_heads == transformers.AutoConfig.from_pretrained(path).num_key_value_heads == 4
    assert read_config(changed(tmp_path, {"num_key_value_heads": None}, "tiny-mistral"))[0].kv_heads == 4


@pytest.mark.parametrize(
    "changes", [{"rope_base": 0.0}, {"rope_base": float("nan")}, {"norm_epsilon": float("inf")}, {"layers": 2**31}]
)
def test_model_config_refuses_numbers_that_cannot_be(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        ModelConfig(**changes)
