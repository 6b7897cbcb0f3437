"""Seeded orders and draws that do not change with the version of NumPy.

They sort or scale the raw words of PCG64, whose stream is fixed. Methods of NumPy's generators may change their results
between versions.
"""

import numpy as np

DOMAIN = 0x77697A617264


def raw_words(count: int, *seeds: int) -> np.ndarray:
    """(count,) uint64 words that depend on the seeds (each 0 or more) alone.

    DOMAIN separates them from default_rng(seed), which may have made the rows.
    """
    return np.random.PCG64([DOMAIN, *seeds]).random_raw(count)


def seeded_order(count: int, *seeds: int) -> np.ndarray:
    """A permutation of range(count): (count,) int64."""
    return np.argsort(raw_words(count, *seeds), kind="stable")


def seeded_uniform(count: int, *seeds: int) -> np.ndarray:
    """(count,) float64, uniform in the open interval (0, 1)."""
    return ((raw_words(count, *seeds) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
