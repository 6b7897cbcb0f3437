"""Rows that are scored once each: packs divided over the data ranks, and every row's values on every rank.

The packs do not depend on the number of ranks, so that a row is computed in the same company in every layout.
"""

from collections.abc import Sequence

import numpy as np

from wizard_engine.data.chat import Sample
from wizard_engine.model import Transformer
from wizard_engine.parallel import Mesh
from wizard_engine.runtime.object_collectives import gather_objects, is_distributed

from .scoring import packed_groups, sequence_logprobs


def rank_groups(lengths: Sequence[int], capacity: int, mesh: Mesh) -> list[list[int]]:
    """Indices of the rows of each of this rank's packs; ranks that share packed rows have the same ones."""
    return list(packed_groups(lengths, capacity))[mesh.data.index :: mesh.data.size]


def gather_rows(local: np.ndarray, groups: Sequence[Sequence[int]], mesh: Mesh) -> np.ndarray:
    """(N, ...) fp64 values of all rows in row order, the same on every rank; every rank makes the call.

    Args:
        local: (N, ...) values, of which this rank has the rows of its `groups`.
    """
    out = np.array(local, dtype=np.float64)
    if not is_distributed():
        return out
    rows = [row for group in groups for row in group] if mesh.is_row_leader else []
    for indices, values in gather_objects((rows, out[rows].tolist())):
        if indices:
            out[indices] = values
    return out


def divided_logprobs(
    model: Transformer,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    capacity: int = 8192,
    mean: bool = False,
    desc: str = "",
) -> np.ndarray:
    """(N,) fp64 log-probability of each sample's supervised tokens, nats; the data ranks divide the samples.

    Args:
        capacity: tokens of a pack.   mean: per token.   desc: label of a progress bar; "": none.
    """
    groups = rank_groups([len(sample.tokens) for sample in samples], capacity, mesh)
    return gather_rows(sequence_logprobs(model, samples, mean=mean, groups=groups, desc=desc), groups, mesh)
