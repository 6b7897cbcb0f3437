"""Two-turn evaluation questions, and reading them from the files that FastChat publishes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# References of the published file that are wrong in at least one turn (FastChat pull request 3158).
WRONG_REFERENCES = frozenset(map(str, (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)))


@dataclass(frozen=True)
class Question:
    """A two-turn question; references[i] is a right answer to turns[i], or () without references."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, ...] = ()


def read_questions(path: Path | str, references: Path | str | None = None) -> list[Question]:
    """Questions of a FastChat file (question_id, category, turns), with the answers of its reference file if given.

    Without a reference file, a list under "references" (a text per turn) in the question file itself counts. The field
    "reference" of the published question file is not shown to the judge, so it is not read.

    Raises:
        ValueError: `path:line: field: ...` for a line that is no such question or reference; the file is empty.
    """
    known: dict[str, tuple[str, ...]] = {}
    for place, item in _lines(references) if references is not None else ():
        choices = item.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        known[_field(item, "question_id", place)] = _turns(turns, "choices[0].turns", place)
    questions = []
    for place, item in _lines(path):
        number = _field(item, "question_id", place)
        turns = _turns(item.get("turns"), "turns", place)
        inline = _turns(item["references"], "references", place) if "references" in item else ()
        questions.append(Question(number, _field(item, "category", place), turns, known.get(number, inline)))
    if not questions:
        raise ValueError(f"{path}:1: file: expected at least one question, got none; give a file with questions")
    return questions


def _lines(path: Path | str) -> list[tuple[str, dict]]:
    """(`path:line`, object) for every line that is not blank."""
    objects = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: json: expected an object in UTF-8, got {error}; correct it") from None
        if not isinstance(item, dict):
            raise ValueError(f"{path}:{number}: json: expected an object, got {type(item).__name__}; correct it")
        objects.append((f"{path}:{number}", item))
    return objects


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
