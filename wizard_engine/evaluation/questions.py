"""Two-turn evaluation questions, and reading them from the files that FastChat publishes."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wizard_engine.data.text_files import OnError, keeping, read_objects

LOG = logging.getLogger("wizard_engine.data")

# References of the published file that are wrong in at least one turn (FastChat pull request 3158).
WRONG_REFERENCES = frozenset(map(str, (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)))


@dataclass(frozen=True)
class Question:
    """A two-turn question; references[i] is a right answer to turns[i], or () without references."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...] = ()


def read_questions(
    path: Path | str, references: Path | str | None = None, *, on_error: OnError = "raise"
) -> list[Question]:
    """Questions of a FastChat file (question_id, category, turns), with the answers of its reference file if given.

    Without a reference file, a list under "references" (a text per turn) in the question file itself counts. The field
    "reference" of the published question file is not shown to the judge, so it is not read.

    Args:
        on_error: "raise", or "skip" to leave out what is no such question or reference and log how many there are.
    Raises:
        ValueError: `path:line: field: ...` for a line that is no such question or reference; the file is empty.
    """
    bad: list[str] = []
    known: dict[str, tuple[str, ...]] = {}
    for place, item in read_objects(references, on_error, bad) if references is not None else ():
        known.update(keeping(on_error, bad, lambda item=item, place=place: _reference(item, place)))
    questions = []
    for place, item in read_objects(path, on_error, bad):
        questions += keeping(on_error, bad, lambda item=item, place=place: _question(item, place, known))
    if bad:
        LOG.warning("%s: %d records rejected, %d questions kept; first: %s", path, len(bad), len(questions), bad[0])
    if not questions:
        raise ValueError(f"{path}:1: file: expected at least one question, got none; give a file with questions")
    return questions


def _reference(item: dict, place: str) -> tuple[str, tuple[str, ...]]:
    """The id of a reference answer, and its turns."""
    choices = item.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, dict) else None
    return _field(item, "question_id", place), _turns(turns, "choices[0].turns", place)


def _question(item: dict, place: str, known: dict[str, tuple[str, ...]]) -> Question:
    """The question of a record, with its reference."""
    number = _field(item, "question_id", place)
    turns = _turns(item.get("turns"), "turns", place)
    inline = item.get("references")
    references = _turns(inline, "references", place) if inline is not None else ()
    return Question(number, _field(item, "category", place), turns, known.get(number, references))


def _field(item: dict, name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"{place}: {name}: expected text or a whole number, got {value!r}; correct the line")
    return str(value)


def _turns(value: Any, name: str, place: str) -> tuple[str, str]:
    texts = [turn for turn in value if isinstance(turn, str) and turn.strip()] if isinstance(value, list) else []
    if len(texts) != 2 or len(value) != 2:
        raise ValueError(f"{place}: {name}: expected two texts, got {str(value)[:60]!r}; correct the line")
    return texts[0], texts[1]
