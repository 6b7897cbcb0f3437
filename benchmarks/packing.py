"""Best-fit packing: the C++ part against plain Python, on lengths as instruction data has them."""

from typing import Any

import numpy as np

from benchmarks.timing import interleave
from wizard_engine.data.packing import pack, pack_reference

PEER = None
CAPACITY = 4096
SIZES = (20_000, 200_000)


def example_lengths(count: int) -> np.ndarray:
    """Log-normal token counts with a median of 150, cut at the capacity: (count,) int64."""
    lengths = np.random.default_rng(0).lognormal(5, 1, count).astype(np.int64) + 1
    return np.minimum(lengths, CAPACITY)


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark; AssertionError if the two versions differ on the timed input."""
    rows = []
    for count in SIZES[: 1 if quick else None]:
        lengths = example_lengths(count)
        assert np.array_equal(pack(lengths, CAPACITY), pack_reference(lengths, CAPACITY))
        variants = {
            "C++": lambda lengths=lengths: pack(lengths, CAPACITY),
            "Python": lambda lengths=lengths: pack_reference(lengths, CAPACITY),
        }
        rows += interleave(
            "packing",
            variants,
            items=count,
            unit="sequences/s",
            shape=f"N={count} capacity={CAPACITY}",
            repeats=3 if quick else 5,
            peer="Python" if peer else None,
        )
    return rows
