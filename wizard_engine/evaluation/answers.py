"""Answers from JSONL files, matched to prompts."""

from collections.abc import Sequence
from pathlib import Path

from wizard_engine.agents.missing import Missing
from wizard_engine.data.text_files import read_objects


def read_answers(spec: Path | str, ids: Sequence[str], instructions: Sequence[str]) -> list[str | Missing]:
    """Answers of a JSONL file in the order of the prompts.

    Each line is an object with the text under "answer" (FILE#FIELD names another field). A null there with the reason
    under "missing" is an answer that did not come, as recipes/arena.py and accuracy.py write it. If all lines have an
    "id", they are matched by it; else, if all have a "prompt", by the text of the instruction; else by order.

    Raises:
        ValueError: `path:line: ...` for a line without such a text; a prompt without an answer; in order, another
            number of lines than prompts.
    """
    path, _, name = str(spec).partition("#")
    name = name or "answer"
    lines = [_read(place, item, name) for place, item in read_objects(path)]
    for key, values in (("id", ids), ("prompt", instructions)):
        if lines and all(isinstance(item.get(key), str) for item in lines):
            known = {item[key]: item[name] for item in lines}
            missing = next((index for index, value in enumerate(values) if value not in known), None)
            if missing is not None:
                raise ValueError(f"{path}: expected an answer to every prompt, got none with {key} {values[missing]!r}")
            return [known[value] for value in values]
    if len(lines) != len(ids):
        raise ValueError(f"{path}: expected {len(ids)} answers in the order of the prompts, got {len(lines)}; add ids")
    return [item[name] for item in lines]


def _read(place: str, item: dict, name: str) -> dict:
    if name in item and item[name] is None:
        reason = item.get("missing")
        reason = reason.get(name) if isinstance(reason, dict) else reason
        if isinstance(reason, str):
            return item | {name: Missing(reason)}
    if not isinstance(item.get(name), str):
        raise ValueError(f"{place}: {name}: expected an object with this text, got {str(item)[:60]!r}; correct it")
    return item
