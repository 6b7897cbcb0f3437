"""Tables of attribute values: counts and shares, quantile bins, contingency tables and Cramer's V."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

NUMERIC_FROM = 9
PAIR_VALUES = 12
REST = "(rest)"


class Bin(NamedTuple):
    """A range of numbers, both ends included, and its label."""

    label: str
    low: float
    high: float


def value_label(value: Any) -> str | None:
    """Label of a value in a table; None stays None."""
    if value is None:
        return None
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def is_numeric(values: Sequence[Any]) -> bool:
    """Whether all known values are numbers and there are more than eight different ones."""
    known = {value for value in values if value is not None}
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    return numbers and len(known) >= NUMERIC_FROM


def quantile_bins(values: Sequence[float | None], bins: int = 5) -> tuple[list[str | None], list[Bin]]:
    """Label of each value's bin, and the bins in rising order.

    Bins hold about equal numbers of values; equal values share a bin, so there may be fewer than `bins`.
    """
    known = np.array([value for value in values if value is not None], np.float64)
    if not len(known):
        return [None] * len(values), []
    edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, known, side="left")
    bin_at = {int(p): _bin(known[place == p].min(), known[place == p].max()) for p in np.unique(place)}
    places = iter(place.tolist())
    return [None if value is None else bin_at[next(places)].label for value in values], list(bin_at.values())


def _bin(low: float, high: float) -> Bin:
    return Bin(f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}", float(low), float(high))


def cluster_sizes(values: Sequence[Any]) -> list[str | None]:
    """For each row whether its cluster holds it "alone", "2 rows", "3 to 5 rows" or "6 or more"."""
    sizes = Counter(value for value in values if value is not None)
    names = {1: "alone", 2: "2 rows", **{size: "3 to 5 rows" for size in (3, 4, 5)}}
    return [None if value is None else names.get(sizes[value], "6 or more") for value in values]


def summary(values: Sequence[float]) -> dict[str, float]:
    """min, median, mean, p95 (95th percentile) and max of numbers."""
    array = np.asarray(values, np.float64)
    low, median, p95, high = np.quantile(array, [0, 0.5, 0.95, 1]).tolist()
    return {"min": low, "median": median, "mean": float(array.mean()), "p95": p95, "max": high}


def column_table(values: Sequence[Any], *, clusters: bool = False) -> dict[str, Any]:
    """Counts and shares of the known values of a column.

    Returns:
        {"kind": "categorical" | "numeric" | "clusters", "values": [{"value", "count", "share"}]}: the most frequent
        first, or for numbers the quantile bins in order with "low" and "high", and "summary" beside them.
    """
    numeric = not clusters and is_numeric(values)
    if numeric:
        labels, bins = quantile_bins(values)
        ranges = {item.label: {"low": item.low, "high": item.high} for item in bins}
    else:
        labels, ranges = cluster_sizes(values) if clusters else [value_label(value) for value in values], {}
    counts = Counter(label for label in labels if label is not None)
    total = sum(counts.values())
    order = list(ranges) or _order(counts)
    lines = [{"value": label, "count": counts[label], "share": counts[label] / total} for label in order]
    table = {"kind": "numeric" if numeric else "clusters" if clusters else "categorical"}
    table["values"] = [line | ranges.get(line["value"], {}) for line in lines]
    return table | ({"summary": summary([value for value in values if value is not None])} if numeric else {})


def _order(counts: Mapping[str, int]) -> list[str]:
    """Whole numbers in rising order, other labels by count."""
    return sorted(counts, key=int) if counts and all(label.isdecimal() for label in counts) else by_count(counts)


def by_count(counts: Mapping[str, int]) -> list[str]:
    """Labels, the most frequent first, equal ones by name; the group of rare ones last."""
    return sorted(counts, key=lambda label: (label == REST, -counts[label], label))


def pair_tables(columns: Mapping[str, Sequence[Any]], *, clusters: str = "") -> list[dict[str, Any]]:
    """Contingency table and Cramer's V of every two columns that vary.

    A column has at most 12 values here, the rarer ones together as "(rest)"; numbers are binned, and the column named
    `clusters` counts by the size of its clusters.

    Returns:
        [{"a", "b", "n", "cramers_v", "rows", "columns", "counts"}]: counts[i][j] rows have a = rows[i], b = columns[j].
    """
    labels = {name: _grouped(_labels(values, name == clusters)) for name, values in columns.items()}
    varied = {name: column for name, column in labels.items() if len(set(column) - {None}) > 1}
    return [_pair(a, b, varied[a], varied[b]) for a, b in combinations(varied, 2)]


def _labels(values: Sequence[Any], clusters: bool) -> list[str | None]:
    if clusters:
        return cluster_sizes(values)
    return quantile_bins(values)[0] if is_numeric(values) else [value_label(value) for value in values]


def _grouped(labels: Sequence[str | None]) -> list[str | None]:
    counts = Counter(label for label in labels if label is not None)
    if len(counts) <= PAIR_VALUES:
        return list(labels)
    kept = set(by_count(counts)[: PAIR_VALUES - 1])
    return [label if label is None or label in kept else REST for label in labels]


def _pair(a: str, b: str, first: Sequence[str | None], second: Sequence[str | None]) -> dict[str, Any]:
    rows, columns, counts = contingency(first, second)
    pair = {"a": a, "b": b, "n": int(counts.sum()), "cramers_v": cramers_v(counts)}
    return pair | {"rows": rows, "columns": columns, "counts": counts.tolist()}


def contingency(first: Sequence[str | None], second: Sequence[str | None]) -> tuple[list[str], list[str], np.ndarray]:
    """Values of two columns, the most frequent first, and how many rows have each combination: (R, C) int64.

    Rows in which either is unknown do not count.
    """
    pairs = [(x, y) for x, y in zip(first, second) if x is not None and y is not None]
    rows, columns = _order(Counter(x for x, _ in pairs)), _order(Counter(y for _, y in pairs))
    row_of, column_of = ({label: place for place, label in enumerate(order)} for order in (rows, columns))
    counts = np.zeros((len(rows), len(columns)), np.int64)
    for x, y in pairs:
        counts[row_of[x], column_of[y]] += 1
    return rows, columns, counts


def cramers_v(counts: np.ndarray) -> float:
    """Association of two categorical columns from their contingency table (R, C): 0 none, 1 each determines the other.

    Corrected for bias, so that many categories over few rows do not look associated; 0 where a column is constant.
    Source: Bergsma 2013, Journal of the Korean Statistical Society 42(3).
    """
    counts = np.asarray(counts, np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    total, (height, width) = counts.sum(), counts.shape
    if total < 2 or min(height, width) < 2:
        return 0.0
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
    phi2 = float(((counts - expected) ** 2 / expected).sum() / total)
    phi2 = max(0.0, phi2 - (height - 1) * (width - 1) / (total - 1))
    smallest = min(size - (size - 1) ** 2 / (total - 1) for size in (height, width))
    return math.sqrt(min(1.0, phi2 / (smallest - 1))) if smallest > 1 else 0.0
