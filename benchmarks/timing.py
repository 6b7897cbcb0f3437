"""Wall times of variants that take turns, so that a busy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def interleave(
    op: str,
    variants: Mapping[str, Callable[[], Any]],
    *,
    items: int,
    unit: str,
    repeats: int = 5,
    shape: str = "",
    peer: str | None = None,
) -> list[dict[str, Any]]:
    """One row per variant: op, shape, variant, seconds {p20, p50, p80}, rate, unit, and ratio to the peer.

    Every variant runs once unmeasured, then `repeats` times in an order that rotates; rate is items per median second.

    Args:
        variants: name -> work.   items: what one call gets through, in `unit` per second.
        peer: variant that the others are compared with. Their `ratio` is {"peer", "p50": peer's median time over their
            own, "p20", "p80": percentiles of the same ratio taken turn by turn}.
    """
    names = list(variants)
    for name in names:
        variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in names:
        row: dict[str, Any] = {"op": op, "shape": shape, "variant": name, "seconds": _percentiles(seconds[name])}
        row |= {"rate": items / row["seconds"]["p50"], "unit": unit, "repeats": repeats}
        if peer in names and name != peer:
            turns = _percentiles(np.divide(seconds[peer], seconds[name]))
            row["ratio"] = turns | {"peer": peer, "p50": float(np.median(seconds[peer]) / np.median(seconds[name]))}
        rows.append(row)
    return rows


def _percentiles(values: Any) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), (float(x) for x in np.percentile(values, (20, 50, 80)))))
