"""Packing of sequences into packs of at most `capacity` tokens: best fit decreasing, in C++ and in plain Python."""

from bisect import bisect_left, insort

import numpy as np

import csrc


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each sequence under best-fit decreasing.

    Sequences are placed longest first (equal lengths in input order), each into the bin with the least sufficient space
    (of equal ones, the bin that got that space last), else into a new bin.

    Args:
        lengths: (N,) integers in [1, capacity], tokens.
        capacity: most tokens a bin holds.
    Returns:
        (N,) int32, bins numbered from 0 in the order they were opened.
    Raises:
        ValueError: a length is outside [1, capacity], or is no integer; the first such sequence is named.
    """
    lengths = check_lengths(lengths, capacity)
    bins = np.empty(len(lengths), np.int32)
    room = int(min(capacity, lengths.sum()))
    status = csrc.library().wizard_pack(lengths.ctypes.data, len(lengths), room, bins.ctypes.data)
    csrc.check(status, f"packing {len(lengths)} sequences into bins of {capacity}")
    return bins


def pack_reference(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The same bins as `pack`, in plain Python: O(N log N) comparisons, O(N x bins) moves. Arguments as there."""
    lengths = check_lengths(lengths, capacity)
    bins = np.empty(len(lengths), np.int32)
    spaces: list[tuple[int, int, int]] = []
    opened = 0
    for step, index in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        length = int(lengths[index])
        place = bisect_left(spaces, (length,))
        if place == len(spaces):
            space, chosen, opened = capacity, opened, opened + 1
        else:
            space, _, chosen = spaces.pop(place)
        bins[index] = chosen
        insort(spaces, (space - length, -step, chosen))
    return bins


def bin_members(bins: np.ndarray) -> list[np.ndarray]:
    """The sequences of each bin, ascending: list over bins of (n,) int64 indices.

    Args:
        bins: (N,) bin of each sequence, as from `pack`.
    """
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins) if len(bins) else np.zeros(0, np.int64)
    return np.split(order, np.cumsum(counts)[:-1]) if len(counts) else []


def check_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Lengths as a contiguous (N,) int64 array, each in [1, capacity]; ValueError names the first that is not."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise ValueError(
            f"lengths: expected a 1-d array of integers, got {lengths.ndim}-d {lengths.dtype}; pass token counts"
        )
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}; choose the tokens of a pack")
    lengths = np.ascontiguousarray(lengths, np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"lengths[{wrong[0]}]: expected 1 to {capacity} tokens, got {lengths[wrong[0]]} "
            f"({wrong.size} of {lengths.size} sequences are outside); shorten the sequence or raise the capacity"
        )
    return lengths
