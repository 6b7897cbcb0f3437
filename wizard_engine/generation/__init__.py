"""Generation with a paged KV cache, and log-probabilities of texts."""

from .offline import Generation, answer_texts, generate
from .scoring import packed_groups, perplexities, sequence_logprobs

__all__ = [
    "Generation",
    "answer_texts",
    "generate",
    "packed_groups",
    "perplexities",
    "sequence_logprobs",
]
