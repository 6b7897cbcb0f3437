"""Rewards of RLEIF as typed objects: a score for the character span of each step, the factors and their product."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_exchange, encode_prompt
from wizard_engine.data.final_answers import Claim, is_right, read_claim
from wizard_engine.data.latex_answers import is_latex, library
from wizard_engine.data.records import Message, Preference
from wizard_engine.data.samples import Pair, fitting_pair, margin_of
from wizard_engine.data.solution_steps import split_steps
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.scoring import packed_groups
from wizard_engine.loss.process_reward import step_scores
from wizard_engine.model.heads import ScoringModel
from wizard_engine.parallel import lockstep
from wizard_engine.runtime.metrics import progress

from .answer_batches import answer_batch, answer_runs, with_end

FACTORS = ("instruction", "process")
# Factors with a reward model of their own.
MODELS = (*FACTORS, "preference")
ALL_FACTORS = (*MODELS, "checked")


@dataclass(frozen=True)
class AnswerReward:
    """Reward of one answer.

    spans: character spans of the steps in the answer's text, so that the reward model may have another tokenizer than
    the policy.   scores: one in [0, 1] per span; none without a process model.   instruction: the instruction factor in
    [0, 1]; None without an instruction model.   finished: whether the answer ended within its limit.
    is_right: whether it claims the number of the reference; None without a reference.   preferred: probability that it
    is preferred to the row's own answer; None without a preference model.
    """

    spans: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    instruction: float | None
    finished: bool
    is_right: bool | None = None
    preferred: float | None = None

    @property
    def process(self) -> float:
        """Minimum over the steps; 0 where the answer has no step or was truncated."""
        return min(self.scores) if self.scores and self.finished else 0.0

    @property
    def checked(self) -> float:
        """1 where the answer claims the number of its reference; 0 elsewhere, and where the answer was truncated."""
        return 1.0 if self.is_right and self.finished else 0.0

    @property
    def preference(self) -> float:
        """Probability that the answer is preferred to the row's own; 0 where it was truncated, or without a model."""
        return self.preferred if self.preferred is not None and self.finished else 0.0

    def total(self, factors: Sequence[str] = FACTORS) -> float:
        """Product of the named factors; 0 for an answer that was truncated or has no step.

        Source: Luo et al. 2023, arXiv:2308.09583: r = r_I r_A with r_A the minimum over the steps.
        """
        if not self.finished or not self.spans:
            return 0.0
        product = self.instruction if "instruction" in factors else 1.0
        product *= self.process if "process" in factors else 1.0
        product *= self.preference if "preference" in factors else 1.0
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
    return _scored_at_end(encode_prompt(tokenizer, (Message("user", instruction),)))


def encode_rated(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> tuple[Sample, int]:
    """Prompt and answer, whose end token the preference reward model scores, and the number of the prompt's tokens.

    Raises:
        ValueError: as for `encode_prompt`.
    """
    exchange = encode_exchange(tokenizer, prompt, answer)
    return _scored_at_end(exchange.tokens), exchange.start


def _scored_at_end(ids: Sequence[int]) -> Sample:
    """A sample with weight at its last token alone."""
    tokens = np.asarray(ids, dtype=np.int32)
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[-1] = 1.0
    return Sample(tokens, weights)


def instruction_pair(tokenizer: Tokenizer, row: Preference, max_length: int, capacity: int) -> Pair:
    """The two instructions of a ranking row, as the instruction reward model reads them, with the row's margin.

    Args:
        max_length: that each stays below, tokens.   capacity: tokens of a pack, which must hold both.
    Raises:
        ValueError: the row has a prompt, one does not fit, or the margin is no number.
    """
    if row.prompt:
        raise ValueError(
            f"prompt: expected none, for chosen and rejected are instructions, got {len(row.prompt)} turns; pairs of "
            "answers are for --kind preference"
        )
    sides = [encode_instruction(tokenizer, text) for text in (row.chosen, row.rejected)]
    return _ranked_pair("instruction", sides, row, max_length, capacity)


def rated_pair(tokenizer: Tokenizer, row: Preference, max_length: int, capacity: int) -> Pair:
    """The two answers of a preference row, as the preference reward model reads them, with the row's margin.

    Args:
        max_length, capacity: as of `instruction_pair`; each answer with its prompt.
    Raises:
        ValueError: the row has no prompt, an answer is blank, the two are the same or tied, one does not fit, or the
            margin is no number.
    """
    if not row.prompt:
        raise ValueError(
            "prompt: expected the turns that chosen and rejected answer, got none; rankings of instructions are for "
            "--kind instruction"
        )
    for name, text in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not text.strip():
            raise ValueError(f"{name}: expected an answer, got a blank one; there is nothing to learn")
    sides = [encode_rated(tokenizer, row.prompt, text)[0] for text in (row.chosen, row.rejected)]
    if np.array_equal(sides[0].tokens, sides[1].tokens):
        raise ValueError("chosen, rejected: expected different tokens, got the same; there is nothing to learn")
    return _ranked_pair("answer", sides, row, max_length, capacity)


def _ranked_pair(what: str, sides: Sequence[Sample], row: Preference, max_length: int, capacity: int) -> Pair:
    """The sides of a pair, each with one token more, where its score is read."""
    longest = max(len(side.tokens) for side in sides)
    if longest >= max_length:
        raise ValueError(f"{what}: expected fewer than {max_length} tokens, got {longest}")
    return fitting_pair(Pair(with_end(sides[0]), with_end(sides[1]), margin_of(row)), capacity)


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


class PreferenceReward:
    """The preference factor: probability that an answer is preferred to the row's own answer to the same prompt.

    factor = sigmoid(s(x, y) - s(x, own answer)), which is 0.5 for an answer as good as the row's own

    The model learns from differences of scores within a prompt, and any number may be added to all scores of a prompt
    without a change of its loss. So its scores of two prompts do not compare, and a mean over a pool of answers would
    give a prompt a weight that nothing was learned about. The difference to a known answer is free of that number. It
    is on the scale of the model's own probabilities, as the process factor is, so that their product needs no scaling.
    Source: Bradley and Terry 1952, Biometrika 39:324 (the probability).
    """

    def __init__(self, model: ScoringModel, tokenizer: Tokenizer, *, capacity: int = 8192) -> None:
        self.model, self.tokenizer, self.capacity = model, tokenizer, capacity

    def check(self, prompt: Sequence[Message], answer: str) -> None:
        """Raises ValueError where a row's own answer, which is always scored, does not fit the model or a pack."""
        limit = min(self.model.config.max_positions, self.capacity)
        length = len(encode_rated(self.tokenizer, prompt, answer)[0].tokens)
        if length >= limit:
            raise ValueError(
                f"answer: expected fewer than {limit} tokens with its prompt (the preference model's context, and "
                f"training.pack_tokens), got {length}"
            )

    def raw(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> np.ndarray:
        """(N,) scores, each known up to a number that depends on its prompt."""
        encoded = [encode_rated(self.tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers)]
        samples, counts = [sample for sample, _ in encoded], [count for _, count in encoded]
        scored = score_answer_tokens(self.model, samples, counts, before=False, capacity=self.capacity)
        return np.asarray([float(scores[-1, 0]) for scores in scored])

    def __call__(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], own: Sequence[str]) -> list[float]:
        """Factors of the answers, in [0, 1]; 0 for a blank one.

        Args:
            own: the row's own answer to each prompt. It is scored once for each prompt, in the same passes.
        """
        kept = [i for i, answer in enumerate(answers) if answer.strip()]
        pairs = [(tuple(prompt), text) for prompt, text in zip(prompts, own)]
        unique = list(dict.fromkeys(pairs))
        scores = self.raw(
            [prompts[i] for i in kept] + [prompt for prompt, _ in unique],
            [answers[i] for i in kept] + [text for _, text in unique],
        )
        own_scores = dict(zip(unique, scores[len(kept) :]))
        factors = [0.0] * len(answers)
        for index, score in zip(kept, scores):
            # The sigmoid in a form that does not overflow.
            factors[index] = float(0.5 + 0.5 * np.tanh(0.5 * (score - own_scores[pairs[index]])))
        return factors


def score_answers(
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    finished: Sequence[bool],
    *,
    instruction: InstructionReward | None,
    process: ProcessReward | None,
    references: Sequence[Reference | None] | None = None,
    preference: PreferenceReward | None = None,
    own: Sequence[str] = (),
) -> list[AnswerReward]:
    """Reward of each answer: the instruction factor of its last user turn, a score for every step, whether it claims
    the number of its reference, and how likely it is preferred to the row's own answer; each where there is a model, or
    a reference, for it.

    Args:
        own: the row's own answer to each prompt, for the preference model alone.
    """
    texts = [prompt[-1].content for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    factors = {} if instruction is None else dict(zip(unique, instruction(unique).tolist()))
    steps = [[]] * len(answers) if process is None else process(prompts, answers)
    preferred = [None] * len(answers) if preference is None else preference(prompts, answers, own)
    rewards = []
    for row, (text, answer, done, scores) in enumerate(zip(texts, answers, finished, steps)):
        spans = tuple(split_steps(answer)) if answer.strip() else ()
        reference = None if references is None else references[row]
        is_right = None if reference is None else reference.is_claimed_by(answer)
        rewards.append(AnswerReward(spans, tuple(scores), factors.get(text), bool(done), is_right, preferred[row]))
    return rewards
