"""Checkpoints: every rank's shards in safetensors files, and one manifest; the directory appears by one rename."""

from .manifest import Shard
from .store import Checkpoint, Saver, latest, load, resume, save

__all__ = ["Checkpoint", "Saver", "Shard", "latest", "load", "resume", "save"]
