"""Direct preference optimisation, from hidden states of packed pairs to the loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import runs_triton
from .linear_logprob import VocabularyShard, linear_logprob
from .linear_loss import LossOutput, Metrics, TokenLoss, check_per_token, check_positive, linear_loss
from .packed import check_cu_seqlens, sequence_ids

VARIANTS = ("sigmoid", "robust", "ipo")


def pair_losses(margin: Tensor, *, beta: float, variant: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """(B,) losses of pairs whose implicit rewards differ by `margin`: h of `dpo`."""
    smoothing = label_smoothing
    if variant == "ipo":
        return (margin / beta - 1 / (2 * beta)).square()
    if variant == "robust":
        return (smoothing * F.logsigmoid(-margin) - (1 - smoothing) * F.logsigmoid(margin)) / (1 - 2 * smoothing)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    num_pairs: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The loss of pairs of sequence log-probabilities, (B,) each, and its metrics, as `dpo` defines them."""
    chosen_reward, rejected_reward = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    losses = pair_losses(margin, beta=beta, variant=variant, label_smoothing=label_smoothing)
    with torch.no_grad():
        metrics = {
            "chosen_reward": chosen_reward.sum(),
            "rejected_reward": rejected_reward.sum(),
            "accuracy": (margin > 0).float().sum() + 0.5 * (margin == 0).float().sum(),
            "margin": margin.sum(),
            "chosen_logprob": policy_chosen.sum(),
            "rejected_logprob": policy_rejected.sum(),
        }
    return losses.sum() / num_pairs, metrics


def sequence_logprobs(logprob: Tensor, weights: Tensor, cu_seqlens: Tensor, *, mean: bool = False) -> Tensor:
    """(S,) weighted sum of the log-probabilities of each packed sequence, or their weighted mean; no gradient on CUDA.

    Args:
        logprob, weights: (T,) fp32.   cu_seqlens: (S + 1,) int32.
    """
    if runs_triton(logprob, "logprob"):
        from ._dpo import sequence_sums

        return sequence_sums(logprob.detach(), weights, cu_seqlens, mean)
    sequence = sequence_ids(cu_seqlens, logprob.numel())
    return _sums(logprob, weights, sequence, cu_seqlens.numel() - 1, mean)


def _sums(logprob: Tensor, weights: Tensor, sequence: Tensor, sequences: int, mean: bool) -> Tensor:
    totals = logprob.new_zeros(sequences + 1).index_add(0, sequence, logprob * weights)[:-1]
    if not mean:
        return totals
    counts = logprob.new_zeros(sequences + 1).index_add(0, sequence, weights.to(logprob.dtype))[:-1]
    return totals / counts.clamp(min=1)


@dataclass
class DpoFormula(TokenLoss):
    """The loss per pair, its likelihood term, and what both need of each token."""

    reference: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    beta: float
    num_pairs: float
    variant: str
    label_smoothing: float
    mean: bool
    nll: float
    num_chosen_tokens: float

    is_separable = False

    def value(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Metrics]:
        """`preference_loss` of the sums or means of packed sequences, plus the chosen answers' likelihood."""
        sequence, weights = sequence_ids(self.cu_seqlens, self.weights.numel())[rows], self.weights[rows]
        pairs = (self.cu_seqlens.numel() - 1) // 2
        policy = _sums(logprob, weights, sequence, 2 * pairs, self.mean)
        loss, metrics = preference_loss(
            *policy.chunk(2),
            *self.reference.chunk(2),
            beta=self.beta,
            num_pairs=self.num_pairs,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
        )
        chosen_nll = -torch.where(sequence < pairs, weights * logprob, 0.0).sum()
        metrics["chosen_nll"] = chosen_nll.detach()
        return (loss + self.nll * chosen_nll / self.num_chosen_tokens if self.nll else loss), metrics

    def grads(self, logprob, entropy, rows):
        """As `TokenLoss.grads`; on CUDA in one kernel."""
        if not runs_triton(logprob, "logprob"):
            return super().grads(logprob, entropy, rows)
        from ._dpo import dpo_grads

        loss, metrics, dlogprob = dpo_grads(
            logprob,
            self.weights,
            self.cu_seqlens,
            self.reference,
            beta=self.beta,
            num_pairs=self.num_pairs,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
            mean=self.mean,
            nll_scale=self.nll / self.num_chosen_tokens,
        )
        return loss, metrics, dlogprob, None


def dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor | tuple[Tensor, Tensor],
    *,
    beta: float,
    num_pairs: float,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    nll: float = 0.0,
    num_chosen_tokens: float | None = None,
    shard: VocabularyShard | None = None,
) -> LossOutput:
    """Direct preference optimisation loss of packed pairs.

    delta = (log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected)), each the sum over an answer's tokens
    (ipo, or length_normalised: their mean);   h = beta delta,   e = label_smoothing

    sigmoid: -(1 - e) log sigmoid(h) - e log sigmoid(-h); with e > 0 this is cDPO
    robust:  (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)
    ipo:     (delta - 1 / (2 beta))^2
    loss = sum over pairs / num_pairs + nll * (-sum over chosen tokens of log p) / num_chosen_tokens

    Args:
        hidden: (T, D).   weight: (V, D).   targets: (T,) int64; -1 is ignored.
        weights: (T,) fp32; tokens of weight 0 (prompts) take no part.
        cu_seqlens: (2 B + 1,) int32: the B chosen sequences, then the B rejected ones in the same order.
        reference: (2 B,) fp32 log-probabilities of the sequences under the reference, summed or averaged as the
            policy's are; or (hidden, weight) of the reference, whose log-probabilities are then computed here.
        beta: strength of the pull towards the reference, > 0.   num_pairs: pairs of the step over all ranks, > 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        nll: weight of the chosen answers' negative log-likelihood per token, >= 0.
        num_chosen_tokens: chosen tokens of the step over all ranks; needed where nll > 0.
        shard: see `linear_logprob`.
    Returns:
        LossOutput; metrics are sums over pairs: chosen_reward, rejected_reward, accuracy (ties count half), margin,
        chosen_logprob, rejected_logprob, and over tokens: chosen_nll. Where policy = reference the loss is ln 2.
    Raises:
        ValueError: shapes or devices do not fit, sequences do not pair up, a number or target is out of range.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; robust: Chowdhury et al. 2024, arXiv:2403.00409; ipo: Azar et
    al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_per_token(targets, weights=weights)
    _check(cu_seqlens, targets, beta, num_pairs, variant, label_smoothing, nll, num_chosen_tokens)
    weighted_targets, weights = torch.where(weights != 0, targets, -1), torch.where(targets >= 0, weights, 0)
    mean = length_normalised or variant == "ipo"
    if isinstance(reference, tuple):
        with torch.no_grad():
            logprob_T, _ = linear_logprob(*reference, weighted_targets, shard=shard)
        reference = sequence_logprobs(logprob_T, weights, cu_seqlens, mean=mean)
    if reference.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(f"reference: expected ({cu_seqlens.numel() - 1},), got {tuple(reference.shape)}")
    formula = DpoFormula(
        reference,
        weights,
        cu_seqlens,
        float(beta),
        float(num_pairs),
        variant,
        float(label_smoothing),
        mean,
        float(nll),
        float(num_chosen_tokens or 1),
    )
    return linear_loss(hidden, weight, weighted_targets, formula, shard=shard)


def _check(cu_seqlens, targets, beta, num_pairs, variant, label_smoothing, nll, num_chosen_tokens) -> None:
    check_cu_seqlens("cu_seqlens", cu_seqlens, targets.numel(), targets.numel())
    if cu_seqlens.numel() % 2 == 0:
        raise ValueError(
            f"cu_seqlens: expected an even number of sequences (chosen, then rejected), got {cu_seqlens.numel() - 1}"
        )
    check_positive(beta=beta, num_pairs=num_pairs)
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected in [0, 0.5), got {label_smoothing}")
    if label_smoothing and variant == "ipo":
        raise ValueError(f"label_smoothing: expected 0 with variant ipo, got {label_smoothing}")
    if not 0 <= nll < float("inf"):
        raise ValueError(f"nll: expected >= 0 and finite, got {nll}")
    if nll and num_chosen_tokens is None:
        raise ValueError("num_chosen_tokens: expected the chosen tokens of the step where nll > 0, got None")
    if num_chosen_tokens is not None:
        check_positive(num_chosen_tokens=num_chosen_tokens)
