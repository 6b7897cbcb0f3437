"""Rewards of RLEIF as typed objects: a score for the character span of each step, the factors and their product."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_exchange, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.solution_steps import split_steps
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.scoring import packed_groups
from wizard_engine.loss.process_reward import step_scores
from wizard_engine.model.heads import ScoringModel
from wizard_engine.model.loading import scoring_model
from wizard_engine.parallel import Mesh, Sharding, lockstep
from wizard_engine.runtime.metrics import progress

from .answer_batches import answer_batch, answer_runs, with_end

FACTORS = ("instruction", "process")


@dataclass(frozen=True)
class AnswerReward:
    """Reward of one answer.

    spans: character spans of the steps in the answer's text, so that the reward model may have another tokenizer than
    the policy.   scores: one in [0, 1] per span.   instruction: the instruction factor in [0, 1].
    finished: whether the answer ended within its limit.
    """

    spans: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    instruction: float
    finished: bool

    @property
    def process(self) -> float:
        """Minimum over the steps; 0 where the answer has no step or was truncated."""
        return min(self.scores) if self.scores and self.finished else 0.0

    def total(self, factors: Sequence[str] = FACTORS) -> float:
        """Product of the named factors; 0 for an answer that was truncated or has no step.

        Source: Luo et al. 2023, arXiv:2308.09583: r = r_I r_A with r_A the minimum over the steps.
        """
        if not self.finished or not self.scores:
            return 0.0
        return (self.instruction if "instruction" in factors else 1.0) * (self.process if "process" in factors else 1.0)


def encode_steps(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> tuple[Sample, list[int]]:
    """Tokens of prompt and answer, and the index of the last token of each step.

    Returns:
        sample: weight 1 at step ends, 0 elsewhere.   ends: index into sample.tokens per step of `split_steps`.
    """
    sample, ends, _ = _steps(tokenizer, prompt, answer)
    return sample, ends


def _steps(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> tuple[Sample, list[int], int]:
    """`encode_steps`, and the number of the prompt's tokens."""
    exchange = encode_exchange(tokenizer, prompt, answer)
    ends = []
    for _, end in split_steps(answer):
        inside = [i for i, (start, stop) in enumerate(exchange.spans) if start < end and stop > start]
        ends.append(exchange.start + (inside[-1] if inside else 0))
    tokens = np.asarray(exchange.tokens, dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[ends] = 1.0
    return Sample(tokens, weights), ends, exchange.start


def encode_instruction(tokenizer: Tokenizer, instruction: str) -> Sample:
    """Prompt of an instruction alone; the instruction reward model scores its last token."""
    tokens = np.asarray(encode_prompt(tokenizer, (Message("user", instruction),)), dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[-1] = 1.0
    return Sample(tokens, weights)


@torch.no_grad()
def score_tokens(
    model: ScoringModel,
    samples: Sequence[Sample],
    *,
    capacity: int = 8192,
    groups: Sequence[Sequence[int]] | None = None,
    desc: str = "",
) -> list[torch.Tensor]:
    """(n, outputs) fp32 scores at every token of each sample; empty where it is in none of the groups.

    Args:
        groups: indices of the samples of each pack of this rank; default: all, in packs of `capacity` tokens.
        desc: label of a progress bar; "": none.
    """
    device = next(model.parameters()).device
    out: list[torch.Tensor] = [torch.zeros(0)] * len(samples)
    if groups is None:
        groups = list(packed_groups([len(sample.tokens) for sample in samples], capacity))
    packs = lockstep(groups, model, backward=False)
    for group in progress(packs, desc=desc, unit="pack", total=len(groups), quiet=not desc):
        batch = collate([with_end(samples[i]) for i in group]).to(device)
        scores = model(*batch.inputs).float().cpu()
        for index, sample_scores in zip(group, scores.split([len(samples[i].tokens) for i in group])):
            out[index] = sample_scores
    return out


@torch.no_grad()
def score_answer_tokens(
    model: ScoringModel, samples: Sequence[Sample], prompt_tokens: Sequence[int], *, before: bool, capacity: int = 8192
) -> list[torch.Tensor]:
    """(n, outputs) fp32 scores at the answer tokens of each sample, or just before them.

    Args:
        prompt_tokens: at the beginning of each sample; equal prompts are read once.
    """
    device, parallel = next(model.parameters()).device, model.body.parallel
    out: list[torch.Tensor] = [torch.zeros(0)] * len(samples)
    runs = answer_runs(samples, prompt_tokens, range(len(samples)), capacity, parallel)
    for run in lockstep(runs, model, backward=False):
        counts = [prompt_tokens[i] for i in run]
        batch = answer_batch([samples[i] for i in run], counts, parallel, device, last=not before)
        scores = model(*batch.inputs)
        scores = (batch.scores_before(scores) if before else batch.scores_at(scores)).float().cpu()
        lengths = [len(samples[i].tokens) - prompt_tokens[i] for i in run]
        for index, answer_scores in zip(run, scores.split(lengths)):
            out[index] = answer_scores
    return out


class InstructionReward:
    """The instruction factor: sigmoid of the calibrated score of the instruction reward model."""

    def __init__(self, model: ScoringModel, tokenizer: Tokenizer, *, mean: float = 0.0, std: float = 1.0) -> None:
        self.model, self.tokenizer, self.mean, self.std = model, tokenizer, mean, std

    def raw(self, instructions: Sequence[str]) -> np.ndarray:
        """(N,) uncalibrated scores."""
        samples = [encode_instruction(self.tokenizer, text) for text in instructions]
        return np.asarray([float(scores[-1, 0]) for scores in score_tokens(self.model, samples)])

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """(N,) factors in (0, 1); the mean instruction of the training pool has 0.5."""
        return 1.0 / (1.0 + np.exp(-(self.raw(instructions) - self.mean) / self.std))


class ProcessReward:
    """The process factor: P(right) + neutral P(neutral) at the last token of each step."""

    def __init__(self, model: ScoringModel, tokenizer: Tokenizer, *, neutral: float = 0.5) -> None:
        self.model, self.tokenizer, self.neutral = model, tokenizer, neutral

    def __call__(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[list[float]]:
        """Scores in [0, 1] of the steps of each answer."""
        encoded = [_steps(self.tokenizer, p, a) if a.strip() else None for p, a in zip(prompts, answers)]
        kept = [i for i, item in enumerate(encoded) if item is not None]
        prompt_tokens = [encoded[i][2] for i in kept]
        scored = score_answer_tokens(self.model, [encoded[i][0] for i in kept], prompt_tokens, before=False)
        out: list[list[float]] = [[] for _ in answers]
        for index, count, scores in zip(kept, prompt_tokens, scored):
            ends = torch.tensor(encoded[index][1]) - count
            out[index] = step_scores(scores[ends], neutral=self.neutral).tolist()
        return out


def score_answers(
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    finished: Sequence[bool],
    *,
    instruction: InstructionReward,
    process: ProcessReward,
) -> list[AnswerReward]:
    """Reward of each answer: the instruction factor of its last user turn, and a score for every step."""
    texts = [prompt[-1].content for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    factor = dict(zip(unique, instruction(unique).tolist()))
    rewards = []
    for text, answer, done, scores in zip(texts, answers, finished, process(prompts, answers)):
        spans = tuple(split_steps(answer)) if scores else ()
        rewards.append(AnswerReward(spans, tuple(scores), factor[text], bool(done)))
    return rewards


def instruction_reward(path: Path, mesh: Mesh, sharding: Sharding | None) -> InstructionReward:
    """The instruction factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, fields = scoring_model(path, 1, mesh, sharding)
    return InstructionReward(model, tokenizer, mean=fields["wizard_mean"], std=fields["wizard_std"])


def process_reward(path: Path, mesh: Mesh, sharding: Sharding | None, neutral: float) -> ProcessReward:
    """The process factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, _ = scoring_model(path, 3, mesh, sharding)
    return ProcessReward(model, tokenizer, neutral=neutral)
