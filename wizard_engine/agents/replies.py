"""Readers of the replies to each task; None for a reply that does not say what was asked, or says two things.

The grammar of each stands in its docstring, see `agents.reading`.
"""

from functools import lru_cache

from .reading.comparison import read_equal
from .reading.failures import FAILURE_CLASSES, read_failures
from .reading.forms import READERS, missing_line, read_reply, schema, schema_of
from .reading.instructions import REWRITTEN_HEADING, read_evolved
from .reading.labels import read_labels, read_ranking
from .reading.methods import read_method
from .reading.reviews import read_review
from .reading.scores import read_scores
from .reading.tags import read_tags
from .reading.texts import read_rewritten, read_suggestion, read_user

__all__ = [
    "FAILURE_CLASSES",
    "READERS",
    "REWRITTEN_HEADING",
    "missing_line",
    "read_equal",
    "read_evolved",
    "read_failures",
    "read_labels",
    "read_method",
    "read_ranking",
    "read_reply",
    "read_review",
    "read_rewritten",
    "read_scores",
    "read_suggestion",
    "read_tags",
    "read_user",
    "schema",
    "schema_of",
    "scores_of",
]

# Characters of replies that are remembered.
_SHORT = 200


def scores_of(text: str, count: int) -> tuple[float, ...] | None:
    """As `read_scores`. Short replies are remembered: programs give the same ones again and again."""
    return (_scores_of_short if len(text) <= _SHORT else read_scores)(text, count)


_scores_of_short = lru_cache(4096)(read_scores)
