"""No text of a reply that was cut stands in anything that a recipe of synthesis writes."""

import json
import random
import re

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from fake_endpoint import Fake
from passing_endpoint import counted, passing_text

from recipes import co_teach, evol_answer, evol_instruct, self_teach
from wizard_engine.agents.calls import check_calls
from wizard_engine.data.records import conversation, write_rows

MARK = "snipped{}"


class Cutter:
    """Cuts every third reply at a random place, and puts a word that no other reply has before the cut."""

    def __init__(self, seed):
        self.rng, self.replies, self.cuts = random.Random(seed), 0, []

    def __call__(self, body, _):
        text, self.replies = passing_text(body), self.replies + 1
        if self.replies % 3:
            return counted(body, text)
        mark = MARK.format(len(self.cuts))
        self.cuts.append(mark)
        place = self.rng.randrange(len(text) + 1)
        # The word stands where a reader would look for the reply, too.
        kept = text[: self.rng.randrange(place + 1)] + f" {mark} " + text[:place]
        return counted(body, kept, finish="length")


def run_all(url, rows, out):
    one, two, three = (f"openai:{name}@{url}#json=no" for name in ("one", "two", "three"))
    common = {"data": (rows,), "quiet": True, "max_missing": 1.0}
    optimise = evol_instruct.Optimise(steps=2, dev_size=6, minibatch=3, candidates=2)
    agents = evol_instruct.Agents(one, one, two, three, ranker=three)
    yield evol_instruct.main(
        evol_instruct.Config(**common, out=out / "a", agents=agents, rounds=2, optimise=optimise, method=None)
    )
    yield evol_answer.main(evol_answer.Config(**common, out=out / "b", agents=evol_answer.Agents(one, two)))
    agents = co_teach.Agents(one, (two,), (two, three), suggester=three, rewriter=three, user=two)
    yield co_teach.main(
        co_teach.Config(**common, out=out / "c", agents=agents, sft_threshold=0.0, dpo_threshold=0.0, chat_turns=2)
    )
    agents = self_teach.Agents(one, two, evolver=three, labeller=two)
    yield self_teach.main(
        self_teach.Config(**common, out=out / "d", agents=agents, samples=3, keep=1.0, min_score=1.0, min_gap=0.0)
    )


@pytest.mark.every(2)
@pytest.mark.parametrize("seed", range(2))
def test_no_output_of_any_recipe_holds_a_cut_reply(seed, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [conversation(f"What is thing {i}?", f"It is thing {i}.") for i in range(10)])
    cutter = Cutter(seed)
    with Fake(cutter) as fake:
        reports = list(run_all(fake.url, rows, tmp_path))
    assert len(cutter.cuts) > 60
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".json", ".txt")]
    for path in written:
        assert not re.search(MARK.format(r"\d"), path.read_text()), path
    made = {path.name: len(path.read_text().splitlines()) for path in written if path.suffix == ".jsonl"}
    assert all(made[name] for name in ("rows.jsonl", "sft.jsonl", "preferences.jsonl", "processes.jsonl"))
    links = [link for line in _lines(tmp_path / "b" / "chains.jsonl") for link in line["links"]]
    assert any(link["accepted"] for link in links) and any(link["reason"] == "call failed" for link in links)
    counts = [counts for report in reports for counts in report["calls"].values()]
    assert sum(task.get("asked longer", 0) for task in counts) > 10
    assert sum(task.get("failed: length", 0) for task in counts) > 10


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("answer", "max"),
        ("evolve", "evolve-max"),
        ("rewrite", "rewrite-max"),
        ("suggest", "rewrite-max"),
        ("rank", "judge-max"),
    ],
)
def test_too_many_cut_replies_name_the_option_that_helps(task, option):
    counts = {task: {"asked": 4, "failed": 2, "failed: length": 2, "unreadable": 0}}
    with pytest.raises(ValueError, match=rf"{task!r}: expected .* 2 of 4 \(length 2\); raise --{option}-tokens, or"):
        check_calls(counts, 0.1)


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
