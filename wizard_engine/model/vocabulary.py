"""The rule about ids and the rows of the embedding, the same for every recipe."""

from pathlib import Path

import numpy as np

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.data.tokenizer_files import listed_ids

from .config import ModelConfig

# Rows of an embedding without an id, as a share of all: published models pad theirs by at most 3 in 100.
MOST_UNUSED = 0.25


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


def check_family(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    """Refuse a tokenizer that a model cannot have been trained with, though all its ids have a row.

    Args:
        directory: of the model; its files list the EOS ids.
    Raises:
        ValueError: an EOS id of the model is the id of a text, or much of the embedding has no id.
    """
    for index in listed_ids(directory).eos:
        text = tokenizer.token_bytes(index)
        if text:
            raise ValueError(
                f"{directory}: tokenizer: expected the EOS id {index} of config.json to have no text, got "
                f"{text.decode('utf-8', 'replace')!r}: another family's tokenizer; choose the model's own"
            )
    if tokenizer.vocab_size < (1 - MOST_UNUSED) * config.vocab_size:
        raise ValueError(
            f"{directory}: tokenizer: expected about {config.vocab_size} ids, as the model's embedding has rows, got "
            f"{tokenizer.vocab_size}: another family's tokenizer; choose the model's own"
        )
