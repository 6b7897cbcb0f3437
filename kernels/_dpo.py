"""Kernels of DPO: a program per pair, from log-probabilities to loss, metrics and gradients.

It runs between the forward and the backward over the vocabulary:

1. Sum weight * logprob over the chosen and over the rejected sequence (means: divided by the sum of weights).
2. Rewards beta (policy - reference), their margin, and the loss of the variant with `grad` = d loss / d margin.
3. Write the gradient of every token: weight * (grad * beta / num_pairs), minus the likelihood term for chosen tokens.
4. Store the pair's metrics, (8, pairs); torch adds them in one order.

`sequence_logprobs_kernel` makes the same sums of the reference model in the same order, so that the margin is exactly 0
where policy and reference are equal. All fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

# Metrics in the order of `dpo_kernel`'s stores.
SUMS = (
    "loss",
    "chosen_reward",
    "rejected_reward",
    "accuracy",
    "margin",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_nll",
)


@triton.jit
def _log_sigmoid(x):
    """log(1 / (1 + exp(-x))), to rounding for every x."""
    small = tl.exp(-tl.abs(x))
    above = 1.0 + small
    # log1p(small); where 1 + small rounds to 1 it is small itself.
    log = tl.where(above == 1.0, small, tl.log(above) * small / tl.where(above == 1.0, 1.0, above - 1.0))
    return tl.minimum(x, 0.0) - log


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _weighted_sum(logprob, weights, start, end, BLOCK: tl.constexpr):
    """Sum of weight times log-probability, and of weights, of the tokens from `start` to `end`."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        weight = tl.load(weights + token, mask=token < end, other=0.0)
        total += weight * tl.load(logprob + token, mask=token < end, other=0.0)
        count += weight
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _write_grads(dlogprob, weights, start, end, grad, BLOCK: tl.constexpr):
    """Write the gradient times each token's weight."""
    for first in tl.range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        weight = tl.load(weights + token, mask=token < end, other=0.0)
        tl.store(dlogprob + token, weight * grad, mask=token < end)


@triton.jit(repr=named("sequence_logprobs", "MEAN"))
def sequence_logprobs_kernel(logprob, weights, cu_seqlens, out, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    total, count = _weighted_sum(logprob, weights, start, end, BLOCK)
    if MEAN:
        total = total / tl.maximum(count, 1.0)
    tl.store(out + sequence, total)


@triton.jit(repr=named("dpo", "VARIANT", "MEAN"), do_not_specialize=["pairs"])
def dpo_kernel(
    logprob,
    weights,
    cu_seqlens,
    reference,
    dlogprob,
    sums,
    pairs,
    beta,
    smoothing,
    pair_scale,
    nll_scale,
    VARIANT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. Chosen sequences come first, then the rejected ones in the same order.
    pair = tl.program_id(0)
    chosen_start = tl.load(cu_seqlens + pair)
    chosen_end = tl.load(cu_seqlens + pair + 1)
    rejected_start = tl.load(cu_seqlens + pairs + pair)
    rejected_end = tl.load(cu_seqlens + pairs + pair + 1)
    likelihood, chosen_count = _weighted_sum(logprob, weights, chosen_start, chosen_end, BLOCK)
    rejected, rejected_count = _weighted_sum(logprob, weights, rejected_start, rejected_end, BLOCK)
    chosen = likelihood
    chosen_scale = 1.0
    rejected_scale = 1.0
    if MEAN:
        chosen_scale = 1.0 / tl.maximum(chosen_count, 1.0)
        rejected_scale = 1.0 / tl.maximum(rejected_count, 1.0)
        chosen = chosen / tl.maximum(chosen_count, 1.0)
        rejected = rejected / tl.maximum(rejected_count, 1.0)
    # 2. Rewards, margin, loss.
    chosen_reward = beta * (chosen - tl.load(reference + pair))
    rejected_reward = beta * (rejected - tl.load(reference + pairs + pair))
    margin = chosen_reward - rejected_reward
    if VARIANT == "ipo":
        residual = margin / beta - 1.0 / (2.0 * beta)
        loss = residual * residual
        grad = 2.0 * residual / beta
    elif VARIANT == "robust":
        debias = 1.0 / (1.0 - 2.0 * smoothing)
        loss = (smoothing * _log_sigmoid(-margin) - (1.0 - smoothing) * _log_sigmoid(margin)) * debias
        grad = (0.0 - smoothing * _sigmoid(margin) - (1.0 - smoothing) * _sigmoid(-margin)) * debias
    else:
        loss = 0.0 - (1.0 - smoothing) * _log_sigmoid(margin) - smoothing * _log_sigmoid(-margin)
        grad = smoothing * _sigmoid(margin) - (1.0 - smoothing) * _sigmoid(-margin)
    # 3. d margin / d logprob = beta * weight for chosen tokens, -beta * weight for rejected ones.
    grad = grad * beta * pair_scale
    _write_grads(dlogprob, weights, chosen_start, chosen_end, grad * chosen_scale - nll_scale, BLOCK)
    _write_grads(dlogprob, weights, rejected_start, rejected_end, 0.0 - grad * rejected_scale, BLOCK)
    # 4. Metrics.
    tl.store(sums + pair, loss * pair_scale - nll_scale * likelihood)
    tl.store(sums + pairs + pair, chosen_reward)
    tl.store(sums + 2 * pairs + pair, rejected_reward)
    tl.store(sums + 3 * pairs + pair, tl.where(margin > 0.0, 1.0, tl.where(margin == 0.0, 0.5, 0.0)))
    tl.store(sums + 4 * pairs + pair, margin)
    tl.store(sums + 5 * pairs + pair, chosen)
    tl.store(sums + 6 * pairs + pair, rejected)
    tl.store(sums + 7 * pairs + pair, 0.0 - likelihood)


def sequence_sums(logprob: Tensor, weights: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    """(S,) weighted sums or means of the sequences, added in the order of `dpo_kernel`."""
    out = torch.empty(cu_seqlens.numel() - 1, dtype=torch.float32, device=logprob.device)
    config = configuration("sequence_logprobs", logprob.device)
    assert config["BLOCK"] == configuration("dpo", logprob.device)["BLOCK"], "both add up in one order"
    launch(sequence_logprobs_kernel, (out.numel(),), logprob, weights, cu_seqlens, out, MEAN=mean, **config)
    return out


def dpo_grads(
    logprob: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor,
    *,
    beta: float,
    num_pairs: float,
    variant: str,
    label_smoothing: float,
    mean: bool,
    nll_scale: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and dlogprob (T,) from the (T,) log-probabilities of packed pairs; arguments as in `dpo`."""
    pairs = (cu_seqlens.numel() - 1) // 2
    dlogprob = torch.zeros_like(logprob)
    sums = torch.empty((len(SUMS), pairs), dtype=torch.float32, device=logprob.device)
    config = configuration("dpo", logprob.device)
    launch(
        dpo_kernel,
        (pairs,),
        logprob,
        weights,
        cu_seqlens,
        reference,
        dlogprob,
        sums,
        pairs,
        float(beta),
        float(label_smoothing),
        1.0 / num_pairs,
        float(nll_scale),
        VARIANT=variant,
        MEAN=mean,
        **config,
    )
    loss, *metrics = sums.sum(1).unbind()
    return loss, dict(zip(SUMS[1:], metrics)), dlogprob
