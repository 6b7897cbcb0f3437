"""Wall times of variants that take turns, so that a busy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def interleave(
    op: str, variants: Mapping[str, Callable[[], Any]], *, items: int, unit: str, repeats: int = 5
) -> list[dict[str, Any]]:
    """One row per variant: {"op", "variant", "seconds": {"p20", "p50", "p80"}, "rate", "unit"}.

    Every variant runs once unmeasured, then `repeats` times in an order that rotates; rate is items per median second.
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
        p20, p50, p80 = (float(value) for value in np.percentile(seconds[name], (20, 50, 80)))
        times = {"p20": p20, "p50": p50, "p80": p80}
        rows.append({"op": op, "variant": name, "seconds": times, "rate": items / p50, "unit": unit})
    return rows
