"""The form of each task's reply: its reader, what to say where it is missing, and its JSON schema."""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from wizard_engine.runtime.text_lines import split_lines

from ..prompts import parse_trajectory
from .comparison import read_equal
from .failures import FAILURE_CLASSES, read_failures
from .instructions import REWRITTEN_HEADING, read_evolved
from .labels import read_labels, read_ranking
from .methods import read_method
from .reviews import read_review
from .scores import read_scores
from .tags import read_tags
from .texts import read_plain, read_rewritten, read_suggestion, read_user

Fields = Mapping[str, str]


class Form(NamedTuple):
    """How replies to a task look.

    Attributes:
        read: (text, fields of the prompt) -> the meaning, or None where it cannot be read.
        missing: fields -> what the reply has to look like, as an instruction.
    """

    read: Callable[[str, Fields], Any]
    missing: Callable[[Fields], str]


def count_steps(fields: Fields) -> int:
    """The number of steps in the fields of a prompt of task "label"."""
    return sum(bool(line.strip()) for line in fields["answer_steps"].split("\n"))


def count_instructions(fields: Fields) -> int:
    """The number of instructions in the fields of a prompt of task "rank": its numbered lines."""
    return sum(bool(re.match(r"\s*\d+\.(?:\s|$)", line)) for line in split_lines(fields["instructions"]))


def count_cases(fields: Fields) -> int:
    """The number of cases in the trajectory of a prompt of task "analyse"."""
    return len(parse_trajectory(fields["trajectory"]))


def _label_lines(fields: Fields) -> str:
    count = count_steps(fields)
    lines = "one line" if count == 1 else f"{count} lines, one for each step, numbered in order"
    return f"exactly {lines}, each with its label 1, 0 or -1 in double brackets at its end, as in `1: right. [[1]]`"


def _rank_lines(fields: Fields) -> str:
    count = count_instructions(fields)
    lines = f"exactly {count} line{'s' * (count != 1)}, one for each instruction"
    return f"{lines}: its number, a colon and its one score from 0 to 10, as in `1: 7.5`"


READERS: dict[str, Form] = {
    "evolve": Form(
        lambda text, _: read_evolved(text),
        lambda _: f"the line `{REWRITTEN_HEADING}`, then the rewritten instruction and nothing after it",
    ),
    "compare": Form(lambda text, _: read_equal(text), lambda _: "exactly `Equal` or exactly `Not Equal`"),
    "diagnose": Form(
        lambda text, _: read_failures(text),
        lambda _: (
            'one JSON object, {"assessment": "...", "failures": [{"class": "...", "reason": "..."}]}, with each class '
            f"one of {', '.join(FAILURE_CLASSES)}; an empty list where there is no failure"
        ),
    ),
    "rewrite": Form(
        lambda text, fields: read_rewritten(text, fields.get("answer", "")),
        lambda _: "the whole new answer and nothing else",
    ),
    "judge": Form(
        lambda text, _: read_scores(text, 2),
        lambda _: (
            "one last line with the two scores, each from 1 to 10, of answer A first and answer B second, "
            "in exactly this form: [[7]] [[4.5]]"
        ),
    ),
    "rate": Form(
        lambda text, _: read_scores(text, 1),
        lambda _: "one last line with the one score, from 1 to 10, in exactly this form: [[7.5]]",
    ),
    "label": Form(lambda text, fields: read_labels(text, count_steps(fields)), _label_lines),
    "rank": Form(lambda text, fields: read_ranking(text, count_instructions(fields)), _rank_lines),
    "suggest": Form(lambda text, _: read_suggestion(text), lambda _: "one sentence that says what to change"),
    "analyse": Form(
        lambda text, fields: read_review(text, count_cases(fields)),
        lambda _: "one line `Case N: ` and the reason for each failed case, or `No failed case.` alone",
    ),
    "optimise": Form(
        lambda text, _: read_method(text),
        lambda _: "the whole new method inside one block that a line of three backticks opens and another one closes",
    ),
    "tag": Form(
        lambda text, _: read_tags(text),
        lambda _: "exactly three lines, `Topic: ...`, `Skill: ...` and `Difficulty: easy`, `medium` or `hard`",
    ),
    "user": Form(lambda text, _: read_user(text), lambda _: "the user's next message alone"),
    "answer": Form(lambda text, _: read_plain(text), lambda _: "the answer"),
}


def read_reply(task: str, text: str, fields: Fields) -> Any:
    """The meaning of a reply to a task's prompt with these fields, None where it cannot be read.

    Raises:
        ValueError: no such task.
    """
    return _form(task).read(text, fields)


def missing_line(task: str, fields: Fields) -> str:
    """The line that is sent after a reply that could not be read: what form it has to have.

    Raises:
        ValueError: no such task.
    """
    return f"Your reply could not be read. Reply once more, with {_form(task).missing(fields)}."


def _form(task: str) -> Form:
    if task not in READERS:
        raise ValueError(f"task: expected one of {', '.join(READERS)}, got {task!r}; choose one of them")
    return READERS[task]


# ---- JSON schemas ---------------------------------------------------------------------------------------------------

_TEXT = {"type": "string"}


def schema(task: str, fields: Fields) -> dict[str, Any] | None:
    """The JSON schema of a verdict, for `response_format`; None for a task whose reply is a text.

    Reasons come before verdicts: a model writes them in this order. Each step and each instruction has a property of
    its own, so that none can be left out. The readers read what fits.
    """
    _form(task)
    return _schema(task, _places(task, fields))


def _places(task: str, fields: Fields) -> int:
    """Steps or instructions that the verdict has a place for each of."""
    return count_steps(fields) if task == "label" else count_instructions(fields) if task == "rank" else 0


def _schema(task: str, places: int) -> dict[str, Any] | None:
    """The same by the number of steps or instructions."""
    if task == "compare":
        return _object({"reasons": _TEXT, "verdict": {"type": "string", "enum": ["Equal", "Not Equal"]}})
    if task == "diagnose":
        failure = _object({"reason": _TEXT, "class": {"type": "string", "enum": list(FAILURE_CLASSES)}})
        return _object({"assessment": _TEXT, "failures": {"type": "array", "items": failure}})
    if task == "judge":
        scores = {f"score_{side}": _number(f"answer {side.upper()}, from 1 to 10") for side in "ab"}
        return _object({"assessment": _TEXT} | scores)
    if task == "rate":
        return _object({"assessment": _TEXT, "score": _number("from 1 (useless) to 10 (could not be better)")})
    if task == "label":
        step = _object({"reasons": _TEXT, "label": {"type": "integer", "enum": [1, 0, -1]}})
        return _object({f"step_{number}": step for number in range(1, places + 1)})
    if task == "rank":
        one = _object({"reasons": _TEXT, "score": _number("quality from 0 to 10")})
        return _object({f"instruction_{number}": one for number in range(1, places + 1)})
    if task == "tag":
        level = {"type": "string", "enum": ["easy", "medium", "hard"]}
        return _object({"reasons": _TEXT, "topic": _TEXT, "skill": _TEXT, "difficulty": level})
    return None


def schema_of(task: str, fields: Fields) -> str:
    """The schema as JSON text, "" for a task whose reply is a text."""
    if task not in READERS:
        return ""
    return _written_schema(task, _places(task, fields))


@lru_cache(256)
def _written_schema(task: str, places: int) -> str:
    matched = _schema(task, places)
    return "" if matched is None else json.dumps(matched)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with all of these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _number(description: str) -> dict[str, Any]:
    return {"type": "number", "description": description}
