"""Batches: samples packed end to end, without padding, with the marks that keep them apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wizard_engine.data.chat import Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences: T positions of S sequences.

    tokens: (T,) int64 inputs.   targets: (T,) int64, the token after each input.   positions: (T,) int64, from 0 in
    each sequence.   cu_seqlens: (S+1,) int32, where each sequence starts, then T.   max_seqlen: longest sequence.
    weights: (T,) fp32, loss weight of each target.   num_supervised: targets whose weight is not 0, known on the host.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    weights: Tensor
    num_supervised: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What a model takes: (tokens, positions, cu_seqlens, max_seqlen)."""
        return self.tokens, self.positions, self.cu_seqlens, self.max_seqlen

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        names = ("tokens", "targets", "positions", "cu_seqlens", "weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(samples: Sequence[Sample]) -> Batch:
    """Batch of the samples in their order; a sample of n tokens becomes n-1 positions (inputs and their targets).

    Raises:
        ValueError: no samples, or a sample of fewer than two tokens.
    """
    lengths = np.asarray([len(sample.tokens) - 1 for sample in samples], dtype=np.int64)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(
            f"samples: expected at least one, of two or more tokens each, got lengths {(lengths + 1).tolist()}"
        )
    starts = np.concatenate([[0], lengths.cumsum()])
    weights = np.concatenate([sample.weights[1:] for sample in samples])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return Batch(
        tokens=torch.from_numpy(np.concatenate([sample.tokens[:-1] for sample in samples]).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate([sample.tokens[1:] for sample in samples]).astype(np.int64)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        weights=torch.from_numpy(weights.astype(np.float32)),
        num_supervised=int(np.count_nonzero(weights)),
    )
