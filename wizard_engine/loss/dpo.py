"""Direct preference optimisation."""

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("sigmoid", "ipo")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    num_pairs: int,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation loss of the pairs on this rank.

    delta = (pc - rc) - (pr - rr)
    sigmoid: -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta), with label smoothing e (cDPO)
    ipo:     (delta - 1 / (2 beta))^2, on log-probabilities averaged per token by the caller

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: (B,) fp32, answer log-probabilities, nats.
        beta: strength of the pull towards the reference, > 0.
        num_pairs: pairs of the step over all ranks; makes the sum over ranks the mean.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
    Returns:
        loss: () fp32.   metrics: sums, to be divided by num_pairs after reduction.
    Raises:
        ValueError: shapes differ, or beta, variant or label_smoothing is out of range.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    if not policy_chosen.shape == policy_rejected.shape == ref_chosen.shape == ref_rejected.shape:
        raise ValueError("policy and ref: expected four tensors of one shape (B,)")
    if beta <= 0:
        raise ValueError(f"beta: expected > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected in [0, 0.5), got {label_smoothing}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant}")
    chosen_reward, rejected_reward = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    if variant == "ipo":
        losses = (margin / beta - 1 / (2 * beta)).square()
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    with torch.no_grad():
        metrics = {
            "chosen_reward": chosen_reward.sum(),
            "rejected_reward": rejected_reward.sum(),
            "accuracy": (margin > 0).float().sum() + 0.5 * (margin == 0).float().sum(),
            "margin": margin.sum(),
            "chosen_logprob": policy_chosen.sum(),
        }
    return losses.sum() / num_pairs, metrics
