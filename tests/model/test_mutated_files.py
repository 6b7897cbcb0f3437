"""Thousands of damaged and made-up model directories: each loads or is refused by name, in bounded time and memory."""

import json
import sys

import pytest
from forked import run_python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FULL = {"safetensors": 20_000, "configuration": 5_000, "tokenizer": 5_000, "gguf": 2_000}


def tried(kind, first, count, folder):
    """Numbers of mutants that loaded and that were refused."""
    if kind == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is absent")
    done = run_python("-m", "tests.model.mutated_files", kind, first, count, folder, timeout=3600)
    progress = folder / "progress"
    where = progress.read_text() if progress.exists() else "the beginning"
    assert done.returncode == 0, f"exit status {done.returncode} at {where}: {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["wrong"], "\n".join(result["wrong"][:20])
    assert result["counts"]["loaded"] and result["counts"]["refused"]
    return result["counts"]


# Catches: a size that is believed; an error of a library without the file's name; a hang on a FIFO; a long message.
@pytest.mark.parametrize("kind", FULL)
def test_a_few_mutants_load_or_are_refused_by_name(kind, tmp_path):
    tried(kind, 0, 30, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_mutants_load_or_are_refused_by_name(kind, tmp_path):
    tried(kind, 0, FULL[kind] // 50, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", FULL)
def test_all_mutants_load_or_are_refused_by_name(kind, tmp_path):
    for first in range(0, FULL[kind], 1000):
        tried(kind, first, 1000, tmp_path / str(first))
