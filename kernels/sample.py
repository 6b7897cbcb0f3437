"""Sampling of one token per row: temperature, top-k, top-p, a seed per row, and the choice's log-probability."""

import math
from numbers import Integral

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, values_are_checked

# Philox 4x32 with 10 rounds: multipliers of the rounds and increments of the keys.
ROUNDS, MULTIPLIERS, WEYL = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64, of the counter 0 under each 64-bit key.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = [seeds & MASK, (seeds >> 32) & MASK]
    words = [torch.zeros_like(seeds) for _ in range(4)]
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = (_product(m, x) for m, x in zip(MULTIPLIERS, words[::2]))
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(key + step) & MASK for key, step in zip(keys, WEYL)]
    return tuple(words)


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers, in int64."""
    low, high = multiplier & 0xFFFF, multiplier >> 16
    first, second = x * low, x * high
    middle = (first >> 16) + second
    return (middle >> 16) & MASK, ((middle << 16) | (first & 0xFFFF)) & MASK


def uniforms(seeds: Tensor) -> Tensor:
    """One number in (0, 1) per seed, fp32, of 2^23 values: the first word of `philox`, its upper 23 bits."""
    return ((philox(seeds)[0] >> 9).float() + 0.5) * 2.0**-23


def row_seeds(seed: int, rows: Tensor, steps: int, first: int = 0) -> Tensor:
    """(B, steps) int64: a seed for every row and step from `first` on, by SplitMix64's finaliser m and increment g.

    m(m(seed + (row + 1) g) + (step + 1) g) modulo 2^64

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    golden = -7046029254386353131
    start = _mixed((seed + 2**63) % 2**64 - 2**63 + (rows.long() + 1) * golden)
    return _mixed(start[:, None] + (torch.arange(first, first + steps, device=rows.device) + 1) * golden)


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def sample_reference(
    logits: Tensor, uniform: Tensor, temperature: Tensor | float, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities as `sample` defines them; masses in fp64."""
    logits_BV = logits if logits.dtype == torch.float64 else logits.float()
    row_temperature = torch.as_tensor(temperature, dtype=logits_BV.dtype, device=logits.device)
    greedy_B = row_temperature == 0
    scaled = logits_BV
    if isinstance(temperature, Tensor) or temperature not in (0.0, 1.0):
        scaled = logits_BV * torch.where(greedy_B, 1.0, row_temperature).reciprocal().view(-1, 1)
    if top_k is not None or top_p is not None:
        # As it stands, a NaN stays one.
        is_below = (scaled < _threshold(scaled, top_k, top_p)) & ~greedy_B.view(-1, 1)
        scaled = torch.where(is_below, -torch.inf, scaled)
    logprobs = scaled.log_softmax(-1)
    tokens = _chosen(logits_BV, logprobs, uniform, greedy_B)
    logprob = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens.masked_fill(logprob.isnan(), 0), logprob


def _chosen(wide: Tensor, logprobs: Tensor, uniform: Tensor, greedy_B: Tensor) -> Tensor:
    """(B,) tokens. Greedy rows take the maximum of the logits: rounding may make log-probabilities tie that differ."""
    if bool(greedy_B.all()):
        return wide.argmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=wide.shape[-1] - 1)
    return torch.where(greedy_B, wide.argmax(-1), tokens) if bool(greedy_B.any()) else tokens


def _threshold(scaled: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """(B, 1) smallest value that stays after top-k and then top-p."""
    ranked = scaled.sort(-1, descending=True).values
    lowest = ranked[:, -1:]
    if top_k is not None:
        last = torch.where(top_k == 0, ranked.shape[-1], top_k).clamp(max=ranked.shape[-1]).long()[:, None] - 1
        lowest = ranked.gather(-1, last)
    if top_p is not None:
        kept = torch.where(ranked >= lowest, ranked, -torch.inf)
        mass = kept.double().softmax(-1).cumsum(-1)
        enough = (mass >= top_p.double()[:, None]).int().argmax(-1, keepdim=True)
        nucleus = ranked.gather(-1, enough)
        lowest = torch.where((top_p >= 1)[:, None], lowest, torch.maximum(nucleus, lowest))
    return lowest


@torch.library.custom_op("wizard_engine::sample", mutates_args=())
def _draw(
    logits: Tensor,
    seeds: Tensor | None,
    uniform: Tensor | None,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from ._sample import sample_rows

    return sample_rows(logits, seeds, uniform, temperature, top_k, top_p)


@_draw.register_fake
def _(logits, seeds, uniform, temperature, top_k, top_p):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64), logits.new_empty(
        logits.shape[:1], dtype=torch.float32
    )


@torch.no_grad()
def sample(
    logits: Tensor,
    seeds: Tensor | None = None,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    uniform: Tensor | None = None,
    checks_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the distribution that it was drawn from.

    z = logits / temperature. top-k keeps the entries of the vocabulary whose z is at least the k-th largest. Of the
    distribution over these, top-p keeps the entries with z >= v, for the largest v whose entries have a mass of at
    least top_p. Ties with the last one stay. The choice is the first entry in vocabulary order whose cumulative mass
    passes a uniform number times the whole mass.

    Args:
        logits: (B, V) fp32, fp16 or bf16 (CPU: fp64 too), last dim contiguous; entries of -inf are never drawn.
        seeds: (B,) int64, one per row: the row's uniform number is `uniforms(seed)`.
        temperature: >= 0, a number or (B,); 0 takes the largest logit, the lowest index of a tie, whatever top_k and
            top_p say, with its log-probability at temperature 1 over the whole vocabulary.
        top_k: integer >= 0, one or (B,); 0 or None keeps all.
        top_p: in (0, 1], a number or (B,); 1 or None keeps all.
        uniform: (B,) fp32 in (0, 1) instead of seeds, where many are made at once.
        checks_values: False where one row's trouble must not be the others': no values are looked at.
    Returns:
        tokens (B,) int64 and logprobs (B,) fp32 (fp64 for fp64 logits), nats. The same on every device up to the
        rounding of masses.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, a number is out of its range, or a row has a NaN, or nothing
            above -inf (values are checked on CPU, and on CUDA inside kernels.check_values(); elsewhere, and without
            `checks_values`, such a row gives token 0 with a log-probability of NaN). Numbers are checked as fp32.
    Source: top-p: Holtzman et al. 2020, arXiv:1904.09751.
    """
    _check(logits, seeds, uniform)
    temperature = _checked("temperature", temperature, logits, 0.0, math.inf, checks_values)
    if top_k is not None:
        top_k = _per_row(_checked("top_k", top_k, logits, 0, math.inf, checks_values), logits)
    if top_p is not None:
        top_p = _per_row(_checked("top_p", top_p, logits, 0.0, 1.0, checks_values, above=True), logits)
    if runs_triton(logits, "logits"):
        tokens, logprobs = _draw(logits, seeds, uniform, _per_row(temperature, logits), top_k, top_p)
    else:
        drawn = uniforms(seeds) if uniform is None else uniform
        tokens, logprobs = sample_reference(logits, drawn, temperature, top_k, top_p)
    if checks_values:
        _check_rows(logits, logprobs)
    return tokens, logprobs


def _per_row(x: Tensor | float, logits: Tensor) -> Tensor:
    """(B,) fp32 or, of integers, int32: those above the vocabulary mean all of it."""
    if not isinstance(x, Tensor):
        x = torch.full(logits.shape[:1], min(x, logits.shape[1]) if isinstance(x, int) else x, device=logits.device)
    return x.float() if x.is_floating_point() else x.clamp(max=logits.shape[1]).int()


def _check(logits: Tensor, seeds: Tensor | None, uniform: Tensor | None) -> None:
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits: expected (B, V) with V >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a float dtype, got {str(logits.dtype).removeprefix('torch.')}")
    if (seeds is None) == (uniform is None):
        raise ValueError(f"seeds, uniform: expected one of the two, got {'both' if uniform is not None else 'none'}")
    name, row_source, dtype = ("seeds", seeds, torch.int64) if uniform is None else ("uniform", uniform, torch.float32)
    if row_source.shape != logits.shape[:1] or row_source.dtype != dtype:
        raise ValueError(
            f"{name}: expected ({logits.shape[0]},) {str(dtype).removeprefix('torch.')}, got {tuple(row_source.shape)} "
            f"{str(row_source.dtype).removeprefix('torch.')}"
        )
    same_device(logits=logits, seeds=seeds, uniform=uniform)
    contiguous_rows(logits=logits)


def _checked(
    name: str,
    value: Tensor | float,
    logits: Tensor,
    low: float,
    high: float,
    checks_values: bool,
    above: bool = False,
) -> Tensor | float:
    """The number or the (B,) tensor as a float, for a float `low`, or as an integer, once it is in range."""
    is_tensor, kind = isinstance(value, Tensor), type(low)
    if is_tensor and (value.shape != logits.shape[:1] or value.device != logits.device):
        expected, got = f"({logits.shape[0]},) on {logits.device}", f"{tuple(value.shape)} on {value.device}"
        raise ValueError(f"{name}: expected {expected}, got {got}")
    if kind is int and (value.is_floating_point() if is_tensor else not isinstance(value, Integral)):
        raise ValueError(f"{name}: expected integers, got {value.dtype if is_tensor else value}")
    for number in _numbers(value) if checks_values else ():
        # The kernel's number: 1e-46 is 0, 1e39 is infinite.
        fp32 = torch.tensor(number, dtype=torch.float32).item() if kind is float else number
        if not (low < fp32 if above else low <= fp32) or not fp32 <= high or fp32 == math.inf:
            range_ = f"in ({low:g}, {high:g}]" if high != math.inf else f">= {low:g} and finite"
            raise ValueError(f"{name}: expected {range_}, got {number}")
    return (value.float() if kind is float else value) if is_tensor else kind(value)


def _numbers(value: Tensor | float) -> list[float]:
    """What there is to look at without a wait for a device."""
    if not isinstance(value, Tensor):
        return [value]
    return value.tolist() if values_are_checked(value) else []


def _check_rows(logits: Tensor, logprobs: Tensor) -> None:
    """ValueError where a row has no distribution: its log-probability is NaN."""
    if values_are_checked(logits) and bool(logprobs.isnan().any()):
        row = int(logprobs.isnan().nonzero()[0, 0])
        raise ValueError(f"logits: expected numbers, some above -inf, got {float(logits[row].amax())} in row {row}")
