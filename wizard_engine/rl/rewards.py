"""Rewards of RLEIF as typed objects: a score for the character span of each step, the factors and their product."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_exchange, encode_prompt
from wizard_engine.data.final_answers import Claim, is_right, read_claim
from wizard_engine.data.latex_answers import is_latex, library
from wizard_engine.data.records import Message
from wizard_engine.data.solution_steps import split_steps
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.scoring import packed_groups
from wizard_engine.loss.process_reward import step_scores
from wizard_engine.model.heads import ScoringModel
from wizard_engine.parallel import lockstep
from wizard_engine.runtime.metrics import progress

from .answer_batches import answer_batch, answer_runs, with_end

FACTORS = ("instruction", "process")
ALL_FACTORS = (*FACTORS, "checked")


@dataclass(frozen=True)
class AnswerReward:
    """Reward of one answer.

    spans: character spans of the steps in the answer's text, so that the reward model may have another tokenizer than
    the policy.   scores: one in [0, 1] per span; none without a process model.   instruction: the instruction factor in
    [0, 1]; None without an instruction model.   finished: whether the answer ended within its limit.
    is_right: whether it claims the number of the reference; None without a reference.
    """

    spans: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    instruction: float | None
    finished: bool
    is_right: bool | None = None

    @property
    def process(self) -> float:
        """Minimum over the steps; 0 where the answer has no step or was truncated."""
        return min(self.scores) if self.scores and self.finished else 0.0

    @property
    def checked(self) -> float:
        """1 where the answer claims the number of its reference; 0 elsewhere, and where the answer was truncated."""
        return 1.0 if self.is_right and self.finished else 0.0

    def total(self, factors: Sequence[str] = FACTORS) -> float:
        """Product of the named factors; 0 for an answer that was truncated or has no step.

        Source: Luo et al. 2023, arXiv:2308.09583: r = r_I r_A with r_A the minimum over the steps.
        """
        if not self.finished or not self.spans:
            return 0.0
        product = self.instruction if "instruction" in factors else 1.0
        product *= self.process if "process" in factors else 1.0
        return product * self.checked if "checked" in factors else product

    def final(self, factors: Sequence[str], no_eos_penalty: float) -> float:
        """The answer's reward: the product of the factors, or minus the penalty where it did not end by itself."""
        return self.total(factors) if self.finished else -no_eos_penalty


@dataclass(frozen=True)
class Reference:
    """A row's own answer, whose number is read once."""

    text: str
    claim: Claim | None

    @classmethod
    def of(cls, text: str) -> "Reference":
        """The reference that a row's answer makes."""
        return cls(text, read_claim(text))

    @property
    def is_readable(self) -> bool:
        """Whether answers can be compared with it."""
        return self.claim is not None or (is_latex(self.text) and library() is not None)

    def is_claimed_by(self, answer: str) -> bool:
        """Whether an answer claims the same number, or the same expression."""
        return is_right(read_claim(answer), answer, self.claim, self.text)


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

    def __init__(
        self, model: ScoringModel, tokenizer: Tokenizer, *, mean: float = 0.0, std: float = 1.0, capacity: int = 8192
    ) -> None:
        self.model, self.tokenizer, self.mean, self.std, self.capacity = model, tokenizer, mean, std, capacity

    def raw(self, instructions: Sequence[str]) -> np.ndarray:
        """(N,) uncalibrated scores."""
        samples = [encode_instruction(self.tokenizer, text) for text in instructions]
        return np.asarray(
            [float(scores[-1, 0]) for scores in score_tokens(self.model, samples, capacity=self.capacity)]
        )

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """(N,) factors in (0, 1); the mean instruction of the training pool has 0.5."""
        return 1.0 / (1.0 + np.exp(-(self.raw(instructions) - self.mean) / self.std))


class ProcessReward:
    """The process factor: P(right) + neutral P(neutral) at the last token of each step."""

    def __init__(
        self, model: ScoringModel, tokenizer: Tokenizer, *, neutral: float = 0.5, capacity: int = 8192
    ) -> None:
        self.model, self.tokenizer, self.neutral, self.capacity = model, tokenizer, neutral, capacity

    def __call__(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[list[float]]:
        """Scores in [0, 1] of the steps of each answer."""
        encoded = [_steps(self.tokenizer, p, a) if a.strip() else None for p, a in zip(prompts, answers)]
        kept = [i for i, item in enumerate(encoded) if item is not None]
        prompt_tokens = [encoded[i][2] for i in kept]
        samples = [encoded[i][0] for i in kept]
        scored = score_answer_tokens(self.model, samples, prompt_tokens, before=False, capacity=self.capacity)
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
    instruction: InstructionReward | None,
    process: ProcessReward | None,
    references: Sequence[Reference | None] | None = None,
) -> list[AnswerReward]:
    """Reward of each answer: the instruction factor of its last user turn, a score for every step, and whether it
    claims the number of its reference; each where there is a model, or a reference, for it."""
    texts = [prompt[-1].content for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    factors = {} if instruction is None else dict(zip(unique, instruction(unique).tolist()))
    steps = [[]] * len(answers) if process is None else process(prompts, answers)
    rewards = []
    for row, (text, answer, done, scores) in enumerate(zip(texts, answers, finished, steps)):
        spans = tuple(split_steps(answer)) if answer.strip() else ()
        reference = None if references is None else references[row]
        is_right = None if reference is None else reference.is_claimed_by(answer)
        rewards.append(AnswerReward(spans, tuple(scores), factors.get(text), bool(done), is_right))
    return rewards
