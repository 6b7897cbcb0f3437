"""Weighted sampling by attributes: raking to target marginals, draws without replacement, partition into slices."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from wizard_engine.data.shuffle import seeded_order, seeded_uniform

UNKNOWN, OTHER = "unknown", "other"
TOLERANCE, SMALLEST = 1e-6, 1e-100
DRAW, PARTITION = 1, 2
RANGE = re.compile(r"(-?\d+(?:\.\d+)?)?\.\.(-?\d+(?:\.\d+)?)?")
Targets = Mapping[str, Mapping[Any, float]]
Marginals = dict[str, dict[str, float]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Weights:
    """Sampling weights of rows and how well they meet their targets.

    weights: (N,) float64, mean 1, none above the cap.
    natural, target, achieved: attribute -> value -> share; target holds targeted attributes only.
    max_error: largest |achieved - target|.   converged: whether it is at most 1e-6.
    effective_sample_size: (sum w)^2 / sum w^2, rows.   capped: rows at the cap.   iterations: passes made.
    """

    weights: np.ndarray
    natural: Marginals
    target: Marginals
    achieved: Marginals
    max_error: float
    converged: bool
    effective_sample_size: float
    capped: int
    iterations: int

    def to_json(self) -> dict[str, Any]:
        """The report without the weights themselves."""
        report = {key: value for key, value in vars(self).items() if key != "weights"}
        return report | {"rows": len(self.weights), "largest_weight": float(self.weights.max())}


def rake(
    attributes: Mapping[str, Sequence[Any]], targets: Targets, *, cap: float = 5.0, iterations: int = 200
) -> Weights:
    """Weights that give each attribute its target shares: iterative proportional fitting, weights capped.

    A pass scales, attribute by attribute, the weights of each value's rows to that value's share, then cuts weights at
    `cap` times their mean; it ends when all shares are met to 1e-6 or after `iterations`. A share that the cap prevents
    shows as achieved != target. Rows without the attribute (None) form the value "unknown", which keeps its
    natural share unless targeted; target shares are of the other rows. If they sum to less than 1, the values without a
    target get the remainder in natural proportion; if they sum to 1, those values get none.

    Args:
        attributes: name -> (N,) values of the rows; further attributes than those targeted are reported.
        targets: name -> value -> share in [0, 1]; for numbers a value may be a range "10..20" (10 <= x < 20),
            "..10" or "20..", and numbers in no range form the value "other".
        cap: largest weight, in mean weights; 1 or more.
        iterations: most passes, 1 or more.
    Raises:
        ValueError: a share above 0 for a value that no row has or that other targets exclude; shares outside [0, 1]
            or with a wrong sum; a cap too small for the rows that may be drawn.
    """
    count = check_attributes(attributes, targets, cap, iterations)
    columns = {name: column(values, targets.get(name, {})) for name, values in attributes.items()}
    natural = {name: shares(labels, np.ones(count)) for name, labels in columns.items()}
    target = {name: complete_target(name, shares_V, natural[name]) for name, shares_V in targets.items()}
    coded = [encode(columns[name], target[name]) for name in targets]
    weights, passes = np.ones(count), 0
    for codes, shares_V in coded:
        weights[shares_V[codes] == 0] = 0
    check_reachable(weights, {name: columns[name] for name in targets}, target)
    drawable, weights = weights > 0, cap_weights(weights, cap)
    while passes < iterations and marginal_error(weights, coded) > TOLERANCE:
        for codes, shares_V in coded:
            sums = np.bincount(codes, weights, len(shares_V))
            weights = weights * np.divide(shares_V, sums, out=np.zeros_like(shares_V), where=sums > 0)[codes]
        weights[drawable] = np.maximum(weights[drawable], SMALLEST)
        weights, passes = cap_weights(weights, cap), passes + 1
    error = marginal_error(weights, coded)
    return Weights(
        weights=weights,
        natural=natural,
        target=target,
        achieved={name: shares(labels, weights) for name, labels in columns.items()},
        max_error=error,
        converged=error <= TOLERANCE,
        effective_sample_size=effective_sample_size(weights),
        capped=int((weights >= cap * (1 - 1e-9)).sum()) if cap > 1 else 0,
        iterations=passes,
    )


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 of (N,) weights: the number of equally weighted rows with the same variance."""
    weights = np.asarray(weights, np.float64)
    return float(weights.sum() ** 2 / np.square(weights).sum())


def largest_sample(weights: np.ndarray) -> int:
    """Most rows that can be drawn before the heaviest row would have to be drawn more than once on average."""
    weights = np.asarray(weights, np.float64)
    return min(math.floor(weights.sum() / weights.max() * (1 + 1e-9)), int((weights > 0).sum()))


def sample_without_replacement(weights: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Indices of k different rows, row i among them with a chance close to p_i = k w_i / sum w.

    Exponential order sampling: the k smallest of E_i / -log(1 - p_i), with E_i seeded exponential draws; as many of the
    keys are below 1 as rows are drawn, on average, and each with chance p_i. For small p_i this is the classic
    weighted reservoir.

    Args:
        weights: (N,) numbers, 0 or more.
        k: rows to draw.
        seed: 0 or more.
    Returns:
        (k,) int64, ascending.
    Raises:
        ValueError: weights that are negative, not finite or all 0; k for which some p_i is above 1.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("weights: expected a 1-d array of finite numbers, some above 0, got others; rake them first")
    most = largest_sample(weights)
    if not 0 <= k <= most:
        ratio = weights.max() / weights.mean()
        reason = f"{(weights > 0).sum()} have a weight"
        if most < (weights > 0).sum():
            reason = f"the heaviest row, {ratio:.3g} times the mean, would repeat"
        raise ValueError(
            f"k: expected 0 to {most} rows, got {k} of {len(weights)}, where {reason}; ask for fewer or lower the cap"
        )
    chance = np.minimum(k * weights / weights.sum(), 1.0)
    with np.errstate(divide="ignore"):
        rate = -np.log1p(-chance)
        keys = -np.log(seeded_uniform(len(weights), seed, DRAW)) / rate
    return np.sort(np.argsort(keys, kind="stable")[:k])


def partition(rows: Sequence[Item], slices: int, seed: int) -> list[list[Item]]:
    """Random slices of rows whose sizes differ by one at most, each in the order of the rows.

    Raises:
        ValueError: fewer than one slice, or fewer rows than slices.
    """
    if not 1 <= slices <= max(1, len(rows)):
        raise ValueError(f"slices: expected 1 to {len(rows)}, one row each at least, got {slices}; choose fewer slices")
    parts = np.array_split(seeded_order(len(rows), seed, PARTITION), slices)
    return [[rows[index] for index in np.sort(part)] for part in parts]


def uniform_target(values: Sequence[Any]) -> dict[str, float]:
    """Equal shares for every value that rows have; rows without a value do not count."""
    labels = sorted(set(column(values, {})) - {UNKNOWN})
    return {name: 1 / len(labels) for name in labels}


def label(value: Any) -> str:
    """A value's name in targets and reports: text as it is, the rest as JSON, whole floats as integers."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def column(values: Sequence[Any], target: Mapping[Any, float]) -> list[str]:
    """Names of values; numbers are mapped to the ranges among the keys of `target`, if there are any."""
    keys = list(map(label, target))
    ranges = [(key, match) for key in keys if (match := RANGE.fullmatch(key))]
    if not ranges:
        return [label(value) for value in values]
    bounds = [(key, float(match[1] or -math.inf), float(match[2] or math.inf)) for key, match in ranges]
    names = []
    for value in values:
        if isinstance(value, int | float) and not isinstance(value, bool):
            names.append(next((key for key, low, high in bounds if low <= value < high), OTHER))
        else:
            names.append(label(value))
    return names


def check_attributes(attributes: Mapping[str, Sequence[Any]], targets: Targets, cap: float, iterations: int) -> int:
    """Number of rows; ValueError for columns of different lengths, unknown attributes, a cap or passes below 1."""
    for name in targets:
        known = name in attributes and any(value is not None for value in attributes[name])
        if not known:
            raise ValueError(f"targets.{name}: expected an attribute of the rows, got none; analyse the rows first")
    sizes = {len(values) for values in attributes.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"attributes: expected columns of one length above 0, got lengths {sorted(sizes)}; give rows")
    if not cap >= 1:
        raise ValueError(f"cap: expected at least 1 mean weight, got {cap}; choose for example 5")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}; choose for example 200")
    return sizes.pop()


def shares(labels: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """Share of the weight that each value has, largest first."""
    totals: Counter[str] = Counter()
    for name, weight in zip(labels, weights.tolist()):
        totals[name] += weight
    return {name: total / float(weights.sum()) for name, total in totals.most_common()}


def complete_target(name: str, requested: Mapping[Any, float], natural: Mapping[str, float]) -> dict[str, float]:
    """Target shares of all values of an attribute, summing to 1. Rules and errors as in `rake`."""
    named = {label(value): share for value, share in requested.items()}
    for value, share in named.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"targets.{name}.{value}: expected a share from 0 to 1, got {share!r}; correct it")
        if share > 0 and value not in natural:
            known = ", ".join(list(natural)[:12])
            raise ValueError(f"targets.{name}.{value}: expected a value that rows have, got none; values are: {known}")
    free = {value: share for value, share in natural.items() if value not in named}
    aside = free.pop(UNKNOWN, 0.0)
    total, rest = sum(named.values()), sum(free.values())
    if total > 1 + TOLERANCE or (total < 1 - TOLERANCE and not rest):
        raise ValueError(f"targets.{name}: expected shares that sum to 1, got {total:.6g}; correct them")
    target = {value: share * (1 - aside) for value, share in named.items() if value in natural}
    scale = max(0.0, 1 - total) * (1 - aside) / rest if rest else 0.0
    target |= {value: (share * scale if scale > TOLERANCE else 0.0) for value, share in free.items()}
    target |= {UNKNOWN: aside} if aside else {}
    return {value: share / sum(target.values()) for value, share in target.items()}


def encode(labels: Sequence[str], target: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) index of each row's value, and (V,) target share of each value."""
    place = {value: index for index, value in enumerate(target)}
    return np.fromiter((place[name] for name in labels), np.int64, len(labels)), np.array(list(target.values()))


def check_reachable(weights: np.ndarray, columns: Mapping[str, Sequence[str]], target: Mapping[str, Mapping]) -> None:
    """ValueError where a value has a target but all of its rows are excluded by a target of 0 on another attribute."""
    for name, labels in columns.items():
        drawable = {value for value, weight in zip(labels, weights.tolist()) if weight > 0}
        for value, share in target[name].items():
            if share > 0 and value not in drawable:
                raise ValueError(
                    f"targets.{name}.{value}: expected a row that may be drawn, got only rows that shares of 0 on "
                    "other attributes exclude; give those a share"
                )


def cap_weights(weights: np.ndarray, cap: float) -> np.ndarray:
    """Weights t * w cut at `cap`, with t such that their mean is 1.

    Raises:
        ValueError: too few rows have a weight for any t: more than 1 in `cap` is needed.
    """
    count, positive = len(weights), int((weights > 0).sum())
    if positive * cap < count * (1 - 1e-12):
        raise ValueError(
            f"cap: expected at least {count / max(positive, 1):.3g} mean weights where {positive} of {count} rows may "
            f"be drawn, got {cap}; raise it or leave the other rows out"
        )
    cap = min(cap, count)
    falling = np.sort(weights)[::-1][:positive]
    below = np.cumsum(falling[::-1])[::-1]
    # With the m heaviest rows at the cap, the others must sum to count - m cap. The smallest m is used for which none
    # of them exceeds the cap.
    scales = (count - cap * np.arange(positive)) / below
    fits = scales * falling <= cap * (1 + 1e-12)
    return np.minimum(weights * scales[np.argmax(fits)], cap) if fits.any() else np.where(weights > 0, cap, 0.0)


def marginal_error(weights: np.ndarray, coded: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Largest difference between a value's share of the weight and its target; 0 without targets."""
    total = weights.sum()
    errors = [np.abs(np.bincount(codes, weights, len(shares_V)) / total - shares_V).max() for codes, shares_V in coded]
    return float(max(errors, default=0.0))
