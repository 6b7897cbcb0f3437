"""Checkpoints: safetensors and one manifest, a directory that appears by one rename, complete or not at all."""

from wizard_engine.checkpoint.store import latest, load, save

__all__ = ["latest", "load", "save"]
