"""Checkpoints survive: exact bytes back, damage named, full disks and kills harmless."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wizard_engine import checkpoint
from wizard_engine.checkpoint import store
from wizard_engine.runtime import files

FILE = "part_00000.safetensors"


def groups(seed=0):
    """Tensors of several dtypes, shapes and storages."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(101, generator=generator)
    return {
        "model": {
            "a": flat[:60].view(6, 10),
            "b": flat[60:],
            "half": torch.randn(3, 5, generator=generator).bfloat16(),
            "transposed": torch.randn(4, 7, generator=generator).t(),
            "tied": flat[:60].view(6, 10),
            "whole": flat,
            "whole_tied": flat.view(101, 1),
        },
        "optimizer": {"step": torch.tensor(3), "ids": torch.arange(2**40, 2**40 + 5), "none": torch.zeros(0, 3)},
        "empty": {},
    }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for group, values in expected.items():
        assert got[group].keys() == values.keys()
        for name, tensor in values.items():
            assert got[group][name].dtype == tensor.dtype
            assert torch.equal(got[group][name], tensor), name


def test_checkpoint_gives_back_exact_tensors_and_state(tmp_path):
    state = {"step": 12, "loss": 0.1 + 0.2, "loader": {"epoch": 1, "order": [3, 1]}, "none": None}
    path = checkpoint.save(tmp_path, 12, tensors=groups(), state=state)
    assert path == tmp_path / "checkpoints" / "step_00000012" == checkpoint.latest(tmp_path)
    assert sorted(os.listdir(path)) == ["manifest.json", "part_00000.safetensors"]
    tensors, state_read = checkpoint.load(path)
    assert_equal(tensors, groups())
    assert state_read == state


def test_latest_is_none_without_checkpoints(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None


def test_save_keeps_the_newest(tmp_path):
    for step in (5, 99999999, 100000000, 7):
        checkpoint.save(tmp_path, step, tensors=groups(), state={}, keep_last=2)
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["step_00000007", "step_100000000", "step_99999999"]
    assert checkpoint.latest(tmp_path).name == "step_100000000"
    checkpoint.save(tmp_path, 100000001, tensors=groups(), state={}, keep_last=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step_100000001"]


def test_save_of_the_same_step_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, tensors=groups(0), state={"n": 0})
    path = checkpoint.save(tmp_path, 1, tensors=groups(1), state={"n": 1})
    tensors, state = checkpoint.load(path)
    assert_equal(tensors, groups(1))
    assert state == {"n": 1} and os.listdir(tmp_path / "checkpoints") == ["step_00000001"]


def damaged(tmp_path, damage):
    path = checkpoint.save(tmp_path, 1, tensors=groups(), state={})
    damage(path)
    return path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def edit_manifest(path, old, new):
    manifest = path / "manifest.json"
    text = manifest.read_text()
    assert old in text
    fields = json.loads(text.replace(old, new))
    del fields["checksum"]
    files.write_sealed(manifest, fields, indent=None)


DAMAGES = {
    "missing": (lambda path: (path / FILE).unlink(), r"part_00000\.safetensors: missing.*tensors model/a, model/b"),
    "truncated": (
        lambda path: os.truncate(path / FILE, (path / FILE).stat().st_size - 9),
        r"part_00000\.safetensors: truncated.*lost tensors optimizer/ids",
    ),
    "no header": (lambda path: os.truncate(path / FILE, 5), r"part_00000\.safetensors: truncated.*tensors model/a"),
    "longer": (lambda path: os.truncate(path / FILE, 10**6), r"part_00000\.safetensors: corrupt: expected \d+ bytes"),
    "flipped bit": (lambda path: flip(path / FILE, -1), r"part_00000\.safetensors: tensor optimizer/ids: corrupt"),
    "flipped header": (lambda path: flip(path / FILE, 8), r"part_00000\.safetensors: corrupt: its header"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json: expected the manifest"),
    "half manifest": (
        lambda path: os.truncate(path / "manifest.json", 40),
        r"manifest\.json: expected JSON, got .* cut or damaged: remove this checkpoint",
    ),
    "foreign manifest": (lambda path: (path / "manifest.json").write_text("[]"), r"manifest\.json: expected a JSON"),
    "edited manifest": (
        lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("6", "7", 1)),
        r"manifest\.json: corrupt: its content does not fit its checksum; remove this checkpoint",
    ),
    "manifest without checksum": (
        lambda path: (path / "manifest.json").write_text(
            re.sub(r', "checksum": "\w+"', "", (path / "manifest.json").read_text())
        ),
        r"manifest\.json: corrupt: its content does not fit its checksum",
    ),
    "former format": (
        lambda path: edit_manifest(path, "checkpoint 3", "checkpoint 2"),
        r"manifest\.json: .* got 'wizard-engine checkpoint 2', of another release; finish the run with the release",
    ),
    "foreign format": (lambda path: edit_manifest(path, "checkpoint 3", "x"), r"manifest\.json: .*format"),
    "pipe for a manifest": (
        lambda path: ((path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")),
        r"manifest\.json: expected a file, got another kind of entry",
    ),
    "pipe for a part": (lambda path: ((path / FILE).unlink(), os.mkfifo(path / FILE)), r"part_00000.*missing"),
    "foreign dtype": (
        lambda path: edit_manifest(path, '"dtype": "bfloat16"', '"dtype": "float16"'),
        r"tensor model/half: expected dtype float16, got BF16",
    ),
    "foreign shape": (
        lambda path: edit_manifest(path, '"shape": [6, 10]', '"shape": [6, 11]'),
        r"tensor model/a: expected parts of 66 elements, got none at 60",
    ),
    "part of nothing": (
        lambda path: edit_manifest(path, '"model/half"', '"model/other"'),
        r"tensor model/half: expected parts of 15 elements, got none at 0",
    ),
    "foreign sum": (
        lambda path: edit_manifest(
            path, re.search(r'"model/a": \[0, 60, \d+', (path / "manifest.json").read_text())[0], '"model/a": [0, 60, 1'
        ),
        r"tensor model/a: corrupt",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_of_a_damaged_checkpoint_names_file_and_tensor(tmp_path, name):
    damage, text = DAMAGES[name]
    with pytest.raises(ValueError, match=text):
        checkpoint.load(damaged(tmp_path, damage))


def test_every_flipped_byte_is_detected(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors={"g": {"x": torch.arange(4.0), "y": torch.arange(3)}}, state={})
    file = path / FILE
    for position in range(file.stat().st_size):
        flip(file, position)
        with pytest.raises(ValueError, match=r"part_00000\.safetensors"):
            checkpoint.load(path)
        flip(file, position)
    checkpoint.load(path)


def test_load_like_names_the_tensor_of_another_model(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors=groups(), state={})
    checkpoint.load(path, like=groups(1))
    other = groups()
    other["model"]["b"] = torch.zeros(40)
    with pytest.raises(ValueError, match=r"tensor b: expected shape \[40\], got \[41\]"):
        checkpoint.load(path, like=other)
    del other["model"]["b"]
    with pytest.raises(ValueError, match="tensor b: expected shape nothing"):
        checkpoint.load(path, like=other)
    with pytest.raises(ValueError, match="tensor v: expected shape"):
        checkpoint.load(path, like={"value": {"v": torch.zeros(1)}})


def test_full_disk_keeps_only_the_old_checkpoints(tmp_path):
    checkpoint.save(tmp_path, 1, tensors=groups(), state={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="step_00000002: not saved") as caught:
            checkpoint.save(tmp_path, 2, tensors={**groups(), "big": {"x": torch.zeros(5000)}}, state={}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and "part_00000.safetensors" in str(caught.value)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    assert_equal(checkpoint.load(checkpoint.latest(tmp_path))[0], groups())


def test_checkpoint_under_another_step_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors=groups(), state={})
    path.rename(path.with_name("step_00000009"))
    with pytest.raises(ValueError, match=r"manifest\.json: expected step 9, as its directory's name says, got 1; give"):
        checkpoint.load(path.with_name("step_00000009"))


@pytest.mark.parametrize("failing", ["os.fsync", "exchange", "Path.rename"])
def test_no_space_at_the_end_of_a_replacing_save_restores_the_old_one(tmp_path, monkeypatch, failing):
    checkpoint.save(tmp_path, 1, tensors=groups(0), state={})
    rename = Path.rename

    def fail(subject, target=None):
        if failing == "Path.rename" and not subject.name.startswith(".partial_"):
            return rename(subject, target)
        raise OSError(errno.ENOSPC, "No space left on device", str(subject))

    if failing == "Path.rename":
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    target = {"os.fsync": (os, "fsync"), "exchange": (files, "exchange"), "Path.rename": (Path, "rename")}[failing]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match="step_00000001: not saved") as caught:
        checkpoint.save(tmp_path, 1, tensors=groups(1), state={})
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    assert_equal(checkpoint.load(checkpoint.latest(tmp_path))[0], groups(0))


def test_what_killed_runs_left_is_removed_or_restored(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(tmp_path, 1, tensors=groups(), state={})
    (folder / ".partial_step_00000009").mkdir()
    (folder / ".partial_step_00000009" / "part_00000.safetensors").write_bytes(b"half")
    (folder / "step_00000001").rename(folder / ".replaced_step_00000001")
    assert checkpoint.latest(tmp_path) == folder / "step_00000001"
    checkpoint.save(tmp_path, 2, tensors=groups(), state={})
    assert sorted(os.listdir(folder)) == ["step_00000001", "step_00000002"]


LOOP = """
import sys, torch
from pathlib import Path
from wizard_engine import checkpoint
step = 0
while True:
    step += 1
    x = torch.full((300_000,), float(step))
    checkpoint.save(Path(sys.argv[1]), step // 2, tensors={"m": {"x": x}}, state={"s": step})
    print(step, flush=True)
"""


def test_killed_saving_never_leaves_a_broken_checkpoint(tmp_path):
    for delay in (0.0, 0.007):
        with subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE) as process:
            for _ in range(3):
                process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        tensors, state = checkpoint.load(checkpoint.latest(tmp_path))
        assert torch.equal(tensors["m"]["x"], torch.full((300_000,), float(state["s"])))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"step": -1}, ValueError, "step"),
        ({"keep_last": 0}, ValueError, "keep_last"),
        ({"tensors": {"../x": {}}}, ValueError, "group"),
        ({"state": {"x": object()}}, TypeError, "object"),
    ],
)
def test_save_refuses_bad_arguments_and_writes_nothing(tmp_path, changes, error, text):
    with pytest.raises(error, match=text):
        checkpoint.save(tmp_path, **{"step": 1, "tensors": {}, "state": {}, **changes})
    assert not (tmp_path / "checkpoints").exists()


def test_manifest_lists_hash_shape_and_dtype(tmp_path):
    path = checkpoint.save(tmp_path, 3, tensors=groups(), state={})
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"][FILE]
    assert entry["bytes"] == (path / FILE).stat().st_size and entry["parts"]["model/half"][:2] == [0, 15]
    assert manifest["tensors"]["model"]["half"] == {"shape": [3, 5], "dtype": "bfloat16"}
    assert store.latest(tmp_path) == path
