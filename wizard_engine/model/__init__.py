"""Model configuration and presets, transformer, scoring heads, Hugging Face layout in and out."""

from .config import PRESETS, ModelConfig
from .heads import ScoringModel
from .hugging_face import load_model, save_model
from .transformer import Transformer

__all__ = ["PRESETS", "ModelConfig", "ScoringModel", "Transformer", "load_model", "save_model"]
