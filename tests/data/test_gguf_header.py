"""Headers of GGUF files that are cut or made up: refused by file and field, before a number of them is believed."""

import mmap
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.model.gguf_files import gguf, write_gguf
from wizard_engine.data import gguf_header
from wizard_engine.data.gguf_header import read_header
from wizard_engine.model.gguf_file import GgufFile
from wizard_engine.model.gguf_import import import_gguf

pytestmark = pytest.mark.skipif(gguf is None, reason="the package gguf is absent")


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def field(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def array(name, kind, count, payload):
    return field(name, 9, struct.pack("<IQ", kind, count) + payload)


def tensor(name="a", dims=(32, 2), kind=0, offset=0):
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return text(name) + numbers


def file_of(fields=(), tensors=(), data=512, *, magic=b"GGUF", version=3, counts=None):
    counts = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


def refusal(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and len(message) < 600 and message.isprintable()
    return message.removeprefix(f"{path}: ")


HEAD = {
    "empty": (b"", "expected a GGUF file, got an empty one"),
    "cut": (b"GGUF\3", "version: expected a whole file, got 5 bytes"),
    "magic": (file_of(magic=b"GGML"), "magic: expected a GGUF file, got other bytes"),
    "version": (file_of(version=1), "version: expected 2 or 3, got 1"),
    "big-endian": (file_of(version=3 << 24), "version: expected 2 or 3, got a big-endian file"),
    "many tensors": (file_of(counts=(2**63, 0)), f"tensor_count: expected at most 65536, got {2**63}"),
    "many fields": (file_of(counts=(0, 2**64 - 1)), "kv_count: expected at most 4096, got"),
    "few tensors": (file_of(tensors=[tensor()], data=0, counts=(9, 0)), "tensor 1: name: expected 1 to 255 bytes, got"),
    "long name": (file_of([struct.pack("<Q", 2**62)], counts=(0, 1)), "field 0: name: length: expected at most 255"),
    "twice": (file_of([field("x", 0, b"\1")] * 2), "x: expected the field once, got it twice"),
    "no type": (file_of([field("x", 13, b"\1")]), "x: type: expected one of the format's, got 13"),
    "long text": (file_of([field("x", 8, struct.pack("<Q", 2**40))]), "x: length: expected at most 33554432"),
    "text at the end": (file_of([field("x", 8, struct.pack("<Q", 9999))]), "x: expected a whole file, got"),
    "no UTF-8": (file_of([field("x", 8, text(b"a\xff"))]), "x: expected UTF-8, got the byte 0xff"),
    "no bool": (file_of([field("x", 7, b"\2")]), "x: expected true or false as 1 or 0, got another byte"),
    "bools": (file_of([array("x", 7, 3, b"\0\1\7")]), "x: expected true or false as 1 or 0, got another byte"),
    "nested": (file_of([array("x", 9, 1, b"")]), "x: expected numbers or texts, got arrays in an array"),
    "long array": (file_of([array("x", 12, 2**61, b"")]), "x: expected a whole file, got"),
    "many texts": (file_of([array("x", 8, 2**40, b"")]), "x: expected at most 1048576 texts in all arrays"),
    "texts at the end": (file_of([array("x", 8, 999, b"")], data=0), "x: length: expected a whole file, got"),
    "a text of many": (file_of([array("x", 8, 2, text("a") + text(b"\xff"))]), "x: expected UTF-8, got the byte 0xff"),
    "controls": (file_of([field("\x1b[2J", 13, b"")]), r"\x1b[2J: type: expected one of the format's, got 13"),
    "alignment": (
        file_of([field("general.alignment", 4, struct.pack("<I", 3))]),
        "general.alignment: expected a po",
    ),
    "zero": (file_of([field("general.alignment", 4, bytes(4))]), "general.alignment: expected a whole number from 1"),
    "text for it": (file_of([field("general.alignment", 8, text("8"))]), "general.alignment: expected a whole number"),
}
PLACES = {
    "twice": ([tensor(), tensor(offset=256)], "a: expected the tensor once, got it twice"),
    "no dims": ([tensor(dims=())], "a: dims: expected 1 to 4, got 0"),
    "many dims": ([text("a") + struct.pack("<I", 2**31)], "a: dims: expected 1 to 4, got 2147483648"),
    "zero": ([tensor(dims=(32, 0))], "a: dims: expected positive numbers below 2^63, got [0, 32]"),
    "huge": ([tensor(dims=(2**63, 1))], "a: dims: expected positive numbers below 2^63, got"),
    "product": ([tensor(dims=(2**62, 2**62))], "a: expected a whole file, got"),
    "behind the end": ([tensor(dims=(32, 5))], "a: expected a whole file, got"),
    "offset": ([tensor(offset=2**63)], "a: expected a whole file, got"),
    "unaligned": ([tensor(offset=8)], "a: offset: expected a multiple of 32, got 8"),
    "overlap": ([tensor(), tensor("b", offset=224)], "b: offset: expected bytes behind a, got some of them again"),
    "the same": ([tensor("b"), tensor("a")], "a: offset: expected bytes behind b, got some of them again"),
    "unknown type": (
        [tensor(kind=999)],
        "a: type: expected one of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, got",
    ),
    "Q5_K": ([tensor(dims=(256, 1), kind=13)], "Q4_K, Q6_K, got Q5_K"),
    "I32": ([tensor(kind=26)], "Q4_K, Q6_K, got I32"),
    "blocks": ([tensor(kind=12)], "a: dims: expected rows of whole blocks of 256 for Q4_K, got 32"),
}


@pytest.mark.parametrize("case", HEAD)
def test_a_header_is_refused_by_field(case, tmp_path):
    content, message = HEAD[case]
    assert refusal(tmp_path, content).startswith(message)


@pytest.mark.parametrize("case", PLACES)
def test_tensors_are_refused_by_name(case, tmp_path):
    tensors, message = PLACES[case]
    assert message in refusal(tmp_path, file_of(tensors=tensors))


def test_every_cut_of_a_header_is_refused(tmp_path):
    fields = [array("x", 8, 2, text("a") + text("b")), field("y", 6, bytes(4)), array("z", 5, 3, bytes(12))]
    whole = file_of(fields, [tensor()], data=256)
    path = tmp_path / "a.gguf"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.gguf: .*expected a whole file, got"):
            GgufFile(path)
    path.write_bytes(whole)
    with GgufFile(path) as file:
        assert file.header.metadata.texts("x") == ["a", "b"] and list(file.header.tensors) == ["a"]


def test_a_header_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 100)
    message = refusal(tmp_path, file_of([array("x", 0, 90, bytes(90))]))
    assert message.startswith("x: expected a header of at most 100 bytes, got a longer one")


def test_values_of_every_type_are_read(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {"uint8": 200, "int8": -3, "uint16": 2**16 - 1, "int16": -5, "uint32": 2**32 - 1, "int32": -7}
    values |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é\n"}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("texts", ["a", "", "中"])
    writer.add_custom_alignment(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        fields = read_header(content, path).metadata.fields
    assert {name: fields[name] for name in values} == values
    assert fields["floats"].tolist() == [0.5, 1.5] and fields["texts"] == ["a", "", "中"]


def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024


# The largest headers that are read to their end before they are refused.
LARGE = {
    "texts": lambda: ([array("x", 8, 1 << 20, text("ab") * (1 << 20)), field("y", 13, b"")], []),
    "wide texts": lambda: ([*(field(f"{i}", 8, text("😀" + "a" * (1 << 20))) for i in range(31)), b"\0"], []),
    "numbers": lambda: ([array("x", 4, 7 << 20, bytes(28 << 20)), field("y", 13, b"")], []),
    "tensors": lambda: ([], [tensor(f"{i:>200}", (32, 1), 0, 128 * i) for i in range(1 << 16)]),
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", LARGE)
def test_a_refusal_takes_little_time_and_memory(case, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(file_of(*LARGE[case]()))
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    with pytest.raises(ValueError, match=r"a\.gguf: "):
        GgufFile(path)
    assert time.process_time() - began < 2.0 and memory("VmHWM") - before < 200 << 20


@pytest.mark.parametrize("kind", ["FIFO", "directory", "nothing"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "a.gguf"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    expected = {"FIFO": "regular file, got a FIFO", "directory": "regular file, got a directory"}
    with pytest.raises(
        ValueError, match=rf"a\.gguf: expected a {expected.get(kind, 'readable GGUF file, got No such')}"
    ):
        GgufFile(path)


U = "llama."
WRONG = {
    "general.architecture": ("qwen2", "expected llama .Llama and Mistral., got qwen2"),
    "split.count": (3, "expected a model in one file; .*, got 3"),
    U + "block_count": (10**6, "expected a whole number from 1 to 2, got 1000000"),
    U + "embedding_length": ("32", "expected a whole number from 1 to 2147483647, got 32"),
    U + "attention.head_count": (0, "expected a whole number from 1 to"),
    U + "attention.head_count_kv": (-2, "expected a whole number from 1 to 2147483647, got -2"),
    U + "context_length": (2**30, "expected a whole number from 1 to 16777216, got"),
    U + "attention.layer_norm_rms_epsilon": (float("nan"), "expected a positive number that fp32 can hold, got nan"),
    U + "rope.freq_base": (-1e4, "expected a positive number that fp32 can hold, got -10000.0"),
    U + "rope.dimension_count": (4, "expected 8, the width of a head, got 4"),
    U + "vocab_size": (31, r"expected \d+, as token_embd.weight has rows, got 31"),
    U + "feed_forward_length": ([32, 32], "expected a whole number from 1 to 2147483647, got an array of 2"),
    U + "expert_count": (8, "expected 0, got 8"),
    U + "rope.scaling.type": ("yarn", "expected none, got yarn"),
    U + "rope.scaling.factor": (8.0, "expected 0.0 or 1.0, got 8.0"),
    U + "residual_scale": (0.2, "expected a field that this engine knows, got 0.2"),
    "tokenizer.ggml.model": ("t5", r"expected llama \(SentencePiece\) or gpt2 \(byte-level\), got t5"),
    "tokenizer.ggml.pre": ("qwen2", "expected one of default, gpt-2, llama-bpe, .*, got qwen2"),
    "tokenizer.ggml.tokens": (["a", "b"], r"expected \d+ tokens, as token_embd.weight has rows, got an array of 2"),
    "tokenizer.ggml.token_type": ([1, 2, 3], r"expected \d+ whole numbers, one for each token, got an array of 3"),
    "tokenizer.ggml.merges": (["ab"], "expected two tokens with a space between, got 'ab'"),
    "tokenizer.ggml.bos_token_id": (10**6, r"expected a whole number from 0 to \d+, got 1000000"),
    "tokenizer.ggml.add_bos_token": (1, "expected true or false, got 1"),
    "tokenizer.chat_template": (7, "expected a text, got 7"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_are_refused_by_name(name, tmp_path):
    value, message = WRONG[name]
    written = write_gguf(tmp_path / "a.gguf", fields={name: value})
    with pytest.raises(ValueError, match=rf"a\.gguf: {name}: {message}"):
        import_gguf(written.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    "name", ["llama.block_count", "tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.tokens"]
)
def test_missing_fields_are_named(name, tmp_path):
    written = write_gguf(tmp_path / "a.gguf", without=(name,))
    with pytest.raises(ValueError, match=rf"a\.gguf: {name}: expected .*, got none"):
        import_gguf(written.path, tmp_path / "out")


def test_missing_and_unknown_tensors_are_named(tmp_path):
    one = np.ones(32, np.float32)
    for extra, without, message in (
        ({}, ("token_embd.weight",), "expected the tensor token_embd.weight, found none"),
        ({}, ("blk.1.attn_k.weight",), "expected the tensor blk.1.attn_k.weight, found none"),
        ({"rope_freqs.weight": one}, (), "rope_freqs.weight: expected a tensor of Llama or Mistral, got an unknown"),
        ({"blk.0.attn_q.bias": one}, (), "blk.0.attn_q.bias: expected a tensor of Llama or Mistral, got an unknown"),
        ({"output_norm.weight": one[:31]}, (), r"output_norm.weight: expected shape \(32,\), got \(31,\)"),
        ({"blk.0.attn_k.weight": one}, (), r"blk.0.attn_k.weight: expected shape \(16, 32\), got \(32,\)"),
    ):
        written = write_gguf(tmp_path / "a.gguf", extra=extra, without=without)
        with pytest.raises(ValueError, match=rf"a\.gguf: {message}"):
            import_gguf(written.path, tmp_path / "out")
