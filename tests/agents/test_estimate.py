"""An estimate says what a run then asks, without a call: calls exactly, tokens about, cost and hours where known."""

import json
import tracemalloc

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from fake_endpoint import Fake
from passing_endpoint import passing

from recipes import co_teach, evol_answer, evol_instruct, self_teach
from wizard_engine.agents import Reply, Request, prompts
from wizard_engine.agents.estimate import DEFAULT_LENGTHS, StandInCast, shown_estimate, stand_in_text
from wizard_engine.agents.prices import Price
from wizard_engine.agents.replies import (
    read_evolved,
    read_failures,
    read_labels,
    read_method,
    read_ranking,
    read_scores,
    read_tags,
)
from wizard_engine.data.records import Message, conversation, write_rows
from wizard_engine.world import held_out

ROWS = 12


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = [" ".join(["It is so because of the wind"] * (3 + i % 2)) for i in range(ROWS)]
    write_rows(path, [conversation(f"Why is thing {i} what it is?", answers[i]) for i in range(ROWS)])
    return path


def settings(recipe, url, options=""):
    """Options of a recipe whose agents are all behind one endpoint."""
    one, two, three = (f"openai:{name}@{url}{options}" for name in ("one", "two", "three"))
    if recipe is evol_instruct:
        optimise = recipe.Optimise(steps=2, dev_size=3, minibatch=2)
        return {"agents": recipe.Agents(one, one, two, three, ranker=three), "rounds": 2, "optimise": optimise}
    if recipe is evol_answer:
        return {"agents": recipe.Agents(one, two), "rounds": 2}
    if recipe is self_teach:
        return {"agents": recipe.Agents(one, two, evolver=three, labeller=two), "samples": 3}
    return {"agents": recipe.Agents(one, (two,), (two, three), suggester=None, user=two), "chat_turns": 2}


def usage(fake):
    """Tokens of prompts and of replies that the endpoint has counted."""
    said = [passing(body, 1)["usage"] for body in fake.asked]
    return [sum(tokens[f"{name}_tokens"] for tokens in said) for name in ("prompt", "completion")]


@pytest.mark.every(2)
@pytest.mark.parametrize("recipe", [evol_instruct, evol_answer, co_teach, self_teach], ids=lambda r: r.__name__)
def test_an_estimate_is_what_the_run_asks(recipe, data, tmp_path, capsys):
    out = tmp_path / "o"
    with Fake(passing) as fake:
        common = {"data": (data,), "out": out, "quiet": True, "max_tokens": 128, **settings(recipe, fake.url)}
        before = recipe.main(recipe.Config(**common, estimate=True))
        assert not fake.asked and not out.exists() and before["stored"] == 0
        recipe.main(recipe.Config(**common, limit=5))
        first, files = len(fake.asked), {path: path.read_bytes() for path in out.iterdir()}
        assert first > 10
        estimate = recipe.main(recipe.Config(**common, estimate=True))
        assert len(fake.asked) == first, "an estimate makes no call"
        assert {path: path.read_bytes() for path in out.iterdir()} == files, "and writes nothing"
        spent = usage(fake)
        recipe.main(recipe.Config(**common, overwrite=True))
    assert before["calls"] == estimate["calls"] + estimate["stored"]
    assert estimate["calls"] == len(fake.asked) - first and 0 < estimate["stored"] <= first
    for name, total, already in zip(("tokens_in", "tokens_out"), usage(fake), spent):
        assert estimate[name] == pytest.approx(total - already, rel=0.15), name
    assert estimate["hours"] is not None and estimate["cost"] is None
    shown = capsys.readouterr().out
    assert f"{estimate['calls']:,}" in shown and "cost " not in shown.split("calls to")[0].splitlines()[0]


def test_the_calls_of_limited_lessons_are_counted(data, tmp_path):
    with Fake(passing) as fake:
        one, two = (f"openai:{name}@{fake.url}" for name in ("one", "two"))
        agents = co_teach.Agents(one, (two,), (two,), suggester=one)
        common = {"data": (data,), "out": tmp_path / "o", "quiet": True, "agents": agents}
        common |= {"lessons": 1, "sft_threshold": 0.0, "max_tokens": 128}
        estimate = co_teach.main(co_teach.Config(**common, estimate=True))
        co_teach.main(co_teach.Config(**common))
    # A suggestion, a rewrite, and the verdict on it.
    assert estimate["calls"] == len(fake.asked) == 4 * ROWS + 4


def test_cost_and_hours_follow_from_prices_and_limits(data, tmp_path, capsys):
    with Fake(passing) as fake:
        options = "#requests_per_minute=30,price_in=2,price_out=8"
        common = {"data": (data,), "out": tmp_path / "o", "estimate": True}
        priced = evol_answer.main(evol_answer.Config(**common, **settings(evol_answer, fake.url, options)))
        one = priced["agents"][f"one@{fake.url[7:-3]}"]
        assert one["calls"] == 2 * ROWS and one["hours"] == pytest.approx(2 * ROWS / 30 / 60)
        assert one["cost"] == pytest.approx((2 * one["tokens_in"] + 8 * one["tokens_out"]) / 1e6)
        assert priced["hours"] == pytest.approx(4 * ROWS / 30 / 60), "the judge has twice as many calls"
        assert priced["cost"] == pytest.approx(sum(agent["cost"] for agent in priced["agents"].values()))
        first, *_, last, note = capsys.readouterr().out.splitlines()
        assert first.split() == ["agent", "task", "calls", "stored", "tokens", "in", "tokens", "out", "cost", "hours"]
        assert (
            last.split()[:4] == ["in", "all", str(6 * ROWS), "0"]
            and float(last.split()[-1]) == pytest.approx(4 * ROWS / 1800, rel=0.01)
            and "stored" in note
        )
        prices = tmp_path / "prices.json"
        prices.write_text(json.dumps({"two": {"in": 1, "out": 4}, "other": {"in": 9, "out": 9}}))
        filed = evol_answer.main(evol_answer.Config(**common, prices=prices, **settings(evol_answer, fake.url)))
        two = filed["agents"][f"two@{fake.url[7:-3]}"]
        assert filed["cost"] == two["cost"] == pytest.approx((two["tokens_in"] + 4 * two["tokens_out"]) / 1e6)
        assert filed["hours"] is None and filed["agents"][f"one@{fake.url[7:-3]}"]["cost"] is None
        assert "hours are known once" in capsys.readouterr().out and not fake.asked


def test_programs_and_models_are_found_in_the_ledger(tmp_path):
    write_rows(tmp_path / "rows.jsonl", held_out(ROWS, 1))
    common = {"data": (tmp_path / "rows.jsonl",), "out": tmp_path / "o", "quiet": True, "rounds": 1}
    evol_answer.main(evol_answer.Config(**common, limit=5))
    estimate = evol_answer.main(evol_answer.Config(**common, estimate=True))
    assert estimate["agents"]["world:expert"]["tasks"]["rewrite"]["stored"] == 5
    assert estimate["agents"]["world:expert"]["calls"] == ROWS - 5


REQUESTS = {
    "evolve": ({"operator": "deepen", "method": "", "instruction": "Why?"}, read_evolved),
    "label": ({"instruction": "q", "answer_steps": "a\nb\nc"}, lambda text: read_labels(text, 3)),
    "rank": ({"instructions": prompts.numbered(["a", "b"])}, lambda text: read_ranking(text, 2)),
    "rate": ({"history": "", "instruction": "q", "reference": "", "answer": "x"}, lambda text: read_scores(text, 1)),
    "optimise": ({"method": "m", "feedback": "f"}, read_method),
    "tag": ({"instruction": "q"}, read_tags),
    "diagnose": ({"instruction": "q", "evolved": "r"}, lambda text: read_failures(text) == {}),
}


@pytest.mark.parametrize("task", REQUESTS)
def test_stand_ins_give_replies_that_can_be_read(task):
    fields, read = REQUESTS[task]
    request = Request(task, prompts.request_messages(task, **fields), 3)
    said = stand_in_text(request, "a", DEFAULT_LENGTHS)
    assert read(said) and stand_in_text(request, "a", DEFAULT_LENGTHS) == said


def test_agents_of_one_name_are_kept_apart_and_a_request_counts_once(tmp_path):
    cast = StandInCast(tmp_path / "none.sqlite", {"m": Price(1.0, 2.0)})
    agents = [cast.agent(f"openai:m@http://127.0.0.1:9/v1{options}") for options in ("", "#concurrency=2")]
    request = Request("answer", (Message("user", "q"),))
    for agent in agents:
        replies = agent.respond([request, request, Request("answer", (Message("user", "p"),))])
        assert replies[0] == replies[1] != replies[2] and isinstance(replies[0], Reply)
    estimate = cast.estimate(scale=10)
    assert estimate["calls"] == 40 and [agent["calls"] for agent in estimate["agents"].values()] == [20, 20]
    assert "#concurrency=2" in shown_estimate(estimate)
    cast.close()


# Case: after a part of the rows, 123 calls were estimated, and the run made 129: more battles were lost.
@pytest.mark.parametrize("part", [0, 5, ROWS])
def test_an_estimate_with_lessons_says_what_verdicts_decide_and_how_many_calls_there_are_at_most(
    data, tmp_path, part, capsys
):
    with Fake(passing) as fake:
        one, two, three = (f"openai:{name}@{fake.url}" for name in ("one", "two", "three"))
        agents = co_teach.Agents(one, (two,), (two, three), suggester=three)
        common = {"data": (data,), "out": tmp_path / "o", "quiet": True, "agents": agents, "max_tokens": 128}
        if part:
            co_teach.main(co_teach.Config(**common, limit=part))
        before = len(fake.asked)
        estimate = co_teach.main(co_teach.Config(**common, estimate=True))
        shown = capsys.readouterr().out
        co_teach.main(co_teach.Config(**common, overwrite=True))
        made = len(fake.asked) - before
    # Answers of two, verdicts of two judges in both orders; at most a suggestion, a rewrite and four verdicts a row.
    assert estimate["calls"] <= estimate["most_calls"] <= 12 * ROWS and made <= estimate["most_calls"]
    (lessons,) = estimate["depends"]
    assert (lessons["what"], lessons["most"], lessons["calls"]) == ("lessons", ROWS, 6)
    assert estimate["most_calls"] == estimate["calls"] + 6 * (ROWS - lessons["taken"])
    assert f"at most {estimate['most_calls']} calls: verdicts that are not there yet decide how many lessons" in shown
    if part == ROWS:
        assert made == estimate["calls"] == 0, "what is all in the ledger is exact"


def test_an_estimate_that_verdicts_do_not_change_names_no_bound(data, tmp_path, capsys):
    common = {"data": (data,), "out": tmp_path / "o", "quiet": True, "estimate": True}
    for more in (
        {"agents": co_teach.Agents("world:careless", ("world:terse",), suggester=None)},
        {"lessons": 1, "sft_threshold": 0.0},
    ):
        estimate = co_teach.main(
            co_teach.Config(**common, **{"agents": co_teach.Agents("world:careless", ("world:terse",)), **more})
        )
        assert estimate["depends"] == [] and estimate["most_calls"] == estimate["calls"]
    assert "at most" not in capsys.readouterr().out


def test_memory_does_not_grow_with_the_requests(tmp_path):
    cast = StandInCast(tmp_path / "none.sqlite")
    agent = cast.agent("openai:m@http://127.0.0.1:9/v1")
    requests = (Request("user", (Message("user", "q"), Message("assistant", "a")), seed) for seed in range(3_000))
    agent.respond([next(requests)])
    tracemalloc.start()
    for request in requests:
        agent.respond([request])
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 3_000 * 20 and agent.lines["user"].calls == 3_000, "a set of the keys took 120 bytes each"
    cast.close()
