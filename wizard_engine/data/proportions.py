"""Intervals and tests of shares: how far a count says something about its rate."""

import math
from math import comb


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a binomial proportion; (0, 1) without observations. Source: Wilson 1927, JASA 22(158)."""
    if not total:
        return 0.0, 1.0
    share, spread = successes / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(better: int, worse: int) -> float:
    """Probability that chance alone gives `better` or more of the `better + worse` cases that two things differ in.

    p = sum_{k >= better} C(n, k) / 2^n, n = better + worse; 1 where they differ in none.

    Source: McNemar 1947, Psychometrika 12(2), in its exact, one-sided form.
    """
    n = better + worse
    return sum(comb(n, k) for k in range(better, n + 1)) / 2**n
