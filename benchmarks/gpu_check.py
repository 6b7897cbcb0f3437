"""Checks and measures everything on this machine's GPU in one go, the most valuable first; nothing is installed.

  make gpu-check                                        the same as
  python -m benchmarks.gpu_check --minutes 8.5          results in benchmarks/results/GPUNAME-DATE
  make gpu-check ARGS="--out $OUT"                      results in that folder: six flat files, none over 16 MiB

Each phase is a process of its own, and each row is on disk the moment it is known. A case that ends its process or
loses the device costs itself alone: the phase goes on behind it. A phase may take its share of the minutes that are
left, and says what it would need to finish; when the minutes are spent, no further phase is started.

Exit status: 0; 1 where something was wrong, crashed or lost the device; 3 where nothing was, but phases were stopped or
left out; 2 where there is no GPU, no Triton, or the command line is wrong.
"""

import argparse
import datetime
import functools
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import Parser
from benchmarks.phase_processes import ROOT, Outcome, Phase, run_phases, spawn

MINUTES = 8.5
# Kept back of the minutes, for the start of this process and the last files.
SECONDS_BACK = 8.0


def default_out(name: str, date: datetime.date, folder: Path) -> Path:
    """folder/GPUNAME-DATE, with a number behind it where that is taken; only letters, digits, dot, _ and -."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{date.isoformat()}").strip("-")
    taken = (folder / (base if number == 1 else f"{base}-{number}") for number in range(1, 1000))
    return next(path for path in taken if not path.exists())


def minutes(text: str) -> float:
    """A number of minutes above 0 and at most a day; for `type=` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return value


def parser(names: Sequence[str]) -> Parser:
    """The command line."""
    reader = Parser("python -m benchmarks.gpu_check", __doc__)
    reader.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/GPUNAME-DATE")
    reader.add_argument("--minutes", type=minutes, default=MINUTES, help="for everything; default: %(default)s")
    reader.add_argument(
        "--only", nargs="+", metavar="PHASE", help=f"of {', '.join(names)}; default: all, in this order"
    )
    reader.add_argument("--cache", type=Path, metavar="FOLDER", help="kernels that benchmarks.compile_cache made ahead")
    reader.add_argument(
        "--stand-in", metavar="MODULE", help="its install() puts something in the place of the GPU first"
    )
    reader.add_argument("--phase", metavar="PHASE", help="run one phase in this process (used by itself)")
    reader.add_argument("--scratch", type=Path, help="for --phase: folder of what is no result")
    reader.add_argument("--seconds", type=float, default=60.0, help="for --phase; default: %(default)s")
    return reader


def main(args: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if args is None else args
    if importlib.util.find_spec("triton") is None:
        return _refuse("expected triton, got none; install the one that belongs to your torch")
    if "--stand-in" in arguments[:-1]:
        importlib.import_module(arguments[arguments.index("--stand-in") + 1]).install()
    from benchmarks import check_phases

    phases = check_phases.PHASES
    names = [phase.name for phase in phases]
    reader = parser(names)
    options = reader.parse_args(arguments)
    chosen = reader.names("--only", options.only, names)
    if options.phase:
        reader.names("--phase", [options.phase], names)
    if not torch.cuda.is_available():
        return _refuse("expected a GPU, got none")
    if options.phase:
        phase = next(phase for phase in phases if phase.name == options.phase)
        return check_phases.run_phase(phase, options.out, options.scratch, options.seconds)
    try:
        out = folder(options.out)
    except ValueError as error:
        reader.error(str(error))
    if options.cache:
        from benchmarks import compile_cache

        major, minor = torch.cuda.get_device_capability(0)
        print(compile_cache.use(options.cache, 10 * major + minor), flush=True)
    return check([phase for phase in phases if phase.name in chosen], out, options)


def _refuse(lack: str) -> int:
    print(f"gpu_check: {lack}; nothing was run", file=sys.stderr)
    return 2


def folder(out: Path | None) -> Path:
    """The folder of the results, there and writable.

    Raises:
        ValueError: it is a file, cannot be made or written, or has other things in it.
    """
    from benchmarks.check_files import foreign

    if out is None:
        today = datetime.datetime.now(datetime.UTC).date()
        out = default_out(torch.cuda.get_device_name(0), today, ROOT / "benchmarks" / "results")
    out = out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written, got {out} ({error.strerror})") from error
    if names := foreign(out):
        raise ValueError(
            f"--out: expected an empty folder or one of an earlier check, got {out} with {', '.join(names)}; "
            "choose a folder of its own, for whatever else is in it would be removed"
        )
    return out


def check(phases: Sequence[Phase], out: Path, options: Any) -> int:
    """Run the phases; say what was left out; returns the exit status."""
    from benchmarks.check_summary import report

    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    command += ["--stand-in", options.stand_in] if options.stand_in else []
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch:

        def launch(phase: Phase, seconds: float) -> Outcome:
            return spawn(phase, out, Path(scratch), seconds, command)

        seconds = 60 * options.minutes - SECONDS_BACK
        outcomes = run_phases(phases, out, seconds, launch, functools.partial(report, out))
    unfinished = [o for o in outcomes if o.status in ("skipped", "stopped", "left out")]
    for outcome in unfinished:
        print(f"{outcome.status}: {outcome.name} {outcome.note}")
    print(f"written: {out}/summary.md" + ("" if unfinished else "; every phase was run"))
    return status_of(outcomes)


def status_of(outcomes: Sequence[Outcome]) -> int:
    """The exit status of a check."""
    fine, unfinished = {"done"}, {"skipped", "stopped", "left out"}
    statuses = {outcome.status for outcome in outcomes}
    return 1 if statuses - fine - unfinished else 3 if statuses & unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
