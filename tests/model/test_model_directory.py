"""Model directories: what is read, how much memory that takes, and what is refused by name before anything is read."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from wizard_engine.model import PRESETS, ModelDirectory, Transformer, load_hf, save_hf
from wizard_engine.model.published import read_config
from wizard_engine.model.safetensors_file import SafetensorsFile, write_file


@pytest.fixture
def mixture(tmp_path):
    """A saved tiny mixture and its directory."""
    model = Transformer(PRESETS["tiny-mixtral"], seed=0)
    return model, save_hf(model, tmp_path / "m")


def test_a_directory_comes_back_with_its_configuration(tmp_path):
    for name in ("tiny", "tiny-llama", "tiny-mistral", "tiny-mixtral"):
        model = Transformer(PRESETS[name], seed=1)
        again = load_hf(save_hf(model, tmp_path / name))
        assert again.config == model.config
        assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("most", [1, 5000, 10**9])
def test_shards_are_no_larger_than_asked_for(mixture, tmp_path, most):
    model, _ = mixture
    path = save_hf(model, tmp_path / "shards", max_shard_bytes=most)
    files = sorted(path.glob("*.safetensors"))
    if most == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        sizes = {file.name: sum(t.numel() * 4 for t in load_file(file).values()) for file in files}
        assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * model.config.num_parameters
        assert set(index["weight_map"].values()) == set(sizes)
        assert all(size <= most or len(load_file(path / name)) == 1 for name, size in sizes.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_hf(path).parameters()))


# Catches: a box counted from the wrong expert or half; a piece of a box that is not written.
def test_boxes_of_parameters_are_those_of_the_whole(mixture):
    model, path = mixture
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)

    def some(size):
        first, last = sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())
        return slice(first, last)

    for _ in range(10):
        boxes = {name: tuple(some(n) for n in p.shape) for name, p in parameters.items()}
        with ModelDirectory(path) as directory:
            for name, tensor in directory.parameters(slices=boxes):
                assert torch.equal(tensor, parameters[name][boxes[name]].detach()), (name, boxes[name])


def test_a_rank_reads_only_the_bytes_of_its_slices(mixture):
    model, path = mixture
    boxes = {
        "blocks.1.feed_forward.experts.gate_up": (slice(1, 2), slice(16, 48), slice(0, 32)),
        "blocks.0.attention.qkv.weight": (slice(28, 40), slice(0, 32)),
        "blocks.0.feed_forward.experts.down": (slice(0, 4), slice(0, 32), slice(8, 16)),
    }
    with ModelDirectory(path) as directory:
        assert directory.bytes_read == 0
        regions_read = dict(directory.parameters(slices=boxes))
        assert directory.bytes_read == 4 * sum(t.numel() for t in regions_read.values())
    assert regions_read.keys() == boxes.keys()
    with ModelDirectory(path) as directory:
        list(directory.parameters())
        assert directory.bytes_read == 4 * model.config.num_parameters
    for name, slices in (
        ("nothing", ()),
        ("norm.weight", ()),
        ("norm.weight", (slice(0, 33),)),
        ("norm.weight", (slice(0, 32, 2),)),
        ("norm.weight", (slice(-3, 32),)),
        ("norm.weight", (slice(9, 3),)),
    ):
        with ModelDirectory(path) as directory, pytest.raises(ValueError, match="slices: "):
            dict(directory.parameters(slices={name: slices}))


PEAK_MEMORY_SCRIPT = """
import resource, sys, torch
from wizard_engine.model import load_hf
torch.set_num_threads(1)
load_hf(sys.argv[1])
def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
reset()
before = resident("VmRSS")
model = load_hf(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(resident("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


# Catches: files read whole; a second copy of the model; pages of the map that are kept.
@pytest.mark.every(3)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("saved", "requested_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_memory_stays_within_a_tensor_of_the_model_itself(tmp_path, saved, requested_dtype):
    config = replace(PRESETS["tiny-mixtral"], vocab_size=20_000, width=512, ffn_width=1536, heads=8, head_width=64)
    model = Transformer(config).to(getattr(torch, saved))
    path = save_hf(model, tmp_path / "m", max_shard_bytes=30_000_000)
    small = save_hf(Transformer(PRESETS["tiny-mixtral"]), tmp_path / "small")
    largest = max(p.numel() for p in model.parameters()) * 4
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY_SCRIPT, str(small), str(path), requested_dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    peak_bytes, model_bytes = (int(number) for number in done.stdout.split())
    assert model_bytes > 60_000_000 and peak_bytes <= model_bytes + largest + 8_000_000, (
        peak_bytes,
        model_bytes,
        largest,
    )


def header_of(path):
    content = (path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
ENTRIES = {
    "a dtype of its own": ({"dtype": "F31"}, rf"{NAME}: dtype: expected one of the format's, got F31"),
    "whole numbers": ({"dtype": "I32"}, rf"{NAME}: expected one of F64, F32, F16, BF16, got I32"),
    "a negative size": ({"shape": [-32, -32]}, rf"{NAME}: expected whole numbers"),
    "true as a size": ({"shape": [True, 1024]}, rf"{NAME}: expected whole numbers"),
    "a size of 1e3": ({"shape": [1e3, 1]}, rf"{NAME}: expected whole numbers"),
    "a huge size": ({"shape": [2**62, 2**62]}, rf"{NAME}: expected \d+ bytes for F32"),
    "another size": ({"shape": [32, 31]}, rf"{NAME}: expected 3968 bytes for F32 \[32, 31\], got data_offsets of 4096"),
    "three offsets": ({"data_offsets": [0, 4096, 1]}, rf"{NAME}: expected whole numbers for shape and two"),
    "offsets that overlap": (
        {"data_offsets": [0, 4096]},
        r"expected its bytes to begin at \d+, behind the former",
    ),
    "offsets behind the end": ({"data_offsets": [10**12, 10**12 + 4096]}, r"expected its bytes to begin at"),
    "another field": ({"code": "import os"}, rf"{NAME}: expected dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_of_a_header_that_cannot_be_is_refused(mixture, case):
    changes, message = ENTRIES[case]
    _, path = mixture
    header, data = header_of(path)
    header[NAME] |= changes
    with_header(path, header, data)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*" + message):
        load_hf(path)


def test_headers_that_are_none_are_refused(mixture):
    _, path = mixture
    header, data = header_of(path)
    twice = json.dumps(header)[:-1] + f', "{NAME}": ' + json.dumps(header[NAME]) + "}"
    cases = {
        b"[1]": "header: expected a JSON object, got list",
        b"{": "header: expected JSON",
        b"\xff\xfe": "header: expected JSON",
        b'{"x": 3}': "x: expected dtype, shape and data_offsets, got 3",
        b"[" * 100_000: "header: expected JSON",
        twice.encode(): f"the name '{NAME}' twice",
        json.dumps(header | {"x": None}).encode(): "x: expected dtype",
    }
    for text, message in cases.items():
        with_header(path, text, data)
        with pytest.raises(ValueError, match=r"model\.safetensors: .*" + message):
            load_hf(path)
    with_header(path, header, data + b"more")
    with pytest.raises(ValueError, match=r"expected a whole safetensors file with \d+ bytes of tensors, got"):
        load_hf(path)
    for length in (2**63, 10**9, 200):
        (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match=rf"a header of {length} bytes in a file of 10"):
            load_hf(path)


def sharded(path):
    """The index of a directory, and the name of its first shard."""
    index = path / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../m/model.safetensors", "a/b.safetensors", "..", "", "pytorch_model.bin", "a\\b.safetensors"],
)
def test_an_index_names_files_of_the_directory_only(tmp_path, name):
    path = save_hf(Transformer(PRESETS["tiny"]), tmp_path / "m", max_shard_bytes=50_000)
    file, index = sharded(path)
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: expected file names inside the directory, got .*model\.norm"):
        load_hf(path)


def test_an_index_and_its_files_agree(tmp_path):
    path = save_hf(Transformer(PRESETS["tiny"]), tmp_path / "m", max_shard_bytes=50_000)
    file, index = sharded(path)
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2

    def refused(message, weight_map):
        file.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_hf(path)

    whole = index["weight_map"]
    refused(
        r"model\.norm\.weight: expected the file model-\d+",
        {k: v for k, v in whole.items() if k != "model.norm.weight"},
    )
    refused(r"model\.norm\.weight: expected the file", whole | {"model.norm.weight": shards[0].name})
    refused(r"expected the tensor nothing that .*index\.json names, found none", whole | {"nothing": shards[0].name})
    refused(r"weight_map of file names, got \{'x': 3\}", {"x": 3})
    first = load_file(shards[0])
    save_file(load_file(shards[1]) | first, shards[1])
    refused(r"expected it once, found it in .*model-00001", whole)
    shards[1].unlink()
    refused(rf"{shards[1].name}: expected a whole safetensors file, got No such file", whole)


def test_tensors_that_do_not_belong_there_are_refused(mixture, tmp_path):
    _, path = mixture
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    load_hf(path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"q_proj\.bias: expected a tensor of MixtralForCausalLM, got an unknown one"):
        load_hf(path)
    tied = save_hf(Transformer(PRESETS["tiny"], seed=0), tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tied / "model.safetensors")
    load_hf(tied)
    head[3, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, tied / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected the embedding's numbers"):
        load_hf(tied)


def test_pickles_are_never_read(mixture, tmp_path):
    _, path = mixture

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (path / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected safetensors weights, found none; pickled weights are never read"):
        load_hf(path)
    (path / "pytorch_model.bin").rename(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file"):
        load_hf(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, r"architectures: expected one of"),
        ({"architectures": [{}]}, r"architectures: expected one of .*, got none"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling: expected none"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, r"rope_parameters: expected none"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters: expected none"),
        ({"rope_scaling": "yarn"}, r"rope_scaling: expected none, got yarn"),
        ({"hidden_act": "gelu"}, r"hidden_act: expected silu, got gelu"),
        ({"attention_bias": True}, r"attention_bias: expected False"),
        ({"mlp_bias": True}, r"mlp_bias: expected False"),
        ({"attention_dropout": 0.1}, r"attention_dropout: expected 0.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1.0"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise: expected 0.0"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: expected None"),
        ({"layer_types": ["full_attention"] * 2}, r"layer_types: expected None"),
        ({"head_dim": 7}, r"head_dim: expected an even number"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok: expected 1 to experts=4, got 9"),
        ({"num_hidden_layers": "2"}, r"layers: expected a whole number, got '2'"),
        ({"num_hidden_layers": True}, r"layers: expected a whole number, got True"),
        ({"sliding_window": 0}, r"sliding_window: expected 1 to"),
        ({"vocab_size": 511}, r"model\.embed_tokens\.weight: expected shape \(511, 32\), got \(512, 32\)"),
        ({"num_hidden_layers": 3}, r"expected the tensor model\.layers\.2\.block_sparse_moe\..* \(and \d+ more\)"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..*: expected a tensor of MixtralForCausalLM"),
    ],
)
def test_configurations_that_are_not_implemented_are_refused(mixture, changes, message):
    _, path = mixture
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message):
        load_hf(path)


def test_missing_fields_have_the_familys_defaults(mixture):
    _, path = mixture
    fields = json.loads((path / "config.json").read_text())
    for name in ("rope_theta", "num_key_value_heads", "rms_norm_eps", "router_aux_loss_coef", "num_experts_per_tok"):
        del fields[name]
    (path / "config.json").write_text(json.dumps(fields | {"num_attention_heads": 16}))
    assert read_config(path)[0].kv_heads == 8
    (path / "config.json").write_text(json.dumps(fields | {"num_key_value_heads": 2}))
    assert load_hf(path).config == PRESETS["tiny-mixtral"]


def test_writing_refuses_what_the_format_has_no_name_for(tmp_path):
    model = Transformer(PRESETS["tiny"])
    model.norm.half()
    with pytest.raises(ValueError, match=r"model: expected parameters of one dtype"):
        save_hf(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"x: expected one of F64"):
        write_file(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.int64)})
    assert not (tmp_path / "m").exists()


def test_a_file_is_read_whatever_its_alignment_and_shapes(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "row": torch.arange(5.0),
        "half": torch.arange(6).half().view(1, 2, 3),
    }
    write_file(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(tensors[name], read) for name, read in load_file(tmp_path / "x.safetensors").items())
    content = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    moved = struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :]
    (tmp_path / "odd.safetensors").write_bytes(moved)
    for name in ("x", "odd"):
        with SafetensorsFile(tmp_path / f"{name}.safetensors") as file:
            for key, tensor in tensors.items():
                out = torch.full(tensor.shape, -1.0)
                file.copy(key, tuple(slice(0, n) for n in tensor.shape), out)
                assert torch.equal(out, tensor.float())
