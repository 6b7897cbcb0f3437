"""Measures co-teaching on rows of a scripted agent: `python measured_co_teach.py FOLDER ROWS` prints JSON.

rows, calls, seconds, calls_per_second, kib: resident memory after a tenth of the rows and at the end; peak_kib.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from varied_agents import Varied

from wizard_engine.agents import Ledger, Scheduler
from wizard_engine.data.records import Conversation, Message
from wizard_engine.synthesis import co_teach


class Rows(Sequence):
    """Rows that are made when they are taken."""

    def __init__(self, number):
        self.number, self.marks, self.highest = number, {}, -1

    def __len__(self):
        return self.number

    def __getitem__(self, place):
        if not 0 <= place < self.number:
            raise IndexError(place)
        if place > self.highest:
            self.highest = place
            if place == self.number // 10:
                self.marks["tenth"] = resident_kib()
        text = f"Question {place} " + "about a thing that is told at some length " * 8
        return Conversation((Message("user", text), Message("assistant", "x")), {"skill": f"skill {place % 20}"})


class Instant(Varied):
    """Keeps no requests."""

    is_instant = True

    def answer_one(self, request):
        reply = super().answer_one(request)
        self.requests.clear()
        return reply


def peak_kib():
    """Most resident memory since the program began; ru_maxrss counts the process that it was forked from, too."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def resident_kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def measure(folder, number):
    """The measurements of one run."""
    # Small batches: few rows are worked on at once, so that what grows is what every row leaves.
    rows, scheduler = Rows(number), Scheduler(Ledger(Path(folder) / "ledger.sqlite"), batch_size=16, quiet=True)
    who = {"ours": Instant("ours"), "rivals": [Instant("rival")], "judge": Instant("judge")}
    began = time.monotonic()
    settings = {"sft_threshold": 2.0, "dpo_threshold": 2.0, "suggester": Instant("suggester")}
    taught = co_teach(rows, **who, **settings, scheduler=scheduler, folder=Path(folder))
    seconds, calls = time.monotonic() - began, scheduler.asked.total()
    return {
        "rows": number,
        "calls": calls,
        "seconds": round(seconds, 1),
        "calls_per_second": round(calls / seconds),
        "lessons": len(taught.sft),
        "pairs": len(taught.preferences),
        "kib": {**rows.marks, "end": resident_kib()},
        "peak_kib": peak_kib(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
