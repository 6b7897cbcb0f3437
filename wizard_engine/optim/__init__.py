"""AdamW over flat buffers, and learning-rate schedules."""

from .adamw import AdamW
from .schedule import cosine_with_warmup

__all__ = ["AdamW", "cosine_with_warmup"]
