"""Parts of the report on a run of one's own: its agents, base model and stages, and what each stage bought."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wizard_engine.html import charts
from wizard_engine.html.graph import STATES, GraphNode, graph
from wizard_engine.html.page import Html, card, chip, grid, legend, pre, section, table, tiles

from . import report_parts as parts

# Measure -> its name on the page, and whether less of it is better.
MEASURES = {
    "loss": ("loss, nats", True),
    "accuracy": ("accuracy, %", False),
    "preferred": ("chosen answers that are likelier, %", False),
    "margin": ("margin", False),
    "auc": ("area under the curve", False),
    "answer_auc": ("wrong answers found, area under the curve", False),
    "reward": ("reward", False),
    "checked": ("right answers, %", False),
    "finished": ("answers that end by themselves, %", False),
    "length": ("tokens of an answer", None),
    "greedy_accuracy": ("exact answers, greedy, %", False),
    "sampled_accuracy": ("exact answers, sampled, %", False),
    "wins": ("blind wins, ties half, %", False),
    "rating": ("rating of 1 to 10", False),
}
PERCENT = ("accuracy", "preferred", "checked", "finished", "greedy_accuracy", "sampled_accuracy", "wins")


def header(details: Mapping[str, Any], summary: Mapping[str, Any], best: Mapping[str, Any] | None) -> str:
    """Heading, sentences on what ran and what came of it, and figures.

    Args:
        best: the comparison of the arena that the page leads with.
    """
    about = details["run"]
    text = str(about["text"])
    if best is not None:
        names = f"{parts.stage_name(best['a'])} against {parts.stage_name(best['b'])}"
        text += f" In the blind comparison {names}: {best['wins']} won, {best['losses']} lost, {best['ties']} tied."
    figures = [*about.get("figures", []), *_figures(details), (parts.duration(summary["seconds"]), "all of it")]
    return (
        '<div class="eyebrow">The WizardLM-2 recipe, end to end</div>'
        f'<h1>{escape(str(about["name"]))}</h1><p class="headline">{escape(text)}</p>{tiles(figures)}'
    )


def _figures(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Parameters of the base model, stages that are done, and calls with their cost."""
    base, stages, agents_ = details.get("base", {}), details.get("graph", []), details.get("agents", [])
    figures = []
    if "parameters" in base:
        number = int(base["parameters"].replace(",", ""))
        shown = f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number:,}"
        figures.append((shown, f"parameters of {base['model']}"))
    if stages:
        done = sum(stage["state"] in ("done", "left out") for stage in stages)
        figures.append((f"{done} of {len(stages)}", "stages done or left out"))
    calls = sum(line["replies"] + line["failures"] for line in agents_)
    if calls:
        tokens = sum(line["tokens_in"] + line["tokens_out"] for line in agents_)
        costs = [line["cost"] for line in agents_ if line["cost"] is not None]
        money = f", cost {sum(costs):,.2f}" if costs else ""
        figures.append((f"{int(calls):,}", f"calls of agents, {int(tokens):,} tokens{money}"))
    return figures


def agents(lines: Sequence[Mapping[str, Any]]) -> str:
    """Who did what in this run, what it took, and why calls failed."""
    if not lines:
        return ""
    used = [_agent(line) for line in lines]
    head = ("agent", "kind", "roles", "calls", "failed", "tokens in", "tokens out", "price in, out", "cost")
    reasons = [
        (line["spec"], reason, f"{count:,}") for line in lines for reason, count in line.get("reasons", {}).items()
    ]
    cards = [card(table(head, used, numeric=range(3, 9)))]
    if reasons:
        body = table(("agent", "reason", "calls"), reasons, numeric=(2,))
        cards += ['<div style="height:18px"></div>', card(body, title="Failed calls")]
    lead = "All calls in the ledgers of the stages. Models of this machine count no tokens; prices are of a million."
    return section("Agents", *cards, lead=lead)


def _agent(line: Mapping[str, Any]) -> tuple[str, ...]:
    calls = line["replies"] + line["failures"]
    price = line["price"]
    return (
        line["spec"],
        kind(line["spec"]),
        ", ".join(line["roles"]) or "–",
        f"{int(calls):,}",
        f"{int(line['failures']):,}",
        *(f"{int(line[name]):,}" if line[name] else "–" for name in ("tokens_in", "tokens_out")),
        "–" if price is None else ", ".join(f"{of:g}" for of in price),
        "–" if line["cost"] is None else f"{line['cost']:,.2f}",
    )


def kind(spec: str) -> str:
    """What an agent is, by its spec."""
    programs = {"world:": "program on the embedded world", "reference:": "program on the rows' references"}
    programs |= {"scripted:": "replies of a file", "openai:": "endpoint"}
    return next((name for prefix, name in programs.items() if spec.startswith(prefix)), "model of this machine")


# ---- what stages bought ---------------------------------------------------------------------------------------------


def bought(held_out: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Every measure of every stage, before and after, with its interval.

    Args:
        held_out: what training stages measured themselves.   others: further measures, see `run_facts`.
        order: the stages as they ran.
    """
    lines = [line for stage in held_out for line in _held_out_lines(stage)] + [_line(item) for item in others]
    places = {where: number for number, where in enumerate(order)}
    lines.sort(key=lambda line: (line[0], places.get(f"slice_{line[0]}/{line[1]}", len(places))))
    shown, before = [], None
    for t, stage, *rest in lines:
        is_same = (t, stage) == before
        names = ("", "") if is_same else (parts.slice_name(t), _title(stage))
        shown.append((*names, *rest))
        before = (t, stage)
    if not shown:
        return ""
    titles = ("slice", "stage", "measure", "measured on", "rows", "before", "after", "change")
    return section(
        "What each stage bought",
        card(table(titles, shown, numeric=(4, 5, 6, 7))),
        lead="Before is the model that the stage started from. Behind ± stand two standard errors, in brackets 95 % "
        "intervals; changes are paired over the rows. No stage learned from the rows that it is measured on.",
    )


def _title(stage: str) -> str:
    return parts.stage_name(stage).replace("_", " ")


def _held_out_lines(stage: Mapping[str, Any]) -> list[tuple]:
    """Lines of what a training stage measured itself."""
    lines = []
    for name, before in stage["before"].items():
        after = stage["after"].get(name)
        if mean(before) is None or mean(after) is None:
            continue
        title = MEASURES.get(name, (name.replace("_", " "), None))[0]
        values = (with_error(name, before), with_error(name, after), change(name, stage["difference"].get(name)))
        lines.append((stage["slice"], stage["stage"], title, "held-out rows", f"{stage['rows']:,}", *values))
    return lines


def _line(item: Mapping[str, Any]) -> tuple:
    name = item["measure"]
    before, after = (with_interval(name, item[side]) if side in item else "–" for side in ("before", "after"))
    title = MEASURES.get(name, (name.replace("_", " "), None))[0]
    last = change(name, item.get("change"))
    on = item["on"] + (f", against {_title(item['against'])}" if "against" in item else "")
    return (item["slice"], item["stage"], title, on, f"{item['rows']:,}", before, after, last)


def mean(measured: Any) -> float | None:
    """A measure without its standard error."""
    if isinstance(measured, list | tuple):
        measured = measured[0] if measured else None
    return None if isinstance(measured, bool) or not isinstance(measured, int | float) else float(measured)


def value(name: str, number: float) -> str:
    """A measure as text."""
    if name == "rating":
        return f"{number:.2f}"
    return f"{100 * number:.1f}" if name in PERCENT else f"{number:.3g}" if name == "length" else f"{number:.3f}"


def with_error(name: str, measured: Sequence[float | None]) -> str:
    """A measure with two standard errors."""
    error = measured[1] if isinstance(measured, list | tuple) and len(measured) > 1 else None
    number = value(name, mean(measured))
    return number if error is None else f"{number} ± {value(name, 2 * error)}"


def with_interval(name: str, measured: Sequence[float | None]) -> str:
    """A measure with the ends of its interval."""
    number, low, high = measured
    interval = "" if low is None or high is None else f" [{value(name, low)}, {value(name, high)}]"
    return value(name, number) + interval


def change(name: str, difference: Sequence[float | None] | None) -> str:
    """A paired difference with two standard errors."""
    if mean(difference) is None:
        return "–"
    scale = 100 if name in PERCENT else 1
    digits = 1 if name in PERCENT or name == "length" else 3
    error = "" if difference[1] is None else f" ± {2 * scale * difference[1]:.{digits}f}"
    return f"{scale * difference[0]:+.{digits}f}{error}"


# ---- stages ---------------------------------------------------------------------------------------------------------


def stages(run_graph: Sequence[Mapping[str, Any]]) -> str:
    """The drawn graph of all stages, and their table: state, why it is so, time, rate, calls."""
    if not run_graph:
        return ""
    colours = {name: edge for name, (edge, _) in STATES.items() if any(s["state"] == name for s in run_graph)}
    picture = graph([_node(stage) for stage in run_graph])
    titles = ("stage", "state", "time", "tokens/s", "calls", "their tokens")
    lines = [
        (
            stage["stage"],
            Html(_state(stage)),
            "–" if stage.get("seconds") is None else parts.duration(stage["seconds"]),
            *(_count(stage.get(name)) for name in ("tokens_per_second", "calls", "call_tokens")),
        )
        for stage in run_graph
    ]
    return section(
        "The stages of this run",
        card(legend(list(colours.items())), f'<div class="wide">{picture}</div>'),
        '<div style="height:18px"></div>',
        card(table(titles, lines, numeric=(2, 3, 4, 5))),
        lead="An arrow leads from a stage to one that reads what it wrote. Tokens per second are those of the training "
        "steps; of RLEIF they are answer tokens over whole rollouts, sampling and scoring included.",
    )


def _node(stage: Mapping[str, Any]) -> GraphNode:
    name = str(stage["stage"])
    lane, _, _ = name.rpartition("/")
    is_timed = stage["state"] == "done" and stage.get("seconds") is not None
    note = parts.duration(stage["seconds"]) if is_timed else ""
    shown: GraphNode = {"name": name, "reads": stage.get("reads", []), "state": stage["state"], "note": note}
    return shown | {"lane": parts.stage_name(lane).replace("_", " "), "why": str(stage.get("why", ""))}


def _state(stage: Mapping[str, Any]) -> str:
    kinds = {"done": "good", "stale": "bad", "partly done": "bad", "running": ""}
    mark = chip(str(stage["state"]), kinds.get(stage["state"], "plain"))
    return mark + (f' <span class="quiet">{escape(str(stage["why"]))}</span>' if stage.get("why") else "")


def _count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


# ---- rows -----------------------------------------------------------------------------------------------------------


def attributes(shifts: Sequence[Mapping[str, Any]], learned: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of attribute values: of the rows as they came, of the targets, as drawn, and as learned from."""
    if not shifts:
        return ""
    names = {"came": "as they came", "target": "target", "drawn": "drawn", "learned": "learned from"}
    colours = dict(zip(names.values(), (charts.GREY, charts.GOLD, charts.BLUE, charts.GREEN)))
    cards = []
    for shift in shifts:
        of_learned = learned.get(shift["attribute"], {})
        values = list(shift["values"]) + (["unknown"] if of_learned.get("unknown") else [])
        columns = {"came": shift["natural"], "target": shift["target"], "drawn": shift["achieved"]}
        columns = {name: [*column, *[0.0] * (len(values) - len(column))] for name, column in columns.items() if column}
        columns |= {"learned": [of_learned.get(v, 0.0) for v in values]} if of_learned else {}
        series = {names[name]: (column, colours[names[name]]) for name, column in columns.items()}
        chart = charts.grouped_bars([str(v) for v in values], series, width=330, label=shift["attribute"])
        cards.append(card(chart, title=str(shift["attribute"])))
    lead = "Share of the rows by attribute, before and after: as they came, as drawn by weight, and as the models "
    lead += "learned from them, with evolved rows and lessons. Rows that agents wrote have the attributes that they "
    lead += "inherit; the others are unknown."
    return section("Attributes of the rows", legend(list(colours.items())), grid(cards), lead=lead)


def examples(items: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the answers of several models side by side, and what was said of them."""
    cards = []
    for item in items:
        answers = "".join(
            f"<div><h4>{escape(parts.stage_name(name))}{_verdict(item, name)}</h4>{pre(text)}</div>"
            for name, text in item["answers"].items()
        )
        cards.append(card(f'<p class="ask">{escape(item["prompt"])}</p><div class="answers">{answers}</div>'))
    if not cards:
        return ""
    lead = "The same held-out rows, answered by the models of the run; won, lost and tied ones in turn."
    return section("Before and after", f'<div class="stack">{"".join(cards)}</div>', lead=lead)


def _verdict(item: Mapping[str, Any], name: str) -> str:
    said = item["verdicts"].get(name)
    return "" if said is None else chip(said, {"won": "good", "lost": "bad"}.get(item["kind"], "plain"))


def base_model(facts: Mapping[str, str]) -> str:
    """Sizes of the base model."""
    return card(table(("", ""), list(facts.items())), title="Base model") if facts else ""
