"""The CPU path of linear log-probabilities: row chunks of the logits, in fp32 whatever the inputs, in one buffer.

Rows whose target is -1 take no part. A chunk's buffer takes in turn the logits, their distance to the row's largest
(or its exponential), and their gradient; what works element by element goes over it in parts that stay in the cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WORKSPACE_BYTES = 192 * 2**20
PART_BYTES = 2**20
# Words whose weights are widened at a time where they are narrower than fp32.
WORDS = 8192

# Of a chunk's log-probabilities, entropies (or None) and rows: their slopes.
Slopes = Callable[[Tensor, Tensor | None, Tensor | slice], tuple[Tensor, Tensor | None]]


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def finish(statistics: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each target, (T,) each, from (4, T) statistics; 0 where the target is -1."""
    peak, total, target, weighted = statistics
    log_total = total.log()
    ignored = targets < 0
    logprob, entropy = target - peak - log_total, log_total - weighted / total
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def merge(parts: Tensor) -> Tensor:
    """(4, T) statistics of the whole vocabulary from (n, 4, T) of its slices: see `linear_logprob_partial`."""
    peaks, totals, targets, weights = parts.unbind(1)
    peak = peaks.amax(0)
    apart = peaks - peak.masked_fill(peak == -torch.inf, 0.0)
    factor = apart.exp()
    lower = weights + totals * apart.clamp(min=torch.finfo(apart.dtype).min)
    weighted = torch.where(factor == 0, factor, factor * lower).sum(0)
    return torch.stack((peak, (totals * factor).sum(0), targets.amax(0), weighted))


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, start: int
) -> Tensor:
    """(4, T): largest logit, sum of exp(logit - largest), target's logit, sum weighted by logit - largest."""
    out = hidden.new_zeros((4, targets.numel()), dtype=wide(hidden[:0]).dtype)
    for rows, own, targets_N in _chunks(hidden, weight, targets, temperature, start):
        out[:, rows] = _reduce(_logits(own, weight), targets_N, entropy)
    return out


def gradients(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor, statistics: Tensor,
    temperature: float, start: int, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dhidden (T, D) and dweight (V, D) from the gradients of log-probabilities and entropies; logits are made anew."""
    sums = _Sums(hidden, weight, needs_hidden, needs_weight, temperature)
    for rows, own, targets_N in _chunks(hidden, weight, targets, temperature, start):
        shifted = _logits(own, weight)
        _shift(shifted, statistics[0, rows], dentropy is not None)
        slopes = dlogprob[rows], None if dentropy is None else dentropy[rows]
        sums.add(rows, own, _gradient(shifted, statistics[:, rows], targets_N, *slopes))
    found = zip(sums.results(), (hidden, weight))
    return tuple(None if dx is None else dx.to(x.dtype) for dx, x in found)


def one_pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, slopes: Slopes,
    needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(4, T) statistics, and dhidden and dweight, wide, where a chunk's slopes depend on nothing outside the chunk."""
    out = hidden.new_zeros((4, targets.numel()), dtype=wide(hidden[:0]).dtype)
    sums = _Sums(hidden, weight, needs_hidden, needs_weight, temperature)
    for rows, own, targets_N in _chunks(hidden, weight, targets, temperature, 0):
        shifted = _logits(own, weight)
        found = _reduce(shifted, targets_N, entropy)
        out[:, rows] = found
        logprob, spread = finish(found, targets_N)
        chunk_slopes = slopes(logprob, spread if entropy else None, rows)
        sums.add(rows, own, _gradient(shifted, found, targets_N, *chunk_slopes))
    return out, *sums.results()


def fits_one_chunk(rows: int, words: int) -> bool:
    """True if this many rows make a single chunk."""
    return rows <= _chunk_rows(words)


def _chunk_rows(words: int) -> int:
    return max(1, WORKSPACE_BYTES // (4 * max(1, words)))


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, start: int
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Rows, their hidden states over the temperature (N, D) wide, and their targets counted from `start`."""
    kept = None if bool((targets >= 0).all()) else (targets >= 0).nonzero()[:, 0]
    count, step = targets.numel() if kept is None else kept.numel(), _chunk_rows(weight.shape[0])
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count)) if kept is None else kept[first : first + step]
        own = wide(hidden[rows])
        yield rows, own if temperature == 1 else own / temperature, targets[rows] - start


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """(N, V) logits, wide."""
    if weight_VD.dtype == hidden_ND.dtype:
        return hidden_ND @ weight_VD.T
    logits = hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0])
    for words in _words(weight_VD):
        logits[:, words] = hidden_ND @ weight_VD[words].to(hidden_ND.dtype).T
    return logits


def _words(weight_VD: Tensor) -> Iterator[slice]:
    for first in range(0, weight_VD.shape[0], WORDS):
        yield slice(first, first + WORDS)


def _parts(values_NV: Tensor) -> Iterator[slice]:
    step = max(1, PART_BYTES // (4 * max(1, values_NV.shape[1])))
    for first in range(0, values_NV.shape[0], step):
        yield slice(first, first + step)


def _reduce(logits_NV: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """(4, N) statistics of a chunk; leaves what `_shift` leaves."""
    out = logits_NV.new_zeros(4, logits_NV.shape[0])
    for part in _parts(logits_NV):
        logits = logits_NV[part]
        peak = logits.amax(-1)
        out[0, part], out[2, part] = peak, _at(logits, targets_N[part])
        _shift(logits, peak, entropy)
        exponential = logits.exp() if entropy else logits
        out[1, part] = exponential.sum(-1)
        if entropy:
            out[3, part] = torch.linalg.vecdot(exponential, logits)
    return out


def _shift(logits_NV: Tensor, peak_N: Tensor, entropy: bool) -> None:
    """Turn logits into exp(logit - peak), or, for entropies, into logit - peak, kept finite."""
    peak_N = peak_N.masked_fill(peak_N == -torch.inf, 0.0)[:, None]
    for part in _parts(logits_NV):
        shifted = logits_NV[part].sub_(peak_N[part])
        shifted.clamp_(min=torch.finfo(shifted.dtype).min) if entropy else shifted.exp_()


def _at(values_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The target's value of each row; -inf where the target is not among the columns."""
    found = values_NV.gather(-1, targets_N.clamp(0, values_NV.shape[1] - 1)[:, None])[:, 0]
    return torch.where(_is_here(values_NV, targets_N), found, -torch.inf)


def _is_here(values_NV: Tensor, targets_N: Tensor) -> Tensor:
    return (targets_N >= 0) & (targets_N < values_NV.shape[1])


def _gradient(
    shifted_NV: Tensor, statistics: Tensor, targets_N: Tensor, dlogprob_N: Tensor, dentropy_N: Tensor | None
) -> Tensor:
    """Gradient of the logits, in place of what `_shift` left: p (-dlogprob - dentropy (log p + H)) + dlogprob 1."""
    _, total, _, weighted = statistics
    for part in _parts(shifted_NV):
        values, over = shifted_NV[part], total[part, None]
        if dentropy_N is None:
            values.mul_(-dlogprob_N[part, None] / over)
        else:
            slope = dentropy_N[part, None]
            # log p + H = (logit - largest) - weighted / total
            base = slope * weighted[part, None] / over - dlogprob_N[part, None]
            probability = values.exp().div_(over)
            values.mul_(-slope).add_(base).mul_(probability)
    here = _is_here(shifted_NV, targets_N)
    at = targets_N.clamp(0, shifted_NV.shape[1] - 1)[:, None]
    return shifted_NV.scatter_add_(-1, at, (dlogprob_N * here)[:, None])


class _Sums:
    """dhidden and dweight, wide, while chunk after chunk adds to them."""

    def __init__(self, hidden: Tensor, weight: Tensor, hidden_needed: bool, weight_needed: bool, temperature: float):
        self.weight, self.temperature, self.words = weight, temperature, list(_words(weight))
        self.dhidden = torch.zeros_like(hidden, dtype=wide(hidden[:0]).dtype) if hidden_needed else None
        self.dweight = torch.empty_like(weight, dtype=wide(weight[:0]).dtype) if weight_needed else None
        self.is_empty = True

    def add(self, rows: Tensor | slice, own_ND: Tensor, dlogits_NV: Tensor) -> None:
        """Add a chunk: its rows, their hidden states over the temperature, and the gradient of their logits."""
        if self.dhidden is not None:
            down = self._back(dlogits_NV)
            self.dhidden[rows] = down if self.temperature == 1 else down / self.temperature
        if self.dweight is not None:
            torch.addmm(
                self.dweight, dlogits_NV.T, own_ND, beta=0.0 if self.is_empty else 1.0, out=self.dweight
            )  # fmt: skip
        self.is_empty = False

    def _back(self, dlogits_NV: Tensor) -> Tensor:
        if self.weight.dtype == dlogits_NV.dtype:
            return dlogits_NV @ self.weight
        parts = (dlogits_NV[:, words] @ self.weight[words].to(dlogits_NV.dtype) for words in self.words)
        return sum(parts, start=dlogits_NV.new_zeros(dlogits_NV.shape[0], self.weight.shape[1]))

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """dhidden and dweight; None where not needed."""
        if self.dweight is not None and self.is_empty:
            self.dweight.zero_()
        return self.dhidden, self.dweight
