"""Damage of what a run reads back: an error that names the file, or the same numbers; no crash, no hang, no change."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wizard_engine import checkpoint
from wizard_engine.runtime.stage import Stage

COUNTS = [12, pytest.param(40, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)]
NUMBER = re.compile(rb"(?<=[ \[])\d+(?=[,\]}])")


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    moments = {name: torch.randn(7, 5, generator=generator) for name in ("first.w", "second.w")}
    return {"model": {"w": torch.randn(7, 5, generator=generator)}, "model_optimizer": moments}


def state(step: int) -> dict:
    loader = {"step": step, "epoch": 1, "pack": 3, "order": "0f" * 8}
    return {"version": 2, "step": step, "skipped": 0, "tokens": 12345, "updates": {"model": step}, "loader": loader}


def written(out: Path) -> Path:
    """A finished run with two checkpoints."""
    stage = Stage(out, "sft", {"lr": 0.1, "training": {"epochs": 2.0}}, {})
    stage.start()
    for step in (4, 6):
        checkpoint.save(out, step, tensors=tensors(step), state=state(step))
    (out / "model").mkdir()
    (out / "model" / "weights").write_bytes(bytes(range(256)))
    stage.finish({"steps": 6, "tokens": 12345}, [out / "model"])
    return out


def flipped(content: bytes, rng: random.Random) -> bytes:
    at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def overwritten(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content)), rng.randrange(1, 64)
    return content[:at] + rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size)]) + content[at + size :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice([b"\0", b"\n{}", b"[" * 100_000, rng.randbytes(20)])


def doubled(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at - rng.randrange(min(at + 1, 50)) :]


def counted(content: bytes, rng: random.Random) -> bytes:
    """One number of the text is another one: what a careless hand or a bad script does to a manifest."""
    numbers = list(NUMBER.finditer(content))
    if not numbers:
        return flipped(content, rng)
    match = rng.choice(numbers)
    number = int(match[0])
    other = rng.choice([number + 1, number - 1, -number, 2 * number, 10**30, 2**63])
    return content[: match.start()] + str(other).encode() + content[match.end() :]


def nested(content: bytes, rng: random.Random) -> bytes:
    return content[:-3] + b', "x": ' + b'{"a":[' * rng.choice([1, 50_000])


DAMAGES = (flipped, overwritten, cut, longer, doubled, counted, nested)


def damage_file(path: Path, rng: random.Random) -> None:
    """Damage one file, or what stands under its name."""
    content = path.read_bytes()
    kind = rng.randrange(20)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        rng.choice([os.mkfifo, os.mkdir])(path)
    elif kind == 2:
        # The same file of the other checkpoint: whole, with a checksum, and wrong.
        others = [other for other in path.parents[1].glob(f"*/{path.name}") if other.parent != path.parent]
        path.write_bytes(others[0].read_bytes() if others else b"")
    else:
        path.write_bytes(rng.choice(DAMAGES)(content, rng))


def read_back(out: Path) -> dict:
    """Everything that a run takes from its directory, as values that can be compared."""
    newest = checkpoint.latest(out)
    groups, saved_state = checkpoint.load(newest)
    values = {
        f"{g}/{n}": x.view(torch.uint8).numpy().tobytes() for g, group in groups.items() for n, x in group.items()
    }
    stage = Stage(out, "sft", {"lr": 0.1, "training": {"epochs": 2.0}}, {})
    done = stage.is_current()
    result = stage.result() if done else None
    stage.start()
    return {"newest": newest.name, "values": values, "state": saved_state, "done": done, "result": result}


def attack(whole: Path, copy: Path, seed: int, read: Callable[[Path], dict]) -> str:
    """Damage a copy; "refused" with an error that names a file of it, or "same" numbers, or what is wrong."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    rng = random.Random(seed)
    files = sorted(path for path in copy.rglob("*") if path.is_file() and (path.parent.name == "step_00000006"))
    files += [copy / "stage.json", copy / "config.json"]
    weights = [4 if path.name == "manifest.json" else 1 for path in files]
    path = rng.choices(files, weights)[0]
    before = path.read_bytes()
    damage_file(path, rng)
    try:
        value = read(copy)
    except ValueError as error:
        return "refused" if path.name in str(error) else f"seed {seed}: {path.name} not named: {error}"
    if path.name == "stage.json" and not path.exists():
        # Without its record the stage runs again, from the same checkpoint.
        return "same"
    same = json.dumps(value, default=bytes.hex) == json.dumps(read_back_of(whole, read), default=bytes.hex)
    return "same" if same or before == (path.read_bytes() if path.is_file() else None) else f"seed {seed}: {path.name}"


def read_back_of(whole: Path, read: Callable[[Path], dict]) -> dict:
    fresh = whole.with_name("fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(whole, fresh)
    return read(fresh)


# Catches: a manifest, a state or a stage record that is believed without its checksum; errors of other types.
@pytest.mark.parametrize("count", COUNTS)
def test_damage_of_a_run_directory_is_named_or_changes_nothing(tmp_path, count):
    whole = written(tmp_path / "whole")
    outcomes = [attack(whole, tmp_path / "copy", seed, read_back) for seed in range(count)]
    assert [outcome for outcome in outcomes if outcome not in ("refused", "same")] == []
    assert outcomes.count("refused") > 0.6 * count


@pytest.mark.parametrize("old", [b'"model": 6', b'"epoch": 1', b'"tokens": 12345', b'"skipped": 0', b'"step": 6'])
def test_counters_of_a_manifest_cannot_be_changed_in_silence(tmp_path, old):
    path = written(tmp_path / "run") / "checkpoints" / "step_00000006" / "manifest.json"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, old[:-1] + b"7"))
    with pytest.raises(ValueError, match=r"step_00000006/manifest\.json: corrupt: its content does not fit"):
        checkpoint.load(path.parent)
