"""The compile report: what compiles here, what is wrong with a row, differences, the command line.

What compiles starts a process without TRITON_INTERPRET, which pytest's conftest sets where there is no GPU.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from forked import COMPILING, run_python

from benchmarks import compile_report, compile_rows, compile_search, launch_forms
from benchmarks.compile_report import diff, differences, line_of, markdown
from benchmarks.compile_rows import compile_all, problems
from benchmarks.launch_forms import Case, cases, cases_of, launch_of
from kernels import configuration

TMA = {"VARIANT": "plain", "BLOCK_M": 128, "BLOCK_N": 64, "TMA": True, "num_warps": 8, "num_stages": 2}


def row(**changes) -> dict:
    """A row with nothing wrong."""
    fields = {
        "label": "attention_forward sm_90 width=128 bytes=2 causal bf16",
        "kernel": "attention_forward",
        "arch": 90,
        "class": {"width": 128, "bytes": 2},
        "config": TMA,
        "form": "causal bf16",
        "registers": 187,
        "spill_store_bytes": 0,
        "spill_load_bytes": 0,
        "stack_bytes": 0,
        "shared_bytes": 98_304,
        "num_warps": 8,
        "blocks": 1,
        "occupancy": 0.125,
        "counts": {"HGMMA": 24, "UTMALDG": 5, "EX2": 70},
        "load_bytes": 16,
        "store_bytes": 16,
        "specialised": False,
        "serialised": False,
        "instructions": 1700,
        "loop": 400,
        "loop_spills": 0,
        "overlapped": 0.0,
        "triton": "3.6.0",
        "ptxas": "12.8.93",
    }
    return fields | changes


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    """The report, or other code, in a process that compiles."""
    command = ("-c", code) if code else ("-m", "benchmarks.compile_report", *arguments)
    return run_python(*command, environment=COMPILING)


def test_entries_of_a_table_compile_and_are_reported(tmp_path):
    path = tmp_path / "report.json"
    done = run(
        "--kernel", "rms_norm_reduce", "--arch", "80", "90", "100", "--jobs", "1", "--json", str(path), "--markdown"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [(row["arch"], row["form"]) for row in rows] == [
        (arch, form) for arch in (80, 90, 100) for form in ("bf16", "fp16", "fp32")
    ]
    assert all(row["registers"] > 8 and row["blocks"] > 0 and row["load_bytes"] == 16 for row in rows)
    assert {"commit", "triton", "torch", "ptxas", "date"} <= rows[0].keys()
    assert "9 forms, 0 wrong" in done.stdout and "| rms_norm_reduce | 100 | 3 |" in done.stdout


ATTENTION = """
from benchmarks.compile_rows import compile_case
from benchmarks.launch_forms import cases
import json
for arch in (80, 90, 100):
    case = next(c for c in cases("attention_backward_q", arch) if c.label.endswith("width=64 bytes=2 full bf16"))
    print(json.dumps(compile_case(case)))
"""


def test_attention_takes_the_tensor_cores_of_each_architecture():
    rows = [json.loads(line) for line in run(code=ATTENTION).stdout.splitlines()]
    assert [row["arch"] for row in rows] == [80, 90, 100] and not any("error" in row for row in rows)
    reported = [[name for name in ("HMMA", "HGMMA", "UTCMMA") if name in row["counts"]] for row in rows]
    assert reported == [["HMMA"], ["HGMMA"], ["UTCMMA"]]
    assert all(row["loop"] > 100 and row["counts"]["EX2"] >= 8 for row in rows)


SPILLING = """
import sys
from pathlib import Path
from benchmarks import compile_report, launch_forms
from kernels import configuration
configuration.FOLDER = Path({folder!r})
compile_report.COMMITTED = configuration.FOLDER / "none.json"
forms = launch_forms.attention
launch_forms.FORMS["attention_forward"] = lambda shape: [form for form in forms(shape) if form[0] == "full bf16"]
sys.exit(compile_report.main(["--jobs", "0", "--arch", "90", "--kernel", "attention_forward"]))
"""


def test_spilling_and_failing_entries_are_named_and_give_status_1(tmp_path):
    spilling = TMA | {"BLOCK_N": 128, "num_warps": 4}
    failing = TMA | {"BLOCK_N": 48}
    table = [{"arch": 90, "class": {"width": w, "bytes": 2}, "config": c} for w, c in ((128, spilling), (64, failing))]
    (tmp_path / "attention_forward.json").write_text(json.dumps({"entries": table}))
    for name in ("attention_backward_kv", "attention_backward_q", "attention_delta"):
        shutil.copy(configuration.FOLDER / f"{name}.json", tmp_path)
    done = run(code=SPILLING.format(folder=str(tmp_path)))
    # catches: spills read as 0, a failure that stops the report or is counted as right.
    assert done.returncode == 1 and "2 forms, 2 wrong" in done.stdout, done.stderr
    assert "wrong: attention_forward sm_90 width=128 bytes=2 full bf16: spills " in done.stderr
    assert "wrong: attention_forward sm_90 width=64 bytes=2 full bf16: does not compile: " in done.stderr
    # catches: what Triton prints about a kernel that it cannot compile, pages of it.
    assert len(done.stdout.splitlines()) == 3 and len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"error": "PTXASError: x"}, "does not compile: PTXASError: x"),
        ({"spill_store_bytes": 36, "spill_load_bytes": 40, "loop_spills": 3}, "spills 76 bytes, 3 instructions in"),
        ({"stack_bytes": 64}, None),
        ({"shared_bytes": 227 * 1024}, None),
        ({"shared_bytes": 227 * 1024 + 16}, "takes 232464 bytes of shared memory of 232448"),
        ({"arch": 80, "config": TMA | {"TMA": False}, "shared_bytes": 164 * 1024}, "of shared memory of 166912"),
        ({"serialised": True}, "wgmma serialised"),
        ({"counts": {"HGMMA": 24}}, "TMA promised, but no UTMALDG"),
        ({"counts": {"HMMA": 24, "UTMALDG": 4}}, "too small for HGMMA"),
        ({"counts": {"UTCMMA": 24, "UTMALDG": 4}, "arch": 100}, None),
        ({"counts": {"HMMA": 24}, "config": TMA | {"TMA": False}}, None),
        ({"config": TMA | {"VARIANT": "rotated"}}, "no exponential between a product and its wait"),
        ({"config": TMA | {"VARIANT": "rotated"}, "overlapped": 0.9}, None),
    ],
)
def test_problems_are_what_an_entry_promises_and_does_not_keep(changes, expected):
    reported = problems(row(**changes))
    # catches: a stack frame taken for a spill, limits of another architecture, promises nobody made.
    assert (not reported) if expected is None else (len(reported) == 1 and expected in reported[0]), reported


def test_line_holds_resources_counts_and_what_is_wrong():
    text = line_of(row(spill_store_bytes=4))
    for expected in ("187 registers", "96.0 KB", "1 blocks", "16/16 B", "HGMMA 24 UTMALDG 5 EX2 70", "spills 4 bytes"):
        assert expected in text
    assert line_of(row(error="E: no")).endswith("does not compile: E: no")


def test_differences_name_what_changed_and_ignore_the_rest():
    old, new = row(date="2025-01-01"), row(date="2026-01-01", registers=190, counts={"HGMMA": 24, "EX2": 72, "STL": 2})
    # catches: counts compared as a whole, counts that are gone left out.
    assert differences(old, new) == ["registers 187 -> 190", "EX2 70 -> 72", "STL 0 -> 2", "UTMALDG 5 -> 0"]
    assert differences(old, row()) == []


def test_diff_counts_changed_new_and_gone_rows_of_the_tables_it_covers():
    old = [row(), row(label="b"), row(label="gone"), row(label="other table", kernel="rope")]
    lines = diff(old, [row(), row(label="b", registers=200), row(label="came")])
    assert lines == ["b: registers 187 -> 200", "came: new", "gone: gone", "1 changed, 1 same, 1 new, 1 gone"]


def test_markdown_has_a_line_per_kernel_and_architecture():
    text = markdown([row(), row(registers=255, spill_load_bytes=8, counts={"HGMMA": 2}), row(arch=80, error="x")])
    assert "| attention_forward | 90 | 2 | 187 to 255 | 8 B | 96 KB | 1 to 1 | HGMMA | UTMALDG | 1 |" in text
    assert "| attention_forward | 80 | 1 | | | | | | | 1 |" in text
    assert "triton 3.6.0 with ptxas 12.8.93" in text


def test_every_table_entry_has_launches_of_its_own_kernel():
    labels = []
    for table in configuration.kernels():
        for arch in (80, 86, 90, 100):
            labels += [case.label for case in cases(table, arch)]
        for case in cases(table, 90):
            made = launch_of(case)
            assert (
                made.kernel.__name__ == f"{table}_kernel"
                and made.options["num_warps"] == dict(case.config)["num_warps"]
            )
    assert len(labels) == len(set(labels))


def test_table_without_launches_is_named():
    with pytest.raises(ValueError, match=r"softmax: expected a table of attention_forward.*; add its launches to"):
        cases_of("softmax", 90, {}, {})


def test_launch_of_another_kernel_is_refused(monkeypatch):
    monkeypatch.setitem(launch_forms.FORMS, "rope", lambda shape: [("forward", lambda: None)])
    with pytest.raises(ValueError, match="rope sm_90 half=8 forward: expected a launch of rope_kernel, got none"):
        launch_of(Case("rope", 90, (("half", 8),), (), "forward"))


def end_the_process(case: Case) -> dict:
    """Stands for a compiler whose assertion fails."""
    if case.form == "bad":
        os._exit(3)
    return {"label": case.label}


@pytest.mark.slow
def test_case_that_ends_its_process_costs_no_other():
    chosen = [Case("adamw", 90, (), (), form) for form in ("a", "bad", "b")]
    moved = []
    rows = compile_all(chosen, 2, lambda: moved.append(1), end_the_process)
    # catches: every case of a broken pool given up.
    assert [row["label"] for row in rows] == [case.label for case in chosen] and len(moved) == 3
    assert [row.get("error") for row in rows] == [None, "the compiler ended its process", None]


def test_what_the_compiler_prints_is_kept_off_and_its_assertion_is_the_reason(monkeypatch, capfd):
    def fail(case):
        os.write(1, b"module {}\n")
        os.write(2, b"python: WSLowerToken.cpp:73: Assertion `false' failed.\n")
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(compile_rows, "launch_of", fail)
    reported = compile_rows.compile_case(Case("adamw", 90, (), (), "a"))
    assert reported["error"].startswith("RuntimeError: PassManager::run failed python: WSLowerToken.cpp:73: Assertion")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "70"], "--arch: expected some of 80, 86, 90, 100, got 70; the nearest is"),
        (["--kernel", "attention_forwrad"], "got attention_forwrad; the nearest is attention_forward"),
        (["--search", "rope", "--arch", "90"], "TRITON_INTERPRET: expected it unset"),
        (["--jobs", "-1"], "--jobs: expected at least 0, got -1"),
        (["--agianst", "x"], "--agianst: expected a known option, got an unknown one; the nearest is --against"),
        ([], "TRITON_INTERPRET: expected it unset, got 1, which compiles nothing; run env -u TRITON_INTERPRET"),
    ],
)
def test_wrong_command_line_gives_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "no/such.json"], "--against: expected a report that --json wrote, got no/such.json"),
        (["--search", "rope"], "--search: expected some of attention_forward, attention_backward_kv"),
        (["--search", "attention_forward", "--arch", "100"], "expected some of 80, 86, 90 for the model, got 100"),
        (["--search", "attention_forward", "--width", "100"], "expected an entry for {'width': 100, 'bytes': 2} on"),
    ],
)
def test_wrong_options_are_named_before_anything_compiles(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_ranking_puts_what_keeps_its_promises_first():
    good, better, spilling = ({"model": {"share": share}} for share in (0.4, 0.5, 0.9))
    groups = {"good": [row(**good)], "spilling": [row(**spilling, spill_load_bytes=4)], "better": [row(**better)]}
    # catches: shares alone deciding. A spill in one form is a spill.
    assert [name for name, _ in compile_search.ranked(groups)] == ["better", "good", "spilling"]
    groups["better"].append(row(spill_load_bytes=4))
    assert [name for name, _ in compile_search.ranked(groups)] == ["good", "spilling", "better"]


def test_search_tries_the_entry_first_and_only_tma_where_the_entry_has_it():
    reported = compile_search.searched("attention_forward", 90, 128)
    assert reported[0] == compile_search.entry_of("attention_forward", 90, 128)
    assert len(reported) > 20 and {config["TMA"] for config in reported} == {reported[0]["TMA"]}
    with pytest.raises(ValueError, match=r"expected an entry for {'width': 100, 'bytes': 2} on sm_90"):
        compile_search.entry_of("attention_forward", 90, 100)


# Catches: a table entry of the mixture's kernels changed without a new report, or to one that spills.
def test_committed_report_has_the_8x22b_forms_without_spills():
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "compile_report.json").read_text())
    reported = {row["label"]: row for row in rows if "8x22b" in row["label"]}
    grouped = {"grouped_swiglu", "grouped_matmul", "grouped_dswiglu", "grouped_dweight"}
    assert {row["kernel"] for row in reported.values()} == grouped | {"moe_route", "moe_combine", "moe_permute"}
    for label, row in reported.items():
        assert row["spill_store_bytes"] + row["spill_load_bytes"] == 0, label
        table = configuration.table(row["kernel"])
        entries = [e for e in table if (e["arch"], e["class"]) == (row["arch"], row["class"])]
        assert [e["config"] for e in entries] == [row["config"]], label
        if row["kernel"].startswith("grouped") and (row["arch"], row["class"]) == (90, {"bytes": 2}):
            assert row["counts"]["HGMMA"] > 0 and row["counts"]["UTMALDG"] > 0 and not row["serialised"], label
