"""Runs benchmarks: one aligned line per case, and the same as JSON lines.

python -m benchmarks
python -m benchmarks train generation --json results.jsonl
python -m benchmarks --quick
python -m benchmarks launches --preset 7b        commands with options of their own: see `--help` of each
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wizard_engine.runtime.files import write_text

# Commands that read their own options.
COMMANDS = ("launches", "compile_cache")
NAMES = ("packing", "minhash", "train", "generation", "serve", "losses")
SEED = 0


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: commit, hardware, versions, threads, date."""
    return {
        "commit": _commit(),
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": SEED,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Short hash of the checkout, with `+changes` where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, capture_output=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.returncode else "") if head.returncode == 0 else "unknown"


def _hardware() -> str:
    """Name of the processor and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = models[0] if models else name
    return f"{name}, {cores} cores"


def line_of(row: dict[str, Any]) -> str:
    """The aligned line of a row: op, shape, variant, median time and its spread, rate, ratio to the peer."""
    p20, p50, p80 = (1e3 * row["seconds"][key] for key in ("p20", "p50", "p80"))
    text = f"{row['op']:16}{row['shape']:76}{row['variant']:14}{p50:9.2f} ms ({p20:.2f} to {p80:.2f})"
    text = f"{text:142}{row['rate']:12,.0f} {row['unit']:12}"
    if "ratio" in row:
        ratio = row["ratio"]
        text += f"{ratio['p50']:6.2f}x {ratio['peer']} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    return text.rstrip()


def measure(name: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of one benchmark; a line says so where its peer is not installed."""
    module = importlib.import_module(f"benchmarks.{name}")
    present = module.PEER is None or importlib.util.find_spec(module.PEER) is not None
    if not present:
        print(f"{name}: {module.PEER} is not installed, nothing to compare with; pip install {module.PEER}")
    return module.run(quick=quick, peer=present)


def main(args: list[str] | None = None) -> int:
    """Runs what the command line names; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in COMMANDS:
        return importlib.import_module(f"benchmarks.{args[0]}").main(args[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of this machine.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"of {', '.join(NAMES)}; default: all; or one of the commands {', '.join(COMMANDS)}",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks.jsonl"), help="JSON lines; default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="small inputs, few repeats: shows that it works")
    options = parser.parse_args(args)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"name: expected some of {', '.join((*NAMES, *COMMANDS))}, got {', '.join(unknown)}")
    about = environment()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    lines = []
    with tqdm(options.names or NAMES, unit="benchmark", dynamic_ncols=True, leave=False, disable=None) as bar:
        for name in bar:
            bar.set_description(name)
            rows = measure(name, options.quick)
            with tqdm.external_write_mode():
                for row in rows:
                    print(line_of(row), flush=True)
            lines += [json.dumps(about | {"quick": options.quick} | row) + "\n" for row in rows]
    write_text(options.json, "".join(lines))
    print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
