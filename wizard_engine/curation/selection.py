"""Raw rows to training slices: removal of duplicates and contaminated rows, weighted draw, partition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from wizard_engine.data.records import Row, texts_of, user_text

from .decontaminate import contaminated
from .dedupe import exact_duplicates, near_duplicates
from .sampling import Targets, Weights, column, largest_sample, partition, rake, sample_without_replacement, shares

REPORTED = ("topic", "language", "skill", "source", "difficulty", "turns", "toxic")


@dataclass(frozen=True)
class Filtered:
    """The rows kept, and the reason for each removed row: {"id", "reason", ...} in row order."""

    rows: list[Row]
    removed: list[dict[str, Any]]


@dataclass(frozen=True)
class Draw:
    """Rows drawn by weight, and the report on weights and marginals (JSON)."""

    rows: list[Row]
    report: dict[str, Any]


def remove_duplicates(
    rows: Sequence[Row],
    *,
    threshold: float = 0.8,
    shingle: int = 3,
    by: Literal["prompt", "row"] = "prompt",
    desc: str = "",
) -> Filtered:
    """Rows without exact and near-duplicates; the first of each cluster stays.

    Args:
        threshold: least Jaccard index of near-duplicates; 1 removes texts of the same words only.
        shingle: words of a shingle.
        by: "prompt" compares the user turns, "row" all turns.   desc: label of a progress bar; "": none.
    Returns:
        Kept, the reasons "exact_duplicate" and "near_duplicate" with the id of the row that stayed under "of".
    """
    texts = [user_text(row) if by == "prompt" else "\n".join(texts_of(row)) for row in rows]
    exact = exact_duplicates(texts)
    first = np.flatnonzero(exact == np.arange(len(texts)))
    near = first[near_duplicates([texts[i] for i in first], threshold=threshold, shingle=shingle, desc=desc)]
    cluster = near[np.searchsorted(first, exact)]
    kept, removed = [], []
    for index, row in enumerate(rows):
        if cluster[index] == index:
            kept.append(row)
            continue
        reason = "exact_duplicate" if exact[index] != index else "near_duplicate"
        removed.append({"id": row.id, "reason": reason, "of": rows[cluster[index]].id})
    return Filtered(kept, removed)


def remove_contaminated(
    rows: Sequence[Row], evaluation: Sequence[str], *, n: int = 13, min_share: float = 0.0, desc: str = ""
) -> Filtered:
    """Rows of which no turn repeats an evaluation text (see `contaminated`).

    Returns:
        Kept, the reason "contaminated" with the number of the evaluation text, the n-gram and the share.
    """
    turns = [texts_of(row) for row in rows]
    every_turn = [turn for texts in turns for turn in texts]
    matches = iter(contaminated(every_turn, evaluation, n=n, min_share=min_share, desc=desc))
    kept, removed = [], []
    for row, texts in zip(rows, turns):
        match = next(filter(None, [next(matches) for _ in texts]), None)
        if match is None:
            kept.append(row)
        else:
            removed.append({"id": row.id, "reason": "contaminated", **vars(match)})
    return Filtered(kept, removed)


def draw(
    rows: Sequence[Row],
    targets: Targets,
    *,
    size: int | None = None,
    cap: float = 5.0,
    iterations: int = 200,
    seed: int = 0,
) -> Draw:
    """A weighted sample of rows without replacement, raked to the targets.

    Args:
        targets: attribute -> value -> share, see `rake`; {} draws with equal weights.
        size: rows to draw; None: as many as the weights allow without repeating a row.
        cap: largest weight, in mean weights.
    Returns:
        Draw; report: the raked marginals, and under "drawn" the shares of the rows drawn.
    Raises:
        ValueError: as `rake` and `sample_without_replacement`.
    """
    names = dict.fromkeys((*targets, *(n for n in REPORTED if any(n in row.attributes for row in rows))))
    columns = {name: [row.attributes.get(name) for row in rows] for name in names}
    if columns:
        weights = rake(columns, targets, cap=cap, iterations=iterations)
    else:
        weights = Weights(np.ones(len(rows)), {}, {}, {}, 0.0, True, float(len(rows)), 0, 0)
    count = largest_sample(weights.weights) if size is None else size
    chosen = sample_without_replacement(weights.weights, count, seed)
    report = {**weights.to_json(), "largest_sample": largest_sample(weights.weights), "drawn": {}}
    for name, values in columns.items():
        labels = column([values[i] for i in chosen], targets.get(name, {}))
        report["drawn"][name] = shares(labels, np.ones(len(labels)))
    return Draw([rows[i] for i in chosen], report)


@dataclass(frozen=True)
class Selection:
    """The slices, every removed row with its reason, the report (JSON: counts, weights, marginals), and the rows that
    are kept apart.
    """

    slices: list[list[Row]]
    removed: list[dict[str, Any]]
    report: dict[str, Any]
    held_out: list[Row]


def select(
    rows: Sequence[Row],
    evaluation: Sequence[str] = (),
    targets: Targets | None = None,
    *,
    size: int | None = None,
    slices: int = 1,
    seed: int = 0,
    cap: float = 5.0,
    dedupe: Mapping[str, Any] | None = None,
    decontaminate: Mapping[str, Any] | None = None,
    hold_out: int = 0,
    quiet: bool = True,
) -> Selection:
    """Removes duplicates and contaminated rows, draws by weight, and partitions into random slices.

    Args:
        hold_out: clean rows to keep apart before the draw, at most half of them; rows that repeat one of them are
            removed as contaminated.
        evaluation: held-out texts.
        dedupe, decontaminate: keyword arguments of `remove_duplicates` and `remove_contaminated`.
        quiet: no progress bars.
        Others: as in `draw` and `partition`.
    Raises:
        ValueError: no row remains after cleaning, or as the steps.
    """
    compared = {**(decontaminate or {}), "desc": "" if quiet else "held-out texts"}
    unique = remove_duplicates(rows, **(dedupe or {}), desc="" if quiet else "duplicates")
    clean = remove_contaminated(unique.rows, evaluation, **compared)
    held_out, clean = _hold_out(clean, hold_out, seed, compared)
    removed = unique.removed + clean.removed
    counts = {"rows": len(rows), "exact_duplicate": 0, "near_duplicate": 0, "contaminated": 0}
    for item in removed:
        counts[item["reason"]] += 1
    if not clean.rows:
        raise ValueError(f"rows: expected some to be left after cleaning, got none of {len(rows)}; removed: {counts}")
    drawn = draw(clean.rows, targets or {}, size=size, cap=cap, seed=seed)
    parts = partition(drawn.rows, slices, seed)
    counts |= {"clean": len(clean.rows), "drawn": len(drawn.rows), "slices": list(map(len, parts))}
    counts |= {"held_out": len(held_out)} if hold_out else {}
    return Selection(parts, removed, {"counts": counts, **drawn.report}, held_out)


def _hold_out(clean: Filtered, count: int, seed: int, decontaminate: Mapping[str, Any]) -> tuple[list[Row], Filtered]:
    """Rows to keep apart, and the others without those that repeat them."""
    if not count:
        return [], clean
    order = np.random.default_rng([seed, 1]).permutation(len(clean.rows))
    chosen = set(order[: min(count, len(clean.rows) // 2)].tolist())
    held_out = [row for place, row in enumerate(clean.rows) if place in chosen]
    rest = [row for place, row in enumerate(clean.rows) if place not in chosen]
    others = remove_contaminated(rest, [user_text(row) for row in held_out], **decontaminate)
    return held_out, Filtered(others.rows, clean.removed + others.removed)
