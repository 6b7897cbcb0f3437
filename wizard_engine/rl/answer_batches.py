"""Micro-batches of sampled answers: a model's inputs, and the positions of the answer tokens in its outputs."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.backend import to_device
from wizard_engine.data.batch import Batch, SharedBatch, collate, prompt_groups, share_prompts
from wizard_engine.data.chat import Sample
from wizard_engine.generation.scoring import packed_groups
from wizard_engine.model import Transformer
from wizard_engine.parallel.context import ParallelContext


class AnswerBatch(Protocol):
    """Answers to prompts, packed for one forward pass.

    Attributes:
        inputs: arguments of the model.   targets: of the loss, per row of `hidden`; -1 where nothing is predicted.
        cu_seqlens: of those rows.   token_ranges: (sample, first, last) of the input tokens, in order.
    """

    targets: Tensor
    cu_seqlens: Tensor
    token_ranges: list[tuple[int, int, int]]

    @property
    def inputs(self) -> tuple:
        """Arguments of the model's forward."""
        ...

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        """Rows of the model's hidden states that predict `targets`."""
        ...

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each answer's tokens at the rows of `targets`; 0 elsewhere."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Values of the answer tokens, (N,), out of values in the layout of `targets`."""
        ...

    def scores_before(self, out: Tensor) -> Tensor:
        """Scores before each answer token, out of a scoring model's scores (T, ...)."""
        ...

    def scores_at(self, out: Tensor) -> Tensor:
        """Scores at each answer token, out of a scoring model's scores (T, ...)."""
        ...


class SharedAnswers:
    """Batch that stores the tokens of a shared prompt once; methods as in `AnswerBatch`."""

    def __init__(self, batch: SharedBatch) -> None:
        self.batch, self.targets, self.cu_seqlens = batch, batch.targets, batch.cu_answers
        self.token_ranges = batch.pieces

    @property
    def inputs(self) -> tuple:
        return self.batch.inputs

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        return model.parallel.pick(out, self.batch.rows)

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        return to_device(torch.cat(list(values)), self.targets.device)

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def scores_before(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.batch.rows)

    def scores_at(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.batch.target_positions)


class WholeAnswers:
    """Batch in which every answer follows its own copy of the prompt; methods as in `AnswerBatch`.

    Context parallelism uses it.
    """

    def __init__(self, batch: Batch, counts: Sequence[int], *, last: bool) -> None:
        self.batch, self.cu_seqlens = batch, batch.cu_seqlens
        ends = batch.cu_seqlens[1:].tolist()
        rows = [torch.arange(end - count, end) - (1 if last else 0) for end, count in zip(ends, counts)]
        self.rows = torch.cat(rows).to(batch.tokens.device)
        self.targets = torch.full_like(batch.targets, -1)
        self.targets[self.rows] = batch.targets[self.rows]
        self.token_ranges = [(i, 0, int(n)) for i, n in enumerate(batch.cu_seqlens.diff())]

    @property
    def inputs(self) -> tuple:
        return self.batch.inputs

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        return out

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        values_N = to_device(torch.cat(list(values)), self.rows.device)
        return values_N.new_zeros(self.targets.shape).index_copy_(0, self.rows, values_N)

    def gather(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.rows)

    def scores_before(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.rows)

    def scores_at(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.rows + 1)


def answer_runs(
    samples: Sequence[Sample],
    prompt_tokens: Sequence[int],
    indices: Sequence[int],
    capacity: int,
    parallel: ParallelContext,
) -> list[list[int]]:
    """Indices of samples in runs of at most `capacity` tokens each; a longer sample forms a run of its own."""
    if parallel.cp.size == 1:
        runs = prompt_groups(samples, prompt_tokens, indices, capacity)
        # Attention pads within a run, so answers of similar lengths are neighbours.
        return [sorted(run, key=lambda i: len(samples[i].tokens) - prompt_tokens[i]) for run in runs]
    groups = packed_groups([len(samples[i].tokens) for i in indices], capacity)
    return [[indices[i] for i in group] for group in groups]


def answer_batch(
    samples: Sequence[Sample],
    prompt_tokens: Sequence[int],
    parallel: ParallelContext,
    device: torch.device,
    *,
    last: bool = False,
) -> AnswerBatch:
    """Batch of one run of samples for one forward pass.

    Args:
        prompt_tokens: at the beginning of each sample.   last: include each sample's last token in the inputs.
    """
    if parallel.cp.size == 1:
        return SharedAnswers(share_prompts(samples, prompt_tokens, last=last).to(device))
    counts = [len(sample.tokens) - count for sample, count in zip(samples, prompt_tokens)]
    inputs = [with_end(sample) for sample in samples] if last else samples
    return WholeAnswers(collate(inputs).to(device), counts, last=last)


def with_end(sample: Sample) -> Sample:
    """The sample with one more token, so that a packed batch has its last token among the inputs."""
    return Sample(np.append(sample.tokens, sample.tokens[-1:]), np.append(sample.weights, np.float32(0)))
