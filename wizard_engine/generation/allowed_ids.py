"""Ids that text has: the others of a model's vocabulary, such as its padding, are never drawn."""

import torch
from torch import Tensor

from wizard_engine.data.tokenizer import Tokenizer


def allowed_ids(tokenizer: Tokenizer, vocab_size: int) -> Tensor | None:
    """(V,) bool: the ids that the tokenizer has, of a model's vocabulary; None where it has all of them."""
    mask = tokenizer.drawable(vocab_size)
    return None if mask is None else torch.from_numpy(mask)


def masked_ids(allowed: Tensor | None, vocab_size: int, device: torch.device) -> Tensor | None:
    """(M,) int64 on a device: the ids that are not allowed; None where all are.

    Raises:
        ValueError: a mask of another shape or dtype, or one that allows nothing.
    """
    if allowed is None:
        return None
    if allowed.shape != (vocab_size,) or allowed.dtype != torch.bool:
        raise ValueError(
            f"allowed_ids: expected ({vocab_size},) bool, got {tuple(allowed.shape)} "
            f"{str(allowed.dtype).removeprefix('torch.')}"
        )
    if not bool(allowed.any()):
        raise ValueError("allowed_ids: expected at least one id, got none")
    if bool(allowed.all()):
        return None
    return (~allowed).nonzero()[:, 0].to(device)
