"""Losses, each a sum over this rank divided by the step's global count; those of a language model start at its hidden
states and stand in `kernels`, where their formulas and kernels are."""

from kernels.cross_entropy import cross_entropy as sft_loss
from kernels.dpo import dpo as dpo_loss
from kernels.dpo import pair_losses, preference_loss, sequence_logprobs
from kernels.linear_loss import LossOutput
from kernels.ppo import clipped_value_loss as value_loss
from kernels.ppo import kl_estimates
from kernels.ppo import ppo as policy_loss

from .process_reward import process_loss
from .reward import ranking_loss

__all__ = [
    "LossOutput",
    "dpo_loss",
    "kl_estimates",
    "pair_losses",
    "policy_loss",
    "preference_loss",
    "process_loss",
    "ranking_loss",
    "sequence_logprobs",
    "sft_loss",
    "value_loss",
]
