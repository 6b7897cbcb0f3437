"""Kernels of PPO: loss, metrics and gradients of the policy (per token), and of the critic.

One program of `ppo_kernel` takes BLOCK tokens, between the forward and the backward over the vocabulary:

1. Load the tokens; those of scale 0 take no part, whatever their numbers are.
2. Clipped surrogate loss of the ratio, and its gradient in the log-probability.
3. Dual clip of tokens with a negative advantage; truncated importance weight; KL estimate to the reference. Each is
   present only where its tensor or flag is.
4. Entropy bonus; store the gradients.

`grad` is d loss / d logprob, updated beside `loss`. Since d ratio / d logprob = ratio, -A ratio is its own
gradient. Metrics are stored as one sum per program and added by torch in one order: no atomics. All fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

# Rows of the kernels' sums, in their order.
SUMS = (
    "loss",
    "clip_fraction",
    "ratio",
    "approx_kl",
    "dual_clip_fraction",
    "importance",
    "importance_truncated",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "entropy",
)
VALUE_SUMS = ("loss", "value_clip_fraction", "value_error")


@triton.jit
def _store_sum(sums, number, block, blocks, values, kept):
    """Store the sum of a block's values where `kept` as metric `number` of (metrics, blocks)."""
    tl.store(sums + number * blocks + block, tl.sum(tl.where(kept, values, 0.0), 0))


@triton.jit(repr=named("ppo", "ESTIMATOR"), do_not_specialize=["tokens", "blocks"])
def ppo_kernel(
    logprob,
    entropy,
    behaviour,
    advantages,
    scale,
    reference,
    sampled,
    dlogprob,
    dentropy,
    sums,
    tokens,
    blocks,
    low,
    high,
    bound,
    kl,
    bonus,
    cap,
    DUAL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 1. The tokens.
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    in_range = token < tokens
    factor = tl.load(scale + token, mask=in_range, other=0.0)
    mask = in_range & (factor != 0.0)
    current = tl.load(logprob + token, mask=mask, other=0.0)
    old = tl.load(behaviour + token, mask=mask, other=0.0)
    advantage = tl.load(advantages + token, mask=mask, other=0.0)
    # 2. loss = max(-A r, -A clamp(r)). The gradient is 0 where the clamp decides.
    difference = current - old
    ratio = tl.exp(difference)
    unclipped = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, low), high)
    loss = tl.maximum(unclipped, clipped)
    grad = tl.where(clipped > unclipped, 0.0, unclipped)
    _store_sum(sums, 1, block, blocks, (clipped > unclipped).to(tl.float32), mask)
    _store_sum(sums, 2, block, blocks, ratio, mask)
    _store_sum(sums, 3, block, blocks, ratio - 1.0 - difference, mask)
    # 3. loss = min(loss, -bound A) where A < 0.
    if DUAL:
        dual_bound = -bound * advantage
        is_bad = advantage < 0.0
        _store_sum(sums, 4, block, blocks, (is_bad & (dual_bound < loss)).to(tl.float32), mask)
        # At a tie torch.minimum gives half of the gradient to each side.
        grad = tl.where(is_bad & (dual_bound <= loss), tl.where(dual_bound == loss, 0.5 * grad, 0.0), grad)
        loss = tl.where(is_bad, tl.minimum(loss, dual_bound), loss)
    if sampled is not None:
        importance = tl.exp(old - tl.load(sampled + token, mask=mask, other=0.0))
        weight = tl.minimum(importance, cap)
        loss = loss * weight
        grad = grad * weight
        _store_sum(sums, 5, block, blocks, importance, mask)
        _store_sum(sums, 6, block, blocks, (importance > cap).to(tl.float32), mask)
    # k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d for d = log r - log p; their gradients in log p: 1, -d, 1 - e^d.
    if reference is not None:
        log_ratio_ref = tl.load(reference + token, mask=mask, other=0.0) - current
        ratio_ref = tl.exp(log_ratio_ref)
        if ESTIMATOR == "k1":
            loss += kl * -log_ratio_ref
            grad += kl
        elif ESTIMATOR == "k2":
            loss += kl * (0.5 * log_ratio_ref * log_ratio_ref)
            grad -= kl * log_ratio_ref
        else:
            loss += kl * (ratio_ref - 1.0 - log_ratio_ref)
            grad += kl * (1.0 - ratio_ref)
        _store_sum(sums, 7, block, blocks, -log_ratio_ref, mask)
        _store_sum(sums, 8, block, blocks, 0.5 * log_ratio_ref * log_ratio_ref, mask)
        _store_sum(sums, 9, block, blocks, ratio_ref - 1.0 - log_ratio_ref, mask)
    # 4. Tokens that take no part get gradients of 0, not 0 * NaN.
    token_entropy = tl.load(entropy + token, mask=mask, other=0.0)
    _store_sum(sums, 10, block, blocks, token_entropy, mask)
    _store_sum(sums, 0, block, blocks, factor * (loss - bonus * token_entropy), mask)
    tl.store(dlogprob + token, tl.where(mask, factor * grad, 0.0), mask=in_range)
    tl.store(dentropy + token, tl.where(mask, -bonus * factor, 0.0), mask=in_range)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def value_loss_kernel(values, old_values, returns, dvalues, sums, tokens, blocks, clip, scale, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    in_range = token < tokens
    value = tl.load(values + token, mask=in_range, other=0.0)
    old = tl.load(old_values + token, mask=in_range, other=0.0)
    target = tl.load(returns + token, mask=in_range, other=0.0)
    step = value - old
    error = value - target
    clipped_error = old + tl.minimum(tl.maximum(step, -clip), clip) - target
    square = error * error
    clipped_square = clipped_error * clipped_error
    # Inside the trust interval both squares are equal up to a rounding, which must not decide: the gradient is `error`.
    # Outside, at a tie, torch.maximum gives half of the gradient to each side.
    outside_grad = tl.where(clipped_square > square, 0.0, tl.where(clipped_square == square, 0.5 * error, error))
    grad = tl.where(tl.abs(step) > clip, outside_grad, error)
    tl.store(dvalues + token, grad * scale, mask=in_range)
    _store_sum(sums, 0, block, blocks, 0.5 * scale * tl.maximum(square, clipped_square), in_range)
    _store_sum(sums, 1, block, blocks, (clipped_square > square).to(tl.float32), in_range)
    _store_sum(sums, 2, block, blocks, square, in_range)


def ppo_grads(
    logprob: Tensor,
    entropy: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    scale: Tensor,
    *,
    clip: tuple[float, float],
    dual_clip: float | None,
    reference: Tensor | None,
    kl: float,
    kl_estimator: str,
    entropy_bonus: float,
    sampled: Tensor | None,
    importance_cap: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss, metrics, dlogprob and dentropy (T,) from (T,) numbers; arguments as in `PpoFormula`."""
    config = configuration("ppo", logprob.device)
    tokens, blocks = logprob.numel(), triton.cdiv(logprob.numel(), config["BLOCK"])
    dlogprob, dentropy = torch.empty_like(logprob), torch.empty_like(logprob)
    sums = torch.zeros((len(SUMS), blocks), dtype=torch.float32, device=logprob.device)
    launch(
        ppo_kernel,
        (blocks,),
        logprob,
        entropy,
        behaviour,
        advantages,
        scale,
        reference,
        sampled,
        dlogprob,
        dentropy,
        sums,
        tokens,
        blocks,
        1.0 - clip[0],
        1.0 + clip[1],
        float(dual_clip or 0.0),
        float(kl),
        float(entropy_bonus),
        float(importance_cap),
        DUAL=dual_clip is not None,
        ESTIMATOR=kl_estimator,
        **config,
    )
    totals = dict(zip(SUMS, sums.sum(1).unbind()))
    absent = {"dual_clip_fraction"} if dual_clip is None else set()
    absent |= {"importance", "importance_truncated"} if sampled is None else set()
    absent |= {"kl_k1", "kl_k2", "kl_k3"} if reference is None else set()
    loss = totals.pop("loss")
    return loss, {name: value for name, value in totals.items() if name not in absent}, dlogprob, dentropy


def value_loss_grads(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(3,) sums as VALUE_SUMS names them, and dvalues (N,); the loss is multiplied by `scale`."""
    config = configuration("value_loss", values.device)
    tokens, blocks = values.numel(), triton.cdiv(values.numel(), config["BLOCK"])
    dvalues = torch.empty_like(values)
    sums = torch.zeros((len(VALUE_SUMS), blocks), dtype=torch.float32, device=values.device)
    launch(
        value_loss_kernel, (blocks,), values, old_values, returns, dvalues, sums, tokens, blocks, clip, scale, **config
    )
    return sums.sum(1), dvalues
