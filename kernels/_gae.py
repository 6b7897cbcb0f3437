"""Kernel of generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}, a program per sequence.

It walks over blocks of BLOCK tokens from the end of the sequence. Inside a block an associative scan from the right
solves the recursion as if nothing came after; then the advantage after the block, `carry`, is added with its decay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch


@triton.jit
def _compose(later_decay, later_value, decay, value):
    """Two neighbouring spans of the recursion A_t = value_t + decay_t A_{t+1} as one; the scan runs from the end."""
    return later_decay * decay, value + decay * later_value


@triton.jit
def gae_kernel(rewards, values, cu_seqlens, advantages, returns, gamma, decay, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - start
    carry = 0.0
    for block in tl.range(tl.cdiv(length, BLOCK) - 1, -1, -1, num_stages=1):
        token = block * BLOCK + tl.arange(0, BLOCK)
        in_range = token < length
        value = tl.load(values + start + token, mask=in_range, other=0.0)
        # V after the sequence's last token is 0.
        next_value = tl.load(values + start + token + 1, mask=token + 1 < length, other=0.0)
        delta = tl.load(rewards + start + token, mask=in_range, other=0.0) + gamma * next_value - value
        # Lanes after the end pass the carry through unchanged (decay 1, delta 0).
        factors = tl.where(in_range, decay, 1.0).to(tl.float32)
        carry_factor, advantage = tl.associative_scan((factors, delta), 0, _compose, reverse=True)
        advantage += carry_factor * carry
        tl.store(advantages + start + token, advantage, mask=in_range)
        tl.store(returns + start + token, advantage + value, mask=in_range)
        # The advantage of the block's first token.
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, advantage, 0.0), 0)


def gae_scan(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N,); arguments as in `gae`."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    config = configuration("gae", rewards.device)
    launch(
        gae_kernel,
        (cu_seqlens.numel() - 1 if rewards.numel() else 0,),
        rewards,
        values,
        cu_seqlens.contiguous(),
        advantages,
        returns,
        gamma,
        gamma * lam,
        **config,
    )
    return advantages, returns
