"""One row per compiled form of a table entry: its resources and instructions, and what is wrong with it.

Compilation uses Triton's cache, and worker processes: a failed assertion of the compiler ends its process.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.issue_model import overlapped_exponentials
from benchmarks.launch_forms import Case, launch_of
from benchmarks.machine_code import SHARED_PER_BLOCK, MachineCode, compile_launch, count

Row = dict[str, Any]
FAILURES = (CompilationError, OutOfResources, PTXASError, RuntimeError, ValueError, AssertionError)
# Prefixes of opcodes that are counted, by the name of the count.
COUNTED = {
    "HGMMA": "HGMMA",
    "HMMA": "HMMA",
    "UTMALDG": "UTMALDG",
    "UTMASTG": "UTMASTG",
    "LDGSTS": "LDGSTS",
    "EX2": "MUFU.EX2",
    "LDL": "LDL",
    "STL": "STL",
}


def row_of(case: Case, code: MachineCode) -> Row:
    """What a case's binary takes and does, bytes for memory and counts for instructions."""
    loops = code.main_loops
    counts = {name: code.count(prefix) for name, prefix in COUNTED.items()}
    counts["UTCMMA"] = sum(i.base.startswith("UTC") and i.is_matrix for i in code.instructions)
    return _named(case) | {
        "registers": code.registers,
        "spill_store_bytes": code.spill_store_bytes,
        "spill_load_bytes": code.spill_load_bytes,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "num_warps": code.num_warps,
        "blocks": code.blocks_per_multiprocessor,
        "occupancy": round(code.occupancy, 3),
        "counts": {name: n for name, n in counts.items() if n},
        "load_bytes": code.vector_bytes["load"],
        "store_bytes": code.vector_bytes["store"],
        "specialised": code.is_specialised,
        "serialised": code.is_serialised,
        "instructions": len(code.instructions),
        "loop": len(loops[0]) if loops else 0,
        "loop_spills": count(loops[0], "LDL", "STL") if loops else 0,
        "overlapped": round(overlapped_exponentials(loops[0]), 3) if loops else 0.0,
    }


def _named(case: Case) -> Row:
    return {
        "label": case.label,
        "kernel": case.table,
        "arch": case.arch,
        "class": dict(case.shape),
        "config": dict(case.config),
        "form": case.form,
    }


def problems(row: Row) -> list[str]:
    """Problems of a row as text; empty where it keeps its entry's promises."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    reasons, counts, config = [], row["counts"], row["config"]
    spilled = row["spill_store_bytes"] + row["spill_load_bytes"]
    if spilled:
        reasons.append(f"spills {spilled} bytes, {row['loop_spills']} instructions in the main loop")
    if row["shared_bytes"] > SHARED_PER_BLOCK[row["arch"]]:
        reasons.append(f"takes {row['shared_bytes']} bytes of shared memory of {SHARED_PER_BLOCK[row['arch']]}")
    if row["serialised"]:
        reasons.append("wgmma serialised: every product waits for the one before")
    promises_tma = bool(config.get("TMA")) and row["arch"] >= 90
    if promises_tma and not counts.get("UTMALDG"):
        reasons.append("TMA promised, but no UTMALDG")
    if promises_tma and row["arch"] == 90 and not counts.get("HGMMA"):
        reasons.append("TMA promised, but its tiles are too small for HGMMA")
    if config.get("VARIANT") == "rotated" and counts.get("HGMMA") and not row["overlapped"]:
        reasons.append("VARIANT rotated, but no exponential between a product and its wait")
    return reasons


def compile_case(case: Case) -> Row:
    """The row of a case, with `error` where it does not compile; what the compiler prints is kept off the terminal."""
    with _captured() as log:
        try:
            return row_of(case, compile_launch(launch_of(case), case.arch))
        except FAILURES as error:
            return _named(case) | {"error": f"{type(error).__name__}: {_reason(str(error), log)}"}


def _reason(message: str, log: Path) -> str:
    """The message, with the compiler's own assertion or first error where it printed one."""
    _flush()
    lines = log.read_text(errors="replace").splitlines()
    printed = [line for line in lines if "Assertion" in line or "error:" in line]
    return " ".join(f"{message} {printed[0] if printed else ''}".split())[:300]


@contextlib.contextmanager
def _captured() -> Iterator[Path]:
    """Send what this process and its children print inside the block to a file; Triton prints from C++, too."""
    with tempfile.NamedTemporaryFile() as file:
        _flush()
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield Path(file.name)
        finally:
            _flush()
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def compile_all(
    cases: Sequence[Case], jobs: int, done: Callable[[], Any], work: Callable[[Case], Row] = compile_case
) -> list[Row]:
    """`work` of every case, in their order, in `jobs` processes, 0 for this one; `done` is called after each."""
    if jobs == 0:
        return [_then(done, work(case)) for case in cases]
    rows: dict[Case, Row] = {}
    with _pool(jobs) as pool:
        futures = {pool.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                rows[futures[future]] = _then(done, future.result())
    for case in (case for case in cases if case not in rows):
        rows[case] = _then(done, _in_own_process(case, work))
    return [rows[case] for case in cases]


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def _in_own_process(case: Case, work: Callable[[Case], Row]) -> Row:
    """Run a case in a separate process, after it or another case ended the shared one."""
    with _pool(1) as pool:
        future: Future[Row] = pool.submit(work, case)
        try:
            return future.result()
        except BrokenProcessPool:
            return _named(case) | {"error": "the compiler ended its process"}


def _then(done: Callable[[], Any], row: Row) -> Row:
    done()
    return row
