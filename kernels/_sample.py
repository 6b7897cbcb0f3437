"""Kernel of sampling. One program takes one row of logits and walks over it many times, from L2 after the first time.

1. Maximum and sum of exponentials of z = logits / temperature, lane by lane, then over the lanes.
2. top-k: bisection for the largest threshold that keeps at least k entries; then the mass that is left.
3. top-p: bisection for the largest threshold that keeps the mass top_p; then the mass that is left.
4. A uniform number: given, or Philox of the row's seed.
5. The first entry in vocabulary order whose cumulative mass passes uniform * mass. Temperature 0: the first maximum.
6. Store the token and its log-probability under the truncated distribution.

There is no sort: a bisection over the bits of the floats takes 32 walks, and entries that tie stay together. Values are
fp32, and sums run in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch


@triton.jit
def _scaled(logits, first, vocab_size, inverse, BLOCK: tl.constexpr):
    """Logits of a block of entries over the temperature, -inf after the last; -0 becomes 0, so that both tie."""
    entries = first + tl.arange(0, BLOCK)
    return tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32) * inverse + 0.0


@triton.jit
def _ordered(x):
    """Integers in the order of the floats: negative floats get their magnitude bits flipped."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(logits, vocab_size, inverse, row_max, threshold, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Number of entries at or above `threshold` (an ordered integer), or the sum of their exp(z - row_max)."""
    lane_sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, vocab_size, BLOCK):
        z = _scaled(logits, first, vocab_size, inverse, BLOCK)
        is_kept = _ordered(z) >= threshold
        if COUNT:
            lane_sums += (is_kept & (first + tl.arange(0, BLOCK) < vocab_size)).to(tl.float32)
        else:
            lane_sums += tl.where(is_kept, tl.exp(z - row_max), 0.0)
    return tl.sum(lane_sums, 0)


@triton.jit
def _threshold(logits, vocab_size, inverse, row_max, low, high, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest ordered integer of [low, high] that keeps at least `target` entries, or that mass; by bisection."""
    # 32 steps: the interval of ordered integers has fewer than 2^32 values.
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        mass = _mass(logits, vocab_size, inverse, row_max, middle.to(tl.int32), COUNT, BLOCK)
        is_enough = mass >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["vocab_size"])
def sample_kernel(
    logits, seeds, uniform, temperature, top_k, top_p, tokens, logprobs, vocab_size, stride, BLOCK: tl.constexpr
):
    # 1. Online softmax in each of BLOCK lanes, which are combined once, at the end.
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    row_temperature = tl.load(temperature + row)
    is_greedy = row_temperature == 0.0
    # A rounded reciprocal as on the CPU, so that the same entries tie.
    inverse = tl.div_rn(1.0, tl.where(is_greedy, 1.0, row_temperature))
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sums = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, vocab_size, BLOCK):
        z = _scaled(logits, first, vocab_size, inverse, BLOCK)
        new_max = tl.maximum(lane_max, z)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        lane_sums = lane_sums * tl.exp(lane_max - shift) + tl.exp(z - shift)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    row_sum = tl.sum(lane_sums * tl.exp(lane_max - tl.where(row_max == float("-inf"), 0.0, row_max)), 0)
    # A NaN among the logits makes the sum NaN; where all are -inf, row_max is.
    is_invalid = (row_sum != row_sum) | (row_max == float("-inf"))
    # Ordered integers in 64 bits, so that their differences do not overflow; the lowest is that of -inf.
    threshold = tl.full([], -2139095041, tl.int64)
    highest = _ordered(row_max).to(tl.int64)
    # 2. top-k.
    if top_k is not None:
        row_top_k = tl.load(top_k + row)
        if (row_top_k > 0) & (row_top_k < vocab_size) & (not is_invalid) & (not is_greedy):
            threshold = _threshold(
                logits, vocab_size, inverse, row_max, threshold, highest, row_top_k.to(tl.float32), True, BLOCK
            )
            row_sum = _mass(logits, vocab_size, inverse, row_max, threshold.to(tl.int32), False, BLOCK)
    # 3. top-p of what top-k left.
    if top_p is not None:
        row_top_p = tl.load(top_p + row)
        if (row_top_p < 1.0) & (not is_invalid) & (not is_greedy):
            threshold = _threshold(
                logits, vocab_size, inverse, row_max, threshold, highest, row_top_p * row_sum, False, BLOCK
            )
            row_sum = _mass(logits, vocab_size, inverse, row_max, threshold.to(tl.int32), False, BLOCK)
    # 4. The uniform number: the upper 23 bits of a Philox word plus a half, times 2^-23, so never 0 or 1.
    if uniform is not None:
        row_uniform = tl.load(uniform + row)
    else:
        # The offset 0, as a tensor of the program.
        random_bits = tl.randint(tl.load(seeds + row), row * 0).to(tl.uint32, bitcast=True)
        row_uniform = ((random_bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    # 5. The choice. `chosen` is the smallest index that passes, over all blocks.
    target_mass = row_uniform * row_sum
    chosen = vocab_size
    last_kept = 0
    mass_before = 0.0
    for first in tl.range(0, vocab_size, BLOCK):
        z = _scaled(logits, first, vocab_size, inverse, BLOCK)
        index = first + tl.arange(0, BLOCK)
        if is_greedy:
            is_past = z == row_max
        else:
            mass = tl.where(_ordered(z) >= threshold.to(tl.int32), tl.exp(z - row_max), 0.0)
            is_past = (mass_before + tl.cumsum(mass, 0) > target_mass) & (mass > 0.0)
            last_kept = tl.maximum(last_kept, tl.max(tl.where(mass > 0.0, index, 0), 0))
            mass_before += tl.sum(mass, 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(is_past & (index < vocab_size), index, vocab_size), 0))
    # 6. row_sum was added in another order, so the last cumulative mass may stay just below the target.
    token = tl.where(is_invalid, 0, tl.where(chosen == vocab_size, last_kept, chosen))
    value = tl.load(logits + token).to(tl.float32) * inverse
    logprob = tl.where(is_invalid, float("nan"), value - row_max - tl.log(row_sum))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)


def sample_rows(
    logits: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64 and log-probabilities (B,) fp32; everything but logits (B, V) per row."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    per_row = (None if x is None else x.contiguous() for x in (seeds, uniform, temperature, top_k, top_p))
    launch(
        sample_kernel,
        (rows,),
        logits,
        *per_row,
        tokens,
        logprobs,
        vocab_size,
        logits.stride(0),
        **configuration("sample", logits.device),
    )
    return tokens, logprobs
