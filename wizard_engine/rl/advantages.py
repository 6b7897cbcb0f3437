"""Token rewards, advantages and returns of a rollout: the inputs of the PPO losses."""

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
        no_eos_penalty: subtracted where the answer has no end token.
        group: consecutive answers per prompt. Above 1, the mean reward of the prompt's other answers is subtracted
            from each answer's reward. That mean does not depend on the answer, so the gradient stays unbiased. The
            reward is not divided by the group's standard deviation, so the instruction factor weighs the prompt.
    Returns:
        rewards, and the k1 and k3 estimators per token.
    """
    estimates = kl_estimates(rollout.behaviour, reference)
    tokens = -kl * estimates["k1"]
    last = torch.tensor(rollout.lengths).cumsum(0) - 1
    final_rewards = [r.final(factors, no_eos_penalty) for r in rewards]
    tokens[last] += _relative(torch.tensor(final_rewards, dtype=tokens.dtype), group)
    return tokens, estimates


def old_logprobs(trained: Tensor, sampled: Tensor, limit: float) -> Tensor:
    """Log-probabilities in the denominator of the PPO ratio.

    These are the sampler's. Where trainer and sampler differ by more than `limit` nats, they are the trainer's, and the
    loss weighs the token with the truncated importance weight, trainer over sampler.
    """
    return torch.where((trained - sampled).abs() > limit, trained, sampled)


def advantages_of_groups(rewards: Tensor, rollout: Rollout, group: int, *, kind: str) -> Tensor:
    """(N,) the same advantage for every token of an answer, relative to the other answers to its prompt.

    rloo: R_i - mean of R_j, j != i.   grpo: (R_i - mean of R_j) / (standard deviation of R_j + 1e-6), i included.
    R is the sum of an answer's token rewards.

    Args:
        rewards: (N,) reward of each token.   group: consecutive answers per prompt, at least 2.
    Source: Ahmadian et al. 2024, arXiv:2402.14740; Shao et al. 2024, arXiv:2402.03300.
    """
    answer_rewards = torch.stack([values.sum() for values in rollout.split(rewards)])
    if kind == "rloo":
        advantage = _relative(answer_rewards, group)
    else:
        groups = answer_rewards.view(-1, group)
        advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    return torch.repeat_interleave(advantage, torch.tensor(rollout.lengths))


def _relative(rewards: Tensor, group: int) -> Tensor:
    """Each reward minus the mean of the other rewards of its group; unchanged for groups of one."""
    if group == 1:
        return rewards
    groups = rewards.view(-1, group)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (group - 1)).flatten()


@dataclass
class TokenTargets:
    """Inputs of the losses for each answer token, (N,), or for each row of a batch."""

    behaviour: Tensor
    sampled: Tensor
    reference: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


@dataclass
class Targets:
    """Inputs of the losses for each answer: one tensor over its tokens."""

    behaviour: tuple[Tensor, ...]
    sampled: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    advantages: tuple[Tensor, ...]
    returns: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def for_batch(self, indices: Sequence[int], batch: AnswerBatch) -> TokenTargets:
        """Targets of the answers of a batch in its layout; 0 where the batch predicts nothing."""
        return TokenTargets(*(batch.scatter([values[i] for i in indices]) for values in vars(self).values()))


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
    """Targets from GAE with advantages whitened over all ranks, or from precomputed advantages.

    Args:
        values: (N,) of a critic.   reference: (N,) log-probabilities under the reference.
        moments: sums (sum, sum of squares, count) of this rank over all ranks.
        behaviour: (N,) log-probabilities in the ratio's denominator; default: the sampler's.
        advantages: (N,) precomputed advantages, for runs without a critic.
    """
    if advantages is None:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(rollout.lengths)], dtype=torch.int32)
        advantages, returns = gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam)
        advantages = whiten(advantages, moments=moments)
    else:
        returns = values = torch.zeros_like(advantages)
    behaviour = rollout.behaviour if behaviour is None else behaviour
    targets = (behaviour, rollout.behaviour, reference, advantages, returns, values)
    return Targets(*(rollout.split(x) for x in targets))
