"""Tuning: candidates, what is chosen and rejected, table files, the processes, the command line."""

import json
import sys
import time

import pytest
import torch

from benchmarks import tune, tune_processes, tune_targets
from benchmarks.tune import (
    Choice,
    check_tables,
    choose,
    entries_for,
    measured_of,
    table_text,
    worth_running,
    write_entry,
)
from benchmarks.tune_processes import Compilers, Job, Worker
from benchmarks.tune_targets import (
    UNTUNED,
    Target,
    candidates,
    checked_cases,
    kernel_name,
    launches,
    neighbours,
    timed_case,
    tuned,
)
from kernels import configuration as tables

CPU = torch.device("cpu")
TARGET = Target.of("rope", {"half": 8, "bytes": 2})
A, B, C, D = ({"BLOCK_TOKENS": n, "num_warps": 4} for n in (16, 32, 64, 128))


def name_of(config: dict) -> str:
    return {16: "A", 32: "B", 64: "C", 128: "D"}[config["BLOCK_TOKENS"]]


def fake(us: dict, wrong=(), wrong_in_full=(), crash=(), asked=None):
    """A worker that knows the time of each configuration, and which are wrong or break it."""

    def ask(request: dict) -> dict:
        if asked is not None:
            asked.append(request)
        if request["do"] == "time":
            return {"us": [us[name_of(config)] for config in request["configs"]]}
        name = name_of(request["config"])
        if name in crash:
            return {"crash": "the process ended with -11"}
        bad = name in wrong or (request["full"] and name in wrong_in_full)
        return {"failures": ["y: error 3, limit 1"] if bad else []}

    return ask


# Catches: the fastest taken before it is checked; a time asked of a wrong candidate.
def test_choose_takes_the_fastest_right_candidate_and_rejects_a_faster_wrong_one():
    asked = []
    choice = choose(TARGET, [A, B, C, D], fake({"A": 9, "B": 5, "C": 1, "D": 7}, wrong="C", asked=asked))
    assert choice.config == B and (choice.us, choice.runner_up_us, choice.candidates) == (5, 7, 4)
    assert choice.rejected == [(C, "y: error 3, limit 1")]
    assert all(C not in request.get("configs", []) for request in asked)


def test_choose_drops_a_winner_that_fails_with_another_mask_or_dtype():
    choice = choose(TARGET, [A, B, C], fake({"A": 9, "B": 5, "C": 7}, wrong_in_full="B"))
    assert choice.config == C and choice.us == 7 and choice.rejected == [(B, "y: error 3, limit 1")]


def test_choose_goes_on_after_a_candidate_that_breaks_the_process():
    choice = choose(TARGET, [A, B, C], fake({"A": 9, "B": 5, "C": 7}, crash="B"))
    assert choice.config == C and choice.rejected == [(B, "crash: the process ended with -11")]


def test_choose_gives_nothing_where_nothing_is_right():
    assert choose(TARGET, [A, B], fake({"A": 9, "B": 5}, wrong="AB")) is None


# Catches: a table that changes with the noise of a measurement.
@pytest.mark.parametrize(("us", "expected"), [(99.5, "A"), (98.0, "B")])
def test_choose_keeps_the_tables_configuration_within_a_percent(us, expected):
    assert name_of(choose(TARGET, [A, B, C], fake({"A": 100, "B": us, "C": 150})).config) == expected


def test_choose_times_the_current_entry_even_without_time():
    asked = []
    choice = choose(TARGET, [A, B, C], fake({"A": 9, "B": 5, "C": 7}, asked=asked), deadline=0.0, clock=lambda: 1.0)
    assert choice.config == A and choice.candidates == 1 and choice.runner_up_us is None
    assert all(B not in request.get("configs", [request.get("config")]) for request in asked)


def test_choose_compares_the_current_entry_with_the_fastest_four():
    asked = []
    us = {"A": 50, "B": 5, "C": 7, "D": 9}
    configs = [A, B, C, D, {"BLOCK_TOKENS": 32, "num_warps": 8}, {"BLOCK_TOKENS": 64, "num_warps": 8}]
    choose(TARGET, configs, fake(us, asked=asked))
    final = next(request["configs"] for request in asked if request["do"] == "time" and len(request["configs"]) > 1)
    assert len(final) == 5 and A in final and D not in final


@pytest.mark.parametrize("kernel", tables.kernels())
def test_table_files_are_written_as_they_are(kernel):
    text = (tables.FOLDER / f"{kernel}.json").read_text(encoding="utf-8")
    assert table_text(json.loads(text)["entries"]) == text


@pytest.fixture
def folder(tmp_path):
    """A table of two classes on sm_80 and sm_90."""
    entries = [
        {"arch": arch, "class": {"half": half, "bytes": 2}, "config": A, "measured": None}
        for arch in (80, 90)
        for half in (8, 16)
    ]
    (tmp_path / "rope.json").write_text(table_text(entries))
    return tmp_path


# Catches: an entry of another architecture or class that changes; keys of a class in another order taken for another.
def test_write_entry_changes_one_line(folder):
    before = (folder / "rope.json").read_text().splitlines()
    write_entry(Target.of("rope", {"bytes": 2, "half": 16}), 90, B, {"us": 1.5}, folder)
    after = (folder / "rope.json").read_text().splitlines()
    changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
    assert len(before) == len(after) and changed == [5]
    expected = {"arch": 90, "class": {"half": 16, "bytes": 2}, "config": B, "measured": {"us": 1.5}}
    assert after[5] == "    " + json.dumps(expected)
    assert [path.name for path in folder.iterdir()] == ["rope.json"]


@pytest.mark.parametrize(("arch", "place"), [(75, 0), (86, 2), (100, 4)])
def test_write_entry_puts_a_new_architecture_in_its_place(folder, arch, place):
    before = json.loads((folder / "rope.json").read_text())["entries"]
    write_entry(TARGET, arch, B, {"us": 1.5}, folder)
    after = json.loads((folder / "rope.json").read_text())["entries"]
    assert after[place]["arch"] == arch and after[:place] + after[place + 1 :] == before


def test_measured_holds_what_the_numbers_depend_on():
    about = {"gpu": "H100", "date": "2026-11-25T10:00:00", "triton": "3.6.0", "torch": "2.11", "ptxas": "12.8", "x": 1}
    assert measured_of(Choice(B, 12.3456, None, 7), about) == {
        "gpu": "H100",
        "date": "2026-11-25",
        "triton": "3.6.0",
        "torch": "2.11",
        "ptxas": "12.8",
        "us": 12.35,
        "runner_up_us": None,
        "candidates": 7,
    }


def test_tune_writes_what_it_chose_and_stops_in_time(folder, monkeypatch, capsys):
    monkeypatch.setattr(tables, "FOLDER", folder)
    tables.table.cache_clear()
    monkeypatch.setattr(tune, "candidates", lambda target, arch, entry: [entry, B, C])

    class Fake:
        def submit(self, jobs):
            return jobs

        def results(self, jobs, deadline):
            return [{"registers": 1}, {"error": "no"}, {"registers": 1}]

    about = dict.fromkeys(("gpu", "date", "triton", "torch", "ptxas"), "x")
    ask = fake({"A": 9, "B": 1, "C": 7})
    try:
        assert tune.tune(90, ["rope"], about, ask, Fake(), deadline=time.monotonic() + 100) == 0
        chosen = [e for e in json.loads((folder / "rope.json").read_text())["entries"] if e["measured"]]
        assert [(e["arch"], e["config"], e["measured"]["us"]) for e in chosen] == [(90, C, 7), (90, C, 7)]
        assert tune.tune(90, ["rope"], about, ask, Fake(), deadline=0.0) == 2
    finally:
        tables.table.cache_clear()
    assert "time is up: 2 classes not tuned" in capsys.readouterr().out


def all_targets(arch: int = 90) -> list[Target]:
    return [target for target, _ in entries_for(arch, tuned())]


def test_every_table_belongs_to_an_operation_and_the_important_come_first():
    actual = all_targets()
    assert {target.kernel for target in actual} == set(tuned()) and set(tuned()) | UNTUNED >= set(tables.kernels())
    assert [str(target) for target in actual[:2]] == [
        "attention_forward bytes=2 width=128",
        "attention_backward_kv bytes=2 width=128",
    ]
    assert all(target.shape.get("bytes") == 4 for target in actual[-20:])
    # Training and decode of 7B, AdamW's gradients in fp32 and half precision included, before everything else.
    assert {(t.op, t.shape.get("width"), t.shape.get("bytes", 2)) for t in actual[:15]} == {
        ("attention", 128, 2),
        ("linear_logprob", None, 2),
        ("rms_norm", 4096, 2),
        ("rms_norm", None, 2),
        ("rope", None, 2),
        ("swiglu", 2048, 2),
        ("adamw", None, 2),
        ("adamw", None, 4),
        ("decode_attention", None, 2),
    }
    with pytest.raises(ValueError, match="expected the table of one of attention"):
        _ = Target.of("softmax_forward", {}).op


# Catches: a case of another class than its target's, whose time would be written into the wrong entry.
@pytest.mark.parametrize("target", all_targets(), ids=str)
def test_cases_look_their_target_up(monkeypatch, target):
    seen = set()
    lookup = tables._lookup

    def spy(kernel, arch, keys):
        seen.add(Target.of(kernel, dict(keys)))
        return lookup(kernel, arch, keys)

    monkeypatch.setattr(tables, "_lookup", spy)
    for case in [timed_case(target), *checked_cases(target, full=True), *checked_cases(target, full=True, small=True)]:
        if case.dtype.itemsize != target.shape.get("bytes", case.dtype.itemsize):
            continue
        seen.clear()
        made = launches(case, 90)
        assert target in seen, f"{case.label} {case.phase} looks up {seen}"
        assert target.kernel in {kernel_name(launch) for launch in made}


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_candidates_begin_with_the_table_and_fit_the_architecture(arch):
    for target, entry in entries_for(arch, tuned()):
        actual = candidates(target, arch, entry)
        assert actual[0] == entry and len(actual) >= 3, target
        assert len({json.dumps(config, sort_keys=True) for config in actual}) == len(actual), target
        assert all(config.keys() == entry.keys() for config in actual), target
        assert arch >= 90 or not any(config.get("TMA") for config in actual), target


def test_neighbours_vary_one_step_and_stay_positive():
    actual = neighbours({"BLOCK": 1, "REREAD": False, "num_warps": 32, "num_stages": 2})
    assert {config["BLOCK"] for config in actual} == {1, 2} and {config["num_warps"] for config in actual} == {16, 32}
    assert {config["num_stages"] for config in actual} == {1, 2, 3} and {config["REREAD"] for config in actual} == {
        False,
        True,
    }
    assert len(actual) == 2 * 2 * 2 * 3


def test_entries_for_takes_the_newest_that_the_architecture_can_run():
    for arch, first in ((86, 86), (89, 86), (90, 90), (103, 100)):
        (_, config), *_ = entries_for(arch, ["attention_forward"])
        expected = [e["config"] for e in tables.table("attention_forward") if e["arch"] == first]
        assert config in expected
    assert tune.table_arch(89) == 86 and tune.table_arch(90) == 90


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")
INTERPRETED = [
    ("attention_backward_q", {"width": 16, "bytes": 4}),
    ("rms_norm_backward", {"width": 16, "bytes": 2}),
    ("rope", {"half": 8, "bytes": 2}),
    ("swiglu_backward", {"width": 16, "bytes": 4}),
    ("adamw", {"bytes": 4}),
]


@interpreted
@pytest.mark.parametrize("target", [Target.of(kernel, keys) for kernel, keys in INTERPRETED], ids=str)
def test_entries_are_right_in_the_interpreter(target):
    config = dict(entries_for(90, [target.kernel]))[target]
    small = {name: min(value, 64) if name.startswith("BLOCK") else value for name, value in config.items()}
    request = {"do": "check", "kernel": target.kernel, "class": target.shape, "config": small, "full": False}
    assert tune.answer(request, CPU) == {"failures": []}


# Catches: a check that runs the plain PyTorch path instead of the kernel.
@interpreted
def test_check_finds_a_wrong_kernel(monkeypatch):
    from kernels import _swiglu

    right = _swiglu.swiglu_forward
    monkeypatch.setattr(_swiglu, "swiglu_forward", lambda gate_up: right(gate_up) * 1.001)
    target = Target.of("swiglu_forward", {"width": 16, "bytes": 4})
    config = dict(entries_for(90, [target.kernel]))[target]
    request = {"do": "check", "kernel": target.kernel, "class": target.shape, "config": config, "full": False}
    actual = tune.answer(request, CPU)["failures"]
    assert len(actual) == 2 and "T=9 F=16" in actual[0]


def test_check_tables_reports_every_entry(capsys):
    rows = list(
        check_tables(90, ["rope"], lambda request: {"failures": ["off"] if request["class"]["half"] == 8 else []})
    )
    assert len(rows) == 10 and [row["class"]["half"] for row in rows if row["wrong"]] == [8, 8]
    assert all(row["config"] and row["seconds"] >= 0 for row in rows)
    assert list(check_tables(90, ["rope"], lambda request: {}, deadline=0.0)) == []
    (row, *_) = check_tables(90, ["rope"], lambda request: {"crash": "the process ended with -11"})
    assert row["wrong"] == "crash: the process ended with -11"
    checks = tune.entry_checks(90, tuned(), lambda request: {"failures": []})
    assert len(checks) == len(entries_for(90, tuned())) and checks[0][1]()["kernel"] == checks[0][0].kernel


SERVER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        os._exit(7)
    if request["do"] == "hang":
        time.sleep(60)
    print("noise from a compiler", flush=True)
    print("reply: " + json.dumps({"pid": os.getpid()}), flush=True)
"""


# Catches: a worker that is not started again; a reply of the dead one read as that of the next.
def test_worker_survives_a_process_that_ends_or_hangs():
    ask = Worker([sys.executable, "-c", SERVER], seconds=20.0)
    try:
        first = ask({"do": "x"})
        assert ask({"do": "x"}) == first
        assert ask({"do": "die"}) == {"crash": "the process ended with 7"}
        second = ask({"do": "x"})
        assert "pid" in second and second != first
        ask.seconds = 0.3
        assert ask({"do": "hang"}) == {"crash": "no answer in 0 s"}
        ask.seconds = 20.0
        assert ask({"do": "x"})["pid"] not in (first["pid"], second["pid"])
    finally:
        ask.close()


def compile_or_die(job: Job) -> dict:
    """Stands in for the compiler; must be importable by its process."""
    import os

    if job.arch == 0:
        os._exit(1)
    return {"arch": job.arch}


# Catches: jobs lost with the process that another job broke.
def test_compilers_lose_only_the_job_that_breaks_its_process(monkeypatch):
    monkeypatch.setattr(tune_processes, "compile_one", compile_or_die)
    compilers = Compilers()
    jobs = [Job("rope", None, arch) for arch in (80, 0, 90)]
    actual = compilers.results(compilers.submit(jobs), time.monotonic() + 60)
    compilers.close()
    assert actual == [{"arch": 80}, {"error": "the compiler ended its process"}, {"arch": 90}]
    assert [worth_running(code, 90) for code in actual] == [True, False, True]
    assert worth_running({}, 90) and not worth_running({"spill_bytes": 5000}, 90)
    assert worth_running({"shared_bytes": 200_000}, 90) and not worth_running({"shared_bytes": 200_000}, 80)


def test_command_line_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "expected a GPU, got none" in printed.err and not printed.out
    assert tune.main(["--arch-check"]) == 2
    capsys.readouterr()
    assert tune.main(["--dry-run", "--kernel", "attention_forward"]) == 0
    printed = capsys.readouterr().out
    assert "attention_forward bytes=2 width=128 sm_90" in printed and '"VARIANT": "plain"' in printed
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--kernel", "atention_forward"])
    assert stopped.value.code == 2 and "the nearest is attention_forward" in capsys.readouterr().err


# Catches: the form of a kernel that only a backward launches, checked with no entry of its table.
def test_the_experts_products_are_checked_in_both_phases():
    target = tune_targets.Target.of("grouped_matmul", {"bytes": 2})
    assert {case.phase for case in tune_targets.checked_cases(target, full=True)} == {"forward", "backward"}
    actual = [case for case in tune_targets.checked_cases(target, full=True) if case.phase == "backward"]
    forms = {x.options["TRANSPOSED"] for x in tune_targets.launches(actual[0], 90) if "TRANSPOSED" in x.options}
    assert True in forms
