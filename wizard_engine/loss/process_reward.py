"""Step classification loss of the process reward model."""

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = (-1, 0, 1)


def process_loss(scores: Tensor, labels: Tensor, *, num_steps: int) -> Tensor:
    """Cross-entropy of step labels.

    loss = sum_i -log softmax(scores_i)[label_i + 1] / num_steps

    Args:
        scores: (N, 3) fp32 logits of wrong, neutral, right at the last token of each step.
        labels: (N,) int64 in -1, 0, 1.   num_steps: labelled steps of the step over all ranks.
    Returns:
        () fp32.
    Source: Lightman et al. 2023, arXiv:2305.20050; labels 1 / 0 / -1 as in WizardMath.
    """
    return F.cross_entropy(scores.float(), labels + 1, reduction="sum") / num_steps


def step_scores(scores: Tensor, *, neutral: float = 0.5) -> Tensor:
    """(N,) score in [0, 1] of each step: P(right) + neutral * P(neutral)."""
    probability = torch.softmax(scores.float(), -1)
    return probability[:, 2] + neutral * probability[:, 1]
