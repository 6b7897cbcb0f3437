"""The rule about ids and the rows of the embedding, the same for every recipe."""

from pathlib import Path

import numpy as np

from wizard_engine.data.tokenizer import Tokenizer

from .config import ModelConfig


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: Path | str) -> None:
    """Refuse a tokenizer that a model cannot be fed with.

    Every id that a text can give, BOS and EOS need a row of the embedding. Others do not: special tokens that were
    added and never trained, further EOS ids. Rows without an id (padding to a multiple, holes) are never drawn, see
    `Tokenizer.drawable`.

    Args:
        where: the tokenizer's or the model's path, for the message.
    Raises:
        ValueError: names the first id without a row.
    """
    beyond = np.flatnonzero(tokenizer.text_ids[config.vocab_size :])
    ids = (config.vocab_size + beyond).tolist()
    ids += [index for index in (tokenizer.bos_id, tokenizer.eos_id) if index >= config.vocab_size]
    if ids:
        raise ValueError(
            f"{where}: tokenizer: expected at most {config.vocab_size} ids, as the model's embedding has rows, got the "
            f"id {ids[0]} (and {len(ids) - 1} more) that training or a text can give; choose the model's own tokenizer"
        )
