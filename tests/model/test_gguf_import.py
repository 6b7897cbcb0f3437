"""GGUF files that are imported: weights, configuration and tokenizer are those that the file was made of."""

import json
import re
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from forked import run_python
from safetensors.numpy import load_file

from tests.model.gguf_files import TEMPLATE, TEXTS, gguf, write_gguf
from wizard_engine.data.chat_template import TemplateCoder
from wizard_engine.data.gguf_header import READABLE
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.model import load_hf, load_model
from wizard_engine.model.gguf_file import GgufFile, packaged_gguf
from wizard_engine.model.gguf_import import import_gguf

pytestmark = pytest.mark.skipif(gguf is None, reason="the package gguf is absent")
TOKENS = torch.arange(3, 40)


def imported_weights(path):
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def logits(model):
    count = len(TOKENS)
    return model.logits(model(TOKENS, torch.arange(count), torch.tensor([0, count]).int(), count))


# Catches: rows of q or k left in llama.cpp's order, or in that of the wrong number of heads; a tied head written twice.
@pytest.mark.parametrize("kind", READABLE)
def test_weights_are_those_of_the_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("wizard_engine.model.gguf_file.PART_ELEMENTS", 16 * 300)
    tied = kind != "F16"
    written = write_gguf(tmp_path / "a.gguf", kind=kind, width=256, tied=tied)
    out = import_gguf(written.path, tmp_path / "out", max_shard_bytes=10**9 if tied else 10**6)
    found = imported_weights(out)
    assert found.keys() == written.weights.keys() and ("lm_head.weight" in found) != tied
    for name, values in written.weights.items():
        assert np.array_equal(found[name], values), name
    assert len(list(out.glob("*.safetensors"))) == 1 or not tied
    model, tokenizer = load_model(out)
    assert model.config == written.config and tokenizer.vocab_size == written.config.vocab_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_transformers_reads_what_is_imported(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    transformers.utils.logging.disable_progress_bar()
    window = {"llama.attention.sliding_window": 16} if tokenizer == "llama" else {}
    written = write_gguf(tmp_path / "a.gguf", kind="F16", tokenizer=tokenizer, fields=window)
    out = import_gguf(written.path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
    assert theirs.config.model_type == ("mistral" if window else "llama")
    torch.testing.assert_close(logits(load_hf(out)), theirs(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-5)
    ids = json.loads((out / "generation_config.json").read_text())
    assert theirs.generation_config.eos_token_id == ids["eos_token_id"]
    reader = transformers.AutoTokenizer.from_pretrained(out)
    assert (reader.bos_token_id, reader.eos_token_id) == (ids["bos_token_id"], ids["eos_token_id"])
    ours = load_tokenizer(out)
    # SentencePiece puts no space behind a mark that a text holds, and transformers does.
    for text in (text for text in TEXTS if "<|" not in text and "<s>" not in text and not text.startswith(" ")):
        assert reader.encode(text, add_special_tokens=False) == ours.encode(text), text
    if tokenizer == "gpt2":
        turns = [{"role": "user", "content": "Tom has 12"}]
        chat = reader.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert chat[0] == ids["bos_token_id"] and chat[-1] == ids["eos_token_id"]


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_transformers_reads_the_same_from_the_file_itself(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate, which is absent")
    transformers.utils.logging.disable_progress_bar()
    written = write_gguf(tmp_path / "a.gguf", kind="Q8_0", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    found = imported_weights(import_gguf(written.path, tmp_path / "out"))
    state = theirs.state_dict()
    assert all(np.array_equal(values, state[name].numpy()) for name, values in found.items())


def test_byte_level_ids_are_those_of_the_vocabulary(tmp_path):
    written = write_gguf(tmp_path / "a.gguf", fields={"tokenizer.ggml.add_bos_token": True})
    out = import_gguf(written.path, tmp_path / "out")
    ours, own = load_tokenizer(out), written.ids
    for text in TEXTS:
        own.encode_special_tokens = True
        assert ours.encode(text) == own.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids) == (0, (1,)) and TemplateCoder(ours).turn_end == 1
    # A user's own token is found in texts, a special one is not.
    assert ours.encode("<think>") == [own.token_to_id("<think>")] and len(ours.encode("<|end|>")) > 1
    fields = json.loads((out / "tokenizer_config.json").read_text())
    assert fields["chat_template"] == TEMPLATE and fields["pad_token"] == "<pad>" and fields["model_max_length"] == 128
    post = json.loads((out / "tokenizer.json").read_text())["post_processor"]
    assert fields["add_bos_token"] and post["special_tokens"]["<|begin|>"]["ids"] == [0]


def test_sentencepiece_ids_are_those_of_the_model(tmp_path):
    written = write_gguf(tmp_path / "a.gguf", tokenizer="llama")
    out = import_gguf(written.path, tmp_path / "out")
    ours, own = load_tokenizer(out), written.ids
    for text in TEXTS:
        assert ours.encode(text) == own.encode(text), text
    # The same from tokenizer.json, which transformers reads.
    (out / "tokenizer.model").unlink()
    fast = load_tokenizer(out)
    for text in TEXTS:
        if "<|begin|>" not in text:
            assert fast.encode(text) == own.encode(text), text
    assert fast.encode("<|begin|>")[-1] == own.piece_to_id("<|begin|>")
    assert json.loads((out / "config.json").read_text())["bos_token_id"] == own.bos_id()


def test_a_sentencepiece_model_without_the_space_in_front(tmp_path):
    written = write_gguf(tmp_path / "a.gguf", tokenizer="llama", fields={"tokenizer.ggml.add_space_prefix": False})
    out = import_gguf(written.path, tmp_path / "out")
    ours = load_tokenizer(out)
    assert not ours.prefixes_space and ours.encode(" Tom has") == written.ids.encode("Tom has")
    (out / "tokenizer.model").unlink()
    fast = load_tokenizer(out)
    assert not fast.prefixes_space
    assert all(fast.encode(text) == ours.encode(text) for text in TEXTS if "<|begin|>" not in text)
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    reader = transformers.AutoTokenizer.from_pretrained(out)
    assert reader.encode("Tom has", add_special_tokens=False) == ours.encode("Tom has")


# Units of a text by each pattern, worked out by hand from llama.cpp's table.
UNITS = {
    "default": ["abc", " ", "123", "45", " x", "?!", "  ", " y"],
    "gpt-2": ["abc", " 12345", " x", "?!", "  ", " y"],
    "smollm": ["abc", " ", "1", "2", "3", "4", "5", " x", "?!", "  ", " y"],
    "llama-bpe": ["abc", " ", "123", "45", " x", "?!", "  ", " y"],
    "tekken": ["abc", " ", "1", "2", "3", "4", "5", " x", "?!", "  ", " y"],
}


@pytest.mark.parametrize("pre", UNITS)
def test_texts_are_cut_as_the_files_name_of_the_pattern_says(pre, tmp_path):
    written = write_gguf(tmp_path / "a.gguf", fields={"tokenizer.ggml.pre": pre})
    out = import_gguf(written.path, tmp_path / "out")
    backend = load_tokenizer(out)._backend
    units = [unit.replace("Ġ", " ") for unit, _ in backend.pre_tokenizer.pre_tokenize_str("abc 12345 x?!   y")]
    assert units == UNITS[pre]
    fields = json.loads((out / "tokenizer.json").read_text())
    is_whole = pre in ("llama-bpe", "tekken")
    assert fields["model"]["ignore_merges"] == is_whole == (fields["post_processor"] is not None)


def test_padding_of_the_vocabulary_has_no_token_and_ends_are_listed(tmp_path):
    kinds = {"tokenizer.ggml.eot_token_id": 2}
    plain = write_gguf(tmp_path / "a.gguf", fields=kinds)
    with GgufFile(plain.path) as file:
        types = file.header.metadata.fields["tokenizer.ggml.token_type"].tolist()
    types[-1], types[1] = 5, 1
    written = write_gguf(tmp_path / "b.gguf", fields=kinds | {"tokenizer.ggml.token_type": types})
    out = import_gguf(written.path, tmp_path / "out")
    ours = load_tokenizer(out)
    assert ours.vocab_size == len(types) - 1 and not ours.text_ids[1] and ours.eos_ids == (1, 2)
    assert not ours.drawable(len(types))[-1]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_dtype(dtype, tmp_path):
    written = write_gguf(tmp_path / "a.gguf")
    out = import_gguf(written.path, tmp_path / "out", dtype=dtype)
    model = load_hf(out, dtype=dtype)
    embedding = torch.from_numpy(written.weights["model.embed_tokens.weight"])
    assert torch.equal(model.embedding.weight, embedding.to(dtype))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_numbers_that_cannot_be_held_are_refused(tmp_path):
    norm = {"output_norm.weight": np.full(32, 1e6, np.float32)}
    written = write_gguf(tmp_path / "a.gguf", extra=norm)
    import_gguf(written.path, tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"a\.gguf: output_norm\.weight: expected numbers that torch\.float16 can hold"
    ):
        import_gguf(written.path, tmp_path / "out", dtype=torch.float16)
    # What was there is intact.
    assert load_hf(tmp_path / "out").config == written.config
    broken = write_gguf(tmp_path / "b.gguf", extra={"output_norm.weight": np.full(32, np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"b\.gguf: output_norm\.weight: expected finite numbers"):
        import_gguf(broken.path, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "out"]


CHILD = """
import sys
from pathlib import Path
import torch
from wizard_engine.model.gguf_import import import_gguf
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
torch.set_num_threads(1)
small, source, out = map(Path, sys.argv[1:])
# What libraries take at their first use is no part of it.
import_gguf(small, out)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
import_gguf(source, out, dtype=torch.bfloat16)
(out / "peak").write_text(str(memory("VmHWM") - before))
"""


# Catches: a tensor, or the file's map, that is in memory as a whole. A matrix takes 24 MB in fp32, and the file 74 MB.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_part_of_a_tensor_is_in_memory_at_a_time(tmp_path):
    small = write_gguf(tmp_path / "small.gguf", kind="F16")
    written = write_gguf(tmp_path / "a.gguf", kind="F16", width=256, ffn_width=24_000, is_zero=True)
    assert written.path.stat().st_size > 70e6
    done = run_python("-c", CHILD, small.path, written.path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "out" / "peak").read_text()) < 24e6


class Distribution:
    """An installed package with files."""

    def __init__(self, folder, *names):
        self.folder, self.names = folder, names

    def __call__(self, package):
        if package != "llm-tiny":
            raise metadata.PackageNotFoundError(package)
        for name in self.names:
            (self.folder / name).write_bytes(b"")
        paths = [metadata.PackagePath(name) for name in (*self.names, "tiny.py")]
        for path in paths:
            path.dist = self
        return paths

    def locate_file(self, name):
        return self.folder / name


def test_the_file_of_an_installed_package_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "files", Distribution(tmp_path, "a.gguf"))
    assert packaged_gguf("llm-tiny") == tmp_path / "a.gguf"
    with pytest.raises(ValueError, match="package: expected an installed one, got llm-other; pip install llm-other"):
        packaged_gguf("llm-other")
    for names, got in (((), "none"), (("a.gguf", "b.gguf"), f"{tmp_path / 'a.gguf'}, {tmp_path / 'b.gguf'}")):
        monkeypatch.setattr(metadata, "files", Distribution(tmp_path, *names))
        with pytest.raises(ValueError, match=re.escape(f"package llm-tiny: expected one .gguf file, got {got}; name")):
            packaged_gguf("llm-tiny")
