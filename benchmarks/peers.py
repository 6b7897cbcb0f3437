"""The same model twice: this engine's, and transformers' from the directory that `save_model` wrote."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wizard_engine import world
from wizard_engine.data.chat import CHAT_ATOMS, Sample, encode_conversation
from wizard_engine.data.tokenizer import Tokenizer, train_tokenizer
from wizard_engine.model import PRESETS, Transformer, save_model

SEED = 0
SHAPES = ("demo", "small")


def examples(count: int) -> tuple[Tokenizer, list[Sample]]:
    """A tokenizer trained on rows of the embedded world, and `count` of those conversations in its tokens."""
    rows = world.natural_corpus(max(count, 500), SEED)
    texts = [message.content for row in rows for message in row.messages]
    tokenizer = train_tokenizer(texts, vocab_size=512, atoms=CHAT_ATOMS)
    return tokenizer, [encode_conversation(tokenizer, row.messages) for row in rows[:count]]


def build(preset: str, tokenizer: Tokenizer) -> Transformer:
    """Random fp32 weights of a preset's shape."""
    return Transformer(replace(PRESETS[preset], vocab_size=tokenizer.vocab_size), seed=SEED)


def describe(preset: str, model: Transformer) -> str:
    """Name, layers x width and vocabulary of a model."""
    config = model.config
    return f"{preset} {config.layers}x{config.width} V={config.vocab_size} fp32"


def transformers_twin(model: Transformer, tokenizer: Tokenizer) -> Any:
    """transformers' LlamaForCausalLM with the same weights, read from a saved model; SDPA attention, fp32."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder) / "model")
        return LlamaForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
