"""Shares of the corpus of replies that readers read right: `python -m tests.agents.reply_rates [--all]`.

A reading is right where a careful person takes the reply so (see replies/README.md), or finds none and the reader has
none. It is wrong where the reader has another one. Where the reader alone has none, the model is asked again.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wizard_engine.agents import prompts, replies

REPLIES = Path(__file__).parent / "replies"
SCALE = {"judge", "rate", "rank"}
TEXTS = {"evolve", "rewrite", "suggest", "user", "optimise"}


def corpus(family: str) -> list[dict]:
    """The rows of a family, those written by hand first."""
    files = [REPLIES / f"{name}.jsonl" for name in (family, f"smollm2_{family}")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    return [json.loads(line) for text in texts for line in text.split("\n") if line]


def fields_of(family: str, row: dict) -> dict[str, str]:
    """Fields of a prompt with as many steps, instructions or cases as the row's."""
    given = row["fields"]
    count = given.get("steps", given.get("count", 0))
    cases = [(["a", "b"], "c")] * given.get("cases", 0)
    return {
        "answer_steps": "\n".join(["a step"] * count),
        "instructions": prompts.numbered(["an instruction"] * count),
        "trajectory": prompts.trajectory(cases),
        "answer": row.get("prompt", {}).get("answer", ""),
    }


def outcome(family: str, row: dict, meaning: Any) -> str:
    """ "right", "none" (there is a reading, and the reader has none) or "wrong"."""
    expected, grade = row["reading"], row["grade"]
    if grade == "content":
        return "right"
    if meaning is None:
        return "right" if expected is None or grade == "doubtful" else "none"
    if expected is None:
        return "wrong"
    return "right" if any(_same(family, meaning, each) for each in [expected, *row.get("also", [])]) else "wrong"


def _same(family: str, meaning: Any, expected: Any) -> bool:
    if family == "compare":
        return meaning is (expected == "Equal")
    if family == "rate":
        return tuple(meaning) == (expected,)
    if family == "analyse":
        cases = dict(re.findall(r"^Case (\d+): (.*)$", meaning, re.MULTILINE))
        return {n: " ".join(r.split()) for n, r in cases.items()} == {
            n: " ".join(r.split()) for n, r in expected.items()
        }
    if family == "diagnose":
        return list(meaning) == expected
    if family in TEXTS:
        return meaning.strip() == expected.strip()
    return meaning == expected if family == "tag" else tuple(meaning) == tuple(expected)


def rates(family: str, read: Callable[[str, dict], Any]) -> tuple[Counter, list[tuple[str, dict, Any]]]:
    """Counts of outcomes, and (outcome, row, meaning) of those that are not right."""
    counts, others = Counter(), []
    for row in corpus(family):
        meaning = read(row["reply"], fields_of(family, row))
        result = outcome(family, row, meaning)
        counts[result] += 1
        if result != "right":
            others.append((result, row, meaning))
    return counts, others


def main() -> None:
    """Prints a line a family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print each reply that is not read right")
    show = parser.parse_args().all
    for family in prompts.TASKS:
        counts, others = rates(family, lambda text, fields, family=family: replies.read_reply(family, text, fields))
        total = counts.total()
        shares = f"right {counts['right'] / total:6.1%}  none {counts['none']:3}  wrong {counts['wrong']:3}"
        print(f"{family:9} {total:4} replies  {shares}")
        for result, row, meaning in others if show else ():
            print(f"  {result}: {row['reply']!r}\n    {row['why']}\n    expected {row['reading']!r}, got {meaning!r}")


if __name__ == "__main__":
    main()
