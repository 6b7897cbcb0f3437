"""Parsers of the replies to each task; None for a reply that does not have the form."""

import re
from collections.abc import Mapping
from fractions import Fraction

from wizard_engine.data.final_answers import read_number
from wizard_engine.runtime.text_lines import LINE_END, LINE_ENDS, LINE_START, split_lines

from .prompts import flatten

REWRITTEN_HEADING = "#Rewritten Instruction#:"

_SCORE = re.compile(rf"\[\[([^\[\]{LINE_ENDS}]{{1,24}})\]\]")
_OUT_OF_TEN = re.compile(r"\s*/\s*10\s*$")
_NUMBERED = re.compile(r"\s*(?:step\s*)?(\d+)\s*[:.)]\s*(\S.*?)\s*", re.IGNORECASE)
_FENCE = re.compile(rf"```[^{LINE_ENDS}]*(?:\r\n|[{LINE_ENDS}])(.*?)[{LINE_ENDS}]*```", re.DOTALL)
_LABELS = (1, 0, -1)


def read_evolved(text: str) -> str:
    """The new instruction: what follows the last line `#Rewritten Instruction#:`, or the whole text without one."""
    lines = split_lines(text)
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
    written = [number for number in _SCORE.findall(text) if any(map(str.isdigit, number))]
    scores = [_score(number) for number in written[-count:]]
    if len(scores) < count or not all(score is not None and 1 <= score <= 10 for score in scores):
        return None
    return tuple(float(score) for score in scores)


def _score(text: str) -> Fraction | None:
    """A score as judges write it: 8, 7.5, 7,5, 8/10."""
    return read_number(_OUT_OF_TEN.sub("", text))


def read_labels(text: str, count: int) -> tuple[int, ...] | None:
    """One label (1, 0, -1) a line; None unless there are exactly `count` of them and nothing else.

    Lines may be numbered, `Step 1: 1`, if they are numbered in order.
    """
    lines = [line.strip() for line in split_lines(text) if line.strip()]
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered) and [int(match[1]) for match in numbered] == list(range(1, len(lines) + 1)):
        lines = [match[2] for match in numbered]
    labels = [read_number(line.removeprefix("+")) for line in lines]
    if len(labels) != count or not all(label in _LABELS for label in labels):
        return None
    return tuple(map(int, labels))


def read_ranking(text: str, count: int) -> tuple[float, ...] | None:
    """Quality scores 0 to 10 of instructions 1..count, from lines `1: 7.5`; None where one is missing or off range."""
    matches = [match for line in split_lines(text) if (match := _NUMBERED.fullmatch(line))]
    scores = {int(match[1]): score for match in matches if (score := _score(match[2])) is not None}
    if set(scores) != set(range(1, count + 1)) or not all(0 <= score <= 10 for score in scores.values()):
        return None
    return tuple(float(scores[number]) for number in range(1, count + 1))


def read_method(text: str) -> str | None:
    """The content of the last block fenced by three backticks, or None where there is none or it is blank."""
    blocks = [block.strip() for block in _FENCE.findall(text)]
    return blocks[-1] if blocks and blocks[-1] else None


_TAG_LINE = re.compile(rf"{LINE_START}\W*(topic|skill|difficulty)\W*:\W*([^{LINE_ENDS}]*?)\W*{LINE_END}", re.IGNORECASE)
_DIFFICULTIES = ("easy", "medium", "hard")


def read_tags(text: str) -> dict[str, str] | None:
    """Topic, skill and difficulty, from lines `Topic: ...`; None where one is missing, long, or no difficulty."""
    tags = {name.lower(): flatten(value).lower() for name, value in _TAG_LINE.findall(text)}
    fits = all(0 < len(tags.get(name, "")) <= 40 for name in ("topic", "skill", "difficulty"))
    return tags if fits and tags["difficulty"] in _DIFFICULTIES else None


def missing_line(task: str, fields: Mapping[str, str]) -> str:
    """What is said to a model whose reply to a task could not be read."""
    return f"Your reply could not be read. Reply once more, in exactly the form that was asked for ({task})."


def schema_of(task: str, fields: Mapping[str, str]) -> str:
    """JSON schema of a verdict, as JSON text; "" for replies that are free text."""
    return ""
