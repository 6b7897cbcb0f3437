"""An arena of ten rivals and two judges at several sizes: calls a second, peak memory, share of the ledger in the time.

python tests/evaluation/measured_arena.py OUT PROMPTS ...      prints a JSON line for each number of prompts
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

from scripted import judge, rival

from recipes import arena
from wizard_engine.agents import Ledger, register
from wizard_engine.data.records import conversation, write_rows

RIVALS, JUDGES = 10, 2
spent = {"store": 0.0, "lookup": 0.0}


def peak_kib():
    """Most resident memory since the program began; ru_maxrss counts the process that it was forked from, too."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def timed(name: str) -> None:
    """Count the time within a method of the ledger."""
    method = getattr(Ledger, name)

    def measured(self, *arguments):
        began = time.perf_counter()
        try:
            return method(self, *arguments)
        finally:
            spent[name] += time.perf_counter() - began

    setattr(Ledger, name, measured)


def measure(out: Path, prompts: int) -> dict:
    """One arena of so many prompts."""
    shutil.rmtree(out, ignore_errors=True)
    write_rows(out / "rows.jsonl", [conversation(f"What is {i} and 1?", f"It is {i + 1}.") for i in range(prompts)])
    spent.update(store=0.0, lookup=0.0)
    began = time.perf_counter()
    report = arena.main(
        arena.Config(
            models=tuple(f"m{i}=scripted:m{i}" for i in range(RIVALS)),
            judge=tuple(f"scripted:j{i}" for i in range(JUDGES)),
            prompts=out / "rows.jsonl",
            n=prompts,
            out=out / "arena",
            quiet=True,
        )
    )
    seconds = time.perf_counter() - began
    calls = sum(counts["replies"] for tasks in report["calls"].values() for counts in tasks.values())
    return {
        "battles": sum(pair[kind] for pair in report["pairwise"] for kind in ("wins", "losses", "ties", "errors")),
        "calls": calls,
        "seconds": seconds,
        "calls_per_second": calls / seconds,
        "ledger_share": sum(spent.values()) / seconds,
        "peak_mb": peak_kib() / 1024,
    }


def main() -> None:
    """Measure all sizes one after another, the smallest first: peaks only grow."""
    for i in range(RIVALS):
        register(f"scripted:m{i}", lambda i=i: rival(f"m{i}"))
    for i in range(JUDGES):
        register(f"scripted:j{i}", lambda i=i: judge(f"j{i}"))
    timed("store")
    timed("lookup")
    for prompts in sorted(map(int, sys.argv[2:])):
        print(json.dumps(measure(Path(sys.argv[1]), prompts)), flush=True)


if __name__ == "__main__":
    main()
