"""Model configuration and presets, transformer, mixture of experts, scoring heads, Hugging Face layout in and out."""

from .config import PRESETS, ModelConfig
from .heads import ScoringModel, scoring_head
from .hugging_face import ModelDirectory, load_hf, load_model, save_hf, save_model, save_sharded
from .mixture import Mixture, Routes
from .transformer import Transformer

__all__ = [
    "PRESETS",
    "Mixture",
    "ModelConfig",
    "ModelDirectory",
    "Routes",
    "ScoringModel",
    "Transformer",
    "load_hf",
    "load_model",
    "save_hf",
    "save_model",
    "save_sharded",
    "scoring_head",
]
