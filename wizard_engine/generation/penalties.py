"""Penalties of tokens that a sequence has sampled before, and biases of single ids, added to logits before sampling."""

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import from_host

from .scheduler import Sampling, Sequence


def penalised(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor, bias: Tensor) -> Tensor:
    """Logits with penalties and biases.

    logits[r, v] - counts[r, v] frequency[r] - (1 if counts[r, v] > 0 else 0) presence[r] + bias[r, v]

    Args:
        logits, counts, bias: (R, V) fp32; counts: how often row r has sampled id v so far.
        frequency, presence: (R,) fp32.
    Source: OpenAI API reference, "Advanced usage: parameter details", https://platform.openai.com/docs/guides.
    """
    # No fused operation: every row rounds alike, whatever else is in the batch.
    logits = logits - counts * frequency[:, None]
    logits = logits - (counts > 0).to(logits.dtype) * presence[:, None]
    return logits + bias


class Penalties(NamedTuple):
    """The penalised rows of a step.

    sequences: of these rows.   rows: (R,) int64 among the step's.   frequency, presence: (R,) fp32.
    """

    sequences: list[Sequence]
    rows: Tensor
    frequency: Tensor
    presence: Tensor

    @classmethod
    def of(cls, grown: Rows[Sequence], device: torch.device) -> "Penalties | None":
        """Of the sequences of a step that have tensors of `start`; None without any."""
        rows = [i for i, sequence in enumerate(grown) if sequence.counts is not None]
        if not rows:
            return None
        sequences = [grown[i] for i in rows]
        numbers = (
            [s.sampling.frequency_penalty for s in sequences],
            [s.sampling.presence_penalty for s in sequences],
        )
        frequency, presence = (from_host(each, torch.float32, device) for each in numbers)
        return cls(sequences, from_host(rows, torch.int64, device), frequency, presence)

    def apply(self, logits_BV: Tensor) -> None:
        """Change the penalised rows of (B, V) logits in place."""
        counts, bias = (torch.stack(x) for x in zip(*((s.counts, s.bias) for s in self.sequences)))
        rows = logits_BV.index_select(0, self.rows)
        logits_BV.index_copy_(0, self.rows, penalised(rows, counts, self.frequency, self.presence, bias))

    def count(self, tokens: Tensor) -> None:
        """Count the step's sampled tokens (B,), on the device: the host may read them after the next step begins."""
        tokens_R = tokens.index_select(0, self.rows)
        for place, sequence in enumerate(self.sequences):
            sequence.counts.index_add_(0, tokens_R[place : place + 1], sequence.counts.new_ones(1))


def start(sequence: Sequence, vocab_size: int, device: torch.device) -> None:
    """Allocate a sequence's counts, all 0, and its biases; they outlive preemption: each token is counted once."""
    if sequence.counts is None and sequence.sampling.is_penalised:
        sequence.bias = bias_of(sequence.sampling, vocab_size, device)
        sequence.counts = torch.zeros(vocab_size, device=device)


def bias_of(sampling: Sampling, vocab_size: int, device: torch.device) -> Tensor:
    """(V,) fp32: what `logit_bias` adds to each logit."""
    bias_V = torch.zeros(vocab_size, device=device)
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias)
        bias_V.index_copy_(0, from_host(ids, torch.int64, device), from_host(values, torch.float32, device))
    return bias_V
