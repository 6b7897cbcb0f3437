"""Independent sections of the report: data path, attributes, evolved problem, curves, examples, tables."""

import math
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from wizard_engine.html import charts
from wizard_engine.html.flow import FlowNode, flow
from wizard_engine.html.page import Html, card, chip, grid, legend, pre, section, table

STYLE = """
.steps { list-style:none; margin:0; padding:0 0 0 26px; border-left:2px solid #d5deea }
.steps li { position:relative; padding:0 0 22px }
.steps li:last-child { padding-bottom:2px }
.steps li::before { content:""; position:absolute; left:-33px; top:5px; width:12px; height:12px; border-radius:50%;
                    background:#3a72c4; box-shadow:0 0 0 4px #fff }
.steps .pair { display:grid; grid-template-columns:minmax(0,3fr) minmax(0,2fr); gap:10px 26px; align-items:start;
               margin-top:8px }
.steps p { margin:2px 0 0; font-size:16.5px }
@media (max-width:760px) { .steps .pair { grid-template-columns:minmax(0,1fr) } }
.steps mark { background:#fdf0c9; padding:0 2px; border-radius:3px }
.answers { display:grid; gap:12px; grid-template-columns:repeat(auto-fit,minmax(min(100%,190px),1fr)) }
.answers h4 { margin:0 0 6px; font-size:13px; font-weight:600; display:flex; justify-content:space-between; gap:8px }
.answers .right pre { border-color:#bfe3d0; background:#f3fbf7 }
.answers .wrong pre { border-color:#f0cfcf; background:#fdf6f6 }
.ask { font-size:15.5px; margin-bottom:12px }
.outcome { display:flex; height:12px; width:150px; border-radius:4px; overflow:hidden; margin-top:5px }
.up { color:#2f9467 } .down { color:#cf4a4a }
"""
NAMES = {"base": "base", "sft": "SFT", "stage_dpo": "Stage-DPO", "rleif": "RLEIF"}


# ---- words and numbers ----------------------------------------------------------------------------------------------


def stage_name(name: str) -> str:
    """Display name of a stage, also inside slash-joined names; other names are unchanged."""
    return "/".join(NAMES.get(part, part) for part in str(name).split("/"))


def slice_name(number: Any) -> str:
    """ "slice 2" for a number, else the name itself."""
    return f"slice {number}" if isinstance(number, int) else str(number)


def duration(seconds: float) -> str:
    """Seconds as "8.4 s", "9 min 12 s" or "1 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def standard_error(share: float, total: int) -> float:
    """sqrt(p (1 - p) / n) of a share; 0 without observations."""
    return math.sqrt(share * (1 - share) / total) if total else 0.0


def interval_text(interval: Sequence[float] | None) -> str:
    """An interval of shares as "52.1 to 58.9 %"."""
    return "–" if not interval else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def change(value: float | None, before: float | None) -> Html:
    """Difference of two shares in points, coloured; empty if either is unknown."""
    if value is None or before is None:
        return Html("")
    points = 100 * (value - before)
    kind = "up" if points >= 0.05 else "down" if points <= -0.05 else "quiet"
    return Html(f'<span class="{kind}">{points if kind != "quiet" else 0.0:+.1f}</span>')


def outcome_bar(wins: int, ties: int, losses: int) -> Html:
    """A bar of three parts: won, tied, lost."""
    total = max(1, wins + ties + losses)
    colours = ((wins, charts.GREEN), (ties, "#d9dfe6"), (losses, charts.RED))
    spans = "".join(f'<i style="width:{100 * n / total:.2f}%;background:{colour}"></i>' for n, colour in colours)
    return Html(f'<div class="outcome" title="won {wins}, tied {ties}, lost {losses}">{spans}</div>')


# ---- sections -------------------------------------------------------------------------------------------------------


def data_flow(nodes: Sequence[FlowNode]) -> str:
    """The path of the data with counts; one column on a narrow screen."""
    if not nodes:
        return ""
    wide, narrow = flow(nodes), flow(nodes, width=360, columns=1)
    lead = "Rows at each place. What is dropped on the way is counted, and its reason kept beside it."
    return section(
        "The path of the data", f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>', lead=lead
    )


def attribute_shifts(shifts: Sequence[Mapping[str, Any]]) -> str:
    """Shares of attribute values before sampling, their targets, and after sampling."""
    if not shifts:
        return ""
    colours = {"natural": charts.GREY, "target": charts.GOLD, "achieved": charts.BLUE}
    cards = []
    for shift in shifts:
        series = {name: (shift[name], colour) for name, colour in colours.items() if shift.get(name)}
        chart = charts.grouped_bars([str(v) for v in shift["values"]], series, width=330, label=shift["attribute"])
        cards.append(card(chart, title=str(shift["attribute"])))
    lead = "Share of the rows by attribute: as they came, as the targets ask, and after weighted sampling."
    return section("Weighted sampling", legend(list(colours.items())), grid(cards), lead=lead)


def evolved_chain(steps: Sequence[Mapping[str, str]], title: str = "A problem, evolved") -> str:
    """A row and its evolved forms, new words marked."""
    if not steps:
        return ""
    items, before = [], None
    for step in steps:
        text = step["instruction"]
        shown = escape(text) if before is None else marked(before, text)
        items.append(
            f"<li>{chip(step.get('operator') or 'original', '' if before is not None else 'plain')}"
            f'<div class="pair"><p>{shown}</p>{pre(step.get("answer", ""))}</div></li>'
        )
        before = text
    lead = "One row from the natural corpus and its evolved forms, with the answers that the agents gave."
    return section(title, card(f'<ol class="steps">{"".join(items)}</ol>'), lead=lead)


def marked(before: str, after: str) -> Html:
    """The words of `after`, those that are not in `before` at that place marked."""
    old, new = before.split(), after.split()
    pieces = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = escape(" ".join(new[start:end]))
        if words:
            pieces.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return Html(" ".join(pieces))


def learning_curves(curves: Mapping[str, Sequence[tuple[float, float]]], stage_colours: Mapping[str, str]) -> str:
    """Small charts, one for each name before the slash."""
    grouped: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, points in curves.items():
        chart, _, series = name.partition("/")
        grouped.setdefault(chart, {})[series or chart] = points
    cards = []
    for chart, series in grouped.items():
        colours = {
            name: stage_colours.get(name, charts.SERIES[i % len(charts.SERIES)]) for i, name in enumerate(series)
        }
        keys = legend([(stage_name(name), colour) for name, colour in colours.items()]) if len(series) > 1 else ""
        cards.append(card(keys, charts.lines(series, width=330, colours=colours, label=chart), title=chart))
    lead = "Strong lines: moving means; faint ones: the values as logged."
    return section("Learning curves", grid(cards), lead=lead) if cards else ""


def examples(items: Sequence[Mapping[str, Any]], stage_colours: Mapping[str, str]) -> str:
    """Held-out problems with the answers of each stage side by side."""
    if not items:
        return ""
    cards = []
    for item in items:
        answers = "".join(
            _answer(stage, text, item.get("correct", {}).get(stage)) for stage, text in item["answers"].items()
        )
        reference = f'<p class="quiet">Reference: {escape(str(item["reference"]))}</p>' if item.get("reference") else ""
        cards.append(
            card(f'<p class="ask">{escape(item["prompt"])}</p>{reference}<div class="answers">{answers}</div>')
        )
    lead = "The same held-out problems, answered after each stage, sampled at temperature 1."
    return section("Before and after", f'<div class="stack">{"".join(cards)}</div>', lead=lead)


def _answer(stage: str, text: str, correct: bool | None) -> str:
    mark = "" if correct is None else chip("right", "good") if correct else chip("wrong", "bad")
    kind = "" if correct is None else "right" if correct else "wrong"
    return f'<div class="{kind}"><h4>{escape(stage_name(stage))}{mark}</h4>{pre(text)}</div>'


def ablations(items: Sequence[Mapping[str, Any]]) -> str:
    """A table per ablation."""
    if not items:
        return ""
    cards = []
    header = ("setting", "greedy %", "sampled %", "")
    for item in items:
        lines = [_ablation_line(row) for row in item["rows"]]
        cards.append(card(table(header, lines, numeric=(1, 2)), title=item["name"]))
    return section("Ablations", grid(cards, wide=True), lead="One thing changed at a time; results as they fell.")


def _ablation_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    greedy, sampled = _share(row, "accuracy", "se"), _share(row, "sampled_accuracy", "sampled_se")
    return row["setting"], greedy, sampled, row.get("note", "")


def _share(row: Mapping[str, Any], name: str, error: str) -> str:
    if row.get(name) is None:
        return "–"
    return f"{100 * row[name]:.1f}" + (f" ± {100 * row[error]:.1f}" if row.get(error) is not None else "")


def call_table(calls: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Calls per agent and task; takes rows, or the counts of a ledger."""
    if isinstance(calls, Mapping):
        calls = [{"agent": agent, "task": task, **n} for agent, tasks in calls.items() for task, n in tasks.items()]
    if not calls:
        return ""
    numbers = [row.get("calls", row.get("replies", 0)) for row in calls]
    lines = [(row["agent"], row["task"], f"{n:,}", f"{row.get('failures', 0):,}") for row, n in zip(calls, numbers)]
    body = table(("agent", "task", "calls", "failures"), lines, numeric=(2, 3))
    return card(body, title="Agents' calls", note=f"{sum(numbers):,} in the ledger")


def phases(items: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of each phase of a rollout step, and the difference between sampler and trainer."""
    if not items:
        return ""
    names = list(dict.fromkeys(name for item in items for name in item["seconds"]))
    head = ("", *(name.replace("_", " ") for name in names), "step", "idle", "apart")
    lines = [
        (
            item["name"],
            *(f"{item['seconds'].get(name, 0.0):.3f}" for name in names),
            f"{item['step']:.3f}",
            f"{100 * item['tail_idle']:.0f} %",
            f"{item['difference']:.0e}",
        )
        for item in items
    ]
    note = (
        "Mean seconds of a rollout; share of the sampling with nothing left to sample; largest difference between "
        "sampler and trainer, nats of a token"
    )
    return card(table(head, lines, numeric=tuple(range(1, len(head)))), title="RLEIF, phase by phase", note=note)


def timing(items: Sequence[Mapping[str, Any]]) -> str:
    """Time of each stage."""
    if not items:
        return ""
    lines = [(str(item["name"]), item["seconds"], duration(item["seconds"])) for item in items]
    return card(charts.bars(lines, width=440, label="time"), title="Time")
