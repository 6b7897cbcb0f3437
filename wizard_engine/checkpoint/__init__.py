"""Checkpoints: every rank's parts in safetensors and one manifest; a directory that appears by one rename, or not."""

from .manifest import Shard
from .store import Checkpoint, Saver, latest, load, resume, save

__all__ = ["Checkpoint", "Saver", "Shard", "latest", "load", "resume", "save"]
