"""Analysis of training rows: every attribute of every row, a table per attribute, and the association of each pair."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wizard_engine.data.rows import Conversation, Row
from wizard_engine.runtime.metrics import progress

from . import attributes as heuristics
from .attributes import ATTRIBUTES, View, view
from .dedupe import near_duplicates
from .tables import column_table, pair_tables
from .topics import clustered_topics

Perplexity = Callable[[list[Conversation]], list[float]]


@dataclass(frozen=True)
class Analysis:
    """Attributes and tables of a set of rows.

    Attributes:
        rows: the rows in order, their attributes completed.
        tables: attribute -> {"kind": "categorical" | "numeric" | "clusters", "kept", "inferred", "missing", and
            "values": [{"value", "count", "share"}]} with "low" and "high" in a value of a numeric attribute, and
            "summary" (min, median, mean, p95, max) beside them.
        pairs: for each two attributes {"a", "b", "n", "cramers_v", "rows", "columns", "counts"}; counts[i][j] is the
            number of rows with a = rows[i] and b = columns[j].
        notes: sentences on how values were inferred.
        columns: attribute -> the value of each row, None where unknown.
    """

    rows: list[Row]
    tables: dict[str, dict[str, Any]]
    pairs: list[dict[str, Any]]
    notes: list[str]
    columns: dict[str, list[Any]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Tables, pairs and notes, without the rows."""
        return {"rows": len(self.rows), "attributes": self.tables, "pairs": self.pairs, "notes": self.notes}


def analyze(
    rows: Sequence[Row],
    *,
    perplexity: Perplexity | None = None,
    sources: Sequence[str] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Analysis:
    """Attributes of rows, and their tables.

    Values in a row's attributes are kept; the others are inferred by attributes.py.

    Args:
        rows: at least one row, of any kinds.
        perplexity: numbers for a list of conversations, such as those of a checkpoint; None: no such attribute.
        sources: name of each row's file, for rows that do not name a source.
        seed: of the clusters that name topics beyond the lexicon.   quiet: no progress bars.
    Raises:
        ValueError: no rows, or another number of sources or perplexities than rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none; give a file with rows")
    if sources is not None and len(sources) != len(rows):
        raise ValueError(f"sources: expected one per row ({len(rows)}), got {len(sources)}; give a name for each row")
    views = [view(row) for row in rows]
    inferred = infer(rows, views, sources=sources, perplexity=perplexity, seed=seed, quiet=quiet)
    present = {name: [row.attributes.get(name) for row in rows] for name in inferred}
    columns = {name: [a if a is not None else b for a, b in zip(present[name], inferred[name])] for name in inferred}
    tables = {name: _table(columns[name], present[name], clusters=name == "cluster") for name in columns}
    completed = [
        row.replace(
            attributes=row.attributes | {name: value for name, value in zip(columns, values) if value is not None}
        )
        for row, values in zip(rows, zip(*columns.values()))
    ]
    return Analysis(completed, tables, pair_tables(columns, clusters="cluster"), _notes(tables, perplexity), columns)


def infer(
    rows: Sequence[Row],
    views: Sequence[View],
    *,
    sources: Sequence[str] | None,
    perplexity: Perplexity | None,
    seed: int,
    quiet: bool,
) -> dict[str, list[Any]]:
    """Inferred columns in the order of ATTRIBUTES; a heuristic does not run for rows that have the value."""

    def column(name: str, function: Callable[[View], Any]) -> list[Any]:
        items = progress(zip(rows, views), desc=name, unit="row", total=len(rows), quiet=quiet)
        return [None if row.attributes.get(name) is not None else function(item) for row, item in items]

    def level(item: View) -> str:
        return heuristics.difficulty(heuristics.difficulty_score(item.messages))

    columns = {
        "topic": _topics(rows, views, seed),
        "language": column("language", lambda item: heuristics.language(item.user, item.answer)),
        "skill": column("skill", lambda item: heuristics.skill(item.messages, item.first)),
        "source": list(sources) if sources is not None else [None] * len(rows),
        "difficulty": column("difficulty", level),
        "perplexity": _perplexities(views, perplexity),
        "length": column("length", lambda item: heuristics.length(f"{item.user}\n{item.answer}")),
        "turns": column("turns", lambda item: item.turns),
        "toxic": column("toxic", lambda item: heuristics.is_toxic(f"{item.user}\n{item.answer}")),
        "cluster": near_duplicates([item.user for item in views], desc="" if quiet else "cluster").tolist(),
    }
    return {name: columns[name] for name in ATTRIBUTES}


def _topics(rows: Sequence[Row], views: Sequence[View], seed: int) -> list[str | None]:
    """The lexicon's topic; rows without one get the topic of their cluster."""
    open_rows = [index for index, row in enumerate(rows) if row.attributes.get("topic") is None]
    topics: list[str | None] = [None] * len(rows)
    for index in open_rows:
        topics[index] = heuristics.lexicon_topic(views[index].user, views[index].answer)
    rest = [index for index in open_rows if topics[index] is None]
    named = clustered_topics([f"{views[index].user}\n{views[index].answer}" for index in rest], seed=seed)
    for index, topic in zip(rest, named):
        topics[index] = topic
    return topics


def _has_answer(item: View) -> bool:
    return bool(item.messages) and item.messages[-1].role == "assistant"


def answered(rows: Sequence[Row]) -> list[Conversation]:
    """The rows that end with an answer, as conversations: those that `analyze` asks perplexities for, in order."""
    return [Conversation(item.messages) for item in map(view, rows) if _has_answer(item)]


def _perplexities(views: Sequence[View], perplexity: Perplexity | None) -> list[float | None]:
    """Perplexities by the callable; None for a row without an answer, and for a value that is not finite."""
    perplexities: list[float | None] = [None] * len(views)
    chosen = [index for index, item in enumerate(views) if _has_answer(item)]
    if perplexity is None or not chosen:
        return perplexities
    values = perplexity([Conversation(views[index].messages) for index in chosen])
    if len(values) != len(chosen):
        raise ValueError(f"perplexity: expected {len(chosen)} values, got {len(values)}; return one per conversation")
    for index, value in zip(chosen, values):
        perplexities[index] = float(value) if math.isfinite(value) else None
    return perplexities


def _table(values: Sequence[Any], present: Sequence[Any], *, clusters: bool) -> dict[str, Any]:
    """Table of a column, with the number of values that came with the rows."""
    kept = sum(value is not None for value in present)
    known = sum(value is not None for value in values)
    origin = {"kept": kept, "inferred": known - kept, "missing": len(values) - known}
    return origin | column_table(values, clusters=clusters)


def _notes(tables: dict[str, dict[str, Any]], perplexity: Perplexity | None) -> list[str]:
    notes = [heuristics.language_method()]
    if perplexity is None:
        notes.append("perplexity: no checkpoint was given, so it is left out")
    for name, table in tables.items():
        if table["kept"]:
            notes.append(f"{name}: {table['kept']} rows brought their own value, {table['inferred']} were inferred")
    return notes
