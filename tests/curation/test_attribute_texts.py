"""Texts that attributes are learned from: their tags are the taxonomy's, and every value occurs."""

import json
from collections import Counter
from pathlib import Path

from wizard_engine.curation.taxonomy import DIFFICULTY, LEVELS, SKILLS, TOPICS, level

FOLDER = Path(__file__).parents[2] / "recipes" / "attributes"


def lines(name):
    with (FOLDER / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_instructions_have_every_value_and_none_twice():
    rows = lines("instructions.jsonl")
    counts = {name: Counter(row[name] for row in rows) for name in ("skill", "topic", "difficulty", "language")}
    assert set(counts["skill"]) == set(SKILLS) and set(counts["topic"]) == set(TOPICS)
    assert set(counts["difficulty"]) == set(DIFFICULTY) and len(counts["language"]) == 15
    assert min(counts["skill"].values()) >= 40 and min(counts["topic"].values()) >= 25
    assert min(counts["difficulty"].values()) >= 250 and min(counts["language"].values()) >= 15
    assert len({row["instruction"].casefold() for row in rows}) == len(rows) == 2990
    starts = Counter(row["instruction"][:40].casefold() for row in rows)
    assert max(starts.values()) <= 4


def test_lists_cover_every_topic_and_skill_in_every_language():
    for name, tag, values, key, least in (
        ("topic_words.jsonl", "topic", TOPICS, "words", 15),
        ("skill_cues.jsonl", "skill", SKILLS, "cues", 6),
    ):
        rows = lines(name)
        known = {value for value in values if value != "general/none"}
        assert {row[tag] for row in rows} == (known if tag == "topic" else set(values))
        assert all(len(of) == 15 for of in (Counter(row["language"] for row in rows),))
        assert all(len(row[key]) >= least and len(set(row[key])) == len(row[key]) for row in rows), name


def test_levels_follow_the_difficulty():
    assert [level(number) for number in DIFFICULTY] == ["easy", "easy", "medium", "hard", "hard"]
    assert {level(number / 10) for number in range(10, 51)} == set(LEVELS)
