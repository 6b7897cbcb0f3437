"""The search for an evolving method in the report: failure rates step by step, classes of failure with examples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wizard_engine.html import charts
from wizard_engine.html.charts import Interval
from wizard_engine.html.page import card, chip, grid, pre, section, table

from .report_parts import interval_text, marked

EXAMPLES = 2  # of each class


def method_searches(out: Path, slices: int) -> list[dict[str, Any]]:
    """The searches of a run: slice, measure, stopped, history, method of the end, examples of the initial method."""
    searches = []
    for number in range(1, slices + 1):
        folder = out / f"slice_{number}" / "evol_instruct"
        path = folder / "report.json"
        search = json.loads(path.read_text(encoding="utf-8")).get("method") if path.exists() else None
        if search and search.get("history"):
            method = (folder / "method.txt").read_text(encoding="utf-8").strip()
            found = {"slice": number, "method": method, "examples": _examples(folder / "method_failures.jsonl")}
            searches.append({name: search.get(name) for name in ("measure", "stopped", "history")} | found)
    return searches


def _examples(path: Path) -> list[dict[str, Any]]:
    """The first failures of each class under the initial method."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for line in path.open(encoding="utf-8") if path.exists() else ():
        failure = json.loads(line)
        if failure["step"] == 0:
            chosen.setdefault(failure["class"], []).append(failure)
    return [failure for failures in chosen.values() for failure in failures[:EXAMPLES]]


def method_section(searches: Sequence[Mapping[str, Any]]) -> str:
    """Failure rates with intervals, counts by class, examples and the last method; "" without a search."""
    if not searches:
        return ""
    cards = [part for search in searches for part in _cards(search)]
    lead = (
        "The evolving method is rewritten from the failures of its predecessors. Rates are of a development set that "
        "no rewriting sees. A method is replaced by one that fails less often, by more than chance if the run asks so."
    )
    return section("The evolving method", *cards, lead=lead)


def _cards(search: Mapping[str, Any]) -> list[str]:
    history = search["history"]
    classes = sorted({name for step in history for name in step["reasons"]})
    rows = [
        Interval(f"step {step['step']}", step["failure_rate"], *step["ci95"], interval_text(step["ci95"]))
        for step in history
        if step.get("ci95")
    ]
    chart = charts.intervals(rows, span=(0, 1), width=450, label="failure rates of the method in force") if rows else ""
    lines = [
        (
            step["step"],
            charts.percent(step["failure_rate"]),
            *(step["reasons"].get(name, 0) for name in classes),
            _tried(step),
        )
        for step in history
    ]
    counts = table(("step", "failed", *classes, "methods tried"), lines, numeric=range(len(classes) + 2))
    what = "classes of failure" if search.get("measure") == "classes" else "the paper's string rules"
    title = f"Slice {search['slice']}: {what}, ended with {search['stopped']}"
    return [
        grid([card(chart, counts, title=title), card(pre(search["method"]), title="The method")], wide=True),
        _example_table(search["examples"]),
    ]


def _tried(step: Mapping[str, Any]) -> str:
    rates = [candidate["failure_rate"] for candidate in step["candidates"]]
    if not rates:
        return ""
    best = f"{len(rates)}, best {charts.percent(min(rates))}"
    return f"{best}, taken" if step["accepted"] else f"{best}, none taken"


def _example_table(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    rows = [
        (
            chip(example["class"], "bad"),
            f"{example['by']}: {example['detail']}",
            example["instruction"],
            marked(example["instruction"], example["evolved"]),
        )
        for example in examples
    ]
    return card(table(("failure", "found by", "original", "evolved"), rows), title="Examples under the first method")
