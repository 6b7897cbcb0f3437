"""Kernel of sampling: a program per row, which walks over the vocabulary a few times, from L2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch


@triton.jit
def _scaled(logits, first, words, inverse, BLOCK: tl.constexpr):
    """Logits over the temperature of a block of words, -inf behind the last; -0 becomes 0."""
    word = first + tl.arange(0, BLOCK)
    return tl.load(logits + word, mask=word < words, other=float("-inf")).to(tl.float32) * inverse + 0.0


@triton.jit
def _ordered(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(logits, words, inverse, peak, lowest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number of the words at or above `lowest` (an ordered integer), or the sum of their exp(z - peak)."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, words, BLOCK):
        z = _scaled(logits, first, words, inverse, BLOCK)
        kept = _ordered(z) >= lowest
        if COUNT:
            total += (kept & (first + tl.arange(0, BLOCK) < words)).to(tl.float32)
        else:
            total += tl.where(kept, tl.exp(z - peak), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _largest(logits, words, inverse, peak, low, high, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest ordered integer of [low, high] that leaves at least `wanted` words, or that mass; bisection."""
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        found = _mass(logits, words, inverse, peak, middle.to(tl.int32), COUNT, BLOCK)
        is_enough = found >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["words"])
def sample_kernel(
    logits, seeds, uniform, temperature, top_k, top_p, tokens, logprobs, words, stride, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    heat = tl.load(temperature + row)
    is_greedy = heat == 0.0
    # Rounded as on the CPU, so that the same words tie.
    inverse = tl.div_rn(1.0, tl.where(is_greedy, 1.0, heat))
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, words, BLOCK):
        z = _scaled(logits, first, words, inverse, BLOCK)
        new = tl.maximum(peaks, z)
        finite = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(peaks - finite) + tl.exp(z - finite)
        peaks = new
    peak = tl.max(peaks, 0)
    total = tl.sum(sums * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)), 0)
    # A NaN is in the sum; where every word is -inf the sum is 0.
    is_bad = (total != total) | (peak == float("-inf"))
    # Ordered integers as 64-bit ones, whose differences do not overflow; the least is that of -inf.
    lowest = tl.full([], -2139095041, tl.int64)
    top = _ordered(peak).to(tl.int64)
    if top_k is not None:
        count = tl.load(top_k + row)
        if (count > 0) & (count < words) & (not is_bad) & (not is_greedy):
            lowest = _largest(logits, words, inverse, peak, lowest, top, count.to(tl.float32), True, BLOCK)
            total = _mass(logits, words, inverse, peak, lowest.to(tl.int32), False, BLOCK)
    if top_p is not None:
        share = tl.load(top_p + row)
        if (share < 1.0) & (not is_bad) & (not is_greedy):
            lowest = _largest(logits, words, inverse, peak, lowest, top, share * total, False, BLOCK)
            total = _mass(logits, words, inverse, peak, lowest.to(tl.int32), False, BLOCK)
    if uniform is not None:
        number = tl.load(uniform + row)
    else:
        word = tl.randint(tl.load(seeds + row), row * 0).to(tl.uint32, bitcast=True)
        number = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    goal = number * total
    chosen = words
    last = 0
    before = 0.0
    for first in tl.range(0, words, BLOCK):
        z = _scaled(logits, first, words, inverse, BLOCK)
        index = first + tl.arange(0, BLOCK)
        if is_greedy:
            passes = z == peak
        else:
            mass = tl.where(_ordered(z) >= lowest.to(tl.int32), tl.exp(z - peak), 0.0)
            passes = (before + tl.cumsum(mass, 0) > goal) & (mass > 0.0)
            last = tl.maximum(last, tl.max(tl.where(mass > 0.0, index, 0), 0))
            before += tl.sum(mass, 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(passes & (index < words), index, words), 0))
    # Sums of other orders may leave the last word's cumulative mass just below the goal.
    token = tl.where(is_bad, 0, tl.where(chosen == words, last, chosen))
    value = tl.load(logits + token).to(tl.float32) * inverse
    logprob = tl.where(is_bad, float("nan"), value - peak - tl.log(total))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)


def sample_rows(
    logits: Tensor, seeds: Tensor | None, uniform: Tensor | None, temperature: Tensor, top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens (B,) int64 and log-probabilities (B,) fp32; everything but logits (B, V) per row."""
    rows, words = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    per_row = (None if x is None else x.contiguous() for x in (seeds, uniform, temperature, top_k, top_p))
    launch(
        sample_kernel, (rows,), logits, *per_row, tokens, logprobs, words, logits.stride(0),
        **configuration("sample", logits.device),
    )  # fmt: skip
    return tokens, logprobs
