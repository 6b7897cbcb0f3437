"""Preference pairs in the slices of Stage-DPO, and their order."""

from collections.abc import Sequence

import numpy as np

from wizard_engine.data.samples import Pair

ORDERS = ("random", "easy_first", "hard_first", "by_gap")


def order_slices(pairs: Sequence[Pair], slices: int, order: str, seed: int) -> list[list[int]]:
    """Indices of the pairs in each slice, near-equal in number.

    easy_first and hard_first go by the length of the chosen answer; by_gap by the judge's score gap, largest first.

    Raises:
        ValueError: fewer pairs than slices, an unknown order, or no gap to go by.
    """
    if not 1 <= slices <= len(pairs):
        raise ValueError(f"slices: expected 1 to {len(pairs)} (the pairs), got {slices}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order}")
    shuffled = np.random.default_rng(seed).permutation(len(pairs))
    lengths = np.asarray([float(pair.chosen.weights.sum()) for pair in pairs])
    gaps = np.asarray([pair.margin for pair in pairs])
    if order == "by_gap" and not gaps.any():
        raise ValueError("order: expected pairs with a judge's score gap for by_gap, attribute gap or margin, got none")
    key = {"random": np.zeros(len(pairs)), "easy_first": lengths, "hard_first": -lengths, "by_gap": -gaps}[order]
    ranked = shuffled[np.argsort(key[shuffled], kind="stable")]
    return [indices.tolist() for indices in np.array_split(ranked, slices)]
