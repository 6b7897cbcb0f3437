"""Parts of the report on a run of one's own: its agents, its stages, and what was measured while they trained."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wizard_engine.html.page import card, section, table, tiles

from . import report_parts as parts

# Held-out measure -> its name on the page, and whether less of it is better.
MEASURES = {
    "loss": ("loss, nats", True),
    "accuracy": ("accuracy, %", False),
    "preferred": ("chosen answers that are likelier, %", False),
    "margin": ("margin", False),
    "auc": ("area under the curve", False),
    "reward": ("reward", False),
    "checked": ("right answers, %", False),
    "finished": ("answers that end by themselves, %", False),
    "length": ("tokens of an answer", None),
}
PERCENT = ("accuracy", "preferred", "checked", "finished")


def header(about: Mapping[str, Any], seconds: float) -> str:
    """Heading, a sentence on what ran, and figures."""
    figures = [*about.get("figures", []), (parts.duration(seconds), "all of it")]
    name, text = escape(str(about["name"])), escape(str(about["text"]))
    return (
        '<div class="eyebrow">The WizardLM-2 recipe, end to end</div>'
        f'<h1>{name}</h1><p class="headline">{text}</p>{tiles(figures)}'
    )


def agents(roles: Mapping[str, str], failures: Mapping[str, int]) -> str:
    """Who did what in this run, and why calls failed."""
    body = table(("role", "agent", "kind"), [(role, spec, kind(spec)) for role, spec in roles.items()])
    cards = [card(body, title="Who does what")]
    if failures:
        lines = [(reason, f"{count:,}") for reason, count in failures.items()]
        cards.append(card(table(("reason", "calls"), lines, numeric=(1,)), title="Failed calls"))
    return section("Agents", *cards)


def kind(spec: str) -> str:
    """What an agent is, by its spec."""
    programs = {"world:": "program on the embedded world", "reference:": "program on the rows' references"}
    programs |= {"scripted:": "replies of a file", "openai:": "endpoint"}
    return next((name for prefix, name in programs.items() if spec.startswith(prefix)), "model of this machine")


def held_out(measured: Sequence[Mapping[str, Any]]) -> str:
    """Every measure of every training stage, before and after, with the paired difference."""
    lines = []
    for stage in measured:
        for number, (name, before) in enumerate(stage["before"].items()):
            difference = stage.get("difference", {}).get(name)
            before, after = mean(before), mean(stage["after"].get(name))
            if before is None or after is None:
                continue
            first = (parts.slice_name(stage["slice"]), parts.stage_name(stage["stage"]), f"{stage['rows']:,}")
            title = MEASURES.get(name, (name.replace("_", " "), None))[0]
            shown = (title, value(name, before), value(name, after), change(name, difference))
            lines.append((*(first if number == 0 else ("", "", "")), *shown))
    if not lines:
        return ""
    titles = ("slice", "stage", "rows", "measure", "before", "after", "change")
    return section(
        "What each stage bought on held-out rows",
        card(table(titles, lines, numeric=(2, 4, 5, 6))),
        lead="Measured by the training stages themselves on rows that they do not learn from, before their first and "
        "after their last step. Changes are paired over the rows; behind ± stand two standard errors.",
    )


def mean(measured: Any) -> float | None:
    """A measure without its standard error."""
    if isinstance(measured, list | tuple):
        measured = measured[0] if measured else None
    return None if isinstance(measured, bool) or not isinstance(measured, int | float) else float(measured)


def value(name: str, number: float) -> str:
    """A measure as text."""
    return f"{100 * number:.1f}" if name in PERCENT else f"{number:.3g}" if name == "length" else f"{number:.3f}"


def change(name: str, difference: Sequence[float] | None) -> str:
    """A paired difference with two standard errors."""
    if difference is None:
        return "–"
    scale = 100 if name in PERCENT else 1
    digits = 1 if name in PERCENT or name == "length" else 3
    return f"{scale * difference[0]:+.{digits}f} ± {2 * scale * difference[1]:.{digits}f}"


def stages(graph: Sequence[Mapping[str, Any]]) -> str:
    """Every stage: whether it is done, why it is not, its time and rate."""
    lines = [
        (
            stage["stage"],
            stage["state"] + (f": {stage['why']}" if stage.get("why") else ""),
            "–" if stage.get("seconds") is None else parts.duration(stage["seconds"]),
            "–" if stage.get("tokens_per_second") is None else f"{stage['tokens_per_second']:,.0f}",
        )
        for stage in graph
    ]
    if not lines:
        return ""
    body = table(("stage", "state", "time", "tokens/s"), lines, numeric=(2, 3))
    return section("The stages of this run", card(body))
