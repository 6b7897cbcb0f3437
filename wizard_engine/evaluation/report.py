"""The report of a progressive run: one self-contained HTML page, without script or outside resources.

`write_report(path, summary, run, details)` needs the keys of summary.json (seed, seconds, stages, pairwise); every part
of `details` is optional; the page omits absent parts.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypedDict

from wizard_engine.html import charts
from wizard_engine.html.charts import Interval, Point
from wizard_engine.html.flow import FlowNode
from wizard_engine.html.page import card, grid, legend, page, pre, section, table, tiles
from wizard_engine.runtime.files import write_text

from . import report_parts as parts
from . import run_parts
from .method_search import method_section

STAGE_COLOURS = {"base": charts.GREY, "sft": charts.BLUE, "stage_dpo": charts.VIOLET, "rleif": charts.ORANGE}
AGENTS_NOTE = (
    "The agents of this run are programs, not language models. They parse the embedded world's word problems, work on "
    "their expression trees and answer, evolve, judge and label from there, behind the same protocol as a model would. "
    "So the numbers show that the pipeline works from end to end, not what a language model would gain."
)


class Details(TypedDict, total=False):
    """Contents of the page beside the summary; every part may be absent.

    Attributes:
        title: heading of the page.
        command: the command that reproduces the run; default `make demo SEED=...`.
        data_flow: [{"name", "count", "note", "lane"}]: the steps of the data, in order.
        attributes: [{"attribute", "values", "natural", "target", "achieved"}]: shares per value; target may be None.
        method_searches: see `method_search.method_searches`.
        evolved: [{"operator", "instruction", "answer"}]: a problem and its evolved forms, the original first.
        curves: "chart/series" or "chart" -> [(step, value)]: series of one chart share its axes.
        examples: [{"prompt", "answers": {stage: text}, "correct": {stage: bool}, "reference"}].
        elo: [{"model", "elo", "low", "high", "battles"}].
        mt_bench: [{"model", "overall", "turns": [a, b], "categories": {name: score}, "missing"}].
        calls: [{"agent", "task", "calls", "failures"}], or what Ledger.counts() returns.
        ablations: [{"name", "rows": [{"setting", "accuracy", "se", "sampled_accuracy", "sampled_se", "note"}]}].
        machine: {"CPU": "...", ...}: hardware, software, and the size of the student.
        timing: [{"name", "seconds"}].
        phases: [{"name", "steps", "seconds": {phase: mean per rollout}, "tail_idle", "difference"}] of reinforcement
            learning: idle share of sampling, largest difference of log-probabilities between sampler and trainer, nats.
        agents_note: replaces the statement that the agents are programs.
        run: "name", "text" (sentences on what ran), "figures" [(value, caption)]: the head of a run of one's own.
        graph: [{"stage", "state", "why", "reads", "seconds", "tokens_per_second", "calls", "call_tokens"}]: every stage
            of the run, and the stages that it reads.
        agents: see `run_facts.agents_used`.   base: facts of the base model, see `run_facts.model_facts`.
        held_out: [{"slice", "stage", "rows", "before", "after", "difference": {name: [mean, standard error]}}]: what
            training stages measured on rows that they did not learn from.
        bought: further measures of stages, [{"slice", "stage", "rows", "on", "measure", "before", "after", "change"}]:
            before and after [value, low, high], change [mean, standard error]; see `run_facts`.
        starts: (slice, stage) -> those of the model that it starts from.
        learned: attribute -> value -> share of the rows that were learned from.
        own_examples: [{"prompt", "answers": {name: text}, "verdicts": {name: text}, "kind"}].
        prompts, held_out_files: rows of the arena, and of RLEIF's held-out answers.
    """

    title: str
    command: str
    data_flow: list[FlowNode]
    attributes: list[dict[str, Any]]
    method_searches: list[dict[str, Any]]
    evolved: list[dict[str, str]]
    curves: dict[str, list[tuple[float, float]]]
    examples: list[dict[str, Any]]
    elo: list[dict[str, Any]]
    mt_bench: list[dict[str, Any]]
    calls: list[dict[str, Any]] | dict[str, dict[str, dict[str, int]]]
    ablations: list[dict[str, Any]]
    machine: dict[str, str]
    timing: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    agents_note: str
    run: dict[str, Any]
    graph: list[dict[str, Any]]
    agents: list[dict[str, Any]]
    base: dict[str, str]
    held_out: list[dict[str, Any]]
    bought: list[dict[str, Any]]
    starts: dict[tuple[int, str], tuple[int, str]]
    learned: dict[str, dict[str, float]]
    own_examples: list[dict[str, Any]]
    prompts: Path | None
    held_out_files: Sequence[Path]


def write_report(path: Path, summary: Mapping[str, Any], run: Path, details: Details | None = None) -> None:
    """Writes the page of a run.

    Args:
        path: the HTML file.
        summary: seed, seconds, stages [{slice, name, accuracy, correct, total, sampled_accuracy, seconds}] and
            pairwise [{a, b, wins, losses, ties, win_rate, ci95}].
        run: directory of the run, named on the page.
    Raises:
        ValueError: a key of the summary is missing, or there is neither a measured stage nor a text on the run.
    """
    write_text(Path(path), report_page(summary, Path(run), details or {}))


def report_page(summary: Mapping[str, Any], run: Path, details: Details) -> str:
    """The page as text; arguments and errors as in `write_report`."""
    missing = [name for name in ("seed", "seconds", "stages", "pairwise") if name not in summary]
    if missing or not (summary["stages"] or details.get("run")):
        what = ", ".join(missing) or "at least one stage"
        raise ValueError(f"summary: expected {what}, got a summary without; write summary.json first")
    about = details.get("run")
    body = _own_body(summary, details) if about else _body(summary, details)
    title = details.get("title") or (_title(summary) if summary["stages"] else str(about["name"] if about else ""))
    best = headline_pair(summary["pairwise"])
    return page(
        title,
        header=run_parts.header(details, summary, best) if about else _header(title, summary),
        body="".join(body),
        footer=escape(f"Run {run.name}, seed {summary['seed']}. The numbers are in {run.name}/summary.json."),
        style=parts.STYLE,
    )


def _body(summary: Mapping[str, Any], details: Details) -> list[str]:
    """Sections of a run on the embedded world."""
    return [
        f'<section><div class="note">{escape(details.get("agents_note") or AGENTS_NOTE)}</div></section>',
        _stages(summary["stages"]) if summary["stages"] else "",
        parts.data_flow(details.get("data_flow", [])),
        parts.attribute_shifts(details.get("attributes", [])),
        parts.evolved_chain(details.get("evolved", [])),
        method_section(details.get("method_searches", [])),
        parts.learning_curves(details.get("curves", {}), STAGE_COLOURS),
        _preference(summary["pairwise"], details.get("elo", [])),
        _mt_bench(details.get("mt_bench", []), is_world=True),
        parts.examples(details.get("examples", []), STAGE_COLOURS),
        parts.ablations(details.get("ablations", [])),
        _running(summary, details),
    ]


def _own_body(summary: Mapping[str, Any], details: Details) -> list[str]:
    """Sections of a run of one's own."""
    order = [stage["stage"] for stage in details.get("graph", [])]
    return [
        run_parts.stages(details.get("graph", [])),
        run_parts.bought(details.get("held_out", []), details.get("bought", []), order),
        run_parts.agents(details.get("agents", [])),
        _stages(summary["stages"]) if summary["stages"] else "",
        parts.data_flow(details.get("data_flow", [])),
        run_parts.attributes(details.get("attributes", []), details.get("learned", {})),
        parts.evolved_chain(details.get("evolved", []), "A row, evolved"),
        method_section(details.get("method_searches", [])),
        parts.learning_curves(details.get("curves", {}), STAGE_COLOURS),
        _preference(summary["pairwise"], details.get("elo", [])),
        _mt_bench(details.get("mt_bench", []), is_world=False),
        run_parts.examples(details.get("own_examples", []))
        or parts.examples(details.get("examples", []), STAGE_COLOURS),
        parts.ablations(details.get("ablations", [])),
        _running(summary, details),
    ]


# ---- header ---------------------------------------------------------------------------------------------------------


def last_slice(stages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Stages of the last slice."""
    return [stage for stage in stages if stage["slice"] == stages[-1]["slice"]]


def _first_and_last(summary: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return summary["stages"][0], summary["stages"][-1]


def _sampled(stage: Mapping[str, Any]) -> float:
    value = stage.get("sampled_accuracy")
    return stage["accuracy"] if value is None else value


def _title(summary: Mapping[str, Any]) -> str:
    first, last = _first_and_last(summary)
    slices = len({stage["slice"] for stage in summary["stages"]})
    over = f" over {slices} slices" if slices > 1 else ""
    return f"From {100 * _sampled(first):.0f} % to {100 * _sampled(last):.0f} % right answers{over}"


def _header(title: str, summary: Mapping[str, Any]) -> str:
    """Heading, a summary in two sentences, and the figures."""
    final = last_slice(summary["stages"])
    path = ", ".join(f"{parts.stage_name(stage['name'])} {100 * _sampled(stage):.1f} %" for stage in final)
    text = f"Answers sampled at temperature 1, last slice: {path}."
    best = headline_pair(summary["pairwise"])
    if best is not None:
        verb = "beats" if best["wins"] > best["losses"] else "loses to" if best["wins"] < best["losses"] else "meets"
        names = f"{parts.stage_name(best['a'])} {verb} {parts.stage_name(best['b'])}"
        text += f" In the blind comparison {names} {best['wins']} : {best['losses']} with {best['ties']} ties."
    return (
        '<div class="eyebrow">The WizardLM-2 recipe, end to end, on the embedded world</div>'
        f'<h1>{escape(title)}</h1><p class="headline">{escape(text)}</p>{tiles(_figures(summary, best))}'
    )


def headline_pair(pairwise: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The comparison of rleif with sft, rleif first, the last of several; else the last with a win rate."""
    known = [pair for pair in pairwise if pair.get("win_rate") is not None]
    turned = [*known, *map(swapped, known)]
    rleif_over_sft = [pair for pair in turned if "rleif" in str(pair["a"]) and "sft" in str(pair["b"])]
    return (rleif_over_sft or known or [None])[-1]


def swapped(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison seen from the other model."""
    interval = pair.get("ci95")
    return {
        **pair,
        "a": pair["b"],
        "b": pair["a"],
        "wins": pair["losses"],
        "losses": pair["wins"],
        "win_rate": 1 - pair["win_rate"],
        "ci95": interval and [1 - interval[1], 1 - interval[0]],
    }


def _figures(summary: Mapping[str, Any], best: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    first, last = _first_and_last(summary)
    names = f"{parts.stage_name(first['name'])} to {parts.stage_name(last['name'])}"
    figures = [
        (f"{100 * _sampled(first):.1f} → {100 * _sampled(last):.1f} %", f"sampled accuracy, {names}"),
        (f"{100 * first['accuracy']:.1f} → {100 * last['accuracy']:.1f} %", f"greedy accuracy, {names}"),
    ]
    if best is not None:
        interval = parts.interval_text(best.get("ci95"))
        caption = f"blind wins of {parts.stage_name(best['a'])} over {parts.stage_name(best['b'])}, 95 % {interval}"
        figures.append((charts.percent(best["win_rate"]), caption))
    problems = f"{last['total']:,} held-out problems a stage"
    return [*figures, (parts.duration(summary["seconds"]), f"all of it, seed {summary['seed']}; {problems}")]


# ---- accuracy -------------------------------------------------------------------------------------------------------


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of every stage: a chart over all slices (one per slice on a narrow screen) and a table."""
    groups: dict[Any, list[Point]] = {}
    for stage in stages:
        groups.setdefault(stage["slice"], []).extend(_points(stage))
    named = [(parts.slice_name(name), points) for name, points in groups.items()]
    colours = {stage["name"]: STAGE_COLOURS.get(stage["name"], charts.TEAL) for stage in stages}
    keys = [(parts.stage_name(name), colour) for name, colour in colours.items()]
    top = max(point.value + 2 * point.error for _, points in named for point in points)
    narrow = "".join(charts.grouped_points([group], top=top, width=360, height=240, label=group[0]) for group in named)
    chart = charts.grouped_points(named, width=1040, height=320, label="accuracy by slice and stage")
    return section(
        "What each stage bought",
        card(
            legend([*keys, ("sampled at temperature 1", charts.SOFT)], rings=("sampled at temperature 1",)),
            f'<div class="wide">{chart}</div><div class="narrow stack">{narrow}</div>',
        ),
        '<div style="height:18px"></div>',
        card(_stage_table(stages)),
        lead="Exact-answer accuracy in per cent on held-out problems, disjoint from everything the student saw. Dots: "
        "greedy answers. Rings: one sample per problem at temperature 1. Bars: two standard errors.",
    )


def _points(stage: Mapping[str, Any]) -> list[Point]:
    colour = STAGE_COLOURS.get(stage["name"], charts.TEAL)
    points = [Point(stage["name"], stage["accuracy"], parts.standard_error(stage["accuracy"], stage["total"]), colour)]
    sampled = stage.get("sampled_accuracy")
    if sampled is not None:
        points.append(Point(stage["name"], sampled, parts.standard_error(sampled, stage["total"]), colour, hollow=True))
    return points


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """A line per stage, with the change against the stage before it in the same slice."""
    lines, before = [], None
    for stage in stages:
        same = before is not None and before["slice"] == stage["slice"]
        error = 100 * parts.standard_error(stage["accuracy"], stage["total"])
        sampled = stage.get("sampled_accuracy")
        lines.append(
            (
                "" if same else parts.slice_name(stage["slice"]),
                parts.stage_name(stage["name"]),
                f"{stage['correct']:,} / {stage['total']:,}" + _missing(stage),
                f"{100 * stage['accuracy']:.1f} ± {error:.1f}",
                parts.change(stage["accuracy"], before["accuracy"] if same else None),
                "–" if sampled is None else f"{100 * sampled:.1f}",
                parts.change(sampled, before.get("sampled_accuracy") if same else None),
                parts.duration(stage["seconds"]) if stage.get("seconds") is not None else "–",
            )
        )
        before = stage
    header = ("slice", "stage", "right", "greedy %", "change", "sampled %", "change", "time")
    return table(header, lines, numeric=range(2, 8))


def _missing(stage: Mapping[str, Any]) -> str:
    """How many answers are in no accuracy of a stage, greedy and sampled; "" for none."""
    counts = [stage.get(name, 0) for name in ("missing", "sampled_missing")]
    return f", {counts[0]} and {counts[1]} missing" if any(counts) else ""


# ---- preference -----------------------------------------------------------------------------------------------------


def _preference(pairwise: Sequence[Mapping[str, Any]], ratings: Sequence[Mapping[str, Any]]) -> str:
    """Blind win rates with intervals, their table, and Elo."""
    if not pairwise and not ratings:
        return ""
    rows = [
        Interval(
            f"{parts.stage_name(pair['a'])} : {parts.stage_name(pair['b'])}",
            pair["win_rate"],
            *pair["ci95"],
            f"{pair['wins']} : {pair['losses']}, {pair['ties']} ties",
            _colour(pair["a"]),
        )
        for pair in pairwise
        if pair.get("win_rate") is not None and pair.get("ci95")
    ]
    cards = []
    if rows:
        chart = charts.intervals(rows, reference=0.5, span=(0, 1), width=450, label="blind win rates")
        cards.append(card(chart, title="Win rate of the first over the second", note="ties left out"))
    if ratings:
        elo = [
            Interval(
                parts.stage_name(item["model"]),
                item["elo"],
                item["low"],
                item["high"],
                f"{item['elo']:.0f}",
                _colour(item["model"]),
            )
            for item in ratings
        ]
        chart = charts.intervals(elo, width=450, form=lambda value: f"{value:.0f}", label="Elo")
        cards.append(card(chart, title="Elo", note="Bradley-Terry, bootstrap median and 95 % interval"))
    return section(
        "Blind preference",
        grid(cards, wide=True),
        '<div style="height:18px"></div>',
        card(_pair_table(pairwise)) if pairwise else "",
        lead="The judge sees two unlabelled answers, their order drawn per prompt and played both ways; a model wins a "
        "prompt only if both games agree. Intervals: bootstrap over prompts.",
    )


def _colour(name: str) -> str:
    """Colour of the stage that a model's name mentions."""
    return next((colour for stage, colour in STAGE_COLOURS.items() if stage in str(name)), charts.TEAL)


def _pair_table(pairwise: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for pair in pairwise:
        wins, losses, ties = pair["wins"], pair["losses"], pair["ties"]
        judged = wins + losses + ties
        rate = pair.get("win_rate")
        with_ties = charts.percent((wins + ties / 2) / judged) if judged else "–"
        names = f"{parts.stage_name(pair['a'])} : {parts.stage_name(pair['b'])}"
        shown = "–" if rate is None else charts.percent(rate)
        interval = parts.interval_text(pair.get("ci95"))
        outcome = parts.outcome_bar(wins, ties, losses)
        lines.append((names, outcome, f"{wins} : {losses}", ties, pair.get("errors", 0), shown, interval, with_ties))
    header = (
        "first : second",
        "won, tied, lost",
        "wins : losses",
        "ties",
        "errors",
        "without ties",
        "95 %",
        "with ties",
    )
    return table(header, lines, numeric=range(2, 8))


# ---- MT-Bench, running ----------------------------------------------------------------------------------------------


def _mt_bench(results: Sequence[Mapping[str, Any]], *, is_world: bool) -> str:
    """Scores per category and turn, a column per model."""
    if not results:
        return ""
    categories = list(dict.fromkeys(name for result in results for name in result["categories"]))
    names = [parts.stage_name(result["model"]) for result in results]
    overall = [("overall", [r["overall"] for r in results])]
    overall += [(f"turn {turn}", [r["turns"][turn - 1] for r in results]) for turn in (1, 2)]
    single = [(category, [r["categories"].get(category) for r in results]) for category in categories]
    known = [value for _, values in overall + single for value in values if value is not None] or [1.0]
    cards = [
        card(
            charts.heatmap(
                [name for name, _ in rows],
                names,
                [values for _, values in rows],
                low=min(known) - 1,
                top=max(known),
                width=440,
                form=lambda value: f"{value:.2f}",
                label=title,
            ),
            title=title,
        )
        for title, rows in (("By turn", overall), ("By category", single))
    ]
    missing = sum(result.get("missing", 0) for result in results)
    lead = f"The judge rates each turn from 1 to 10; ratings that are missing: {missing}."
    if is_world:
        lead = "Two-turn questions of the world in the manner of MT-Bench: the second turn changes one number. The "
        lead += f"world's judge rates each turn from 1 to 10; ratings that are missing: {missing}."
    return section("Two-turn questions", grid(cards, wide=True), lead=lead)


def _running(summary: Mapping[str, Any], details: Details) -> str:
    """Calls of agents, times of stages, the machine, and the command that repeats the run."""
    command = details.get("command") or f"make demo SEED={summary['seed']}"
    machine = list(details.get("machine", {}).items())
    reproduce = card(pre(command), table(("", ""), machine) if machine else "", title="Reproduce")
    phases = parts.phases(details.get("phases", []))
    base = run_parts.base_model(details.get("base", {}))
    beside = f'<div class="stack">{parts.timing(details.get("timing", []))}{phases}{base}{reproduce}</div>'
    cards = [parts.call_table(details.get("calls", [])), beside]
    return section("How it ran", grid([item for item in cards if item], wide=True))
