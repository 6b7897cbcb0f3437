"""Log-probabilities of target tokens straight from hidden states, in row chunks: never a whole (T, V) matrix."""

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 * 2**20
KEPT_BYTES = 8 * 2**20


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, and the entropy, with full logits."""
    logits_TV = _wide(hidden) @ _wide(weight).T / temperature
    logprob_TV = logits_TV.log_softmax(-1)
    chosen_T = logprob_TV.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    entropy_T = -(logprob_TV.exp() * logprob_TV).sum(-1)
    ignored_T = targets < 0
    return chosen_T.masked_fill(ignored_T, 0.0), entropy_T.masked_fill(ignored_T, 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _LinearLogprob(torch.autograd.Function):
    """Row chunks of the logits, computed again in the backward unless a single small chunk holds them all."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy):
        weight_VD = _wide(weight)
        logprob_T, entropy_T = (weight_VD.new_zeros(targets.shape) for _ in range(2))
        chunks, kept = _chunks(targets.numel(), weight.shape[0]), None
        for rows in chunks:
            logprob_TV = _chunk_logprobs(hidden[rows], weight_VD, temperature)
            logprob_T[rows] = logprob_TV.gather(-1, targets[rows].clamp(min=0)[:, None])[:, 0]
            if entropy:
                finite = logprob_TV.clamp(min=torch.finfo(logprob_TV.dtype).min)
                entropy_T[rows] = -torch.linalg.vecdot(logprob_TV.exp(), finite)
            if len(chunks) == 1 and 4 * logprob_TV.numel() <= KEPT_BYTES:
                kept = logprob_TV
        for values in (logprob_T, entropy_T):
            values.masked_fill_(targets < 0, 0.0)
        ctx.save_for_backward(hidden, weight, targets, entropy_T, kept)
        ctx.chunks, ctx.temperature, ctx.entropy = chunks, temperature, entropy
        ctx.mark_non_differentiable(*([] if entropy else [entropy_T]))
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx, dlogprob_T, dentropy_T):
        hidden, weight, targets, entropy_T, kept = ctx.saved_tensors
        weight_VD = _wide(weight)
        keep_T = (targets >= 0).to(weight_VD.dtype)
        dlogprob_T = keep_T * dlogprob_T
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight_VD)
        for rows in ctx.chunks:
            wide = _wide(hidden[rows])
            logprob_TV = _chunk_logprobs(hidden[rows], weight_VD, ctx.temperature) if kept is None else kept
            slope = -dlogprob_T[rows, None]
            if ctx.entropy:
                finite = logprob_TV.clamp(min=torch.finfo(logprob_TV.dtype).min)
                slope = slope - (finite + entropy_T[rows, None]) * (keep_T * dentropy_T)[rows, None]
            dlogits = logprob_TV.exp().mul_(slope)
            dlogits.scatter_add_(-1, targets[rows].clamp(min=0)[:, None], dlogprob_T[rows, None])
            if ctx.temperature != 1:
                dlogits.div_(ctx.temperature)
            dhidden[rows] = (dlogits @ weight_VD).to(hidden.dtype)
            dweight.addmm_(dlogits.T, wide)
        return dhidden, dweight.to(weight.dtype), None, None, None


def _chunk_logprobs(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """(rows, V) log-probabilities of a chunk."""
    logits_TV = _wide(hidden_TD) @ weight_VD.T
    return (logits_TV if temperature == 1 else logits_TV.div_(temperature)).log_softmax(-1)


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, WORKSPACE_BYTES // (8 * columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token and entropy of its distribution.

    logprob_i = log softmax(weight hidden_i / temperature)[targets_i]

    Args:
        hidden: (T, D).   weight: (V, D).   targets: (T,) int64; -1 is ignored and gives 0.
        temperature: divides the logits, > 0.   entropy: whether to compute the entropy.
    Returns:
        logprob: (T,) fp32, nats.   entropy: (T,) fp32, nats, or None. Both differentiable.
    Raises:
        ValueError: shapes do not match, or temperature is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden, weight: expected (T, D), (V, D), got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
    logprob_T, entropy_T = _LinearLogprob.apply(hidden, weight, targets, temperature, entropy)
    return logprob_T, entropy_T if entropy else None
