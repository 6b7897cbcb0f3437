"""Measures this project's kernels beside their peers: one aligned line per case and variant, and JSON lines.

  python -m benchmarks.kernels                            every operation, all shapes (some minutes on a GPU)
  python -m benchmarks.kernels --op attention --quick     fewer shapes
  python -m benchmarks.kernels --compare OLD.json --fail-over 5%     exit status 1 where a row got slower
  python -m benchmarks.kernels --compare OLD.json NEW.json           the same of two files, nothing measured
  python -m benchmarks.kernels --table RESULTS.json       a Markdown table of a results file
  python -m benchmarks.kernels --op rms_norm --case D=4096 --profile   # one repetition for ncu or nsys

Every variant is checked against float64 before it is timed; a wrong one is timed too, and marked. Times are medians
with the 20th and 80th percentile, of variants that take turns, with a cold L2; kernel time and wall time apart; a
backward is timed alone. Rates are compared with a device copy and a matrix product (cuBLAS, on a GPU) measured in the
same run. Where there is no GPU the plain PyTorch code runs on small shapes, so that the harness itself can be tried.
"""

import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing, kernel_rows, roofline
from benchmarks.command_line import Parser, percent
from benchmarks.kernel_cases import OPERATIONS, Case, cases
from benchmarks.kernel_checks import Oracle, Verdict, repeats_bits
from benchmarks.kernel_peers import FAILURES, Variant, own_configs, variants
from benchmarks.kernel_problems import Function, Tensors, call_of
from benchmarks.kernel_rows import EQUAL_FLOPS, Row, add_rates, add_ratios, line_of
from benchmarks.tune_processes import Compilers, Job
from benchmarks.tune_targets import kernel_name
from kernels.configuration import architecture
from kernels.launch import record
from wizard_engine.runtime.files import write_text

SEED = 0
COMPILE_SECONDS = 300.0
DEFAULT_RESULTS = Path("runs/kernels.jsonl")


@dataclass
class Session:
    """One run: its device, what numbers depend on, the ceilings, and the rows so far, written as they come."""

    device: torch.device
    about: dict[str, Any]
    ceilings: dict[str, float]
    results: Path | None = None
    profile: bool = False
    seconds: float = 0.3
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    compiled: dict[tuple[Case, str], dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        """Print the rows, keep them, and append them to the results file."""
        for row in rows:
            print(line_of(row), flush=True)
        self.rows += rows
        if self.results:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            with open(self.results, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def start(device: torch.device, *, command: str, **options: Any) -> Session:
    """A session on the device, its ceilings measured (not for a profile)."""
    about = gpu_timing.environment(device) | {"command": command}
    unmeasured = {"copy_gbps": float("inf"), "matrix_tflops": float("inf")}
    ceilings = unmeasured if options.get("profile") else gpu_timing.ceilings(device)
    return Session(device, about, ceilings, **options)


def compile_ahead(session: Session, chosen: Sequence[Case], deadline: float) -> None:
    """Compile what the cases launch in parallel processes, into the cache that launches look up.

    What became of each goes into `session.compiled`; variants that did not compile, or ended the compiler's process,
    are never launched.
    """
    if session.device.type != "cuda":
        return
    arch = architecture(session.device)
    names = [(case, name, config) for case in chosen for name, config in own_configs(case, session.device).items()]
    jobs = [Job("attention_forward" if config else "", case, arch, tuple(config.items())) for case, _, config in names]
    compilers = Compilers()
    results = compilers.results(compilers.submit(jobs), deadline)
    compilers.close()
    session.compiled |= {(case, name): result for (case, name, _), result in zip(names, results)}
    print(f"{len(jobs)} compiled ahead, {sum('error' in result for result in results)} of them failed", flush=True)


def measure(session: Session, case: Case) -> list[Row]:
    """Rows of a case: every variant checked, then those that ran timed together."""
    inputs = _Inputs(case, case.problem.inputs(case.dtype, session.device, SEED))
    chosen = [v for v in variants(case, session.device) if v.name in (session.only or [v.name])]
    chosen = [v for v in chosen if v.name not in session.skip]
    rows = [_new_row(session, case, variant) for variant in chosen]
    calls: dict[str, gpu_timing.Call] = {}
    for variant, row in zip(chosen, rows):
        call = _checked_call(session, inputs, variant, row) if _can_run(session, case, variant, row) else None
        if call is not None:
            calls[variant.name] = call
    inputs.oracle = None
    _clear(session.device)
    if session.profile:
        _profile(session, case, calls, rows)
    elif calls:
        rows += _time_or_say(session, case, calls, rows)
    calls.clear()
    inputs = None
    _clear(session.device)
    return rows


def _can_run(session: Session, case: Case, variant: Variant, row: Row) -> bool:
    """False for what is absent or did not compile; what is known of the binary goes into the row."""
    code = session.compiled.get((case, variant.name), {})
    if variant.absent:
        row |= {"status": "absent", "note": variant.absent}
        return False
    if "error" in code:
        row |= {"status": "error", "note": f"not compiled: {code['error']}"}
        return False
    row |= code
    return True


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _new_row(session: Session, case: Case, variant: Variant) -> Row:
    work = case.work
    return session.about | {
        "op": case.op,
        "phase": case.phase,
        "label": case.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        "variant": variant.name,
        "is_ours": variant.is_ours,
        "flops": work.flops,
        "bytes": work.bytes,
        "ceilings": session.ceilings,
        "reproduce": reproduce(case, variant),
    }


def reproduce(case: Case, variant: Variant) -> str:
    """The command line that measures this row alone."""
    command = ["python", "-m", "benchmarks.kernels", "--op", case.op, "--case", case.label, "--variant", variant.name]
    return shlex.join(command)


@dataclass
class _Inputs:
    """A case's inputs, and one copy that every variant which writes its inputs is timed on."""

    case: Case
    tensors: Tensors
    oracle: Oracle | None = None
    scratch: Tensors | None = None

    def verdicts(self, results: Tensors) -> list[Verdict]:
        """Against the oracle, which is computed once."""
        self.oracle = self.oracle or Oracle(self.case.problem, self.tensors, self.case.phase)
        return self.oracle.verdicts(results)

    def call(self, variant: Variant, function: Function, *, timed: bool) -> gpu_timing.Call:
        """The variant on the inputs, on a copy where it writes them: a new one, or where `timed` the common one."""
        tensors = self.tensors
        if variant.mutates or self.case.problem.in_place:
            if timed and self.scratch is None:
                self.scratch = {name: x.clone() for name, x in self.tensors.items()}
            tensors = self.scratch if timed else {name: x.clone() for name, x in self.tensors.items()}
        return call_of(self.case.problem, function, tensors, self.case.phase)


def _checked_call(session: Session, inputs: _Inputs, variant: Variant, row: Row) -> gpu_timing.Call | None:
    """The variant's call where it runs, right or wrong, as the row says; otherwise None, and the row says why."""
    try:
        function = variant.prepare(inputs.case.problem, session.device)
        _compare_results(inputs, variant, function, row)
        call = inputs.call(variant, function, timed=True)
        for _ in range(2):
            call()
        row["peak_memory_gib"] = gpu_timing.peak_memory_gib(call, session.device)
        if variant.is_ours:
            row["config"] = configurations(call)
        return call
    except FAILURES as error:
        row |= {"status": "error", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"}
        print(f"{inputs.case.label} {variant.name}: {row['note']}", flush=True)
        gpu_timing.check_alive(session.device)
        return None


def _compare_results(inputs: _Inputs, variant: Variant, function: Function, row: Row) -> None:
    """Run the variant twice, compare the first run with the oracle and with the second, and put it into the row."""
    runs = [inputs.call(variant, function, timed=False)() for _ in range(2)]
    first, second = ({name: x.detach() for name, x in run.items()} for run in runs)
    verdicts = inputs.verdicts(first)
    worst = max(verdicts, key=lambda verdict: verdict.error / verdict.limit if verdict.limit else verdict.error)
    row |= {"max_error": worst.error, "error_limit": worst.limit, "rms_error": max(v.rms for v in verdicts)}
    row |= {"checked": inputs.oracle.scope, "repeats_bits": repeats_bits(first, second)}
    wrong = [str(verdict) for verdict in verdicts if not verdict.is_right]
    row |= {"status": "wrong", "note": "; ".join(wrong)} if wrong else {"status": "right"}


def configurations(call: gpu_timing.Call) -> dict[str, dict[str, Any]]:
    """Tiles, warps and stages of each kernel that a call launches; empty where it launches none of ours."""
    with record() as launches:
        call()
    return {
        kernel_name(launch): {
            name: value for name, value in launch.options.items() if isinstance(value, bool | int | str)
        }
        for launch in launches
    }


def _time_or_say(session: Session, case: Case, calls: dict[str, gpu_timing.Call], rows: list[Row]) -> list[Row]:
    """`_time`; where it fails (memory, as a rule: all variants are there at once), the rows that ran say so."""
    try:
        return _time(session, case, calls, rows)
    except FAILURES as error:
        gpu_timing.check_alive(session.device)
        for row in rows:
            if row["status"] in ("right", "wrong"):
                why = f"not timed: {type(error).__name__}: {' '.join(str(error).split())[:240]}"
                row["note"] = "; ".join(filter(None, [row.get("note", ""), why]))
        return []


def _time(session: Session, case: Case, calls: dict[str, gpu_timing.Call], rows: list[Row]) -> list[Row]:
    """Fill the rows in; returns the row of the matrix product of as many operations, for a case of products."""
    flops, equal = {}, []
    if case.problem.is_matrix:
        name = EQUAL_FLOPS
        calls[name], flops[name] = gpu_timing.matrix_call(session.device, case.dtype, case.work.flops)
        equal = [_new_row(session, case, Variant(name)) | {"status": "right", "flops": flops[name], "bytes": 0}]
    names = {name: f"{case.range_name}.{name.replace(' ', '_')}" for name in calls}
    timings = gpu_timing.time_calls(calls, session.device, seconds=session.seconds, ranges=names)
    ours = next((name for name in calls if name in ("triton", "reference")), next(iter(calls)))
    state = gpu_timing.state_under(calls[ours], session.device)
    for row in rows + equal:
        timing = timings.get(row["variant"])
        if timing is None:
            continue
        row |= {"kernel_us": timing.kernel_us, "wall_us": timing.wall_us, "us": timing.us, "repeats": timing.repeats}
        row |= state
        if state.get("throttle"):
            notes = [row.get("note", ""), f"throttled: {', '.join(state['throttle'])}"]
            row["note"] = "; ".join(filter(None, notes))
        add_rates(row, row["flops"], row["bytes"], timing.us, case.problem.is_matrix, session.ceilings)
    add_ratios(rows + equal)
    return equal


def _profile(session: Session, case: Case, calls: dict[str, gpu_timing.Call], rows: list[Row]) -> None:
    """One repetition of each call inside its NVTX range, nothing else between cudaProfilerStart and Stop."""
    for row in rows:
        call = calls.get(row["variant"])
        if call is None:
            continue
        name = f"{case.range_name}.{row['variant'].replace(' ', '_')}"
        call()
        with gpu_timing.profiled(session.device), gpu_timing.marked(name, session.device):
            call()
        row |= {"status": "profiled", "note": f"NVTX range {name}"}
        for line in profiler_lines(row["reproduce"], name):
            print(line)


def profiler_lines(command: str, name: str) -> list[str]:
    """Command lines that record a range with Nsight Compute and Nsight Systems; clocks are left as they are."""
    run = f"{command} --profile"
    return [
        f"  ncu --nvtx --nvtx-include '{name}/' --clock-control none --set full -o {name} {run}",
        f"  nsys profile -c cudaProfilerApi -t cuda,nvtx -o {name} {run}",
    ]


def parser() -> Parser:
    """The command line."""
    reader = Parser("python -m benchmarks.kernels", __doc__)
    reader.add_argument("--op", nargs="+", metavar="NAME", help=f"of {', '.join(OPERATIONS)}; default: all")
    reader.add_argument("--case", metavar="TEXT", help="only cases whose shape contains this text")
    reader.add_argument("--variant", nargs="+", metavar="NAME", default=[], help="only these variants, such as triton")
    reader.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    reader.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    reader.add_argument("--profile", action="store_true", help="one repetition in NVTX ranges, no flush, nothing timed")
    reader.add_argument(
        "--json",
        type=Path,
        default=DEFAULT_RESULTS,
        metavar="PATH",
        help="JSON lines; the roofline is written beside them as .html; default: %(default)s",
    )
    reader.add_argument(
        "--compare", nargs="+", type=Path, metavar="FILE", help="OLD, with what is measured now; OLD NEW, two files"
    )
    reader.add_argument(
        "--fail-over", type=percent, default=0.05, metavar="SHARE", help="slowdown that fails --compare; default: 5%%"
    )
    reader.add_argument("--table", type=Path, metavar="RESULTS", help="print a Markdown table of a results file")
    return reader


def main(args: list[str] | None = None) -> int:
    """Runs what the command line names; returns the exit status."""
    arguments = sys.argv[1:] if args is None else args
    reader = parser()
    options = reader.parse_args(arguments)
    names = reader.names("--op", options.op, list(OPERATIONS))
    if options.compare and len(options.compare) > 2:
        reader.error(f"--compare: expected one or two files, got {len(options.compare)}")
    try:
        if options.table:
            print(kernel_rows.markdown(kernel_rows.read_rows(options.table)))
            return 0
        old = kernel_rows.read_rows(options.compare[0]) if options.compare else []
        if options.compare and len(options.compare) == 2:
            return _compare(kernel_rows.read_rows(options.compare[1]), old, options.fail_over)
        rows = _measure_all(reader, options, names, arguments)
        return _compare(rows, old, options.fail_over) if options.compare else 0
    except ValueError as error:
        reader.error(str(error))


def _compare(new: list[Row], old: list[Row], limit: float) -> int:
    changes = kernel_rows.compare(new, old, limit)
    print(kernel_rows.report(changes, limit))
    return int(any(change.is_worse for change in changes))


def _measure_all(reader: Parser, options: Any, names: list[str], arguments: Sequence[str]) -> list[Row]:
    device = _device(reader, options.device)
    chosen = [case for case in cases(names, device, options.quick) if (options.case or "") in case.label]
    if not chosen:
        reader.error(
            f"--case: expected a part of a shape of {', '.join(names)}, got {options.case!r}, which is in none"
        )
    names = dict.fromkeys(variant.name for case in chosen for variant in variants(case, device))
    reader.names("--variant", options.variant, list(names))
    announce(device)
    command = shlex.join(["python", "-m", "benchmarks.kernels", *arguments])
    results = None if options.profile else options.json
    if results:
        results.unlink(missing_ok=True)
    session = start(
        device,
        command=command,
        results=results,
        profile=options.profile,
        seconds=0.1 if options.quick else 0.3,
        only=options.variant,
    )
    print("  ".join(f"{key} {value}" for key, value in session.about.items()))
    print(ceilings_line(session))
    if not options.profile:
        compile_ahead(session, chosen, time.monotonic() + COMPILE_SECONDS)
    for case in chosen:
        session.add(measure(session, case))
    if not options.profile:
        page = options.json.with_suffix(".html")
        write_text(page, roofline.page_of(session.rows))
        print(f"written: {options.json}, {page}")
    return session.rows


def announce(device: torch.device) -> None:
    """Say first where figures come from, if not from a GPU."""
    if device.type != "cuda":
        print("These are CPU figures: no GPU is used, the plain PyTorch code runs on small shapes, wall time only.")


def _device(reader: Parser, name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        reader.error("--device: expected a machine with a GPU for cuda, got none; use --device cpu")
    return torch.device("cuda:0" if has_gpu and name != "cpu" else "cpu")


def ceilings_line(session: Session) -> str:
    """The ceilings of a session as text."""
    if session.profile:
        return "profile: nothing is timed"
    copy, matrix = session.ceilings["copy_gbps"], session.ceilings["matrix_tflops"]
    return f"ceilings of this run: copy {copy:,.0f} GB/s, matrix product {matrix:,.2f} TFLOP/s"


if __name__ == "__main__":
    sys.exit(main())
