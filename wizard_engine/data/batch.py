"""Batches: samples packed end to end without padding, with the offsets that separate them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.backend import to_device
from kernels.shared_prefix import Prefixes

from .chat import Sample


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
        """Arguments of a model: (tokens, positions, cu_seqlens, max_seqlen)."""
        return self.tokens, self.positions, self.cu_seqlens, self.max_seqlen

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        names = ("tokens", "targets", "positions", "cu_seqlens", "weights")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


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


@dataclass(frozen=True, eq=False)
class SharedBatch:
    """Packed samples that store the tokens of a shared prompt once: T positions.

    tokens, positions: (T,) int64, prompts first.   prefixes: which answer continues which prompt.
    rows: (R,) int64, for each answer token, sample after sample, the position whose hidden state predicts it.
    targets: (R,) int64, those tokens.   target_positions: (R,) int64, their positions, with `last` (else -1).
    cu_answers: (S + 1,) int32, where each sample's answer tokens start.
    pieces: (sample, first, last) of the tokens in the pack, in order.   max_seqlen: longest sample.
    """

    tokens: Tensor
    positions: Tensor
    prefixes: Prefixes
    rows: Tensor
    targets: Tensor
    target_positions: Tensor
    cu_answers: Tensor
    pieces: list[tuple[int, int, int]]
    max_seqlen: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Prefixes, int]:
        """Arguments of a model."""
        return self.tokens, self.positions, self.prefixes, self.max_seqlen

    def to(self, device: torch.device | str) -> "SharedBatch":
        """The batch with its tensors on a device."""
        names = ("tokens", "positions", "rows", "targets", "target_positions", "cu_answers")
        moved = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, prefixes=self.prefixes.to(device), **moved)


def share_prompts(samples: Sequence[Sample], prompt_tokens: Sequence[int], *, last: bool = False) -> SharedBatch:
    """Batch of the samples in their order, each prompt once.

    Args:
        prompt_tokens: number of prompt tokens at the start of each sample, at least 1.
        last: keep each sample's last token as a position, although it predicts nothing.
    Raises:
        ValueError: no samples, or one without a prompt or an answer.
    """
    _check_prompts(samples, prompt_tokens)
    prompt_of, first_of = _distinct_prompts(samples, prompt_tokens)
    ends = [len(sample.tokens) - (0 if last else 1) for sample in samples]
    prompts = [(number, 0, prompt_tokens[number]) for number in first_of]
    tails = [(number, prompt_tokens[number], end) for number, end in enumerate(ends)]
    pieces = [*prompts, *tails]
    starts = np.cumsum([0, *(b - a for _, a, b in pieces)])
    prefix_tokens, total = int(starts[len(prompts)]), int(starts[-1])
    previous = np.arange(-1, total - 1)
    previous[starts[: len(prompts)]] = starts[: len(prompts)]
    keys, rows, targets, target_positions = [], [], [], []
    for number, (prompt, count, end) in enumerate(zip(prompt_of, prompt_tokens, ends)):
        begin, tail = starts[prompt], starts[len(prompts) + number]
        keys += [np.arange(begin, begin + count), np.arange(tail, tail + end - count)]
        if end > count:
            # The first token of an answer follows the last one of its prompt, which stands elsewhere in the pack.
            previous[tail] = begin + count - 1
        answer = len(samples[number].tokens) - count
        rows += [[begin + count - 1], np.arange(tail, tail + answer - 1)]
        targets.append(samples[number].tokens[count:])
        target_positions.append(np.arange(tail, tail + answer) if last else np.full(answer, -1))
    lengths = [len(sample.tokens) - count for sample, count in zip(samples, prompt_tokens)]

    def marks(sizes: Sequence[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)

    prefixes = Prefixes(
        marks([b - a for _, a, b in prompts]),
        max(b for _, _, b in prompts),
        marks([b - a for _, a, b in tails]),
        max(1, *(b - a for _, a, b in tails)),
        marks(ends),
        max(ends),
        torch.from_numpy(np.concatenate(keys)),
        torch.from_numpy(previous),
        prefix_tokens,
        total,
    )
    return SharedBatch(
        tokens=torch.from_numpy(np.concatenate([samples[i].tokens[a:b] for i, a, b in pieces]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(a, b) for _, a, b in pieces])),
        prefixes=prefixes,
        rows=torch.from_numpy(np.concatenate(rows).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        target_positions=torch.from_numpy(np.concatenate(target_positions).astype(np.int64)),
        cu_answers=marks(lengths),
        pieces=pieces,
        max_seqlen=max(ends),
    )


def _check_prompts(samples: Sequence[Sample], prompt_tokens: Sequence[int]) -> None:
    for number, (sample, count) in enumerate(zip(samples, prompt_tokens, strict=True)):
        if not 1 <= count < len(sample.tokens):
            raise ValueError(
                f"samples: expected 1 to {len(sample.tokens) - 1} prompt tokens in sample {number}, got {count}"
            )
    if not samples:
        raise ValueError("samples: expected at least one, got none")


def _distinct_prompts(samples: Sequence[Sample], prompt_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each sample the number of its prompt, and for each distinct prompt the first sample that has it."""
    number_of: dict[bytes, int] = {}
    first_of: list[int] = []
    prompt_of = []
    for number, (sample, count) in enumerate(zip(samples, prompt_tokens)):
        key = sample.tokens[:count].tobytes()
        if key not in number_of:
            number_of[key] = len(first_of)
            first_of.append(number)
        prompt_of.append(number_of[key])
    return prompt_of, first_of


def prompt_groups(
    samples: Sequence[Sample], prompt_tokens: Sequence[int], indices: Sequence[int], capacity: int
) -> list[list[int]]:
    """The samples `indices` in groups that keep those of one prompt together.

    A group has at most `capacity` tokens, each prompt counted once, or it is a single longer sample.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index in indices:
        by_prompt.setdefault(samples[index].tokens[: prompt_tokens[index]].tobytes(), []).append(index)
    ordered = sorted(by_prompt.values(), key=lambda group: max(len(samples[i].tokens) for i in group))
    runs: list[list[int]] = []
    filled = capacity
    for group in ordered:
        prompt = prompt_tokens[group[0]]
        answers = [len(samples[i].tokens) - prompt for i in group]
        # The answers to a prompt are split only if they do not fit into one group.
        is_new, closes = True, prompt + sum(answers) <= capacity < filled + prompt + sum(answers)
        for index, answer in zip(group, answers):
            needed = answer + (prompt if is_new else 0)
            if not runs or closes or filled + needed > capacity:
                runs.append([])
                filled, needed, closes = 0, answer + prompt, False
            runs[-1].append(index)
            filled, is_new = filled + needed, False
    return runs
