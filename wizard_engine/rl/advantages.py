"""Rewards of tokens, advantages and returns: what the losses of PPO need of a rollout."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gae import gae, whiten
from wizard_engine.loss import kl_estimates

from .answer_batches import AnswerBatch
from .rewards import AnswerReward
from .trajectories import Rollout


def token_rewards(
    rollout: Rollout,
    rewards: Sequence[AnswerReward],
    reference: Tensor,
    *,
    factors: Sequence[str],
    kl: float,
    no_eos_penalty: float,
    group: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
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


def trusted(trained: Tensor, sampled: Tensor, limit: float) -> Tensor:
    """Log-probabilities that ratios are taken to: the sampler's, and the trainer's own where the two are further apart
    than `limit` nats; there the truncated importance weight of the loss, trainer over sampler, is not 1."""
    return torch.where((trained - sampled).abs() > limit, trained, sampled)


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
    rollout: Rollout,
    rewards: Tensor,
    values: Tensor | None,
    reference: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    moments=None,
    behaviour: Tensor | None = None,
    advantages: Tensor | None = None,
) -> Targets:
    """GAE over the rollout, advantages whitened with moments over all ranks; or advantages that are given.

    Args:
        values: (N,) of a critic.   reference: (N,) log-probabilities under the reference.
        moments: function of (sum, sum of squares, count) on this rank giving the totals over ranks.
        behaviour: (N,) log-probabilities that ratios are taken to; default: the sampler's.
        advantages: (N,) where no critic takes part.
    """
    if advantages is None:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(rollout.lengths)], dtype=torch.int32)
        advantages, returns = gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam)
        advantages = whiten(advantages, moments=moments)
    else:
        returns = values = torch.zeros_like(advantages)
    behaviour = rollout.behaviour if behaviour is None else behaviour
    parts = (behaviour, rollout.behaviour, reference, advantages, returns, values)
    return Targets(*(rollout.split(x) for x in parts))
