"""Rollouts of reinforcement learning: sampled answers with everything that one PPO update needs, packed end to end."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.gae import gae, whiten
from kernels.linear_logprob import linear_logprob

from ..data.chat import Sample, encode_prompt
from ..data.records import Message
from ..data.tokenizer import Tokenizer
from ..loss import kl_estimates
from ..model import Routes, ScoringModel, Transformer
from ..parallel import gather_objects, paced
from ..parallel.spread import Spread
from .answers import AnswerBatch, answer_batch, answer_runs
from .generation import Generation, continued
from .rewards import AnswerReward, score_answer_tokens
from .sampler import Sampler
from .scheduler import Sampling


@dataclass
class Rollout:
    """Sampled answers of one step on this rank.

    samples: prompt and answer ids, weight 1 on every answer token.   texts: the answers.   lengths: answer tokens.
    behaviour: (N,) log-probability of the answer tokens as sampled, all answers end to end, nats.
    experts: of a policy with experts, where the sampler sent each token that a trainer feeds, (n - 1, L, A) per sample.
    stamp: checksum of the weights that it was sampled from.
    load: of this rank's engine: steps, tokens that came out of them, sequences that could run at once.
    """

    prompts: list[tuple[Message, ...]]
    samples: list[Sample]
    texts: list[str]
    finished: list[bool]
    lengths: list[int]
    behaviour: Tensor
    experts: list[Tensor] | None = None
    stamp: int | None = None
    load: tuple[int, int, int] = (0, 0, 0)

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each sample's prompt."""
        return [len(sample.tokens) - length for sample, length in zip(self.samples, self.lengths)]

    def batch(self, picked: Sequence[int], spread: Spread, device: torch.device) -> AnswerBatch:
        """Some answers for one forward pass of a model that is spread so."""
        counts = self.prompt_tokens
        return answer_batch([self.samples[i] for i in picked], [counts[i] for i in picked], spread, device)

    def routes(self, picked: Sequence[int], batch: AnswerBatch, device: torch.device) -> Routes:
        """The sampler's choices for the tokens of a batch of some samples; fresh ones of a dense policy."""
        if self.experts is None:
            return Routes()
        pieces = [self.experts[picked[i]][first:last] for i, first, last in batch.pieces]
        return Routes(torch.cat(pieces).to(device).int())

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Per-answer pieces of a tensor over all answer tokens."""
        return values.split(self.lengths)


def step_seed(*parts: int) -> int:
    """A 63-bit seed from numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def roll_out(
    sampler: Sampler, tokenizer: Tokenizer, prompts: Sequence[Sequence[Message]], *, samples: int,
    max_new_tokens: int, temperature: float, seed: int, first: int = 0, stride: int = 1,
) -> Rollout:  # fmt: skip
    """`samples` answers to each prompt, drawn from the weights that the sampler has taken.

    Args:
        first, stride: the prompts are number first, first + stride, ... of those of all ranks; an answer does not
            depend on how they are divided. Ranks that have the same prompts, for they divide a model's matrices or
            tokens, sample a share of the prompts each, and all of them get all; ranks that divide the sampler's
            matrices sample what any of them has together.
    """
    numbers = [(first + i * stride) * samples + j for i in range(len(prompts)) for j in range(samples)]
    repeated = [tuple(prompt) for prompt in prompts for _ in range(samples)]
    ids = [encode_prompt(tokenizer, prompt) for prompt in repeated]
    row, tp = sampler.row, sampler.mesh.tp
    shares = [[i for i in range(len(ids)) if i // samples % row.size == r] for r in range(row.size)]
    parts = gather_objects([(numbers[i], ids[i]) for i in shares[row.index]], tp)
    together = [pair for part in parts for pair in part]
    samplings = [
        Sampling(max_new_tokens, float(temperature), seed=seed, row=number, eos_id=tokenizer.eos_id)
        for number, _ in together
    ]
    engine = sampler.engine
    before = engine.steps, engine.generated
    drawn = continued(engine, [prompt for _, prompt in together], samplings)
    slots = min(engine.max_sequences, len(together))
    load = engine.steps - before[0], engine.generated - before[1], slots
    begin = sum(len(part) for part in parts[: tp.index])
    own = drawn.rows(range(begin, begin + len(parts[tp.index])))
    drawn = _in_order(gather_objects(own, row), shares)
    packed = []
    for prompt, answer in zip(ids, drawn.tokens):
        weights = np.concatenate((np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)))
        packed.append(Sample(np.asarray([*prompt, *answer], dtype=np.int32), weights))
    texts = [tokenizer.decode(tokens).strip() for tokens in drawn.tokens]
    behaviour = torch.tensor([x for row in drawn.logprobs for x in row], dtype=torch.float32)
    lengths = [len(tokens) for tokens in drawn.tokens]
    return Rollout(repeated, packed, texts, drawn.finished, lengths, behaviour, drawn.experts, sampler.stamp, load)


def _in_order(parts: Sequence[Generation], shares: Sequence[Sequence[int]]) -> Generation:
    """What each part drew for its share of the rows, in the order of the rows."""
    if len(parts) == 1:
        return parts[0]
    places = {row: (r, i) for r, share in enumerate(shares) for i, row in enumerate(share)}
    whole = Generation(experts=None if parts[0].experts is None else [])
    for row in range(len(places)):
        part, place = places[row]
        for name, values in vars(parts[part]).items():
            if values is not None:
                getattr(whole, name).append(values[place])
    return whole


@torch.no_grad()
def answer_logprobs(model: Transformer, rollout: Rollout, *, temperature: float, capacity: int = 8192) -> Tensor:
    """(N,) log-probability of the answer tokens under another model, with the sampler's temperature."""
    device, spread = model.embedding.weight.device, model.spread
    out: list[Tensor] = [torch.zeros(0)] * len(rollout.samples)
    runs = answer_runs(rollout.samples, rollout.prompt_tokens, range(len(out)), capacity, spread)
    for run in paced(runs, model, backward=False):
        batch = rollout.batch(run, spread, device)
        hidden = batch.hidden(model, model(*batch.inputs))
        logprob, _ = linear_logprob(
            hidden, model.head_weight, batch.targets, temperature=temperature, shard=model.shard
        )
        pieces = batch.of_answers(logprob).float().cpu().split([rollout.lengths[i] for i in run])
        for index, piece in zip(run, pieces):
            out[index] = piece
    return torch.cat(out)


@torch.no_grad()
def answer_values(critic: ScoringModel, rollout: Rollout) -> Tensor:
    """(N,) critic's value of the state before each answer token."""
    scores = score_answer_tokens(critic, rollout.samples, rollout.prompt_tokens, before=True)
    return torch.cat([score[:, 0] for score in scores])


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


def trusted(own: Tensor, sampled: Tensor, limit: float) -> Tensor:
    """Log-probabilities that ratios are taken to: the sampler's, and the trainer's own where the two are further apart
    than `limit` nats; there the truncated importance weight of the loss, trainer over sampler, is not 1."""
    return torch.where((own - sampled).abs() > limit, own, sampled)


def idle_share(loads: Sequence[tuple[int, int, int]]) -> float:
    """Share of the sampling that went by with nothing to sample, at the end of the longest answers: 1 - tokens over
    what all ranks' sequences could have got in the steps of the slowest rank.

    Args:
        loads: `Rollout.load` of every rank.
    """
    steps = max(load[0] for load in loads)
    room = steps * sum(load[2] for load in loads)
    return 1 - sum(load[1] for load in loads) / room if room else 0.0


def advantages_of_groups(rewards: Tensor, rollout: Rollout, group: int, *, kind: str) -> Tensor:
    """(N,) the same advantage for every token of an answer, relative to the other answers to its prompt.

    rloo: R_i - mean of R_j, j != i.   grpo: (R_i - mean of R_j) / (standard deviation of R_j + 1e-6), i included.
    R is the sum of an answer's token rewards.

    Args:
        rewards: (N,) reward of each token.   group: answers per prompt, at least 2, one after the other.
    Source: Ahmadian et al. 2024, arXiv:2402.14740; Shao et al. 2024, arXiv:2402.03300.
    """
    total = torch.stack([piece.sum() for piece in rollout.split(rewards)])
    if kind == "rloo":
        advantage = _relative(total, group)
    else:
        rows = total.view(-1, group)
        advantage = ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)).flatten()
    return torch.repeat_interleave(advantage, torch.tensor(rollout.lengths))


def _relative(finals: Tensor, group: int) -> Tensor:
    """Each reward minus the mean of the other rewards of its group; unchanged for groups of one."""
    if group == 1:
        return finals
    rows = finals.view(-1, group)
    return (rows - (rows.sum(1, keepdim=True) - rows) / (group - 1)).flatten()


@dataclass
class TokenTargets:
    """What the losses need of each answer token, (N,), or of each row of a batch."""

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

    def of(self, picked: Sequence[int], batch: AnswerBatch) -> TokenTargets:
        """Those of some answers, as a batch of them stands; 0 where it predicts nothing."""
        return TokenTargets(*(batch.place([pieces[i] for i in picked]) for pieces in vars(self).values()))


def make_targets(
    rollout: Rollout, rewards: Tensor, values: Tensor | None, reference: Tensor, *, gamma: float = 1.0,
    lam: float = 1.0, moments=None, own: Tensor | None = None, advantages: Tensor | None = None,
) -> Targets:  # fmt: skip
    """GAE over the rollout, advantages whitened with moments over all ranks; or advantages that are given.

    Args:
        values: (N,) of a critic.   reference: (N,) log-probabilities under the reference.
        moments: function of (sum, sum of squares, count) on this rank giving the totals over ranks.
        own: (N,) the trainer's log-probabilities of the answers; default: the sampler's are taken for them.
        advantages: (N,) where no critic takes part.
    """
    if advantages is None:
        marks = torch.tensor([0, *itertools.accumulate(rollout.lengths)], dtype=torch.int32)
        advantages, returns = gae(rewards, values, marks, gamma=gamma, lam=lam)
        advantages = whiten(advantages, moments=moments)
    else:
        returns = values = torch.zeros_like(advantages)
    behaviour = rollout.behaviour if own is None else own
    parts = (behaviour, rollout.behaviour, reference, advantages, returns, values)
    return Targets(*(rollout.split(x) for x in parts))
