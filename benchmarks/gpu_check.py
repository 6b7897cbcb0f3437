"""Checks and measures everything on this machine's GPU in one go, the most valuable first; nothing is installed.

  make gpu-check                                        the same as
  python -m benchmarks.gpu_check --minutes 9            results in benchmarks/results/GPUNAME-DATE

Each phase is a process of its own, so that a crash costs one phase; it writes what it has as soon as it has it. A phase
may take its share of the minutes that are left; when they are spent, no further phase is started, and what was left out
is printed. Exit status: 0, or 1 where something was wrong, crashed or was stopped, or 2 where there is no GPU.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing, kernel_rows, kernels, roofline, tune, tune_targets
from benchmarks.command_line import Parser
from benchmarks.kernel_cases import OPERATIONS, Case, cases
from benchmarks.tune_processes import Compilers
from kernels import configuration as tables
from wizard_engine.files import write_text

ROOT = Path(__file__).resolve().parents[1]
# Seconds under which a phase is not started, and lines of a phase that the log keeps.
LEAST_SECONDS = 8.0
LOG_LINES = 3000
NOTE = "note: "
MIXTURE_GOALS = {"forward": 0.82, "backward": 0.72}
MIXTURE = ("experts", "moe_route", "moe_permute", "moe_combine")


@dataclass(frozen=True)
class Phase:
    """A name, the share of the time that it may take (seconds of nine minutes), and what it does: 0 or 1 for wrong."""

    name: str
    seconds: float
    run: Callable[[Path, float], int]


@dataclass(frozen=True)
class Outcome:
    """What became of a phase: done, wrong, crashed, stopped or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


def append(path: Path, value: dict[str, Any]) -> None:
    """Add a JSON line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            found.append({"cut": line[:80]})
    return found


# What the phases do, each in its own process.


def _device() -> torch.device:
    return torch.device("cuda:0")


def environment(out: Path, seconds: float) -> int:
    """Names and versions of everything that figures depend on."""
    about = gpu_timing.environment(_device())
    append(out / "phases.jsonl", {"environment": about})
    for name, value in about.items():
        print(f"{name:18}{value}")
    return 0


def check_entries(out: Path, seconds: float) -> int:
    """Every table entry of this architecture: random and exact numbers, every mask and dtype, two runs."""
    arch, ask, compilers = tables.architecture(_device()), tune.worker(), Compilers()
    deadline, done, wrong = time.monotonic() + seconds, 0, 0
    try:
        for row in tune.check_tables(arch, tune_targets.tuned(), ask, compilers, deadline):
            append(out / "checks.jsonl", row)
            done, wrong = done + 1, wrong + bool(row["wrong"])
            print(
                f"{tune.Target.of(row['kernel'], row['class'])}: {row['wrong'] or 'right'} ({row['seconds']} s)",
                flush=True,
            )
    finally:
        ask.close()
        compilers.close()
    whole = len(tune.entries_for(arch, tune_targets.tuned()))
    print(f"{NOTE}{done} of {whole} entries checked, {wrong} wrong")
    return int(wrong > 0)


def ceilings(out: Path, seconds: float) -> int:
    """Copy bandwidth and matrix rate, twice: the difference is what two runs differ by."""
    for _ in range(2):
        found = gpu_timing.ceilings(_device())
        append(out / "phases.jsonl", {"ceilings": found})
        print(
            f"{NOTE}copy {found['copy_gbps']:,.0f} GB/s, matrix product {found['matrix_tflops']:,.0f} TFLOP/s",
            flush=True,
        )
    return 0


def _ceilings_text(found: dict[str, float]) -> str:
    return f"copy {found['copy_gbps']:,.0f} GB/s, matrix product {found['matrix_tflops']:,.0f} TFLOP/s"


def measured_cases(phase: str) -> list[Case]:
    """Cases of a phase: those of a quick run first, then the others."""
    groups = {"attention": ["attention"], "linear_logprob": ["linear_logprob"], "mixture": list(MIXTURE)}
    groups["decode"] = ["decode_attention"]
    taken = {name for group in groups.values() for name in group}
    own = next((group for name, group in groups.items() if phase.startswith(name)), None)
    names = own or [name for name in OPERATIONS if name not in taken]
    wanted = {"attention_forward": ("forward",), "attention_backward": ("backward",)}.get(phase)
    found = [*cases(names, _device(), quick=True), *cases(names, _device())]
    return list(dict.fromkeys(case for case in found if wanted is None or case.phase in wanted))


def skipped_peers(case: Case) -> tuple[str, ...]:
    """flex_attention compiles for long: it is measured here only where nothing but it and varlen takes the shape."""
    problem = case.problem
    return ("flex",) if case.op == "attention" and not (problem.is_ragged or problem.window) else ()


def measure(phase: str) -> Callable[[Path, float], int]:
    """The phase that measures the cases of that name."""

    def run(out: Path, seconds: float) -> int:
        deadline, found, device = time.monotonic() + seconds, measured_cases(phase), _device()
        command = f"python -m benchmarks.gpu_check --only {phase}"
        session = kernels.start(device, command=command, results=out / "results.jsonl", seconds=0.15)
        print(kernels.ceilings_line(session))
        kernels.compile_ahead(session, found, time.monotonic() + 0.35 * seconds)
        for place, case in enumerate(found):
            if time.monotonic() > deadline:
                print(f"{NOTE}{place} of {len(found)} cases measured, next would be {case.label}")
                break
            session.skip = skipped_peers(case)
            session.add(kernels.measure(session, case))
        for text in mixture_shares(session.rows):
            print(f"{NOTE}{text}")
        wrong = [row for row in session.rows if row["is_ours"] and row["status"] in ("wrong", "error")]
        print(f"{NOTE}{len(session.rows)} rows, {len(wrong)} of ours wrong or in error")
        return int(bool(wrong))

    return run


def mixture_shares(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Routing, copies and sums of rows as a share of a layer's forward (goal: below 5 %); layers against cuBLAS."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["op"] in MIXTURE and row["phase"] == "forward" and row["is_ours"] and "us" in row:
            name = row["op"] + (" " + row["label"].split()[5] if row["op"] == "experts" else "")
            times.setdefault(row["label"].split()[0], {})[name] = row["us"]
    found = []
    for tokens, us in times.items():
        layer, parts = us.get("experts uniform"), [us.get(name) for name in MIXTURE[1:]]
        if layer is not None and None not in parts:
            found.append(f"{tokens}: routing and rows {sum(parts) / (layer + parts[0]):.1%} of the layer's forward")
    for row in rows:
        if row["op"] == "experts" and row["is_ours"] and "share_of_equal" in row:
            found.append(
                f"{row['label']} {row['phase']}: {row['share_of_equal']:.2f} of cuBLAS at equal FLOPs, goal "
                f"{MIXTURE_GOALS[row['phase']]}"
            )
    return found


def train(out: Path, seconds: float) -> int:
    """Training steps of the 7B shapes, with and without recomputation as time allows, and a trace of the first."""
    from benchmarks import train_step

    began, device = time.monotonic(), _device()
    for number, (recompute, lengths) in enumerate(train_step.CASES):
        if number and (time.monotonic() - began) * (number + 1) / number > seconds:
            print(f"{NOTE}{len(train_step.CASES) - number} cases left out for lack of time")
            break
        trace = None if number else out / "train_step.trace.json"
        found = train_step.run(device, recompute=recompute, lengths=lengths, trace=trace)
        append(out / "train.jsonl", gpu_timing.environment(device) | found)
        print(
            f"{NOTE}recomputation {recompute}: {found['layers']} layers, {found['tokens_per_second']:,.0f} tokens/s, "
            f"{found['mfu']:.1%} MFU, {found['peak_memory_gib']:.1f} GiB"
        )
    return 0


def plan_rates(out: Path, seconds: float) -> int:
    """What the planner assumes of a GPU, at the shapes of 7B and 8x22B, and its seconds for a block of each."""
    from benchmarks import plan_rates as rates
    from wizard_engine import plan

    began, name, wrong = time.monotonic(), torch.cuda.get_device_name(0), 0
    gpu = next((known for known in plan.GPUS if known.partition("-")[0] in name), "H200")
    for number, preset in enumerate(("7b", "8x22b")):
        if number and time.monotonic() - began > seconds / 2:
            print(f"{NOTE}{preset} left out for lack of time")
            break
        config = rates.PRESETS[preset]
        found = rates.compared(rates.measure(config, 8192, _device(), plan.GPUS[gpu]), preset, config, 8192, gpu)
        write_text(out / f"plan_rates_{preset}.json", json.dumps(found, indent=1))
        print(f"{NOTE}{preset}: planned block over measured {found['planned_over_measured']:.3f}, goal within 10 %")
        wrong += abs(found["planned_over_measured"] - 1) > rates.GOAL
    return int(wrong > 0)


def rollout(out: Path, seconds: float) -> int:
    """The engine at the shapes of 7B: steps of single tokens, a rollout."""
    from benchmarks import rollout as engine

    for row in engine.measure("7b", _device()):
        append(out / "rollout.jsonl", gpu_timing.environment(_device()) | row)
        print(NOTE + engine.text_of(row))
    return 0


def tests(out: Path, seconds: float) -> int:
    """The kernels' tests on the GPU, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        print(f"{NOTE}pytest is not installed: not run")
        return 0
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    return int(subprocess.run(command, cwd=ROOT).returncode != 0)


PHASES = (
    Phase("environment", 20, environment), Phase("tables", 80, check_entries), Phase("ceilings", 20, ceilings),
    Phase("attention_forward", 75, measure("attention_forward")),
    Phase("attention_backward", 52, measure("attention_backward")),
    Phase("linear_logprob", 40, measure("linear_logprob")), Phase("mixture", 47, measure("mixture")),
    Phase("row_kernels", 34, measure("row_kernels")), Phase("train_step", 45, train),
    Phase("decode", 22, measure("decode")), Phase("rollout", 60, rollout),
    Phase("plan_rates", 20, plan_rates), Phase("pytest", 25, tests),
)  # fmt: skip


# The parent: starts the phases, watches the time, keeps the books.


def share_of(phases: Sequence[Phase], place: int, left: float) -> float:
    """Seconds that a phase may take: its share of what is left for it and those behind it."""
    return left * phases[place].seconds / sum(phase.seconds for phase in phases[place:])


def run_phases(
    phases: Sequence[Phase],
    out: Path,
    seconds: float,
    launch: Callable[[Phase, Path, float], Outcome],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the phases in order until the time is spent; each outcome is on disk before the next phase starts."""
    deadline, outcomes = clock() + seconds, []
    for place, phase in enumerate(phases):
        left = deadline - clock()
        if left < LEAST_SECONDS:
            outcome = Outcome(phase.name, "skipped", 0.0, "the minutes are spent")
        else:
            print(f"== {phase.name}: {left:.0f} s left", flush=True)
            outcome = launch(phase, out, share_of(phases, place, left))
        print(f"== {phase.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.note}", flush=True)
        outcomes.append(outcome)
        append(out / "phases.jsonl", vars(outcome))
        write_text(out / "summary.md", summary(out, outcomes))
    return outcomes


def spawn(phase: Phase, out: Path, seconds: float, command: Sequence[str] | None = None) -> Outcome:
    """Run a phase in a process group of its own; it is told 85 % of its seconds and ended after all of them."""
    words = [*(command or [sys.executable, "-m", "benchmarks.gpu_check"]), "--phase", phase.name]
    words += ["--out", str(out), "--seconds", f"{0.85 * seconds:.1f}"]
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    notes: list[str] = []
    reader = threading.Thread(target=_log, args=(process.stdout, out / "log.txt", phase.name, notes), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end_group(process)
    reader.join(timeout=5)
    status = {0: "done", 1: "wrong", None: "stopped"}.get(code, f"crashed (exit {code})")
    return Outcome(phase.name, status, round(time.monotonic() - began, 1), "; ".join(notes[-2:]))


def _end_group(process: subprocess.Popen) -> None:
    """End the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(stream: Any, path: Path, name: str, notes: list[str]) -> None:
    """Copy a phase's output to the terminal and, up to LOG_LINES lines, to the log; collect its notes."""
    with open(path, "a", encoding="utf-8") as file:
        for number, line in enumerate(stream):
            print(line, end="", flush=True)
            if number < LOG_LINES:
                file.write(f"[{name}] {line}")
                file.flush()
            if line.startswith(NOTE):
                notes.append(line.removeprefix(NOTE).strip())


def summary(out: Path, outcomes: Sequence[Outcome]) -> str:
    """summary.md: phases, environment, ceilings, wrong entries, the tables of results, the training step."""
    lines = read_lines(out / "phases.jsonl")
    about = next((line["environment"] for line in lines if "environment" in line), {})
    parts = [f"# GPU check: {about.get('gpu', 'unknown GPU')}, {about.get('date', '')[:10]}", "`make gpu-check`"]
    kept = ("driver", "torch", "triton", "ptxas", "cuda", "python", "commit", "power_limit_watt", "max_sm_mhz")
    parts.append(", ".join(f"{name} {about[name]}" for name in kept if about.get(name)))
    rows = [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.note} |" for o in outcomes]
    parts.append("\n".join(["| phase | status | s | |", "|---|---|---|---|", *rows]))
    for found in (line["ceilings"] for line in lines if "ceilings" in line):
        parts.append(_ceilings_text(found))
    parts += _checks_text(read_lines(out / "checks.jsonl")) + _rows_text(read_lines(out / "results.jsonl"))
    parts += [_train_text(row) for row in read_lines(out / "train.jsonl")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _checks_text(checks: Sequence[dict]) -> list[str]:
    if not checks:
        return []
    wrong = [row for row in checks if row.get("wrong")]
    lines = [f"- {row['kernel']} {row['class']} {row['config']}: {row['wrong']}" for row in wrong]
    return ["## Table entries", f"{len(checks)} checked, {len(wrong)} wrong", "\n".join(lines)]


def _rows_text(rows: Sequence[dict]) -> list[str]:
    whole = [row for row in rows if "op" in row]
    if not whole:
        return []
    untimed = [kernel_rows.line_of(row) for row in whole if row["status"] in ("wrong", "error")]
    shown = ["```\n" + "\n".join(untimed) + "\n```"] if untimed else []
    return ["## Kernels", kernel_rows.markdown(whole), *shown]


def _train_text(row: dict) -> str:
    from benchmarks import train_step

    return f"## Training step\n\n{train_step.text_of(row)}"


def default_out(name: str, date: datetime.date, folder: Path) -> Path:
    """folder/GPUNAME-DATE, with a number behind it where that is taken; only letters, digits, dot, _ and -."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{date.isoformat()}").strip("-")
    taken = (folder / (base if number == 1 else f"{base}-{number}") for number in range(1, 1000))
    return next(path for path in taken if not path.exists())


def finish(out: Path) -> None:
    """The roofline of what was measured."""
    rows = [row for row in read_lines(out / "results.jsonl") if "op" in row]
    if rows:
        write_text(out / "roofline.html", roofline.page_of(rows))


def main(args: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    reader = Parser("python -m benchmarks.gpu_check", __doc__)
    reader.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/GPUNAME-DATE")
    reader.add_argument("--minutes", type=float, default=9.0, help="for everything; default: %(default)s")
    names = [phase.name for phase in PHASES]
    reader.add_argument(
        "--only", nargs="+", metavar="PHASE", help=f"of {', '.join(names)}; default: all, in this order"
    )
    reader.add_argument("--phase", metavar="PHASE", help="run one phase in this process (used by itself)")
    reader.add_argument("--seconds", type=float, default=60.0, help="for --phase; default: %(default)s")
    options = reader.parse_args(args)
    chosen = reader.names("--only", options.only, names)
    if options.phase:
        reader.names("--phase", [options.phase], names)
    if not torch.cuda.is_available():
        print("gpu_check: expected a GPU, got none; nothing was run", file=sys.stderr)
        return 2
    if options.phase:
        return next(phase for phase in PHASES if phase.name == options.phase).run(options.out, options.seconds)
    return check([phase for phase in PHASES if phase.name in chosen], options)


def check(phases: Sequence[Phase], options: Any) -> int:
    """Run the phases, write the summary and the roofline, say what was left out."""
    today = datetime.datetime.now(datetime.UTC).date()
    out = (options.out or default_out(torch.cuda.get_device_name(0), today, ROOT / "benchmarks" / "results")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_phases(phases, out, 60 * options.minutes - 5, spawn)
    finish(out)
    left_out = [outcome.name for outcome in outcomes if outcome.status == "skipped"]
    print(f"not run for lack of time: {', '.join(left_out)}" if left_out else "every phase was run")
    print(f"written: {out}/summary.md")
    return int(any(outcome.status not in ("done", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
