"""GGUF files that somebody damaged or made up; see mutated_files.py."""

import math
import struct

import numpy as np

from tests.model.gguf_files import gguf, write_gguf

COUNTS = [0, 1, 2, 31, 32, 255, 4096, 2**16, 2**20, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
VALUES = [
    *(
        0,
        1,
        -1,
        2,
        3,
        33,
        2**24,
        2**31 - 1,
        2**32 - 1,
        0.0,
        -1.0,
        1e-320,
        1e38,
        float("nan"),
        float("inf"),
        True,
        False,
    ),
    *("", "llama", "gpt2", "qwen2", "x" * 5000, "\n\0", [1], ["a"], ["a", "a"], [0.5], [True], [2**31]),
]


def originals(folder):
    """Files that are mutated, each in a folder of its own."""
    for number, (kind, tokenizer) in enumerate((("F32", "gpt2"), ("Q8_0", "llama"))):
        (folder / str(number)).mkdir(parents=True)
        write_gguf(folder / str(number) / "model.gguf", kind=kind, tokenizer=tokenizer)
    return sorted(folder.iterdir())


def mutate(draw, folder, damaged, special_file):
    """Change the file of a folder: its bytes, its numbers, or fields and tensors by name."""
    path = folder / "model.gguf"
    content = bytearray(path.read_bytes())
    kind = draw.random()
    if kind < 0.02:
        special_file(draw, path)
    elif kind < 0.2:
        path.write_bytes(damaged(draw, bytes(content)))
    elif kind < 0.3:
        path.write_bytes(content[: draw.choice([0, 3, 4, 8, 23, 24, draw.randrange(len(content))])])
    elif kind < 0.6:
        for _ in range(draw.choice([1, 1, 2, 5])):
            change_number(draw, content)
        path.write_bytes(content)
    else:
        change_fields(draw, path)


def change_number(draw, content):
    """Put another number where the header has one: a count, a length, a type, a dim, an offset."""
    end = content.find(b"blk.1.ffn_down.weight") + 60
    places = [8, 16, *(place for place in range(24, end - 8) if content[place + 3 : place + 8] == b"\0" * 5)]
    form, most = draw.choice([("<Q", 2**64), ("<I", 2**32)])
    struct.pack_into(form, content, draw.choice(places), draw.choice(COUNTS) % most)


def change_fields(draw, path):
    """Write the file again with other values of some fields, without some, or with other tensors."""
    reader = gguf.GGUFReader(path)
    names = [name for name in reader.fields if not name.startswith(("GGUF.", "general.architecture"))]
    tokenizer = "llama" if "tokenizer.ggml.scores" in names else "gpt2"
    fields = {name: draw.choice(VALUES) for name in draw.sample(names, draw.choice([0, 0, 0, 1, 1, 2]))}
    more = ["attention.key_length", "attention.sliding_window", "expert_count", "rope.scaling.type", "x\n"]
    fields |= {f"llama.{name}": draw.choice(VALUES) for name in more if draw.random() < 0.05}
    if draw.random() < 0.1:
        fields["general.alignment"] = draw.choice([0, 1, 3, 8, 64, 2**31])
    for name in ("tokens", "merges", "scores", "token_type"):
        key = f"tokenizer.ggml.{name}"
        if key in names and draw.random() < 0.3:
            fields[key] = changed_entries(draw, reader.fields[key].contents())
    tensors = [tensor.name for tensor in reader.tensors]
    without = draw.sample([*names, *tensors], draw.choice([0, 0, 0, 1, 2]))
    tensor = draw.choice(tensors)
    shape = draw.choice([(32,), (32, 32), (16, 32), (400, 32), (0, 32), (1, 1, 1, 1)])
    extra = {tensor: gguf_array(draw, shape)} if draw.random() < 0.2 else {}
    unknown = ("rope_freqs.weight", "blk.0.attn_q.bias")
    extra |= {name: gguf_array(draw, (32,)) for name in unknown if draw.random() < 0.02}
    try:
        write_gguf(path, tokenizer=tokenizer, fields=fields, without=tuple(without), extra=extra)
    except (ValueError, struct.error, OverflowError, TypeError):
        # Some values the writer cannot write.
        path.write_bytes(path.read_bytes()[: draw.randrange(1000)])


def changed_entries(draw, entries):
    """An array with some entries changed, gone, moved or there twice."""
    entries = list(entries)
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(len(entries))
        kind = draw.randrange(4)
        if kind == 0:
            del entries[at]
        elif kind == 1:
            entries.insert(at, entries[draw.randrange(len(entries))])
        elif kind == 2:
            other = draw.randrange(len(entries))
            entries[at], entries[other] = entries[other], entries[at]
        elif isinstance(entries[at], str):
            entries[at] = draw.choice(["", " ", "a b", "▁", "<0x41>", "中", "x" * 600, "\n", "a:0", "<|end|>"])
        else:
            entries[at] = type(entries[at])(draw.choice([0, 1, 2, 3, 4, 5, 6, 7, -1, 10**9]))
    return entries


def gguf_array(draw, shape):
    """A tensor of random bytes."""
    return np.frombuffer(draw.randbytes(4 * math.prod(shape)), np.float32).reshape(shape)
