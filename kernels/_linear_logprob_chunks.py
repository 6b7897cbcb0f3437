"""The CPU path of linear log-probabilities: chunks of rows of the logits, at least fp32, one buffer per chunk.

Rows whose target is -1 are skipped. The buffer of a chunk holds in turn the logits, their distance to row_max (or its
exponential), and their gradient. Elementwise passes go over it in parts that fit the cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WORKSPACE_BYTES = 192 * 2**20
PART_BYTES = 2**20
# Vocabulary entries whose weights are widened at a time, where they are narrower than fp32.
VOCAB_BLOCK = 8192

# From a chunk's log-probabilities, entropies (or None) and rows to the loss's gradients in the first two.
LossGrads = Callable[[Tensor, Tensor | None, Tensor | slice], tuple[Tensor, Tensor | None]]


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def finish(statistics: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each target, (T,) each, from (4, T) statistics; 0 where the target is -1."""
    row_max, row_sum, target, weighted = statistics
    log_total = row_sum.log()
    ignored = targets < 0
    logprob, entropy = target - row_max - log_total, log_total - weighted / row_sum
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def merge(parts: Tensor) -> Tensor:
    """(4, T) statistics of the whole vocabulary from (n, 4, T) of its slices: see `linear_logprob_partial`."""
    split_max, split_sum, target, split_weighted = parts.unbind(1)
    row_max = split_max.amax(0)
    max_change = split_max - row_max.masked_fill(row_max == -torch.inf, 0.0)
    rescale = max_change.exp()
    shifted = split_weighted + split_sum * max_change.clamp(min=torch.finfo(max_change.dtype).min)
    weighted_sum = torch.where(rescale == 0, rescale, rescale * shifted).sum(0)
    return torch.stack((row_max, (split_sum * rescale).sum(0), target.amax(0), weighted_sum))


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, start: int
) -> Tensor:
    """(4, T): row_max of the logits z, sum e^(z - row_max), the target's z, sum (z - row_max) e^(z - row_max)."""
    out = hidden.new_zeros((4, targets.numel()), dtype=wide(hidden[:0]).dtype)
    for rows, hidden_ND, targets_N in _chunks(hidden, weight, targets, temperature, start):
        out[:, rows] = _reduce(_logits(hidden_ND, weight), targets_N, entropy)
    return out


def gradients(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    start: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden (T, D) and dweight (V, D) from the gradients of log-probabilities and entropies."""
    sums = _Sums(hidden, weight, needs_hidden, needs_weight, temperature)
    for rows, hidden_ND, targets_N in _chunks(hidden, weight, targets, temperature, start):
        shifted = _logits(hidden_ND, weight)
        _shift(shifted, statistics[0, rows], dentropy is not None)
        loss_grads = dlogprob[rows], None if dentropy is None else dentropy[rows]
        sums.add(rows, hidden_ND, _gradient(shifted, statistics[:, rows], targets_N, *loss_grads))
    grads_and_operands = zip(sums.results(), (hidden, weight))
    return tuple(None if dx is None else dx.to(x.dtype) for dx, x in grads_and_operands)


def one_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    loss_grads: LossGrads,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(4, T) statistics, dhidden and dweight, wide, for a loss whose gradients in a chunk need that chunk alone."""
    out = hidden.new_zeros((4, targets.numel()), dtype=wide(hidden[:0]).dtype)
    sums = _Sums(hidden, weight, needs_hidden, needs_weight, temperature)
    for rows, hidden_ND, targets_N in _chunks(hidden, weight, targets, temperature, 0):
        shifted = _logits(hidden_ND, weight)
        chunk_statistics = _reduce(shifted, targets_N, entropy)
        out[:, rows] = chunk_statistics
        logprob, entropies = finish(chunk_statistics, targets_N)
        chunk_grads = loss_grads(logprob, entropies if entropy else None, rows)
        sums.add(rows, hidden_ND, _gradient(shifted, chunk_statistics, targets_N, *chunk_grads))
    return out, *sums.results()


def fits_one_chunk(rows: int, vocab_size: int) -> bool:
    """True if this many rows make a single chunk."""
    return rows <= _chunk_rows(vocab_size)


def _chunk_rows(vocab_size: int) -> int:
    return max(1, WORKSPACE_BYTES // (4 * max(1, vocab_size)))


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, start: int
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Rows, their hidden states over the temperature (N, D) wide, and their targets counted from `start`."""
    kept = None if bool((targets >= 0).all()) else (targets >= 0).nonzero()[:, 0]
    count, step = targets.numel() if kept is None else kept.numel(), _chunk_rows(weight.shape[0])
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count)) if kept is None else kept[first : first + step]
        hidden_ND = wide(hidden[rows])
        yield rows, hidden_ND if temperature == 1 else hidden_ND / temperature, targets[rows] - start


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """(N, V) logits, wide."""
    if weight_VD.dtype == hidden_ND.dtype:
        return hidden_ND @ weight_VD.T
    logits = hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0])
    for entries in _vocab_blocks(weight_VD):
        logits[:, entries] = hidden_ND @ weight_VD[entries].to(hidden_ND.dtype).T
    return logits


def _vocab_blocks(weight_VD: Tensor) -> Iterator[slice]:
    for first in range(0, weight_VD.shape[0], VOCAB_BLOCK):
        yield slice(first, first + VOCAB_BLOCK)


def _parts(values_NV: Tensor) -> Iterator[slice]:
    step = max(1, PART_BYTES // (4 * max(1, values_NV.shape[1])))
    for first in range(0, values_NV.shape[0], step):
        yield slice(first, first + step)


def _reduce(logits_NV: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """(4, N) statistics of a chunk; its buffer then holds what `_shift` writes."""
    out = logits_NV.new_zeros(4, logits_NV.shape[0])
    for part in _parts(logits_NV):
        logits = logits_NV[part]
        row_max = logits.amax(-1)
        out[0, part], out[2, part] = row_max, _at(logits, targets_N[part])
        _shift(logits, row_max, entropy)
        exponential = logits.exp() if entropy else logits
        out[1, part] = exponential.sum(-1)
        if entropy:
            out[3, part] = torch.linalg.vecdot(exponential, logits)
    return out


def _shift(logits_NV: Tensor, row_max_N: Tensor, entropy: bool) -> None:
    """Turn logits into exp(logit - row_max), or, for entropies, into logit - row_max, kept finite."""
    row_max_N = row_max_N.masked_fill(row_max_N == -torch.inf, 0.0)[:, None]
    for part in _parts(logits_NV):
        shifted = logits_NV[part].sub_(row_max_N[part])
        shifted.clamp_(min=torch.finfo(shifted.dtype).min) if entropy else shifted.exp_()


def _at(values_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The target's value of each row; -inf where the target is not among the columns."""
    target_N = values_NV.gather(-1, targets_N.clamp(0, values_NV.shape[1] - 1)[:, None])[:, 0]
    return torch.where(_is_here(values_NV, targets_N), target_N, -torch.inf)


def _is_here(values_NV: Tensor, targets_N: Tensor) -> Tensor:
    return (targets_N >= 0) & (targets_N < values_NV.shape[1])


def _gradient(
    shifted_NV: Tensor, statistics: Tensor, targets_N: Tensor, dlogprob_N: Tensor, dentropy_N: Tensor | None
) -> Tensor:
    """Gradient of the logits, in the buffer of `_shift`: p (-dlogprob - dentropy (log p + H)) + [target] dlogprob."""
    _, row_sum, _, weighted_sum = statistics
    for part in _parts(shifted_NV):
        values, row_sum_N = shifted_NV[part], row_sum[part, None]
        if dentropy_N is None:
            values.mul_(-dlogprob_N[part, None] / row_sum_N)
        else:
            dentropy = dentropy_N[part, None]
            # log p + H = (logit - row_max) - weighted_sum / row_sum
            base = dentropy * weighted_sum[part, None] / row_sum_N - dlogprob_N[part, None]
            probability = values.exp().div_(row_sum_N)
            values.mul_(-dentropy).add_(base).mul_(probability)
    here = _is_here(shifted_NV, targets_N)
    at = targets_N.clamp(0, shifted_NV.shape[1] - 1)[:, None]
    return shifted_NV.scatter_add_(-1, at, (dlogprob_N * here)[:, None])


class _Sums:
    """dhidden and dweight, wide, summed over the chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, hidden_needed: bool, weight_needed: bool, temperature: float):
        self.weight, self.temperature, self.vocab_blocks = weight, temperature, list(_vocab_blocks(weight))
        self.dhidden = torch.zeros_like(hidden, dtype=wide(hidden[:0]).dtype) if hidden_needed else None
        self.dweight = torch.empty_like(weight, dtype=wide(weight[:0]).dtype) if weight_needed else None
        self.is_empty = True

    def add(self, rows: Tensor | slice, hidden_ND: Tensor, dlogits_NV: Tensor) -> None:
        """Add a chunk: its rows, their hidden states over the temperature, and the gradient of their logits."""
        if self.dhidden is not None:
            dhidden_ND = self._back(dlogits_NV)
            self.dhidden[rows] = dhidden_ND if self.temperature == 1 else dhidden_ND / self.temperature
        if self.dweight is not None:
            torch.addmm(self.dweight, dlogits_NV.T, hidden_ND, beta=0.0 if self.is_empty else 1.0, out=self.dweight)
        self.is_empty = False

    def _back(self, dlogits_NV: Tensor) -> Tensor:
        if self.weight.dtype == dlogits_NV.dtype:
            return dlogits_NV @ self.weight
        products = (dlogits_NV[:, entries] @ self.weight[entries].to(dlogits_NV.dtype) for entries in self.vocab_blocks)
        return sum(products, start=dlogits_NV.new_zeros(dlogits_NV.shape[0], self.weight.shape[1]))

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """dhidden and dweight; None where not needed."""
        if self.dweight is not None and self.is_empty:
            self.dweight.zero_()
        return self.dhidden, self.dweight
