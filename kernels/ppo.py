"""Proximal policy optimisation: the policy's loss from hidden states, the critic's loss, estimators of divergence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import runs_triton
from .linear_logprob import VocabularyShard
from .linear_loss import LossOutput, Metrics, TokenLoss, check_per_token, check_positive, linear_loss
from .packed import check_cu_seqlens, sequence_ids

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimates(logprob: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Per-token estimators of KL(policy, reference) from sampled tokens.

    k1 = log p - log r (unbiased);   k2 = k1^2 / 2;   k3 = r / p - 1 - log(r / p) (unbiased, never negative)

    Source: Schulman 2020, "Approximating KL divergence".
    """
    difference = reference - logprob
    return {"k1": -difference, "k2": 0.5 * difference.square(), "k3": difference.exp() - 1 - difference}


@dataclass
class PpoFormula(TokenLoss):
    """The loss per token and what it needs of each: tensors (T,), 0 in `scale` where a token takes no part."""

    behaviour: Tensor
    advantages: Tensor
    scale: Tensor
    clip: tuple[float, float]
    dual_clip: float | None
    reference: Tensor | None
    kl: float
    kl_estimator: str
    entropy: float
    sampled: Tensor | None
    importance_cap: float

    uses_entropy = True

    def value(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Metrics]:
        """The sum over tokens of scale times the token's loss, as `ppo` defines it."""
        scale = self.scale[rows]
        live = scale != 0
        # What stands where a token takes no part must not reach a gradient, not even as 0 times NaN.
        behaviour, advantages = (torch.where(live, x[rows], 0) for x in (self.behaviour, self.advantages))
        difference = logprob - behaviour
        ratio = difference.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - self.clip[0], 1 + self.clip[1])
        loss = torch.maximum(plain, clipped)
        metrics = {"clip_fraction": clipped > plain, "ratio": ratio, "approx_kl": ratio - 1 - difference}
        if self.dual_clip is not None:
            bound = -self.dual_clip * advantages
            metrics["dual_clip_fraction"] = (advantages < 0) & (bound < loss)
            loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
        if self.sampled is not None:
            importance = (behaviour - torch.where(live, self.sampled[rows], 0)).exp()
            loss = loss * importance.clamp(max=self.importance_cap)
            metrics |= {"importance": importance, "importance_truncated": importance > self.importance_cap}
        if self.reference is not None:
            estimates = kl_estimates(logprob, torch.where(live, self.reference[rows], 0))
            loss = loss + self.kl * estimates[self.kl_estimator]
            metrics |= {f"kl_{name}": value for name, value in estimates.items()}
        loss = loss - self.entropy * entropy
        metrics["entropy"] = entropy
        sums = {name: torch.where(live, value.detach(), 0).float().sum() for name, value in metrics.items()}
        return torch.where(live, scale * loss, 0).sum(), sums

    def grads(self, logprob, entropy, rows):
        """As `TokenLoss.grads`; on CUDA in one kernel."""
        if not runs_triton(logprob, "logprob"):
            return super().grads(logprob, entropy, rows)
        from ._ppo import ppo_grads

        return ppo_grads(
            logprob,
            entropy,
            self.behaviour,
            self.advantages,
            self.scale,
            clip=self.clip,
            dual_clip=self.dual_clip,
            reference=self.reference,
            kl=self.kl,
            kl_estimator=self.kl_estimator,
            entropy_bonus=self.entropy,
            sampled=self.sampled,
            importance_cap=self.importance_cap,
        )


def token_scale(
    targets: Tensor,
    *,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """(T,) fp32 factor of each token's loss, 0 where the target is ignored.

    1 / num_tokens, or, given num_sequences, 1 / (num_sequences times the tokens of its sequence).
    """
    live = (targets >= 0).float()
    if num_sequences is None:
        return live / num_tokens
    sequence = sequence_ids(cu_seqlens, targets.numel())
    lengths = live.new_zeros(cu_seqlens.numel()).index_add(0, sequence, live)
    return live / (lengths.clamp(min=1)[sequence] * num_sequences)


def ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    *,
    clip: float | tuple[float, float],
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    cu_seqlens: Tensor | None = None,
    dual_clip: float | None = None,
    reference: Tensor | None = None,
    kl: float = 0.0,
    kl_estimator: str = "k3",
    entropy: float = 0.0,
    sampled: Tensor | None = None,
    importance_cap: float = 2.0,
    temperature: float = 1.0,
    shard: VocabularyShard | None = None,
) -> LossOutput:
    """Clipped surrogate loss over the answer tokens of this rank.

    r = exp(log p - behaviour),   l = max(-A r, -A clamp(r, 1 - low, 1 + high))
    dual clip, where A < 0:       l = min(l, -dual_clip A)
    truncated importance weight:  l = l min(exp(behaviour - sampled), importance_cap)
    loss = sum_i scale_i (l + kl k(log p, reference) - entropy H_i)

    with scale = 1 / num_tokens, or, given num_sequences instead, 1 / (num_sequences times the tokens of i's sequence).

    Args:
        hidden: (T, D).   weight: (V, D).   targets: (T,) int64; -1 (prompts, padding) is ignored, whatever the other
            tensors hold there.
        behaviour: (T,) fp32 log-probability when the answer was sampled, by the trainer's own numerics, nats.
        advantages: (T,) fp32.   clip: half width of the trust interval, or (low, high), > 0.
        num_tokens: answer tokens of the step over all ranks.   num_sequences: its answers; then also cu_seqlens,
            (S + 1,) int32. One of the two.
        dual_clip: bound on the loss of bad tokens, > 1.   reference: (T,) fp32 log-probability under the reference.
        kl: coefficient of the estimator `kl_estimator` of KL(policy, reference), >= 0.   entropy: of the bonus, >= 0.
        sampled: (T,) fp32 log-probability that the sampler itself recorded, where its numerics differ from the
            trainer's.   importance_cap: truncation of the weight, > 0.
        temperature: that of the sampling, > 0.   shard: see `linear_logprob`.
    Returns:
        LossOutput; metrics are sums over tokens: clip_fraction, ratio, approx_kl (k3 to the behaviour), entropy; with
        dual_clip dual_clip_fraction; with sampled importance and importance_truncated; with reference kl_k1, kl_k2,
        kl_k3. On fresh rollouts the ratio is 1.
    Raises:
        ValueError: shapes or devices do not fit, a number or target is out of range, or both denominators are given.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2019, arXiv:1912.09729, eq. 5; truncated
    importance weights: Espeholt et al. 2018, arXiv:1802.01561, sec. 4.
    """
    check_per_token(targets, behaviour=behaviour, advantages=advantages, reference=reference, sampled=sampled)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    _check(low, high, dual_clip, reference, kl, kl_estimator, entropy, importance_cap)
    _check_denominator(targets, num_tokens, num_sequences, cu_seqlens)
    scale = token_scale(targets, num_tokens=num_tokens, num_sequences=num_sequences, cu_seqlens=cu_seqlens)
    formula = PpoFormula(
        behaviour,
        advantages,
        scale,
        (low, high),
        dual_clip,
        reference,
        kl,
        kl_estimator,
        entropy,
        sampled,
        importance_cap,
    )
    return linear_loss(hidden, weight, targets, formula, temperature=temperature, shard=shard)


@torch.library.custom_op("wizard_engine::value_loss", mutates_args=())
def _value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, scale: float
) -> tuple[Tensor, Tensor]:
    from ._ppo import value_loss_grads

    return value_loss_grads(values.contiguous(), old_values.contiguous(), returns.contiguous(), clip, scale)


@_value_loss.register_fake
def _(values, old_values, returns, clip, scale):
    return values.new_empty(3), values.new_empty(values.shape)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _differentiate(ctx, dsums, _):
    return ctx.saved_tensors[0] * dsums[0], None, None, None, None


_value_loss.register_autograd(_differentiate, setup_context=_save)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float, num_tokens: float
) -> tuple[Tensor, Metrics]:
    """Clipped squared error of the critic.

    loss = sum_i max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / (2 num_tokens)

    Args:
        values, old_values, returns: (N,) fp32.   clip: largest move of a value that still pays, > 0.
        num_tokens: answer tokens of the step over all ranks, > 0.
    Returns:
        loss: () fp32.   metrics: sums over tokens (value_clip_fraction, value_error).
    Raises:
        ValueError: shapes differ, or a number is not positive.
    """
    check_per_token(values, old_values=old_values, returns=returns)
    check_positive(clip=clip, num_tokens=num_tokens)
    if runs_triton(values, "values"):
        sums, _ = _value_loss(values, old_values, returns, float(clip), 1.0 / num_tokens)
        return sums[0], {"value_clip_fraction": sums[1].detach(), "value_error": sums[2].detach()}
    moved = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (moved - returns).square()
    with torch.no_grad():
        metrics = {"value_clip_fraction": (clipped > plain).float().sum(), "value_error": plain.sum()}
    return 0.5 * torch.maximum(plain, clipped).sum() / num_tokens, metrics


def _check(low, high, dual_clip, reference, kl, kl_estimator, entropy, importance_cap) -> None:
    for number in (low, high):
        if not 0 < number < float("inf"):
            raise ValueError(f"clip: expected > 0 and finite, got {number}")
    if dual_clip is not None and not 1 < dual_clip < float("inf"):
        raise ValueError(f"dual_clip: expected > 1 and finite, got {dual_clip}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected one of {', '.join(KL_ESTIMATORS)}, got {kl_estimator}")
    for name, number in (("kl", kl), ("entropy", entropy)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name}: expected >= 0 and finite, got {number}")
    if kl and reference is None:
        raise ValueError("reference: expected the reference's log-probabilities where kl > 0, got None")
    check_positive(importance_cap=importance_cap)


def _check_denominator(targets, num_tokens, num_sequences, cu_seqlens) -> None:
    if (num_tokens is None) == (num_sequences is None):
        raise ValueError(f"num_tokens, num_sequences: expected one of the two, got {num_tokens}, {num_sequences}")
    if num_tokens is not None:
        return check_positive(num_tokens=num_tokens)
    check_positive(num_sequences=num_sequences)
    if cu_seqlens is None:
        raise ValueError("cu_seqlens: expected the sequences' boundaries where num_sequences is given, got None")
    check_cu_seqlens("cu_seqlens", cu_seqlens, targets.numel(), targets.numel())
