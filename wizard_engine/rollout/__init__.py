"""Generation with a KV cache, scoring of given texts, rewards and trajectories."""

from .generation import Generation, answer_texts, generate
from .scoring import packed_groups, perplexities, sequence_logprobs

__all__ = [
    "Generation", "answer_texts", "generate", "packed_groups", "perplexities", "sequence_logprobs",
]  # fmt: skip
