"""Generation with a KV cache, scoring of given texts, advantages."""

from .advantages import gae, whiten
from .generation import Generation, answer_texts, generate
from .scoring import packed_groups, perplexities, sequence_logprobs

__all__ = [
    "Generation", "answer_texts", "gae", "generate", "packed_groups", "perplexities", "sequence_logprobs", "whiten",
]  # fmt: skip
