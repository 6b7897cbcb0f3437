"""Calls of a stage: cut replies are asked longer, unreadable ones again; all are counted, none is taken for whole."""

import asyncio
import random

import pytest
from asking import Instant
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.agents import Calls, Cast, Ledger, Limits, Reply, Scheduler, prompts
from wizard_engine.agents.calls import as_read, check_calls, together
from wizard_engine.agents.replies import read_scores, scores_of
from wizard_engine.data.records import Message
from wizard_engine.runtime.process import Runtime

ASKED = [task for task in prompts.TASKS if task != "user"]


class Scripted:
    """Says what a function of the request says, and remembers the requests."""

    name = fingerprint = "scripted"
    concurrency, ended = 8, ""

    def __init__(self, behave):
        self.behave, self.asked = behave, []

    async def reply(self, request):
        self.asked.append(request)
        said = self.behave(request, len(self.asked))
        return said if isinstance(said, Reply) else Reply(said)

    async def aclose(self):
        pass


def fields_of(task, text="some text\nof two lines"):
    template = prompts.load_template(task)
    return {name: next(iter(template.choices[name])) if name in template.choices else text for name in template.fields}


def called(agent, *, task="judge", read=as_read, times=1, ledger=None, **options):
    """What some calls of a task say, and the calls."""
    calls = Calls(Scheduler(ledger, quiet=True), **options)

    async def ask():
        return await asyncio.gather(
            *(calls.ask(agent, task, fields_of(task), seed, read=read) for seed in range(times))
        )

    return calls.scheduler.run(ask()), calls


def told(agent, *, task="answer", longer=False, times=1, **options):
    """The same for turns of a conversation."""
    calls = Calls(Scheduler(quiet=True), **options)
    messages = (Message("user", "Hello"), *((Message("assistant", "Hi"),) if task == "user" else ()))

    async def ask():
        return await asyncio.gather(
            *(calls.converse(agent, messages, seed, task=task, longer=longer) for seed in range(times))
        )

    return calls.scheduler.run(ask()), calls


def number(text):
    return int(text) if text.isdigit() else None


def cut(text):
    return Reply(text, finish="length")


def test_a_cut_reply_is_asked_for_once_more_with_twice_the_limit():
    agent = Scripted(lambda request, _: "7" if request.max_tokens > 100 else cut("7"))
    (meaning,), calls = called(agent, read=number, limits=Limits(judge=100))
    assert meaning == 7 and [request.max_tokens for request in agent.asked] == [100, 200]
    assert calls.statistics() == {"judge": {"asked": 1, "failed": 0, "unreadable": 0, "asked longer": 1}}


def test_a_reply_that_is_cut_again_has_failed():
    agent = Scripted(lambda *_: cut("7"))
    (meaning,), calls = called(agent, read=number)
    assert meaning is None and len(agent.asked) == 2
    expected = {"asked": 1, "failed": 1, "failed: length": 1, "unreadable": 0, "asked longer": 1}
    assert calls.statistics() == {"judge": expected}


def test_an_unreadable_reply_is_asked_again_twice_with_what_was_missing():
    agent = Scripted(lambda request, times: "7" if times == 3 else f"well {times}")
    (meaning,), calls = called(agent, read=number)
    first, *others = agent.asked
    assert meaning == 7 and len(others) == 2
    for request, said in zip(others, ("well 1", "well 2")):
        assert request.messages[0] == first.messages[0] and request.messages[1] == Message("assistant", said)
        assert request.messages[2].role == "user" and "form" in request.messages[2].content
        assert (request.seed, request.max_tokens, request.task) == (first.seed, first.max_tokens, first.task)
    assert calls.statistics() == {"judge": {"asked": 1, "failed": 0, "unreadable": 0, "asked again": 2}}


@pytest.mark.parametrize(("says", "again"), [("well", 2), ("", 2)])
def test_what_cannot_be_read_at_all_is_counted_apart(says, again):
    agent = Scripted(lambda *_: says)
    (meaning,), calls = called(agent, read=number)
    assert meaning is None and len(agent.asked) <= 1 + again
    assert calls.statistics() == {"judge": {"asked": 1, "failed": 0, "unreadable": 1, "asked again": again}}


def test_a_repeat_that_fails_or_is_cut_leaves_it_unreadable():
    for second in (cut("7"), Reply("", "timed out")):
        agent = Scripted(lambda _, times, second=second: "well" if times == 1 else second)
        (meaning,), calls = called(agent, read=number)
        assert meaning is None and len(agent.asked) == 2
        assert calls.counts["judge"] == {"asked": 1, "failed": 0, "unreadable": 1, "asked again": 1}


def test_a_program_is_not_asked_what_it_meant():
    agent = Instant()
    (meaning,), calls = called(agent, read=number)
    assert meaning is None and len(agent.batches) == 1 and calls.counts["judge"]["unreadable"] == 1


def test_failed_calls_are_counted_by_reason():
    says = [Reply("", "content_filter: no"), Reply("", "status 400: too long"), Reply("", "timed out"), "7"]
    meanings, calls = called(Scripted(lambda request, _: says[request.seed]), read=number, times=4)
    assert meanings == [None, None, None, 7]
    reasons = {"failed: content_filter": 1, "failed: status 400": 1, "failed: timed out": 1}
    assert calls.statistics()["judge"] == {"asked": 4, "failed": 3, "unreadable": 0, **reasons}
    with pytest.raises(ValueError, match=r"replies to 'judge': expected at most 5 % missing, got 3 of 4"):
        check_calls(calls.statistics(), 0.05)
    check_calls(calls.statistics(), 0.75)


def test_all_of_it_comes_from_the_ledger_the_next_time(tmp_path):
    def behave(request, _):
        return "7" if len(request.messages) > 1 else "well" if request.max_tokens > 2048 else cut("we")

    ledger = Ledger(tmp_path / "l.sqlite")
    first, second = Scripted(behave), Scripted(behave)
    one, two = (called(agent, read=number, ledger=ledger, times=3) for agent in (first, second))
    assert one[0] == two[0] == [7] * 3 and one[1].statistics() == two[1].statistics()
    assert len(first.asked) == 9 and second.asked == []


@pytest.mark.parametrize(("task", "longer", "asked"), [("answer", False, 1), ("answer", True, 2), ("user", True, 2)])
def test_cut_turns_are_dropped_and_asked_longer_where_that_is_wanted(task, longer, asked):
    agent = Scripted(lambda *_: cut("half an ans"))
    (turn,), calls = told(agent, task=task, longer=longer)
    assert turn is None and len(agent.asked) == asked and calls.counts[task]["failed: length"] == 1


def test_cut_answers_are_kept_on_request_and_marked():
    agent = Scripted(lambda *_: cut("half an ans "))
    (turn,), calls = told(agent, on_length="keep", longer=True)
    assert turn == "half an ans" and len(agent.asked) == 1 and calls.counts["answer"]["cut"] == 1
    assert calls.marks("whole", turn) == {"finish": "length"} and calls.marks("whole", None) == {}
    for keeping in (lambda: told(agent, task="user", on_length="keep"), lambda: called(agent, on_length="keep")):
        (nothing,), _ = keeping()
        assert nothing is None
    with pytest.raises(ValueError, match="on_length: expected drop or keep, got 'cut'"):
        Calls(on_length="cut")


def test_a_blank_turn_is_unreadable():
    (turn,), calls = told(Scripted(lambda *_: " \n"))
    assert turn is None and calls.counts["answer"]["unreadable"] == 1


def test_each_task_has_its_own_limit_and_options_reach_the_request():
    limits = Limits(answer=11, evolve=12, rewrite=13, judge=600)
    for task, most in {"evolve": 12, "rewrite": 13, "judge": 600, "suggest": 13, "compare": 600}.items():
        agent = Scripted(lambda *_: "fine")
        called(agent, task=task, limits=limits, top_p=0.9)
        assert (agent.asked[0].max_tokens, agent.asked[0].top_p, agent.asked[0].task) == (most, 0.9, task)
    agent = Scripted(lambda *_: "fine")
    told(agent, limits=limits)
    assert agent.asked[0].max_tokens == 11
    steps = [Limits(judge=2048).of("label", {"answer_steps": "\n".join("ab" * count)}) for count in (1, 3, 100)]
    assert steps == sorted(steps) and steps[0] < 500 and steps[-1] == 2048


# Case: of every third reply, cut at a random place, the beginning came back as a meaning.
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["drop", "keep"]), st.integers(1, 3))
def test_no_meaning_is_that_of_a_cut_reply(seed, on_length, third):
    beginnings = set()

    def behave(request, times):
        rng = random.Random(f"{seed} {times}")
        text = f"reply {times} of {rng.random()}"
        if times % 3 != third % 3:
            return text
        beginnings.add(text[: rng.randrange(len(text))].strip())
        return cut(text[: rng.randrange(len(text) + 1)])

    def read(text):
        return text if rng.random() < 0.7 else None

    rng, whole = random.Random(seed), set()
    agent = Scripted(behave)
    calls = Calls(Scheduler(quiet=True), on_length=on_length)
    cut_texts = set()

    def noted(request, times):
        said = behave(request, times)
        (cut_texts if isinstance(said, Reply) else whole).add(said.text.strip() if isinstance(said, Reply) else said)
        return said

    agent.behave = noted

    async def ask():
        asked = [calls.ask(agent, task, fields_of(task), n, read=read) for task in ASKED for n in range(3)]
        turns = [calls.converse(agent, (Message("user", f"{n}"),), n, longer=n % 2 == 0) for n in range(9)]
        return await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*turns))

    meanings, turns = calls.scheduler.run(ask())
    assert {meaning for meaning in meanings if meaning is not None} <= whole
    kept = {turn for turn in turns if turn is not None} - whole
    assert kept <= (cut_texts if on_length == "keep" else set())
    assert all(calls.marks(turn) == {"finish": "length"} for turn in kept)
    counts = calls.counts["answer"]
    assert len([turn for turn in turns if turn is None]) == counts["failed"] + counts["unreadable"]


def test_what_is_asked_again_keeps_the_larger_limit():
    def behave(request, times):
        return cut("we") if request.max_tokens == 100 else "7" if times == 4 else "well"

    agent = Scripted(behave)
    (meaning,), calls = called(agent, read=number, limits=Limits(judge=100))
    assert meaning == 7 and [request.max_tokens for request in agent.asked] == [100, 200, 200, 200]
    assert calls.counts["judge"] == {"asked": 1, "failed": 0, "unreadable": 0, "asked longer": 1, "asked again": 2}


def staged(agent, *, task="judge", read=number, rows=500, unreadable=30, **options):
    """What a stage gives that asks one thing for each row; the rows that it had done where it ended."""
    calls, found = Calls(Scheduler(quiet=True, unreadable=unreadable), **options), []

    async def work(row):
        return await calls.ask(agent, task, fields_of(task), row, read=read)

    rows_of = calls.scheduler.rows(range(rows), work, lambda _, said: found.append(said), desc="s", agents=[agent])
    calls.scheduler.run(rows_of)
    return found, calls


@pytest.mark.parametrize(
    "task", ["judge", "rate", "label", "rank", "tag", "compare", "diagnose", "evolve", "rewrite", "suggest"]
)
@pytest.mark.parametrize("kind", ["text", "cut", "blank", "program"])
def test_a_stage_ends_early_where_none_of_an_agents_first_replies_can_be_read(task, kind):
    agent = Scripted(lambda *_: {"cut": cut("It is w"), "blank": " "}.get(kind, "Well, it depends."))
    agent.converses = kind != "program"
    said = rf"replies of scripted to '{task}': expected some that can be read, got none in the first 30 requests, such"
    help_ = {
        "cut": r"'It is w', cut at its limit; raise --(judge|evolve|rewrite)-max-tokens, give another",
        "blank": "' '",
    }
    with pytest.raises(
        ValueError, match=rf"{said} as {help_.get(kind, '.Well, it depends')}.*{task}\.txt.*--max-missing 1"
    ):
        staged(agent, task=task)
    # Requests, their repeats, and what is in flight.
    tries = {"program": 1, "cut": 2}.get(kind, 3)
    assert 30 * tries <= len(agent.asked) <= 30 * tries + 4 * 8 * tries


def test_blank_turns_throughout_end_a_stage():
    with pytest.raises(ValueError, match=r"to 'answer': .* none in the first 30 requests, such as ' '"):
        told(Scripted(lambda *_: " "), times=40)


# Case: requests that can be read only when they are asked again, the first of all, or the thirtieth.
@pytest.mark.parametrize("readable", [0, 29, "again"])
def test_where_some_can_be_read_the_stage_goes_on_and_the_share_decides(readable):
    def behave(request, _):
        return "7" if (len(request.messages) > 1 if readable == "again" else request.seed == readable) else "well"

    agent = Scripted(behave)
    agent.concurrency = 1
    found, calls = staged(agent, rows=60, unreadable=40)
    assert found.count(7) == (60 if readable == "again" else 1)
    if readable == "again":
        return check_calls(calls.statistics(), 0.05)
    with pytest.raises(ValueError, match=r"replies to 'judge': expected at most 5 % missing, got 59 of 60"):
        check_calls(calls.statistics(), 0.05)


def test_small_stages_failed_calls_and_other_agents_do_not_end_it_early():
    found, calls = staged(Scripted(lambda *_: "well"), rows=29)
    assert found == [None] * 29
    with pytest.raises(ValueError, match=r"expected at most 5 % missing, got 29 of 29 \(unreadable 29\)"):
        check_calls(calls.statistics(), 0.05)
    assert staged(Scripted(lambda *_: Reply("", "timeout: none")), rows=90)[0] == [None] * 90
    assert staged(Scripted(lambda *_: "well"), rows=90, unreadable=0)[0] == [None] * 90
    # Two agents have a count of their own, and two tasks.
    calls, one, two = Calls(Scheduler(quiet=True)), Scripted(lambda *_: "well"), Scripted(lambda *_: "well")
    two.name = two.fingerprint = "two"

    async def ask():
        asked = [(agent, task, seed) for agent in (one, two) for task in ("judge", "rate") for seed in range(29)]
        return await asyncio.gather(*(calls.ask(a, t, fields_of(t), s, read=number) for a, t, s in asked))

    assert calls.scheduler.run(ask()) == [None] * 116


def test_an_accepted_share_of_all_never_ends_a_stage_early(tmp_path):
    for most, unreadable in ((0.05, 30), (0.99, 30), (1.0, 0)):
        cast = Cast(tmp_path / "l.sqlite", Runtime(), quiet=True, max_missing=most)
        assert cast.scheduler.unreadable == unreadable
        cast.close()


@pytest.mark.parametrize("is_instant", [True, False])
def test_calls_of_one_agent_are_given_in_order_and_an_error_ends_them(is_instant):
    agent, begun = Instant(), []
    agent.is_instant = is_instant

    async def call(number):
        begun.append(number)
        await asyncio.sleep(0)
        if number == 2:
            raise ValueError("two")
        return number

    assert asyncio.run(together(agent, (call(number) for number in (1, 3)))) == [1, 3]
    with pytest.raises(ValueError, match="two"):
        asyncio.run(together(agent, (call(number) for number in (1, 2, 3))))
    assert begun == ([1, 3, 1, 2] if is_instant else [1, 3, 1, 2, 3])


def test_remembered_scores_are_those_that_are_read():
    for text in ("[[7]] [[4.5]]", "Score: 7", "[[7]]", "Both are 7.", "x" * 300 + "\n[[7]] [[4]]") * 2:
        for count in (1, 2, 1):
            assert scores_of(text, count) == read_scores(text, count)
