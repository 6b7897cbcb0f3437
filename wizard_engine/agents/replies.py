"""Parsers of the replies to each task; None for a reply that does not have the form."""

import re

from .prompts import flatten

REWRITTEN_HEADING = "#Rewritten Instruction#:"

_SCORE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_RANK_LINE = re.compile(r"^\s*(\d+)\s*[:.]\s*(\d+(?:\.\d+)?)\s*$", re.MULTILINE)
_FENCE = re.compile(r"```[^\n]*\n(.*?)\n?```", re.DOTALL)
_LABELS = {"1": 1, "+1": 1, "0": 0, "-1": -1}


def read_evolved(text: str) -> str:
    """The new instruction: what follows the last line `#Rewritten Instruction#:`, or the whole text without one."""
    lines = text.split("\n")
    for index in range(len(lines) - 1, -1, -1):
        head, heading, rest = lines[index].partition(REWRITTEN_HEADING)
        if heading and not head.strip():
            return "\n".join([rest, *lines[index + 1 :]]).strip()
    return text.strip()


def read_equal(text: str) -> bool | None:
    """True for `Equal`, False for `Not Equal`, None for anything else."""
    verdict = flatten(text).strip(" .!`\"'").lower()
    return {"equal": True, "not equal": False}.get(verdict)


def read_scores(text: str, count: int) -> tuple[float, ...] | None:
    """The last `count` scores written `[[x]]`, each from 1 to 10; None with fewer of them or one out of range."""
    scores = [float(number) for number in _SCORE.findall(text)][-count:]
    if len(scores) < count or not all(1 <= score <= 10 for score in scores):
        return None
    return tuple(scores)


def read_labels(text: str, count: int) -> tuple[int, ...] | None:
    """One label (1, 0, -1) a line; None unless there are exactly `count` of them and nothing else."""
    labels = [_LABELS.get(line.strip()) for line in text.splitlines() if line.strip()]
    if len(labels) != count or None in labels:
        return None
    return tuple(labels)


def read_ranking(text: str, count: int) -> tuple[float, ...] | None:
    """Quality scores 0 to 10 of instructions 1..count, from lines `1: 7.5`; None where one is missing or off range."""
    scores = {int(number): float(score) for number, score in _RANK_LINE.findall(text)}
    if set(scores) != set(range(1, count + 1)) or not all(0 <= score <= 10 for score in scores.values()):
        return None
    return tuple(scores[number] for number in range(1, count + 1))


def read_method(text: str) -> str | None:
    """The content of the last block fenced by three backticks, or None where there is none or it is blank."""
    blocks = [block.strip() for block in _FENCE.findall(text)]
    return blocks[-1] if blocks and blocks[-1] else None


_TAG_LINE = re.compile(r"^\W*(topic|skill|difficulty)\W*:\W*(.*?)\W*$", re.MULTILINE | re.IGNORECASE)
_DIFFICULTIES = ("easy", "medium", "hard")


def read_tags(text: str) -> dict[str, str] | None:
    """Topic, skill and difficulty, from lines `Topic: ...`; None where one is missing, long, or no difficulty."""
    tags = {name.lower(): flatten(value).lower() for name, value in _TAG_LINE.findall(text)}
    fits = all(0 < len(tags.get(name, "")) <= 40 for name in ("topic", "skill", "difficulty"))
    return tags if fits and tags["difficulty"] in _DIFFICULTIES else None
