"""Answers from JSONL files, matched to prompts."""

import json
from collections.abc import Sequence
from pathlib import Path


def read_answers(spec: Path | str, ids: Sequence[str], instructions: Sequence[str]) -> list[str]:
    """Answers of a JSONL file in the order of the prompts.

    Each line is an object with the text under "answer" (FILE#FIELD names another field). If all lines
    have an "id", they are matched by it; else, if all have a "prompt", by the text of the instruction; else by order.

    Raises:
        ValueError: `path:line: ...` for a line without such a text; a prompt without an answer; in order, another
        number
            of lines than prompts.
    """
    path, _, name = str(spec).partition("#")
    lines = [_read(path, number, line, name or "answer") for number, line in _numbered(path)]
    for key, values in (("id", ids), ("prompt", instructions)):
        if lines and all(isinstance(item.get(key), str) for item in lines):
            known = {item[key]: item[name or "answer"] for item in lines}
            missing = next((index for index, value in enumerate(values) if value not in known), None)
            if missing is not None:
                raise ValueError(f"{path}: expected an answer to every prompt, got none with {key} {values[missing]!r}")
            return [known[value] for value in values]
    if len(lines) != len(ids):
        raise ValueError(f"{path}: expected {len(ids)} answers in the order of the prompts, got {len(lines)}; add ids")
    return [item[name or "answer"] for item in lines]


def _numbered(path: str) -> list[tuple[int, bytes]]:
    lines = enumerate(Path(path).read_bytes().split(b"\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _read(path: str, number: int, line: bytes, name: str) -> dict:
    try:
        item = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}:{number}: json: expected an object in UTF-8, got {error}; correct it") from None
    if not isinstance(item, dict) or not isinstance(item.get(name), str):
        raise ValueError(f"{path}:{number}: {name}: expected an object with this text, got {line[:60]!r}; correct it")
    return item
