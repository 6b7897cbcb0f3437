"""Micro-batches of sampled answers: what a model reads, and where the numbers of their tokens are in what it says."""

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
    """Some answers to prompts, packed for one forward pass.

    Attributes:
        inputs: what a model takes.   targets: of the loss, per row of `hidden`; -1 where nothing is predicted.
        cu_seqlens: of those rows.   pieces: (sample, first, last) of the tokens that are read, in their order.
    """

    targets: Tensor
    cu_seqlens: Tensor
    pieces: list[tuple[int, int, int]]

    @property
    def inputs(self) -> tuple:
        """Arguments of the model's forward."""
        ...

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        """Rows of a model's hidden states that predict `targets`."""
        ...

    def place(self, pieces: Sequence[Tensor]) -> Tensor:
        """Numbers of each answer's tokens, where `targets` has them; 0 elsewhere."""
        ...

    def of_answers(self, rows: Tensor) -> Tensor:
        """Of numbers that stand like `targets`, those of answer tokens, (N,)."""
        ...

    def before(self, out: Tensor) -> Tensor:
        """Of a scoring model's scores (T, ...), those before each answer token."""
        ...

    def at(self, out: Tensor) -> Tensor:
        """The same at each answer token itself."""
        ...


class SharedAnswers:
    """Prompts of several answers are read once; methods as `AnswerBatch` says."""

    def __init__(self, batch: SharedBatch) -> None:
        self.batch, self.targets, self.cu_seqlens, self.pieces = batch, batch.targets, batch.cu_answers, batch.pieces

    @property
    def inputs(self) -> tuple:
        return self.batch.inputs

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        return model.parallel.pick(out, self.batch.rows)

    def place(self, pieces: Sequence[Tensor]) -> Tensor:
        return to_device(torch.cat(list(pieces)), self.targets.device)

    def of_answers(self, rows: Tensor) -> Tensor:
        return rows

    def before(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.batch.rows)

    def at(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.batch.target_positions)


class WholeAnswers:
    """Every answer is read behind its own prompt: where ranks divide the tokens of a sequence; methods as `AnswerBatch`
    says."""

    def __init__(self, batch: Batch, counts: Sequence[int], *, last: bool) -> None:
        self.batch, self.cu_seqlens = batch, batch.cu_seqlens
        ends = batch.cu_seqlens[1:].tolist()
        rows = [torch.arange(end - count, end) - (1 if last else 0) for end, count in zip(ends, counts)]
        self.rows = torch.cat(rows).to(batch.tokens.device)
        self.targets = torch.full_like(batch.targets, -1)
        self.targets[self.rows] = batch.targets[self.rows]
        self.pieces = [(i, 0, int(n)) for i, n in enumerate(batch.cu_seqlens.diff())]

    @property
    def inputs(self) -> tuple:
        return self.batch.inputs

    def hidden(self, model: Transformer, out: Tensor) -> Tensor:
        return out

    def place(self, pieces: Sequence[Tensor]) -> Tensor:
        values = to_device(torch.cat(list(pieces)), self.rows.device)
        return values.new_zeros(self.targets.shape).index_copy_(0, self.rows, values)

    def of_answers(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.rows)

    def before(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.rows)

    def at(self, out: Tensor) -> Tensor:
        return out.index_select(0, self.rows + 1)


def answer_runs(
    samples: Sequence[Sample],
    prompt_tokens: Sequence[int],
    indices: Sequence[int],
    capacity: int,
    parallel: ParallelContext,
) -> list[list[int]]:
    """Some samples in runs of at most `capacity` tokens each, or one longer sample."""
    if parallel.cp.size == 1:
        runs = prompt_groups(samples, prompt_tokens, indices, capacity)
        # Answers of similar lengths stand together: their attention is padded run by run.
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
    """One run of samples, for one forward pass.

    Args:
        prompt_tokens: at the beginning of each sample.   last: read each sample's last token, too.
    """
    if parallel.cp.size == 1:
        return SharedAnswers(share_prompts(samples, prompt_tokens, last=last).to(device))
    counts = [len(sample.tokens) - count for sample, count in zip(samples, prompt_tokens)]
    read = [with_end(sample) for sample in samples] if last else samples
    return WholeAnswers(collate(read).to(device), counts, last=last)


def with_end(sample: Sample) -> Sample:
    """The sample with one more token, so that its own last token is among the inputs of a packed batch."""
    return Sample(np.append(sample.tokens, sample.tokens[-1:]), np.append(sample.weights, np.float32(0)))
