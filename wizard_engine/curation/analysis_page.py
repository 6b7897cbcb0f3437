"""The analysis of training rows as files: rows with their attributes, tables as JSON, and an HTML page with plots."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wizard_engine.data.records import write_rows
from wizard_engine.html import charts
from wizard_engine.html.page import card, chip, grid, page, section, table, tiles
from wizard_engine.runtime.files import write_json, write_text

from .analysis import Analysis
from .attributes import ATTRIBUTES, view

BARS = 14
PAIRS_SHOWN = 6
ROWS_SHOWN = 8
ABOUT = {
    "topic": "keywords; clusters of words where there are none",
    "language": "ISO 639-1",
    "skill": "what the first user turn asks for",
    "source": "where the row came from",
    "difficulty": "numbers, clauses, constraints, steps",
    "perplexity": "of the answers, under the checkpoint",
    "length": "words; characters in CJK",
    "turns": "user turns",
    "toxic": "a word of the list occurs",
    "cluster": "near-duplicates of the row's user turns",
}


def write_analysis(analysis: Analysis, out: Path) -> dict[str, Path]:
    """Writes OUT/rows.jsonl, OUT/analysis.json and OUT/analysis.html; returns their paths by these names' stems."""
    paths = {"rows": out / "rows.jsonl", "analysis": out / "analysis.json", "page": out / "analysis.html"}
    write_rows(paths["rows"], analysis.rows)
    write_json(paths["analysis"], analysis.to_json())
    write_text(paths["page"], analysis_page(analysis))
    return paths


def analysis_page(analysis: Analysis, *, title: str = "What the training rows are like") -> str:
    """The HTML page of an analysis, complete in itself."""
    known = [name for name in ATTRIBUTES if analysis.tables[name]["values"]]
    attributes = section(
        "Attributes",
        grid([_attribute(name, analysis) for name in known]),
        lead="Each attribute by itself. Numbers in grey: rows, and their share of all rows.",
    )
    notes = "".join(f"<li>{charts.escape(note)}</li>" for note in analysis.notes)
    method = section("How the values came about", f'<ul class="quiet">{notes}</ul>')
    return page(
        title,
        header=f'<div class="eyebrow">Data analysis</div><h1>{charts.escape(title)}</h1>{_tiles(analysis)}',
        body=attributes + _pairs(analysis, known) + _examples(analysis) + method,
        style=".rows td:first-child { min-width:17em }",
        footer="Written by recipes/analyze.py. The same tables are in analysis.json, the rows in rows.jsonl.",
    )


def _tiles(analysis: Analysis) -> str:
    values = {name: analysis.tables[name]["values"] for name in ATTRIBUTES}
    length = analysis.tables["length"].get("summary")
    copies = 1 - next((item["share"] for item in values["cluster"] if item["value"] == "alone"), 0)
    toxic = next((item["count"] for item in values["toxic"] if item["value"] == "yes"), 0)
    figures = [
        (f"{len(analysis.rows):,}", f"rows from {_count(values['source'], 'source')}"),
        (_count(values["topic"], "topic"), f"in {_count(values['language'], 'language')}"),
        (f"{length['median']:,.0f} words" if length else "–", "median length of a row"),
        (charts.percent(copies), "of the rows have a near-duplicate"),
        (f"{toxic:,}", "rows with a word of the toxic list"),
    ]
    return tiles(figures)


def _count(values: Sequence[Any], noun: str) -> str:
    return f"{len(values)} {noun}{'' if len(values) == 1 else 's'}"


def _attribute(name: str, analysis: Analysis) -> str:
    """Card of one attribute: a histogram for numbers, else bars."""
    item = analysis.tables[name]
    if item["kind"] == "numeric":
        values = [value for value in analysis.columns[name] if value is not None]
        numbers = item["summary"]
        shown = ", ".join(f"{key} {charts.number(numbers[key])}" for key in ("mean", "p95", "max"))
        return card(charts.histogram(values, label=name), f'<p class="quiet">{shown}</p>', title=name, note=ABOUT[name])
    values = item["values"]
    lines = [(line["value"], line["count"], _counted(line)) for line in values[:BARS]]
    if len(values) > BARS:
        rest = values[BARS:]
        total = {"count": sum(line["count"] for line in rest), "share": sum(line["share"] for line in rest)}
        lines.append((f"{len(rest)} more", total["count"], _counted(total)))
    return card(charts.bars(lines, label=name), title=name, note=ABOUT[name])


def _counted(line: dict[str, Any]) -> str:
    return f"{line['count']:,} · {charts.percent(line['share'])}"


def _pairs(analysis: Analysis, known: Sequence[str]) -> str:
    """Association of every two attributes, and the most associated pairs in full."""
    if not analysis.pairs:
        return ""
    strength = {(pair["a"], pair["b"]): pair["cramers_v"] for pair in analysis.pairs}
    varied = [name for name in known if any(name in pair for pair in strength)]
    values = [[strength.get((a, b), strength.get((b, a))) for b in varied] for a in varied]
    ordered = sorted(analysis.pairs, key=lambda pair: -pair["cramers_v"])
    overview = card(
        charts.heatmap(varied, varied, values, top=1, width=420, form=lambda v: f"{v:.2f}", label="association"),
        title="Cramér's V",
        note="0: independent, 1: one determines the other",
    )
    lines = [(f"{pair['a']} – {pair['b']}", pair["cramers_v"], f"{pair['cramers_v']:.2f}") for pair in ordered[:BARS]]
    strongest = card(charts.bars(lines, width=440, label="association"), title="Strongest", note="the same numbers")
    return section(
        "Pairs of attributes",
        grid([overview, strongest, *map(_pair, ordered[:PAIRS_SHOWN])], wide=True),
        lead="How much one attribute tells about another. Weights on one marginal move every attribute tied to it.",
    )


def _pair(pair: dict[str, Any]) -> str:
    """Card of one contingency table: the shares within each row of the table."""
    shares = [[count / max(1, sum(line)) if count else None for count in line] for line in pair["counts"]]
    chart = charts.heatmap(
        pair["rows"],
        pair["columns"],
        shares,
        top=1,
        width=440,
        form=lambda v: f"{100 * v:.0f}",
        label=f"{pair['a']} by {pair['b']}",
    )
    return card(chart, title=f"{pair['b']} within {pair['a']}", note=f"per cent of a row; V = {pair['cramers_v']:.2f}")


def _examples(analysis: Analysis) -> str:
    """A few rows, drawn with a fixed seed, with what the heuristics say of them."""
    chosen = random.Random(0).sample(range(len(analysis.rows)), min(ROWS_SHOWN, len(analysis.rows)))
    lines = []
    for index in sorted(chosen):
        values = {name: analysis.columns[name][index] for name in ATTRIBUTES}
        text = " ".join(view(analysis.rows[index]).user.split())
        lines.append(
            (
                text if len(text) <= 160 else text[:159] + "…",
                chip(str(values["skill"])),
                chip(str(values["topic"]), "plain"),
                values["language"],
                values["difficulty"],
                values["length"],
            )
        )
    header = ("user turns", "skill", "topic", "language", "difficulty", "length")
    shown = f'<div class="rows">{table(header, lines, numeric=(5,))}</div>'
    return section("A few rows", shown, lead="Drawn at random, to judge the heuristics by.")
