"""Kernels of PPO: the policy's loss between the two passes over the vocabulary, and the critic's, with their slopes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

# Rows of the kernels' sums, in their order.
SUMS = (
    "loss", "clip_fraction", "ratio", "approx_kl", "dual_clip_fraction", "importance", "importance_truncated", "kl_k1",
    "kl_k2", "kl_k3", "entropy",
)  # fmt: skip
VALUE_SUMS = ("loss", "value_clip_fraction", "value_error")


@triton.jit
def _put(sums, number, block, blocks, values, kept):
    """Store the sum of a block's kept values as number `number`."""
    tl.store(sums + number * blocks + block, tl.sum(tl.where(kept, values, 0.0), 0))


@triton.jit(repr=named("ppo", "ESTIMATOR"), do_not_specialize=["tokens", "blocks"])
def ppo_kernel(
    logprob, entropy, behaviour, advantages, scale, reference, sampled, dlogprob, dentropy, sums, tokens, blocks, low,
    high, bound, kl, bonus, cap,
    DUAL: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    factor = tl.load(scale + token, mask=inside, other=0.0)
    live = inside & (factor != 0.0)
    current = tl.load(logprob + token, mask=live, other=0.0)
    old = tl.load(behaviour + token, mask=live, other=0.0)
    advantage = tl.load(advantages + token, mask=live, other=0.0)
    difference = current - old
    ratio = tl.exp(difference)
    plain = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, low), high)
    loss = tl.maximum(plain, clipped)
    slope = tl.where(clipped > plain, 0.0, plain)
    _put(sums, 1, block, blocks, (clipped > plain).to(tl.float32), live)
    _put(sums, 2, block, blocks, ratio, live)
    _put(sums, 3, block, blocks, ratio - 1.0 - difference, live)
    if DUAL:
        most = -bound * advantage
        is_bad = advantage < 0.0
        _put(sums, 4, block, blocks, (is_bad & (most < loss)).to(tl.float32), live)
        # At a tie torch.minimum gives half of the gradient to each side.
        slope = tl.where(is_bad & (most <= loss), tl.where(most == loss, 0.5 * slope, 0.0), slope)
        loss = tl.where(is_bad, tl.minimum(loss, most), loss)
    if sampled is not None:
        importance = tl.exp(old - tl.load(sampled + token, mask=live, other=0.0))
        weight = tl.minimum(importance, cap)
        loss = loss * weight
        slope = slope * weight
        _put(sums, 5, block, blocks, importance, live)
        _put(sums, 6, block, blocks, (importance > cap).to(tl.float32), live)
    if reference is not None:
        apart = tl.load(reference + token, mask=live, other=0.0) - current
        far = tl.exp(apart)
        if ESTIMATOR == "k1":
            loss += kl * -apart
            slope += kl
        elif ESTIMATOR == "k2":
            loss += kl * (0.5 * apart * apart)
            slope -= kl * apart
        else:
            loss += kl * (far - 1.0 - apart)
            slope += kl * (1.0 - far)
        _put(sums, 7, block, blocks, -apart, live)
        _put(sums, 8, block, blocks, 0.5 * apart * apart, live)
        _put(sums, 9, block, blocks, far - 1.0 - apart, live)
    spread = tl.load(entropy + token, mask=live, other=0.0)
    _put(sums, 10, block, blocks, spread, live)
    _put(sums, 0, block, blocks, factor * (loss - bonus * spread), live)
    tl.store(dlogprob + token, tl.where(live, factor * slope, 0.0), mask=inside)
    tl.store(dentropy + token, tl.where(live, -bonus * factor, 0.0), mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def value_loss_kernel(
    values, old_values, returns, dvalues, sums, tokens, blocks, clip, scale, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    value = tl.load(values + token, mask=inside, other=0.0)
    old = tl.load(old_values + token, mask=inside, other=0.0)
    goal = tl.load(returns + token, mask=inside, other=0.0)
    step = value - old
    off = value - goal
    moved = old + tl.minimum(tl.maximum(step, -clip), clip) - goal
    plain = off * off
    clipped = moved * moved
    # Inside the interval both are the same up to a rounding, which must not decide; outside, at a tie, torch.maximum
    # gives half of the gradient to each.
    beyond = tl.where(clipped > plain, 0.0, tl.where(clipped == plain, 0.5 * off, off))
    slope = tl.where(tl.abs(step) > clip, beyond, off)
    tl.store(dvalues + token, slope * scale, mask=inside)
    _put(sums, 0, block, blocks, 0.5 * scale * tl.maximum(plain, clipped), inside)
    _put(sums, 1, block, blocks, (clipped > plain).to(tl.float32), inside)
    _put(sums, 2, block, blocks, plain, inside)


def ppo_slopes(
    logprob: Tensor, entropy: Tensor, behaviour: Tensor, advantages: Tensor, scale: Tensor, *,
    clip: tuple[float, float], dual_clip: float | None, reference: Tensor | None, kl: float, kl_estimator: str,
    entropy_bonus: float, sampled: Tensor | None, importance_cap: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Loss, metrics, dlogprob and dentropy (T,) from (T,) numbers; arguments as in `PpoFormula`."""
    config = configuration("ppo", logprob.device)
    tokens, blocks = logprob.numel(), triton.cdiv(logprob.numel(), config["BLOCK"])
    dlogprob, dentropy = torch.empty_like(logprob), torch.empty_like(logprob)
    sums = torch.zeros((len(SUMS), blocks), dtype=torch.float32, device=logprob.device)
    launch(
        ppo_kernel, (blocks,), logprob, entropy, behaviour, advantages, scale, reference, sampled, dlogprob, dentropy,
        sums, tokens, blocks, 1.0 - clip[0], 1.0 + clip[1], float(dual_clip or 0.0), float(kl), float(entropy_bonus),
        float(importance_cap), DUAL=dual_clip is not None, ESTIMATOR=kl_estimator, **config,
    )  # fmt: skip
    totals = dict(zip(SUMS, sums.sum(1).unbind()))
    absent = {"dual_clip_fraction"} if dual_clip is None else set()
    absent |= {"importance", "importance_truncated"} if sampled is None else set()
    absent |= {"kl_k1", "kl_k2", "kl_k3"} if reference is None else set()
    loss = totals.pop("loss")
    return loss, {name: value for name, value in totals.items() if name not in absent}, dlogprob, dentropy


def value_slopes(
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
