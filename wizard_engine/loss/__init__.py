"""Losses as pure functions of tensors; each is a sum over this rank divided by the step's global count."""

from .dpo import dpo_loss
from .ppo import policy_loss, value_loss
from .process_reward import process_loss
from .reward import ranking_loss
from .sft import sft_loss

__all__ = ["dpo_loss", "policy_loss", "process_loss", "ranking_loss", "sft_loss", "value_loss"]
