"""The GPU check: order, shares of the time, isolation of crashes, what is written; the training step on a CPU."""

import datetime
import gzip
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_gpu
import pytest
import torch

from benchmarks import (
    check_cases,
    check_files,
    check_phases,
    check_summary,
    gpu_check,
    phase_processes,
    train_single,
    train_step,
)
from benchmarks.check_cases import DONE, LEFT_OUT, LOST, WRONG, Visit, run_cases
from benchmarks.check_phases import PHASES
from benchmarks.phase_processes import Outcome, Phase, run_phases, share_of, spawn
from wizard_engine.model.config import PRESETS
from wizard_engine.planning.flops import flops_per_token

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
THREE = [Phase("first", 10, None), Phase("second", 30, None), Phase("third", 60, None)]


class FakeTime:
    """A clock, and a launcher whose phases take the seconds given."""

    def __init__(self, durations: dict[str, float], out: Path) -> None:
        self.now, self.durations, self.out, self.granted, self.seen = 0.0, durations, out, {}, []

    def clock(self) -> float:
        return self.now

    def launch(self, phase: Phase, seconds: float) -> Outcome:
        path = self.out / "phases.jsonl"
        self.seen.append([json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else [])
        self.granted[phase.name] = seconds
        used = min(self.durations[phase.name], seconds)
        self.now += used
        return Outcome(phase.name, "done" if used == self.durations[phase.name] else "stopped", used)


def test_share_of_the_time_left():
    assert [share_of(THREE, 0, 100.0), share_of(THREE, 1, 90.0), share_of(THREE, 2, 60.0)] == [10.0, 30.0, 60.0]
    assert share_of(THREE, 1, 180.0) == 60.0


# Catches: shares that do not shrink after a slow phase; time that a quick phase leaves lost; results kept to the end.
def test_phases_run_in_order_and_pass_on_the_time_they_leave(tmp_path):
    fake, reported = FakeTime({"first": 1.0, "second": 99.0, "third": 20.0}, tmp_path), []
    outcomes = run_phases(THREE, tmp_path, 100.0, fake.launch, lambda o: reported.append(len(o)), fake.clock)
    assert [(o.name, o.status) for o in outcomes] == [("first", "done"), ("second", "stopped"), ("third", "done")]
    assert fake.granted == {"first": 10.0, "second": pytest.approx(33.0), "third": pytest.approx(66.0)}
    assert fake.seen == [[], ["first"], ["first", "second"]] and reported == [1, 2, 3]


def test_phases_are_not_started_when_the_time_is_spent(tmp_path, capsys):
    def launch(phase: Phase, seconds: float) -> Outcome:
        fake.now += 95.0
        return Outcome(phase.name, "done", 95.0)

    fake = FakeTime({}, tmp_path)
    outcomes = run_phases(THREE, tmp_path, 100.0, launch, lambda o: None, fake.clock)
    assert [o.status for o in outcomes] == ["done", "skipped", "skipped"]
    assert "second: skipped" in capsys.readouterr().out


def has_ended(process: int) -> bool:
    """True if the process is gone, or waits to be collected, within five seconds."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def rows_of(out: Path, phase: str) -> list[dict]:
    return [row for row in check_files.read_lines(out / "rows.jsonl") if row.get("from") == phase]


# Catches: a crash or a lost device that ends the phase or the run; children of a stopped phase that go on; results that
# a crash leaves behind in hundreds of files or one huge one.
@pytest.mark.slow
def test_whole_check_with_phases_that_crash_hang_flood_and_lose_the_device(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stand-in", "fake_gpu", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'benchmarks'}"}
    done = subprocess.run([*command, "--minutes", "8"], cwd=ROOT, env=environment, capture_output=True, text=True)
    outcomes = {line["name"]: line for line in check_files.read_lines(out / "phases.jsonl")}
    assert {name: line["status"] for name, line in outcomes.items()} == {
        "bad": "wrong",
        "hang": "stopped",
        "flood": "done",
        "dies": "lost the device",
    }, done.stdout[-3000:] + done.stderr
    assert done.returncode == 1 and list(outcomes) == [phase.name for phase in fake_gpu.phases()]

    bad = {row["case"]: row for row in rows_of(out, "bad") if "pid" in row or "status" in row}
    assert [bad[case].get("status") for case in "abcdef"] == [None, "lost", None, "lost", "error", None]
    assert bad["e"]["note"] == "ValueError: odd shape" and len({bad[case]["pid"] for case in "acf"}) == 3
    assert {"from": "bad", "case": "b", "value": "before the end"} in rows_of(out, "bad")
    assert outcomes["bad"]["note"] == "6 of 6 cases, 3 not right: b, d, e"
    assert [row["case"] for row in rows_of(out, "dies")] == ["0", "1"]
    assert outcomes["dies"]["note"] == "in case 2"

    before, child = rows_of(out, "hang")
    assert before["value"] == "before the hang" and has_ended(child["child"])
    assert "removed 401 that are no files of the check" in outcomes["flood"]["note"]
    assert "flooded" in outcomes["flood"]["note"] and "log.txt: cut here" in outcomes["flood"]["note"]
    files = list(out.rglob("*"))
    assert {path.name for path in files} == {"rows.jsonl", "phases.jsonl", "summary.md", "log.txt"}
    assert all(path.is_file() and path.stat().st_size <= 16 * 2**20 for path in files)
    assert len(done.stdout) < 2**21 and "further lines are left out" in done.stdout
    text = (out / "summary.md").read_text()
    assert "| hang | stopped |" in text and "- bad b  lost: the process or the device did not survive" in text


def visit(tmp_path: Path, phase: str = "some", seconds: float = 60.0) -> Visit:
    return Visit(phase, tmp_path, tmp_path, seconds, CPU)


def test_a_phase_is_left_out_on_a_gpu_that_is_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_phases, "gpu", lambda: CPU)
    monkeypatch.setattr(check_phases, "device_bytes", lambda device: 40 * 2**30)
    ran = []
    for gib, status in ((80, LEFT_OUT), (40, DONE)):
        phase = Phase("some", 1, lambda visit: ran.append(visit.device) or DONE, gib * 2**30)
        assert check_phases.run_phase(phase, tmp_path, tmp_path, 9.0) == status
    assert ran == [CPU]
    assert "note: needs 80 GiB of the GPU's memory, there are 40: left out" in capsys.readouterr().out


# Catches: a traceback, which is exit status 1, taken for wrong results.
@pytest.mark.parametrize(
    ("code", "status"), [(0, "done"), (1, "crashed (exit 1)"), (WRONG, "wrong"), (LEFT_OUT, "left out")]
)
def test_status_of_a_phase_is_that_of_its_process(tmp_path, code, status):
    command = [sys.executable, "-c", f"import sys; print('note: x'); sys.exit({code})"]
    outcome = spawn(Phase("some", 1.0, None), tmp_path, tmp_path, 30.0, command)
    assert (outcome.status, outcome.note) == (status, "x")


# Catches: rows that are kept until the case or the phase ends.
def test_each_row_is_on_disk_before_the_next_is_made(tmp_path):
    seen = []

    def case():
        for number in range(3):
            yield {"number": number}
            seen.append(len(rows_of(tmp_path, "some")))

    assert run_cases(visit(tmp_path), [("one", case)]) == DONE and seen == [1, 2, 3]


def test_a_phase_says_what_it_would_need_to_finish(tmp_path, monkeypatch, capsys):
    one = visit(tmp_path)

    def slow():
        one.seconds = -1.0
        return [{"status": "wrong"}]

    assert run_cases(one, [("a", list), ("b", slow), ("c", list), ("d", list)]) == WRONG
    journal = check_cases.journal_of(tmp_path, "some")
    seconds = {"a": 1.0, "b": 8.0}
    monkeypatch.setattr(check_cases.Journal, "ended", {name: (s, name == "a") for name, s in seconds.items()})
    text = check_cases.progress(journal, ["a", "b", "c", "d"])
    assert re.fullmatch(r"2 of 4 cases, 1 not right: b, all need about 18 s, next would be c", text)
    assert "note: 2 of 4 cases, 1 not right: b" in capsys.readouterr().out


def test_a_lost_device_ends_the_process_and_a_peers_failure_does_not_make_a_phase_wrong(tmp_path):
    def lose():
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    with pytest.raises(SystemExit) as stopped:
        run_cases(visit(tmp_path), [("a", list), ("b", lose)])
    assert stopped.value.code == LOST and check_cases.journal_of(tmp_path, "some").open == "b"
    peer = [("a", lambda: [{"status": "error", "is_ours": False}, {"status": "absent"}])]
    assert run_cases(visit(tmp_path, "peers"), peer) == DONE
    for text, lost in (
        ("CUDA error: unspecified launch failure", True),
        ("CUDA out of memory", False),
        ("no kernel image", False),
        ("CUDA error: device-side assert triggered", True),
        ("expected fp32", False),
    ):
        assert check_cases.is_lost(RuntimeError(text)) == lost, text


def test_rows_stop_at_the_limit_and_say_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(check_files, "ROW_BYTES", 300)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"half')
    assert [check_files.append(path, {"text": "x" * 80}) for _ in range(6)] == 3 * [True] + 3 * [False]
    lines = check_files.read_lines(path)
    assert [line.get("text", "")[:1] for line in lines] == ["", "x", "x", "x", ""]
    assert lines[0] == {"cut": '{"half'} and "full" in lines[-1]["cut"]


def test_files_are_cut_at_a_line_and_others_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(check_files, "FILE_BYTES", 5000)
    (tmp_path / "rows.jsonl").write_text('{"value": 1}\n' * 1000)
    (tmp_path / "train_step.trace.json.gz").write_bytes(os.urandom(6000))
    (tmp_path / "log.txt").write_text("short\n")
    (tmp_path / "link").symlink_to(tmp_path / "log.txt")
    (tmp_path / "a" / "b").mkdir(parents=True)
    said = check_files.enforce(tmp_path)
    assert len(said) == 3 and "removed 2" in said[0]
    lines = check_files.read_lines(tmp_path / "rows.jsonl")
    assert lines[0] == lines[-2] == {"value": 1} and lines[-1]["cut"].startswith("cut here: ")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "log.txt"}
    assert (tmp_path / "rows.jsonl").stat().st_size <= 5000 and check_files.enforce(tmp_path) == []


def test_log_of_a_phase_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(phase_processes, "LOG_LINES", 3)
    script = "print('line\\n' * 10 + 'note: end')"
    outcome = spawn(Phase("loud", 1.0, None), tmp_path, tmp_path, 20.0, [sys.executable, "-c", script])
    log = (tmp_path / "log.txt").read_text()
    assert log.count("line") == 4 and "[loud] 8 further lines are left out" in log
    assert outcome.note == "end" and outcome.status == "done"


def test_phases_begin_with_what_is_worth_most():
    order = [
        "compile",
        "operations",
        "train_step",
        "attention",
        "rollout",
        "tables",
        "recipes",
        "mixture",
        "linear_logprob",
    ]
    assert [phase.name for phase in PHASES] == [*order, "row_kernels", "one_rank", "plan_rates", "pytest", "trace"]
    assert sum(phase.seconds for phase in PHASES) == 510 == 60 * gpu_check.MINUTES
    assert all(0 < phase.bytes <= 80 * 2**30 for phase in PHASES[1:])


# Catches: peers that compile for tens of seconds; the backward of the first shapes behind the forward of the last ones.
def test_measured_cases_of_a_phase_are_the_quick_ones_first(monkeypatch):
    cuda = torch.device("cuda", 0)
    attention, rows, heads = (
        check_phases.chosen_cases(n, cuda) for n in ("attention", "row_kernels", "linear_logprob")
    )
    assert {case.op for case in heads} == {"linear_logprob"} and heads[0].problem.tokens == 8192
    assert [case.phase for case in attention[:4]] == ["forward", "backward"] * 2
    assert attention[0].problem == attention[1].problem and len(set(attention)) == len(attention)
    assert {case.op for case in rows} == {"rms_norm", "rope", "swiglu", "adamw", "decode_attention"}
    assert "D=8192" not in rows[0].label
    assert set(check_phases.skipped_peers(attention[0])) == {"flex", "eager", "sdpa flash"}
    assert check_phases.skipped_peers(rows[0]) == check_phases.skipped_peers(heads[0]) == ("compile",)


def test_the_step_stands_beside_the_ledgers_prediction_and_goes_without(tmp_path, monkeypatch, capsys):
    row = {"tokens": 16384, "seconds": {"step": {"p50": 3.0}}}
    ledger = type(sys)("benchmarks.launches")
    ledger.predict = lambda preset, tokens, step: {
        "predicted_seconds": 2.0,
        "mfu": 0.5,
        "asked": (preset, tokens, step),
    }
    monkeypatch.setitem(sys.modules, "benchmarks.launches", ledger)
    monkeypatch.setattr(sys.modules["benchmarks"], "launches", ledger, raising=False)
    (predicted,) = check_phases.predicted(visit(tmp_path), row)
    assert predicted["measured_over_predicted"] == 1.5 and predicted["prediction"]["asked"] == ("7b", 16384, "train")

    def refuse(*arguments):
        raise ValueError("tokens: expected fewer")

    ledger.predict = refuse
    assert list(check_phases.predicted(visit(tmp_path), row)) == []
    assert "no prediction: tokens: expected fewer" in capsys.readouterr().out


# Catches: a trace that is written before the figures, or that makes the folder too large.
@pytest.mark.parametrize(("limit", "there"), [(16 * 2**20, True), (10, False)])
def test_trace_is_compressed_and_left_out_where_it_is_too_large(tmp_path, monkeypatch, limit, there):
    monkeypatch.setattr(check_phases, "FILE_BYTES", limit)
    monkeypatch.setattr(train_step, "trace", lambda device, path: path.write_text("[1]" * 1000), raising=False)
    out = tmp_path / "out"
    out.mkdir()
    one = Visit("trace", out, tmp_path, 60.0, CPU)
    assert check_phases.trace(one) == DONE and PHASES[-1].name == "trace"
    path = out / "train_step.trace.json.gz"
    assert path.exists() == there and (not there or gzip.decompress(path.read_bytes()) == b"[1]" * 1000)
    (row,) = rows_of(out, "trace")
    assert (row["trace"] is not None) == there


def test_summary_shows_what_is_wrong(tmp_path):
    about = {"gpu": "H100", "date": "2026-11-25T00:00:00", "torch": "2.11"}
    figures = dict.fromkeys(("tokens_per_second", "tflops", "mfu", "peak_tflops", "peak_memory_gib"), 0.5)
    figures |= dict.fromkeys(("layers", "layers_of_preset", "tokens", "documents"), 7)
    figures |= {"recompute": "none", "seconds": {"forward": {"p50": 0.5}, "step": {"p50": 1.5}}}
    rows = [
        {"environment": about},
        {"ceilings": {"copy_gbps": 3000.0, "matrix_tflops": 700.0}},
        {"ceilings": {"copy_gbps": 3100.0, "matrix_tflops": 710.0}},
        {"entry": {"wrong": ""}, "status": "right", "from": "tables", "case": "swiglu"},
        {"entry": {"wrong": "dq"}, "status": "wrong", "note": "dq: error 3", "from": "tables", "case": "rope half=8"},
        {"train_step": figures},
        {"op": "x", "status": "error", "is_ours": False, "phase": "step", "label": "", "variant": "y"},
        {"prediction": {"predicted_seconds": 1.0}, "measured_seconds": 1.5, "measured_over_predicted": 1.5},
    ]
    for row in rows:
        check_files.append(tmp_path / "rows.jsonl", row)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"op": "cut in the mid')
    check_summary.report(tmp_path, [Outcome("tables", "wrong", 12.0, "2 of 90")])
    text = (tmp_path / "summary.md").read_text()
    for expected in (
        "# GPU check: H100, 2026-11-25",
        "torch 2.11",
        "| tables | wrong | 12 | 2 of 90 |",
        "2 checked, 1 wrong",
        "- tables rope half=8  wrong: dq: error 3",
        "copy 3,000 to 3,100 GB/s, matrix product 700 to 710",
        "forward 500 ms, step 1500 ms",
        "MFU 50.0%",
        "predicted 1.000 s, measured 1.500 s: 1.50 times as long",
        'rows cut: {"op": "cut in the mid',
    ):
        assert expected in text, text


def test_default_folder_has_a_plain_name_and_takes_no_other_runs(tmp_path):
    date = datetime.date(2026, 11, 25)
    first = gpu_check.default_out("NVIDIA H100 80GB (HBM3)/x", date, tmp_path)
    assert first.name == "NVIDIA-H100-80GB-HBM3-x-2026-11-25" and re.fullmatch(r"[A-Za-z0-9._-]+", first.name)
    first.mkdir()
    assert gpu_check.default_out("NVIDIA H100 80GB (HBM3)/x", date, tmp_path).name == f"{first.name}-2"


@pytest.fixture
def has_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_exit_status_says_what_became_of_the_phases(tmp_path, monkeypatch, has_gpu, capsys):
    status = {}
    monkeypatch.setattr(
        gpu_check, "spawn", lambda phase, *more: Outcome(phase.name, status.get(phase.name, "done"), 1.0)
    )
    arguments = ["--out", str(tmp_path / "run")]
    assert gpu_check.main([*arguments, "--only", "tables", "pytest"]) == 0
    assert "every phase was run" in capsys.readouterr().out
    for what, expected in (
        ("left out", 3),
        ("stopped", 3),
        ("wrong", 1),
        ("lost the device", 1),
        ("crashed (exit -11)", 1),
    ):
        status["pytest"] = what
        assert gpu_check.main([*arguments, "--only", "tables", "pytest"]) == expected, what
    assert gpu_check.main(["--out", str(tmp_path / "two"), "--minutes", "0.2"]) == 3
    assert "skipped: compile the minutes are spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "atention"], "the nearest is attention"),
        (["--minutes", "0"], "above 0, got '0'"),
        (["--minutes", "-3"], "above 0, got '-3'"),
        (["--minutes", "soon"], "above 0, got 'soon'"),
        (["--minutes", "nan"], "above 0, got 'nan'"),
        (["--out", "FILE"], "--out: expected a folder that can be written"),
        (["--out", "FILE/below"], "--out: expected a folder that can be written"),
        (["--out", "USED"], "--out: expected an empty folder or one of an earlier check"),
    ],
)
def test_command_line_refuses_with_status_2(tmp_path, has_gpu, capsys, arguments, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    arguments = [w.replace("FILE", str(tmp_path / "file")).replace("USED", str(tmp_path / "used")) for w in arguments]
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "used" / "thesis.tex").exists() and (tmp_path / "file").is_file()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, has_gpu, monkeypatch, capsys):
    def fail(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpu_check.tempfile, "TemporaryFile", fail)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2 and "Permission denied" in capsys.readouterr().err


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.err == "gpu_check: expected a GPU, got none; nothing was run\n" and not printed.out


# Catches: an import at the top of the command that needs Triton.
def test_without_triton_there_is_one_line_and_status_2():
    script = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            sys.modules.pop(name, None)
            raise ModuleNotFoundError(name, name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.meta_path.insert(0, Absent())
from benchmarks import gpu_check
sys.exit(gpu_check.main([]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "gpu_check: expected triton, got none; install the one that belongs to your torch; nothing was run\n"
    )


@pytest.mark.parametrize("arguments", ["--minutes 5", '--out "$OUT/check" --minutes 8.5'])
def test_make_gpu_check_runs_the_module_and_installs_nothing(arguments):
    command = ["make", "-n", "gpu-check", "PYTHON=some-python", f"ARGS={arguments.replace('$', '$$')}"]
    # Under `make test` this make would be a sub-make, and print the folders that it enters.
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=inherited).stdout
    assert printed.splitlines()[-1] == f"PYTHONPATH=. some-python -m benchmarks.gpu_check {arguments}"
    done = subprocess.run(command[:1] + command[2:], cwd=ROOT, capture_output=True, text=True, env=inherited)
    assert (
        done.returncode == 2 and "some-python has no torch; PYTHON=" in done.stderr and "Traceback" not in done.stderr
    )


LENGTHS = (17, 5, 30, 1)


# Catches: gradients that do not reach the flat buffer; parameters that do not follow the master copy.
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_training_step_moves_masters_and_clears_gradients(recompute):
    config = replace(PRESETS["tiny"], tied=False)
    state = train_single.build(config, CPU, recompute)
    engine = state.optimizer.sharded
    before = engine.master.clone()
    calls = train_single.step_phases(state, train_single.Packed.of(LENGTHS, config.vocab_size, CPU))
    calls["forward"]()
    calls["backward"]()
    names = [name for name, _, values in engine.shards(engine.gradient()) if bool(values.any())]
    assert sorted(names) == sorted(engine.shapes)
    calls["update"]()
    assert not engine.gradient().any() and not torch.equal(engine.master, before)
    for name, _, values in engine.shards(engine.master):
        parameter = state.model.get_parameter(name)
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter.flatten(), values.bfloat16()), name
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


def test_fractions_of_the_mixture_belong_to_one_size():
    def row(op, label, us, **changes):
        return {"op": op, "phase": "forward", "label": label, "us": us, "is_ours": True, **changes}

    rows = [
        row("experts", "T=8 D=6 F=4 E=2 A=2 uniform bf16", 90.0),
        row("experts", "T=8 D=6 F=4 E=2 A=2 zipf bf16", 500.0),
        row("experts", "T=8 D=6 F=4 E=2 A=2 uniform bf16", 7.0, is_ours=False),
        row("moe_route", "T=8 D=6", 10.0),
        row("moe_permute", "T=8 D=6", 3.0),
        row("moe_combine", "T=8 D=6", 2.0),
        row("moe_combine", "T=9 D=6", 2.0),
        row("moe_route", "T=8 D=6", 99.0, phase="backward"),
    ]
    assert check_phases.mixture_shares(rows) == ["T=8: routing and rows 15.0% of the layer's forward"]
    assert check_phases.mixture_shares(rows[1:]) == []
    timed = row("experts", "T=8", 5.0, phase="backward", share_of_equal=0.715)
    assert check_phases.mixture_shares([timed]) == ["T=8 backward: 0.71 of cuBLAS at equal FLOPs, goal 0.72"]
