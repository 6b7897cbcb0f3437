"""The corpus of replies itself: its files, fields and counts. What readers make of it is tested beside the readers."""

import json
from pathlib import Path

import pytest

from wizard_engine.agents import prompts
from wizard_engine.agents.replies import FAILURE_CLASSES

REPLIES = Path(__file__).parent / "replies"
STYLES = {"gpt-4", "claude", "llama-3", "mistral", "qwen", "deepseek-r1", "gemma", "small"}
GRADES = {"sure", "doubtful", "content"}
KEYS = {"style", "language", "fields", "reply", "reading", "grade", "why"}
SMOLLM2_KEYS = KEYS | {"finish", "prompt", "mode"}
TEXTS = ("evolve", "rewrite", "suggest", "user", "optimise")
# Tasks that SmolLM2 was asked.
ASKED = [task for task in prompts.TASKS if (REPLIES / f"smollm2_{task}.jsonl").exists()]


def rows(name: str) -> list[dict]:
    with (REPLIES / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def is_number(value: object, fields: dict) -> bool:
    return type(value) in (int, float) and fields["lowest"] <= value <= fields["highest"]


def fits(family: str, row: dict) -> bool:
    """Whether the reading has the form of its family and agrees with the fields of the row."""
    reading, fields = row["reading"], row["fields"]
    if family == "rate":
        return is_number(reading, fields)
    if family in ("judge", "rank"):
        return len(reading) == fields["count"] and all(is_number(score, fields) for score in reading)
    if family == "label":
        return len(reading) == fields["steps"] and all(type(label) is int and abs(label) <= 1 for label in reading)
    if family == "compare":
        return reading in ("Equal", "Not Equal")
    if family == "analyse":
        return all(1 <= int(case) <= fields["cases"] and reason.strip() for case, reason in reading.items())
    if family == "diagnose":
        return reading == [name for name in FAILURE_CLASSES if name in reading]
    if family == "tag":
        values = reading.values()
        return (
            list(reading) == ["topic", "skill", "difficulty"]
            and all(value and value == value.lower() for value in values)
            and reading["difficulty"] in ("easy", "medium", "hard")
        )
    return reading == reading.strip() != "" and all(text in row["reply"] for text in [reading, *row.get("also", [])])


@pytest.mark.parametrize("family", prompts.TASKS)
def test_written_replies_are_many_and_varied(family):
    written = rows(family)
    assert len(written) >= 80
    assert {row["style"] for row in written} == STYLES
    assert len({row["language"] for row in written}) >= 6
    assert len({(row["reply"], json.dumps(row["fields"])) for row in written}) == len(written)
    unread = sum(row["reading"] is None for row in written)
    assert len(written) / 8 < unread < len(written) / 2
    assert sum(row["grade"] == "sure" for row in written) >= 0.9 * len(written)


@pytest.mark.parametrize("family", prompts.TASKS)
def test_each_reading_fits_its_family_and_fields(family):
    for row in rows(family) + (rows(f"smollm2_{family}") if family in ASKED else []):
        assert row["reading"] is None or fits(family, row), row
        assert row["grade"] in GRADES and row["why"], row
        assert row["grade"] != "content" or row["reading"] is None, row
        assert "also" not in row or (family in TEXTS and row["reading"] is not None), row


@pytest.mark.parametrize("family", prompts.TASKS)
def test_rows_hold_the_named_keys(family):
    assert all(set(row) - {"also"} == KEYS for row in rows(family))
    asked = rows(f"smollm2_{family}") if family in ASKED else []
    assert all(set(row) - {"also"} == SMOLLM2_KEYS for row in asked)


def test_smollm2_was_asked_every_task_but_the_newest():
    assert set(prompts.TASKS) - set(ASKED) == {"diagnose"}


@pytest.mark.parametrize("family", ASKED)
def test_smollm2_answered_at_least_thirty_prompts_of_this_project(family):
    answered = rows(f"smollm2_{family}")
    assert len(answered) >= 30
    assert {row["style"] for row in answered} == {"smollm2"}
    assert {row["finish"] for row in answered} <= {"stop", "length"}
    assert all(row["prompt"] for row in answered)
