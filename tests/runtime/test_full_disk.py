"""A full disk at every place that writes: an OSError that names the file, and what was there stays."""

import ast
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from wizard_engine import checkpoint
from wizard_engine.agents import Ledger, Reply, Request
from wizard_engine.agents.ledger import Stored
from wizard_engine.data.records import Message
from wizard_engine.model import ModelConfig, Transformer, save_hf
from wizard_engine.runtime import files
from wizard_engine.runtime.metrics import MetricsLogger, read_metrics
from wizard_engine.runtime.run_lock import RunLock
from wizard_engine.runtime.stage import Stage

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(vocab_size=31, width=8, layers=1, heads=2, kv_heads=1, head_width=4, ffn_width=12)


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Within the block, no file grows beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_rows(out: Path) -> None:
    files.write_text(out / "rows.jsonl", '{"messages": []}\n' * 10)


def write_checkpoint(out: Path) -> None:
    checkpoint.save(out, 2, tensors={"m": {"x": torch.zeros(500)}}, state={})


def write_model(out: Path) -> None:
    save_hf(Transformer(CONFIG), out / "model")


def write_stage(out: Path) -> None:
    Stage(out, "x", {}, {}).finish({"rows": 2}, [])


def write_ledger(out: Path) -> None:
    ledger = Ledger(out / "ledger.sqlite")
    try:
        request = Request("answer", (Message("user", "q"),))
        ledger.store([Stored("teller", "teller", b"k" * 32, request, Reply("text " * 3000))])
    finally:
        ledger.close()


def write_lock(out: Path) -> None:
    RunLock.take(out)


WRITERS = {
    "rows.jsonl": write_rows,
    "step_00000002": write_checkpoint,
    "part_00000.safetensors": write_checkpoint,
    "model.safetensors": write_model,
    "stage.json": write_stage,
    "ledger.sqlite": write_ledger,
    ".lock": write_lock,
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_named_with_its_file_and_keeps_what_was_there(tmp_path, name):
    WRITERS[name](tmp_path)
    if name == ".lock":
        RunLock.take(tmp_path).release()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(), pytest.raises(OSError, match=name.replace(".", r"\.")):
        WRITERS[name](tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if name == "ledger.sqlite":
        ledger = Ledger(tmp_path / name)
        assert ledger.lookup([b"k" * 32]) == {b"k" * 32: Reply("text " * 3000)}
        ledger.close()
    else:
        assert {path: content for path, content in after.items() if path.name != ".lock"} == before


def test_full_disk_in_the_metrics_is_named_and_the_lines_before_stay(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.jsonl", 3, "x", quiet=True)
    logger.log(step=1, loss=0.5)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with full_disk(size + 5), pytest.raises(OSError, match=r"metrics\.jsonl: not written .*the same command") as caught:
        logger.log(step=2, loss=0.25)
    assert caught.value.errno == errno.EFBIG
    logger.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


# Catches: a new place that writes a file by itself, whose full disk would have no name.
def test_files_are_written_where_a_full_disk_is_named():
    known = {
        ("wizard_engine/runtime/files.py", "replacing"),
        ("wizard_engine/runtime/metrics.py", "__init__"),
        ("wizard_engine/checkpoint/manifest.py", "_written"),
        ("wizard_engine/model/safetensors_file.py", "write_parts"),
        ("wizard_engine/model/hugging_face.py", "begin"),
        ("recipes/chat.py", "save"),
        ("wizard_engine/pipeline/served.py", "_server"),
    }
    found = set()
    for folder in ("wizard_engine", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(function, ast.FunctionDef) and any(map(_writes, ast.walk(function))):
                    found.add((path.relative_to(ROOT).as_posix(), function.name))
    # Of nested functions the inner one is meant.
    assert found - {("wizard_engine/model/hugging_face.py", "save_sharded")} == known


def _writes(node: ast.AST) -> bool:
    """Whether a call opens a file for writing, or writes one by its path."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    of_path = isinstance(node.func, ast.Attribute)
    if name in ("write_text", "write_bytes") and of_path:
        return True
    texts = [x.value for x in [*node.args, *(k.value for k in node.keywords)] if isinstance(x, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
    return name == "open" and any(set(mode) & set("wax+") for mode in modes)


# Catches: a reader that finds no model while a new one takes its place; a former model that is lost.
@pytest.mark.parametrize("can_exchange", [True, False])
def test_replaced_directory_is_the_former_or_the_new_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    for name in ("new", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    seen = []
    rename = Path.rename

    def watched(self, target):
        moved = rename(self, target)
        seen.append((tmp_path / "model" / "x").exists())
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    files.replace_directory(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "x").read_text() == "new" and os.listdir(tmp_path) == ["model"]
    assert seen == ([] if can_exchange else [False, True])


def test_replacement_that_was_killed_between_two_renames_is_undone(tmp_path):
    (tmp_path / f"{files.REPLACED}model").mkdir()
    (tmp_path / f"{files.REPLACED}model" / "x").write_text("former")
    save_hf(Transformer(CONFIG), tmp_path / "model")
    assert not (tmp_path / "model" / "x").exists() and os.listdir(tmp_path) == ["model"]
    (tmp_path / "model").rename(tmp_path / f"{files.REPLACED}model")
    files.restore_replaced(tmp_path)
    assert os.listdir(tmp_path) == ["model"]


def test_model_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync, replace = [], os.fsync, files.replace_directory

    def watched(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(new, path):
        assert {str(file) for file in new.rglob("*")} <= set(synced) and str(new) in synced
        replace(new, path)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr("wizard_engine.model.hugging_face.replace_directory", replaced)
    save_hf(Transformer(CONFIG), tmp_path / "model")
    assert str(tmp_path) in synced


def test_temporary_file_is_never_one_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.7.tmp").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "7")
    with pytest.raises(OSError, match="x: not written"):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / ".x.7.tmp").is_symlink()
