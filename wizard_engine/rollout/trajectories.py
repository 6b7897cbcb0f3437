"""Rollouts of reinforcement learning: sampled answers with everything that one PPO update needs, packed end to end."""

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.gae import gae, whiten

from ..data.chat import Sample, encode_prompt
from ..data.records import Message
from ..data.tokenizer import Tokenizer
from ..loss import kl_estimates
from ..model import Routes, ScoringModel, Transformer
from ..parallel import gather_objects, sharded
from ..parallel.mesh import Axis
from .generation import Generation, generate
from .rewards import AnswerReward, score_tokens
from .scoring import token_logprobs


@dataclass
class Rollout:
    """Sampled answers of one step on this rank.

    samples: prompt and answer ids, weight 1 on every answer token.   texts: the answers.   lengths: answer tokens.
    behaviour: (N,) log-probability of the answer tokens as sampled, all answers end to end, nats.
    experts: of a policy with experts, where the sampler sent each token that a trainer feeds, (n - 1, L, A) per sample.
    """

    prompts: list[tuple[Message, ...]]
    samples: list[Sample]
    texts: list[str]
    finished: list[bool]
    lengths: list[int]
    behaviour: Tensor
    experts: list[Tensor] | None = None

    def routes(self, picked: Sequence[int], device: torch.device) -> Routes:
        """The sampler's choices for some samples packed in this order; fresh ones of a dense policy."""
        if self.experts is None:
            return Routes()
        return Routes(torch.cat([self.experts[i] for i in picked]).to(device).int())

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Per-answer pieces of a tensor over all answer tokens."""
        return values.split(self.lengths)


def step_seed(*parts: int) -> int:
    """A 63-bit seed from numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def roll_out(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[Message]], *, samples: int,
    max_new_tokens: int, temperature: float, seed: int, batch_size: int = 128, first: int = 0, stride: int = 1,
) -> Rollout:  # fmt: skip
    """`samples` answers to each prompt, drawn from the model itself.

    Args:
        first, stride: the prompts are number first, first + stride, ... of those of all ranks; an answer does not
            depend on how they are divided. Ranks that have the same prompts, for they divide a model's matrices or
            tokens, sample a share of the answers each, and all of them get all.
    """
    numbers = [(first + i * stride) * samples + j for i in range(len(prompts)) for j in range(samples)]
    repeated = [tuple(prompt) for prompt in prompts for _ in range(samples)]
    ids = [encode_prompt(tokenizer, prompt) for prompt in repeated]
    engine = sharded(model)
    row = Axis() if engine is None else engine.mesh.row
    mine = slice(row.index, None, row.size)
    with engine.gathered() if engine is not None else nullcontext():
        drawn = generate(
            model, ids[mine], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            eos_id=tokenizer.eos_id, batch_size=batch_size, numbers=numbers[mine],
        )  # fmt: skip
    drawn = _interleaved(gather_objects(drawn, row))
    packed = []
    for prompt, answer in zip(ids, drawn.tokens):
        weights = np.concatenate((np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)))
        packed.append(Sample(np.asarray([*prompt, *answer], dtype=np.int32), weights))
    texts = [tokenizer.decode(tokens).strip() for tokens in drawn.tokens]
    behaviour = torch.tensor([x for row in drawn.logprobs for x in row], dtype=torch.float32)
    lengths = [len(tokens) for tokens in drawn.tokens]
    return Rollout(repeated, packed, texts, drawn.finished, lengths, behaviour, drawn.experts)


def _interleaved(parts: Sequence[Generation]) -> Generation:
    """What was drawn for rows r, r + n, ... by part r of n, in the order of the rows."""
    if len(parts) == 1:
        return parts[0]
    whole = Generation()
    for name, values in vars(whole).items():
        columns = [getattr(part, name) for part in parts]
        if columns[0] is not None:
            rows = itertools.zip_longest(*columns)
            values = [x for row in rows for x in row if x is not None]
        setattr(whole, name, values)
    return whole


def answer_logprobs(model: Transformer, rollout: Rollout, *, temperature: float) -> Tensor:
    """(N,) log-probability of the answer tokens under another model, with the sampler's temperature."""
    pieces = token_logprobs(model, rollout.samples, temperature=temperature)
    return torch.from_numpy(np.concatenate([p[-n:] for p, n in zip(pieces, rollout.lengths)]))


@torch.no_grad()
def answer_values(critic: ScoringModel, rollout: Rollout) -> Tensor:
    """(N,) critic's value of the state before each answer token."""
    scores = score_tokens(critic, rollout.samples)
    return torch.cat([s[-n - 1 : -1, 0] for s, n in zip(scores, rollout.lengths)])


def token_rewards(
    rollout: Rollout, rewards: Sequence[AnswerReward], reference: Tensor, *, factors: Sequence[str], kl: float,
    no_eos_penalty: float, group: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(N,) reward of each answer token: the answer's reward on its last token, minus kl times k1 on every token.

    Args:
        reference: (N,) log-probabilities under the reference.   kl: coefficient of k1 = log p - log r.
        no_eos_penalty: taken off where the answer did not close itself.
        group: answers per prompt, one after the other; above 1 each answer's reward is taken relative to the mean of
            the others of its prompt. That mean does not depend on the answer, so the gradient stays unbiased, and with
            no division by a group's deviation the instruction factor stays in as the prompt's weight.
    Returns:
        rewards, and the k1 and k3 estimators per token.
    """
    estimates = kl_estimates(rollout.behaviour, reference)
    tokens = -kl * estimates["k1"]
    last = torch.tensor(rollout.lengths).cumsum(0) - 1
    finals = [r.total(factors) - (0.0 if r.finished else no_eos_penalty) for r in rewards]
    tokens[last] += _relative(torch.tensor(finals, dtype=tokens.dtype), group)
    return tokens, estimates


def _relative(finals: Tensor, group: int) -> Tensor:
    """Each reward minus the mean of the other rewards of its group; unchanged for groups of one."""
    if group == 1:
        return finals
    rows = finals.view(-1, group)
    return (rows - (rows.sum(1, keepdim=True) - rows) / (group - 1)).flatten()


@dataclass
class TokenTargets:
    """What the losses need of each token of a packed row, (T,) each; 0 outside the answers."""

    behaviour: Tensor
    sampled: Tensor
    reference: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


@dataclass
class Targets:
    """Per-answer pieces of the same, over the answer tokens."""

    behaviour: tuple[Tensor, ...]
    sampled: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    advantages: tuple[Tensor, ...]
    returns: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def of(self, picked: Sequence[int], is_answer: Tensor) -> TokenTargets:
        """Those of some answers packed in this order, whose answer tokens are marked in `is_answer` (T,)."""
        return TokenTargets(*(_spread([pieces[i] for i in picked], is_answer) for pieces in vars(self).values()))


def _spread(pieces: Sequence[Tensor], is_answer: Tensor) -> Tensor:
    return torch.zeros(is_answer.shape, device=is_answer.device).masked_scatter_(
        is_answer, torch.cat(list(pieces)).to(is_answer.device)
    )


def make_targets(
    rollout: Rollout, rewards: Tensor, values: Tensor, reference: Tensor, *, gamma: float, lam: float, moments,
    own: Tensor | None = None,
) -> Targets:  # fmt: skip
    """GAE over the rollout, advantages whitened with moments over all ranks.

    Args:
        reference: (N,) log-probabilities under the reference.
        moments: function of (sum, sum of squares, count) on this rank giving the totals over ranks.
        own: (N,) the trainer's log-probabilities of the answers; default: the sampler's are taken for them.
    """
    marks = torch.tensor([0, *itertools.accumulate(rollout.lengths)], dtype=torch.int32)
    advantages, returns = gae(rewards, values, marks, gamma=gamma, lam=lam)
    whitened = whiten(advantages, moments=moments)
    behaviour = rollout.behaviour if own is None else own
    parts = (behaviour, rollout.behaviour, reference, whitened, returns, values)
    return Targets(*(rollout.split(x) for x in parts))
