"""Ranking loss of the reward models that compare: of instructions, and of answers."""

import torch.nn.functional as F
from torch import Tensor


def ranking_loss(better: Tensor, worse: Tensor, margin: Tensor, *, num_pairs: int) -> Tensor:
    """Bradley-Terry loss with a margin.

    loss = sum_b -log sigmoid(better_b - worse_b - margin_b) / num_pairs

    Args:
        better, worse: (B,) fp32 scores.   margin: (B,) fp32, >= 0, in score units.
        num_pairs: pairs of the step over all ranks.
    Returns:
        () fp32.
    Source: Luo et al. 2023, arXiv:2308.09583 (instruction reward model); Ouyang et al. 2022, arXiv:2203.02155, eq. 1
    (answers); margin as in Llama 2, Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(better - worse - margin).sum() / num_pairs
