"""Expressions in LaTeX that are no plain number, compared by math-verify where it is installed (extra `math`)."""

import threading
from functools import cache
from importlib import metadata, util

# Of the end of a text; an expression that is longer is no final answer.
MAX_CHARACTERS = 4000
TIMEOUT_SECONDS = 5


@cache
def library() -> str | None:
    """Name and version of the library, None where it is not installed."""
    if util.find_spec("math_verify") is None:
        return None
    return f"math-verify {metadata.version('math-verify')}"


def is_latex(text: str) -> bool:
    """Whether a text holds LaTeX: a command, or mathematics between dollars."""
    return "\\" in text or text.count("$") >= 2


def same_expression(answer: str, reference: str) -> bool:
    """Whether two texts claim equal expressions: `\\boxed{2\\sqrt{3}}` and `$\\sqrt{12}$`.

    Raises:
        ValueError: the library is not installed.
    """
    if library() is None:
        raise ValueError(
            "answers in LaTeX: expected math-verify to compare expressions, got no such package; "
            "pip install -e '.[math]'"
        )
    gold, said = _parsed(reference), _parsed(answer)
    if not gold or not said:
        return False
    from math_verify import verify

    return bool(verify(gold, said, timeout_seconds=_timeout()))


@cache
def _parser() -> tuple:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return LatexExtractionConfig(), ExprExtractionConfig()


def _parsed(text: str) -> list:
    from math_verify import parse

    text = text.strip()[-MAX_CHARACTERS:]
    return parse(text, extraction_config=_parser(), parsing_timeout=_timeout())


def _timeout() -> int | None:
    """Seconds for one expression; none outside the main thread, where the library's alarm cannot ring."""
    return TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
