"""What happens when one rank of many goes wrong: the others end within seconds and say which, and the run goes on."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forked import ENVIRONMENT, run_ranks
from many_ranks import save_base, torchrun, torchrun_command, untimed, word_texts

from wizard_engine import checkpoint
from wizard_engine.data.records import conversation, write_rows
from wizard_engine.model import load_hf
from wizard_engine.runtime.metrics import read_metrics

WORKER = Path(__file__).parent / "failing.py"
KILLS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    texts = word_texts(60)
    shapes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "ffn_width": 24}
    save_base(root / "base", texts, tied=False, **shapes)
    write_rows(root / "rows.jsonl", [conversation(a, b) for a, b in zip(texts[::2], texts[1::2])])
    write_rows(root / "other.jsonl", [conversation(b, a) for a, b in zip(texts[::2], texts[1::2])])
    return root


def arguments(root, out, how="fine", rank=0, step=0, *, steps=12, seconds=8, options=()):
    """Of the worker that trains and lets one rank go wrong."""
    return [
        WORKER,
        how,
        rank,
        step,
        "--model",
        root / "base",
        "--data",
        root / "rows.jsonl",
        "--out",
        out,
        "--training.lr",
        "3e-3",
        "--training.pack-tokens",
        "120",
        "--training.packs-per-step",
        "4",
        "--training.epochs",
        "400",
        "--training.max-steps",
        steps,
        "--training.save-every",
        "4",
        "--quiet",
        "--no-audit",
        "--mesh.timeout-seconds",
        seconds,
        *options,
    ]


def run(*args, start=torchrun, **options):
    began = time.monotonic()
    done = start(2, *arguments(*args, **options), timeout=120)
    return done, time.monotonic() - began


def killed(out, rank):
    """1 once a rank of the run into `out` has been killed, 0 where it does not run."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            if str(out).encode() in argv and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
                return 1
        except OSError:
            continue
    return 0


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("how", "text", "start"),
    [
        ("error", "rows.jsonl:7: this row is bad", run_ranks),
        ("bug", "KeyError: 'nobody expected this'", torchrun),
    ],
)
def test_error_on_one_rank_ends_all_and_is_named_by_all(root, tmp_path, how, text, start):
    done, seconds = run(root, tmp_path, how, rank=1, step=6, start=start)
    assert done.returncode and seconds < 30
    assert f"error: [rank 1/2] {text}" in done.stderr
    # Rank 0 says the same, unless torchrun was quicker to end it.
    is_ended = start is torchrun and "signal" in done.stderr.lower()
    assert done.stderr.count(f"[rank 1/2] {text}") >= 2 or is_ended, done.stderr[-2000:]
    assert checkpoint.latest(tmp_path).name == "step_00000004"


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("stop", "rank 1 is gone, or does not run: last seen at sft step"),
        pytest.param("late", "rank 1 did not come: last seen at sft step 6", marks=pytest.mark.slow),
    ],
)
def test_rank_that_a_collective_waits_for_is_named(root, tmp_path, how, text):
    process = subprocess.Popen(
        torchrun_command(2, *arguments(root, tmp_path, how, rank=1, step=6, seconds=5)),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines, began = [], time.monotonic()
        for line in process.stderr:
            lines.append(line)
            if text in line:
                break
        assert any(f"[rank 0/2] {text}" in line for line in lines), "".join(lines)[-3000:]
        assert time.monotonic() - began < 60
    finally:
        process.kill()
        for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
            if str(tmp_path) in line and "failing.py" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
        process.wait()


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("rows", r"[rank 1/2] sft: configuration: data: expected the same on every rank"),
        ("options", r"[rank 1/2] sft: configuration: training: lr: expected the same on every rank"),
        ("tokens", r"[rank 1/2] sft: tokens of the rows: expected the same on every rank"),
    ],
)
def test_rank_with_other_options_or_files_is_named_before_the_first_step(root, tmp_path, how, text):
    done, _ = run(root, tmp_path, how, rank=1, start=run_ranks)
    assert done.returncode and text in done.stderr and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--mesh.dp-shard", "3"), "must divide the ranks of data: dp_shard=3, ranks / (cp x tp) = 2"),
        pytest.param(
            ("--mesh.dp-shard", "2", "--mesh.dp-replicate", "2"),
            "got 2 x 2 x 1 x 1 = 4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_number_of_ranks_that_the_mesh_does_not_have_is_refused(root, tmp_path, options, text):
    done, _ = run(root, tmp_path, start=run_ranks, options=options)
    assert done.returncode and text in done.stderr


@pytest.mark.slow
def test_disk_that_is_full_on_one_rank_ends_all_and_keeps_the_checkpoint_before(root, tmp_path):
    """Rank 1 cannot write its part of the checkpoint of step 8; the run ends at the next save."""
    done, _ = run(root, tmp_path, "full", rank=1, step=6)
    assert done.returncode and done.stderr.count("[rank 1/2]") >= 2
    assert "step_00000008: not saved" in done.stderr and "part_00001.safetensors" in done.stderr
    assert "earlier checkpoints are intact" in done.stderr
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_00000004"]
    checkpoint.load(checkpoint.latest(tmp_path))
    done, _ = run(root, tmp_path)
    assert done.returncode == 0 and len(untimed(tmp_path)) == 12, done.stderr[-2000:]


@pytest.mark.slow
def test_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(root, tmp_path):
    done, _ = run(root, tmp_path, "nan", rank=1, step=5)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0] * 5 + [1] * 7
    assert all(p.isfinite().all() for p in load_hf(tmp_path / "model").parameters())


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_the_losses_are_those_of_no_kill(root, tmp_path):
    """A rank is killed ten times, at random moments, within saves too; torchrun starts the run again each time."""
    steps = 1500
    whole, _ = run(root, tmp_path / "whole", steps=steps)
    assert whole.returncode == 0, whole.stderr[-2000:]
    out, generator, kills, seen = tmp_path / "cut", random.Random(0), 0, 0
    with open(tmp_path / "log", "w") as log:
        launcher = ("--max-restarts", "40", "--monitor-interval", "0.1")
        argv = torchrun_command(2, *arguments(root, out, steps=steps), launcher=launcher)
        process = subprocess.Popen(argv, env=ENVIRONMENT, stderr=log, stdout=log)
        partial = lambda: list((out / "checkpoints").glob(".partial_*"))  # noqa: E731
        while process.poll() is None and kills < KILLS:
            time.sleep(0.02)
            latest = checkpoint.latest(out)
            now = int(latest.name.removeprefix("step_")) if latest is not None else 0
            if now <= seen:
                continue
            seen = now
            if kills % 2:
                deadline = time.monotonic() + 2
                while not partial() and time.monotonic() < deadline:
                    time.sleep(0.0002)
            else:
                time.sleep(generator.random() * 0.2)
            kills += killed(out, generator.randrange(2))
        assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
    assert kills == KILLS, f"{kills} kills in {len(untimed(out))} steps"
    assert untimed(out) == untimed(tmp_path / "whole")
    result = json.loads((out / "stage.json").read_text())["result"]
    assert result == json.loads((tmp_path / "whole" / "stage.json").read_text())["result"]
    for a, b in zip(*(load_hf(path / "model").parameters() for path in (out, tmp_path / "whole")), strict=True):
        assert a.equal(b)
