"""The GPU check: order, shares of the time, isolation of crashes, what is written; the training step on a CPU."""

import datetime
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, train_single
from benchmarks.gpu_check import PHASES, Outcome, Phase, run_phases, share_of, spawn, summary
from wizard_engine.model.config import PRESETS
from wizard_engine.throughput import flops_per_token

CPU = torch.device("cpu")
THREE = [Phase("first", 10, None), Phase("second", 30, None), Phase("third", 60, None)]


class FakeTime:
    """A clock, and a launcher whose phases take the seconds given."""

    def __init__(self, takes: dict[str, float]) -> None:
        self.now, self.takes, self.given, self.seen = 0.0, takes, {}, []

    def clock(self) -> float:
        return self.now

    def launch(self, phase: Phase, out: Path, seconds: float) -> Outcome:
        path = out / "phases.jsonl"
        self.seen.append([json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else [])
        self.given[phase.name] = seconds
        used = min(self.takes[phase.name], seconds)
        self.now += used
        return Outcome(phase.name, "done" if used == self.takes[phase.name] else "stopped", used)


def test_share_of_the_time_left():
    assert [share_of(THREE, 0, 100.0), share_of(THREE, 1, 90.0), share_of(THREE, 2, 60.0)] == [10.0, 30.0, 60.0]
    assert share_of(THREE, 1, 180.0) == 60.0


# Catches: shares that do not shrink after a slow phase; time that a quick phase leaves lost; results kept to the end.
def test_phases_run_in_order_and_pass_on_the_time_they_leave(tmp_path):
    fake = FakeTime({"first": 1.0, "second": 99.0, "third": 20.0})
    outcomes = run_phases(THREE, tmp_path, 100.0, fake.launch, fake.clock)
    assert [(o.name, o.status) for o in outcomes] == [("first", "done"), ("second", "stopped"), ("third", "done")]
    assert fake.given == {"first": 10.0, "second": pytest.approx(33.0), "third": pytest.approx(66.0)}
    assert fake.seen == [[], ["first"], ["first", "second"]]
    assert "| second | stopped | 33 |" in (tmp_path / "summary.md").read_text()


def test_phases_are_not_started_when_the_time_is_spent(tmp_path, capsys):
    def launch(phase: Phase, out: Path, seconds: float) -> Outcome:
        fake.now += 95.0
        return Outcome(phase.name, "done", 95.0)

    fake = FakeTime({})
    outcomes = run_phases(THREE, tmp_path, 100.0, launch, fake.clock)
    assert [o.status for o in outcomes] == ["done", "skipped", "skipped"]
    assert "second: skipped" in capsys.readouterr().out


CHILD = """
import os, signal, subprocess, sys, time
name = sys.argv[sys.argv.index("--phase") + 1]
print("note: began " + name, flush=True)
if name == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "wrong":
    sys.exit(1)
if name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(sys.argv[sys.argv.index("--out") + 1] + "/child", "w").write(str(child.pid))
    time.sleep(60)
print("seconds " + sys.argv[sys.argv.index("--seconds") + 1])
"""


def has_ended(process: int) -> bool:
    """True if the process is gone, or waits to be collected, within five seconds."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


# Catches: a crash that ends the run; children of a stopped phase that go on; a stop taken for a success.
def test_a_crash_or_hang_costs_one_phase(tmp_path):
    names = ["segfault", "hang", "wrong", "fine"]
    phases = [Phase(name, 1.0, None) for name in names]
    seconds = {"hang": 1.5}

    def launch(phase: Phase, out: Path, share: float) -> Outcome:
        return spawn(phase, out, seconds.get(phase.name, 20.0), [sys.executable, "-c", CHILD])

    outcomes = run_phases(phases, tmp_path, 100.0, launch)
    assert [o.status for o in outcomes] == ["crashed (exit -11)", "stopped", "wrong", "done"]
    assert [o.note for o in outcomes] == [f"began {name}" for name in names]
    log = (tmp_path / "log.txt").read_text()
    assert "[fine] seconds 17.0" in log and "[segfault] note: began segfault" in log
    assert has_ended(int((tmp_path / "child").read_text())), "a child of the stopped phase goes on"
    found = json.loads((tmp_path / "phases.jsonl").read_text().splitlines()[0])
    assert found["name"] == "segfault" and found["status"] == "crashed (exit -11)"


def test_log_of_a_phase_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOG_LINES", 3)
    script = "print('line\\n' * 10 + 'note: end')"
    outcome = spawn(Phase("loud", 1.0, None), tmp_path, 20.0, [sys.executable, "-c", script])
    assert (tmp_path / "log.txt").read_text().count("line") == 3 and outcome.note == "end"


def test_phases_begin_with_what_is_worth_most():
    first = ["environment", "tables", "ceilings", "attention_forward", "attention_backward"]
    last = ["train_step", "decode", "rollout", "plan_rates", "pytest"]
    assert [phase.name for phase in PHASES] == [*first, "linear_logprob", "mixture", "row_kernels", *last]
    assert sum(phase.seconds for phase in PHASES) == 540


def test_measured_cases_of_a_phase_are_the_quick_ones_first():
    forward, backward, rows, heads = (
        gpu_check.measured_cases(n)
        for n in ("attention_forward", "attention_backward", "row_kernels", "linear_logprob")
    )
    assert {case.op for case in heads} == {"linear_logprob"}
    assert {case.phase for case in heads} == {"forward", "backward"} and heads[0].problem.tokens == 8192
    assert {case.phase for case in forward} == {"forward"} and {case.phase for case in backward} == {"backward"}
    assert [case.problem for case in forward] == [case.problem for case in backward]
    assert {case.op for case in rows} == {"rms_norm", "rope", "swiglu", "adamw"}
    assert len(set(forward)) == len(forward) and "D=8192" not in rows[0].label
    special = [case for case in forward if case.problem.is_ragged or case.problem.window]
    assert [gpu_check.skipped_peers(case) for case in special] == [(), ()]
    assert gpu_check.skipped_peers(forward[0]) == ("flex",) and gpu_check.skipped_peers(rows[0]) == ()


def test_summary_shows_what_is_wrong(tmp_path):
    about = {"gpu": "H100", "date": "2026-11-25T00:00:00", "torch": "2.11"}
    gpu_check.append(tmp_path / "phases.jsonl", {"environment": about})
    gpu_check.append(tmp_path / "phases.jsonl", {"ceilings": {"copy_gbps": 3000.0, "matrix_tflops": 700.0}})
    entry = {"kernel": "rope", "class": {"half": 8}, "config": {"BLOCK": 1}}
    for wrong in ("", "dq: error 3"):
        gpu_check.append(tmp_path / "checks.jsonl", entry | {"wrong": wrong})
    figures = dict.fromkeys(("tokens_per_second", "tflops", "mfu", "peak_tflops", "peak_memory_gib"), 0.5)
    figures |= dict.fromkeys(("layers", "layers_of_preset", "tokens", "documents"), 7)
    figures |= {"recompute": "none"}
    gpu_check.append(tmp_path / "train.jsonl", figures | {"seconds": {"forward": {"p50": 0.5}, "step": {"p50": 1.5}}})
    (tmp_path / "results.jsonl").write_text('{"op": "cut in the mid')
    text = summary(tmp_path, [Outcome("tables", "wrong", 12.0, "2 of 90")])
    for part in (
        "# GPU check: H100, 2026-11-25", "torch 2.11", "| tables | wrong | 12 | 2 of 90 |", "2 checked, 1 wrong",
        "- rope {'half': 8} {'BLOCK': 1}: dq: error 3", "copy 3,000 GB/s", "forward 500 ms, step 1500 ms", "MFU 50.0%",
    ):  # fmt: skip
        assert part in text


def test_default_folder_has_a_plain_name_and_takes_no_other_runs(tmp_path):
    date = datetime.date(2026, 11, 25)
    first = gpu_check.default_out("NVIDIA H100 80GB (HBM3)/x", date, tmp_path)
    assert first.name == "NVIDIA-H100-80GB-HBM3-x-2026-11-25" and re.fullmatch(r"[A-Za-z0-9._-]+", first.name)
    first.mkdir()
    assert gpu_check.default_out("NVIDIA H100 80GB (HBM3)/x", date, tmp_path).name == f"{first.name}-2"


def test_whole_check_with_fake_phases_writes_few_flat_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "spawn", lambda phase, out, seconds: Outcome(phase.name, "done", 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--out", str(tmp_path / "run"), "--minutes", "1", "--only", "ceilings", "pytest"]) == 0
    assert "every phase was run" in capsys.readouterr().out
    files = list((tmp_path / "run").iterdir())
    assert 1 <= len(files) <= 8 and all(f.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", f.name) for f in files)
    monkeypatch.setattr(gpu_check, "spawn", lambda phase, out, seconds: Outcome(phase.name, "crashed (exit -11)", 1.0))
    assert gpu_check.main(["--out", str(tmp_path / "run"), "--only", "ceilings"]) == 1
    assert gpu_check.main(["--out", str(tmp_path / "two"), "--minutes", "0.1"]) == 0
    assert "not run for lack of time: environment, tables" in capsys.readouterr().out


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.err == "gpu_check: expected a GPU, got none; nothing was run\n" and not printed.out
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--only", "atention_forward"])
    assert stopped.value.code == 2 and "the nearest is attention_forward" in capsys.readouterr().err


def test_make_gpu_check_runs_the_module_and_installs_nothing():
    root = Path(__file__).parents[2]
    command = ["make", "-n", "gpu-check", "PYTHON=some-python", "ARGS=--minutes 5"]
    # Under `make test` this make would be a sub-make, and print the folders that it enters.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=own).stdout
    assert printed.strip() == "PYTHONPATH=. some-python -m benchmarks.gpu_check --minutes 5"


LENGTHS = (17, 5, 30, 1)


# Catches: gradients that do not reach the flat buffer; parameters that do not follow the master copy.
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_training_step_moves_masters_and_clears_gradients(recompute):
    config = replace(PRESETS["tiny"], tied=False)
    state = train_single.build(config, CPU, recompute)
    engine = state.optimizer.sharded
    before = engine.master.clone()
    calls = train_single.parts(state, train_single.Packed.of(LENGTHS, config.vocab_size, CPU))
    calls["forward"]()
    calls["backward"]()
    names = [name for name, _, values in engine.parts(engine.gradient()) if bool(values.any())]
    assert sorted(names) == sorted(engine.shapes)
    calls["update"]()
    assert not engine.gradient().any() and not torch.equal(engine.master, before)
    for name, _, values in engine.parts(engine.master):
        own = state.model.get_parameter(name)
        assert own.dtype == torch.bfloat16 and torch.equal(own.flatten(), values.bfloat16()), name
    fresh = train_single.build(config, CPU).model
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in fresh.parameters() if p.dim() == 1)


def test_training_operations_count_documents_apart():
    config = PRESETS["7b"]
    expected = 3 * (5 * flops_per_token(config, 5) + 7 * flops_per_token(config, 7))
    assert train_single.training_flops(config, (5, 7)) == expected
    assert sum(train_single.DOCUMENTS) == 16384


@pytest.mark.parametrize(
    ("one", "two", "whole", "layers"), [(10, 13, 50, 13), (10, 13, 11, 1), (10, 13, 9, 1), (10, 13, 1000, 32)]
)
def test_layers_that_fit_follow_from_two_peaks(one, two, whole, layers):
    assert train_single.layers_that_fit(one, two, whole, 32) == layers


def test_shares_of_the_mixture_are_those_of_one_size():
    def row(op, label, us, **changes):
        return {"op": op, "phase": "forward", "label": label, "us": us, "is_ours": True, **changes}

    rows = [
        row("experts", "T=8 D=6 F=4 E=2 A=2 uniform bf16", 90.0),
        row("experts", "T=8 D=6 F=4 E=2 A=2 zipf bf16", 500.0),
        row("experts", "T=8 D=6 F=4 E=2 A=2 uniform bf16", 7.0, is_ours=False), row("moe_route", "T=8 D=6", 10.0),
        row("moe_permute", "T=8 D=6", 3.0), row("moe_combine", "T=8 D=6", 2.0), row("moe_combine", "T=9 D=6", 2.0),
        row("moe_route", "T=8 D=6", 99.0, phase="backward"),
    ]  # fmt: skip
    assert gpu_check.mixture_shares(rows) == ["T=8: routing and rows 15.0% of the layer's forward"]
    assert gpu_check.mixture_shares(rows[1:]) == []
    timed = row("experts", "T=8", 5.0, phase="backward", share_of_equal=0.715)
    assert gpu_check.mixture_shares([timed]) == ["T=8 backward: 0.71 of cuBLAS at equal FLOPs, goal 0.72"]
