"""Clusters of exact and of near-duplicate texts: MinHash and locality-sensitive hashing in C++, exact verification."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

import csrc
from wizard_engine.runtime.metrics import progress

from .words import words

RECALL = 0.999
SEED = 1


class Shingles(NamedTuple):
    """Shingle hashes of N texts: text i has hashes[offsets[i] : offsets[i + 1]], sorted and unique.

    groups differs for texts that differ in their numbers or arithmetic signs.
    """

    hashes: np.ndarray
    offsets: np.ndarray
    groups: np.ndarray


def exact_duplicates(texts: Sequence[str]) -> np.ndarray:
    """Cluster of each text, where equal texts share one: (N,) int64, the index of the cluster's first text."""
    first: dict[str, int] = {}
    return np.fromiter((first.setdefault(text, index) for index, text in enumerate(texts)), np.int64, len(texts))


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.8,
    shingle: int = 3,
    permutations: int = 128,
    numbers_matter: bool = True,
    desc: str = "",
) -> np.ndarray:
    """Cluster of each text, where near-duplicates share one.

    Two texts are joined if the Jaccard index of their shingles (runs of `shingle` words, see `words`) is at least
    `threshold` and their numbers are the same in the same order. Candidates come from MinHash with bands that find a
    pair at the threshold with probability 0.999 or more; each candidate is verified on all its shingles. Clusters are
    the connected components. Deterministic; the order of the texts changes the numbering only.

    Args:
        texts: any Unicode texts; case, punctuation and width do not count, a Chinese character counts as a word.
        threshold: in (0, 1].
        shingle: words of a shingle; a shorter text is one shingle.
        permutations: MinHash values per text.
        numbers_matter: False joins texts that differ in their numbers too.
        desc: label of a progress bar; "": none.
    Returns:
        (N,) int64, the index of the cluster's first text.
    Raises:
        ValueError: an argument outside its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected above 0 and at most 1, got {threshold}; choose for example 0.8")
    shingles = shingle_texts(texts, shingle=shingle, desc=desc)
    signatures = minhash_signatures(shingles, permutations=permutations)
    clusters = np.empty(len(texts), np.int64)
    # With one group for all, the C++ code never separates texts by their numbers.
    groups = shingles.groups if numbers_matter else np.zeros(len(texts), np.uint64)
    arrays = (shingles.hashes, shingles.offsets, groups, signatures)
    # MinHash bands only propose pairs; the C++ code verifies each on all its shingles, so a false one costs time only.
    rows = band_rows(threshold, permutations)
    pointers = [array.ctypes.data for array in arrays]
    status = csrc.library().wizard_clusters(*pointers, len(texts), permutations, rows, threshold, clusters.ctypes.data)
    csrc.check(status, f"clustering {len(texts)} texts")
    return clusters


def shingle_texts(texts: Sequence[str], *, shingle: int = 3, desc: str = "") -> Shingles:
    """Shingle hashes of texts, 64 bits each.

    Args:
        desc: label of a progress bar; "": none.
    Raises:
        ValueError: shingle is below 1.
    """
    if shingle < 1:
        raise ValueError(f"shingle: expected at least 1 word, got {shingle}; choose for example 3")
    bar = progress(texts, desc=desc, unit="row", quiet=not desc)
    split = [words(text, operators=True) for text in bar]
    joined = [" ".join(parts).encode() for parts in split]
    # One buffer of all texts: C++ reads text i between ends[i - 1] and ends[i].
    ends = np.cumsum([len(part) for part in joined], dtype=np.int64)
    # An upper bound: a text has at most as many distinct shingles as words.
    hashes = np.empty(sum(map(len, split)), np.uint64)
    offsets = np.empty(len(texts) + 1, np.int64)
    text = b"".join(joined)
    pointers = ends.ctypes.data, len(texts), shingle, hashes.ctypes.data, offsets.ctypes.data
    total = csrc.check(csrc.library().wizard_shingles(text, *pointers), f"shingles of {len(texts)} texts")
    groups = np.fromiter(map(number_group, split), np.uint64, len(texts))
    return Shingles(hashes[:total], offsets, groups)


def number_group(parts: Sequence[str]) -> int:
    """64-bit hash of the numbers and signs among a text's words, in order."""
    # Word problems often differ in their numbers alone; as training rows they are different problems.
    numbers = [part for part in parts if not part[0].isalpha()]
    return int.from_bytes(blake2b(" ".join(numbers).encode(), digest_size=8).digest(), "little") if numbers else 0


def minhash_signatures(shingles: Shingles, *, permutations: int = 128) -> np.ndarray:
    """MinHash values of texts: (N, permutations) uint32; the share of equal values estimates the Jaccard index.

    Raises:
        ValueError: permutations is below 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}; choose for example 128")
    count = len(shingles.offsets) - 1
    signatures = np.empty((count, permutations), np.uint32)
    arrays = shingles.hashes.ctypes.data, shingles.offsets.ctypes.data
    status = csrc.library().wizard_signatures(*arrays, count, permutations, SEED, signatures.ctypes.data)
    csrc.check(status, f"signatures of {count} texts")
    return signatures


def band_rows(threshold: float, permutations: int) -> int:
    """Most rows per band with which a pair at the threshold shares a band with probability RECALL.

    A pair of Jaccard index s shares one of b = permutations // r bands of r rows with probability 1 - (1 - s^r)^b.
    Returns 1 if no number of rows is enough.
    """
    # More rows per band propose fewer false pairs, so the largest number with enough recall is the cheapest.
    for rows in range(permutations, 1, -1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= RECALL:
            return rows
    return 1
