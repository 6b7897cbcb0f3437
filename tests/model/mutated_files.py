"""Model directories that somebody damaged or made up, drawn from a seed, and a process that tries to load them.

    python -m tests.model.mutated_files safetensors 0 400 FOLDER

Every mutant is loaded under a limit of memory and time. It loads, or is refused with a ValueError that begins with its
folder; a crash, a hang or another error ends the process or is listed.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from safetensors import SafetensorError, safe_open

from tests.model import mutated_gguf
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer
from wizard_engine.model import PRESETS, Transformer, load_hf, load_model, save_hf
from wizard_engine.model.gguf_import import import_gguf

MEMORY_BYTES, SECONDS = 1 << 30, 5
# What a refusal may take beside the file.
REFUSAL_BYTES, REFUSAL_SECONDS = 200 << 20, 2.0
TEXT = "Tom has 12 apples.\n</s> é 中"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


EDGES = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 31, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**9),
    *(10**8, 10**400, -(10**400), 0.5, 1e9, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 32.0),
    *("", "2", "x" * 5000, "\0", "a/../b", "BPE", "F32", "float16", [], {}, [[]], [1], [0, 4096], {"a": 1}),
    *(nested(60), nested(400), ["x"] * 1000, {str(i): i for i in range(500)}, "\N{COMBINING ACUTE ACCENT}"),
]


def damaged(draw, content):
    """Bytes that were flipped, cut, moved or added."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 60])):
        size = len(content)
        at = min(draw.choice([draw.randrange(size + 1), draw.randrange(min(size, 400) + 1)]), max(0, size - 1))
        kind, count = draw.randrange(6), draw.choice([1, 2, 9, 100])
        if kind < 2 and size:
            content[at] = draw.randrange(256)
        elif kind == 2:
            del content[at : at + count]
        elif kind == 3:
            content[at:at] = draw.randbytes(count)
        elif kind == 4:
            content[at:at] = content[draw.randrange(size + 1) :][:count]
        else:
            del content[draw.choice([at, size - count if size > count else 0]) :]
    return bytes(content)


def replaced(draw, value, depth=0):
    """A JSON value one node of which is another value, gone, or there twice."""
    if isinstance(value, dict | list) and value and depth < 6 and draw.random() < 0.9:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        copy = value.copy()
        kind = draw.random()
        if kind < 0.08:
            del copy[key]
        elif kind < 0.14 and isinstance(copy, dict):
            copy[draw.choice(["", "x" * 300, "\n", *copy])] = copy.pop(key)
        elif kind < 0.14:
            copy.insert(key, copy[key])
        else:
            copy[key] = replaced(draw, value[key], depth + 1)
        return copy
    return draw.choice(EDGES)


def special_file(draw, path):
    """Something that is no regular file in the place of one."""
    path.unlink()
    kind = draw.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == 2 else "/nowhere")


def rewrite_json(draw, path):
    """Mutate a JSON file as a value or as bytes."""
    kind = draw.random()
    if kind < 0.02:
        special_file(draw, path)
    elif kind < 0.7:
        fields = json.loads(path.read_text())
        for _ in range(draw.choice([1, 1, 2, 4])):
            fields = replaced(draw, fields)
        path.write_text(json.dumps(fields, ensure_ascii=draw.random() < 0.5), errors="surrogatepass")
    elif kind < 0.75:
        text = path.read_text().rstrip().removesuffix("}")
        name = draw.choice(list(json.loads(path.read_text())) or ["x"])
        path.write_text(
            text + f', "{name}": ' + draw.choice(["1e999", "1" * 5000, "[" * 5000, "NaN", "1}", '"\\ud800"}'])
        )
    else:
        path.write_bytes(damaged(draw, path.read_bytes()))


def mutate_safetensors(draw, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = draw.random()
    if kind < 0.01:
        special_file(draw, path)
    elif kind < 0.15:
        path.write_bytes(damaged(draw, content))
    elif kind < 0.35:
        text = damaged(draw, text)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    elif kind < 0.45:
        length = draw.choice([0, 1, 7, length - 1, length + 1, len(content), 2**31, 2**60, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", length) + text + data)
    else:
        header = json.loads(text)
        for _ in range(draw.choice([1, 1, 2, 3])):
            header = header_changed(draw, header) if isinstance(header, dict) else header
        text = json.dumps(header).encode() + b" " * draw.choice([0, 1, 3])
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_changed(draw, header):
    """A header with one field changed as an attacker would."""
    header = json.loads(json.dumps(header))
    name = draw.choice(list(header) or ["x"])
    entry = header.get(name)
    kind = draw.randrange(9)
    if not isinstance(entry, dict) or "data_offsets" not in entry or kind == 0:
        return replaced(draw, header)
    # An earlier change may have left anything there.
    offsets, shape = entry["data_offsets"], entry.get("shape")
    is_plain = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    start, end = offsets if is_plain else (0, 0)
    if kind == 1:
        entry["data_offsets"] = [start + draw.choice([-4, 4, 4096, 2**62]), end + draw.choice([0, 4, 4096, 2**62])]
    elif kind == 2:
        turned = shape[::-1] if isinstance(shape, list) else shape
        entry["shape"] = draw.choice([[], [0, 2**62], [2**62] * 64, [1] * 100, turned, [2**32, 2**32]])
    elif kind == 3:
        entry["dtype"] = draw.choice([[], {}, None, "F31", "BF16", "I32", "F64", "F8_E4M3", "f32", 3])
    elif kind == 4:
        other = draw.choice(list(header))
        header[name], header[other] = header[other], header[name]
    elif kind == 5:
        header[draw.choice(["lm_head.weight", "model.layers.9.x", "", "__metadata__", "x\n" * 90])] = header.pop(name)
    elif kind == 6:
        header["__metadata__"] = draw.choice([{name: "model.norm.weight"}, {name: name}, [], 3, {"format": None}])
    elif kind == 7:
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    else:
        header[name] = replaced(draw, entry)
    return header


def mutate_configuration(draw, folder):
    path = folder / draw.choice(["config.json"] * 9 + ["model.safetensors.index.json"])
    if path.name != "config.json" and not path.exists():
        path.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    elif draw.random() < 0.4:
        fields = json.loads(path.read_text())
        rope = draw.choice([{}, {"rope_theta": 5e5}, {"rope_type": "yarn"}, {"rope_theta": 0}, []])
        more = {"rope_parameters": rope, "rope_scaling": draw.choice([None, rope]), "model_type": "llama"}
        more |= {"num_experts": 8, "wizard_outputs": draw.choice(EDGES), "wizard_surprise": True, "head_dim": 8}
        fields |= {name: value for name, value in more.items() if draw.random() < 0.3}
        fields |= {name: draw.choice(EDGES) for name in fields if draw.random() < 0.1}
        path.write_text(json.dumps(fields))
    rewrite_json(draw, path)


def mutate_tokenizer(draw, folder):
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model")]
    main = [path for path in files if path.name in ("tokenizer.json", "tokenizer.model")]
    path = draw.choice(main * 3 + files)
    if path.suffix == ".model":
        path.write_bytes(damaged(draw, path.read_bytes()))
    elif path.name == "tokenizer.json" and draw.random() < 0.3:
        fields = json.loads(path.read_text())
        entry = {
            "id": draw.choice([0, 300, 5000, 2**31, 2**32 - 1]),
            "content": draw.choice(["", "[PAD]", "a", "</s>"]),
        }
        flags = {name: draw.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        fields["added_tokens"].insert(0, entry | flags)
        fields["model"]["vocab"][draw.choice(["q", "zz"])] = draw.choice([0, 999, 2**20, 2**31, 2**32 - 1])
        padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        fields["padding"] = draw.choice([None, padding | {"pad_type_id": 0, "pad_token": "x"}])
        path.write_text(json.dumps(fields))
    else:
        rewrite_json(draw, path)


def sentencepiece_model():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "one two three"] * 4),
        model_writer=file,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return file.getvalue()


def originals(kind, folder):
    """Folders that are mutated."""
    if kind == "gguf":
        return mutated_gguf.originals(folder)
    if kind == "tokenizer":
        words = train_tokenizer([TEXT], vocab_size=400, atoms=("USER:",))
        (folder / "a").mkdir(parents=True)
        words.save(folder / "a")
        (folder / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "bos_token_id": 0}))
        shutil.copytree(folder / "a", folder / "b")
        (folder / "b" / "tokenizer_config.json").unlink()
        (folder / "c").mkdir()
        (folder / "c" / "tokenizer.model").write_bytes(sentencepiece_model())
        return [folder / name for name in "abc"]
    names = ("tiny", "tiny-mixtral") if kind == "configuration" else ("tiny",)
    return [save_hf(Transformer(PRESETS[name], seed=0), folder / name) for name in names]


def mutate_gguf(draw, folder):
    mutated_gguf.mutate(draw, folder, damaged, special_file)


MUTATE = {
    "safetensors": mutate_safetensors,
    "configuration": mutate_configuration,
    "tokenizer": mutate_tokenizer,
    "gguf": mutate_gguf,
}


def load(kind, folder):
    if kind == "tokenizer":
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode(TEXT))
        return
    if kind == "gguf":
        read_again(import_gguf(folder / "model.gguf", folder / "out"))
        return
    model = load_hf(folder)
    if kind == "safetensors":
        check_against_library(model, folder / "model.safetensors")


def read_again(path):
    """What was imported is a model directory."""
    try:
        load_model(path)
    except ValueError as error:
        raise AssertionError(f"imported, and not read: {error}") from error


def check_against_library(model, path):
    """A file that both read holds the same for both."""
    try:
        with safe_open(path, "pt") as file:
            theirs = file.get_tensor("model.norm.weight")
            names = set(file.keys())
            embedding = "model.embed_tokens.weight"
            table = file.get_tensor(embedding if embedding in names else "lm_head.weight")
    except SafetensorError:
        return
    assert same_bits(model.norm.weight, theirs.float()), "another norm than the library reads"
    assert same_bits(model.embedding.weight, table.float()), "another embedding than the library reads"


def same_bits(first, second):
    """Whether two tensors are equal, not-a-numbers included."""
    return first.shape == second.shape and torch.equal(first.view(torch.int32), second.view(torch.int32))


def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024


def attempt(kind, folder):
    """loaded, refused, or what went wrong."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    # Of processor time, for the machine may be busy; a reader that waits for ever uses none.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        load(kind, folder)
        return "loaded"
    except ValueError as error:
        seconds, grown = time.process_time() - began, memory("VmHWM") - before
        if not str(error).startswith(str(folder)):
            return f"ValueError without the folder: {str(error)[:200]}"
        if len(str(error)) > 1000 or not str(error).isprintable():
            return f"a message of {len(str(error))} characters, or with control characters: {str(error)[:300]!r}"
        if seconds > REFUSAL_SECONDS or grown > REFUSAL_BYTES:
            return f"refused after {seconds:.1f} s and {grown >> 20} MiB: {str(error)[:200]}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(kind, first, count, folder):
    """Try mutants `first` to `first + count`; prints what became of them as JSON."""
    starts = originals(kind, folder / "originals")
    for start in starts:
        load(kind, start)
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + MEMORY_BYTES,) * 2)
    counts, wrong = {"loaded": 0, "refused": 0}, []
    for number in range(first, first + count):
        (folder / "progress").write_text(f"{kind} {number}")
        draw, mutant = random.Random(f"{kind} {number}"), folder / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(draw.choice(starts), mutant)
        MUTATE[kind](draw, mutant)
        outcome = attempt(kind, mutant)
        if outcome in counts:
            counts[outcome] += 1
        else:
            wrong.append(f"{kind} {number}: {outcome}")
    print(json.dumps({"counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
