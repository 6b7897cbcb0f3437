"""Generation with a paged KV cache, and log-probabilities of texts."""

from .divided_rows import divided_logprobs, gather_rows, rank_groups
from .offline import Generation, answer_texts, generate
from .scoring import packed_groups, perplexities, sequence_logprobs

__all__ = [
    "Generation",
    "answer_texts",
    "divided_logprobs",
    "gather_rows",
    "generate",
    "packed_groups",
    "perplexities",
    "rank_groups",
    "sequence_logprobs",
]
