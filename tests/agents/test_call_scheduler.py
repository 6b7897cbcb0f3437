"""Rows flow from call to call: in order, at full rate, each call once, and an end that is quick and clean."""

import asyncio
import gc
import logging
import os
import random
import signal
import threading
import time

import clock
import pytest
from asking import Echo, Instant, ask, responses, texts

from wizard_engine.agents import Ledger, Reply, Scheduler, scheduler
from wizard_engine.runtime import metrics
from wizard_engine.runtime.spill import Spill


class Timed:
    """Answers many calls at once, each after its own time, and remembers them."""

    def __init__(self, name="timed", concurrency=8, seconds=lambda request: 0.01):
        self.name = self.fingerprint = name
        self.concurrency, self.seconds, self.ended = concurrency, seconds, ""
        self.asked, self.running, self.most, self.closed, self._room = [], 0, 0, 0, None

    async def reply(self, request):
        self._room = self._room or asyncio.Semaphore(self.concurrency)
        async with self._room:
            self.asked.append(request.messages[-1].content)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.sleep(self.seconds(request))
            finally:
                self.running -= 1
        text = request.messages[-1].content
        return Reply("", "timed out") if "fail" in text else Reply(f"{self.name}: {text}")

    async def aclose(self):
        self.closed, self._room = self.closed + 1, None


def shuffled(request):
    return random.Random(request.messages[-1].content).expovariate(1)


def rows(run, items, work, agents=(), **options):
    """What rows give, by place."""
    out = {}
    run.run(run.rows(items, work, out.__setitem__, desc="rows", agents=agents, **options))
    return out


@pytest.fixture
def no_noise(caplog):
    """The loop has nothing to say of tasks and errors that nobody asked for."""
    caplog.set_level(logging.WARNING, logger="asyncio")
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_results_stand_at_the_places_of_their_items_whatever_comes_first(monkeypatch, tmp_path):
    clock.use(monkeypatch)
    first, second = Timed("a", 4, shuffled), Timed("b", 3, shuffled)
    run, finished = Scheduler(quiet=True), []

    async def work(number):
        one = await run.ask(first, ask(f"row {number}"))
        two = await run.ask(second, ask(one.text, seed=number))
        finished.append(number)
        return two.text

    spill = Spill(tmp_path)
    run.run(run.rows(iter(range(300)), work, spill.put, desc="rows", agents=(first, second)))
    assert list(spill) == [f"b: a: row {number}" for number in range(300)]
    assert finished != sorted(finished) and (first.most, second.most) == (4, 3)
    assert (first.closed, second.closed) == (1, 1)


# Catches: blocks with a barrier (2.7x), rivals one after another (2x).
def test_heavy_tailed_calls_take_the_time_of_an_ideal_queue(monkeypatch):
    clock.use(monkeypatch)

    def tail(request):
        return min(60.0, random.Random(request.seed).paretovariate(1.2))

    rivals = [Timed(name, 64, tail) for name in "ab"]
    run, requests = Scheduler(quiet=True), [ask("q", seed=number) for number in range(1500)]
    ended = []

    async def work(request):
        await asyncio.gather(*(run.ask(rival, request) for rival in rivals))
        ended.append(asyncio.get_running_loop().time())

    rows(run, requests, work, agents=rivals, width=2)
    ideal = clock.ideal_seconds(map(tail, requests), 64)
    assert ended[-1] - 1000.0 <= 1.05 * ideal


def test_equal_calls_at_once_are_one(tmp_path):
    agent, ledger = Timed(), Ledger(tmp_path / "l.sqlite")
    replies = responses(agent, [ask(f"q{number % 3}", seed=1) for number in range(60)], ledger)
    assert texts(replies) == [f"timed: q{number % 3}" for number in range(60)] and len(agent.asked) == 3
    for kind in (Echo, Instant):
        echo = kind(fingerprint=kind.__name__)
        assert len({reply.text for reply in responses(echo, [ask("a")] * 40, ledger)}) == 1
        assert sum(map(len, echo.batches)) == 1


def test_a_caller_that_gives_up_takes_no_call_from_the_others(tmp_path, no_noise):
    for agent in (Timed(), Echo(), Instant()):
        run = Scheduler(Ledger(tmp_path / f"{agent.name}{type(agent).__name__}.sqlite"), quiet=True)

        async def both(run=run, agent=agent):
            one, two = (asyncio.ensure_future(run.ask(agent, ask("a"))) for _ in range(2))
            await asyncio.sleep(0)
            one.cancel()
            return await two

        assert run.run(both()).ok


@pytest.mark.parametrize("where", ["work", "done", "items", "agent", "batch"])
def test_the_error_of_one_row_ends_the_run_with_it(tmp_path, no_noise, where):
    class Broken(Timed, Echo):
        def respond(self, requests):
            raise ValueError("row 7: broken")

        async def reply(self, request):
            if request.messages[-1].content == "row 7":
                raise ValueError("row 7: broken")
            return await super().reply(request)

    class BrokenBatch(Echo):
        respond = Broken.respond

    agent = {"agent": Broken(), "batch": BrokenBatch()}.get(where, Timed(seconds=lambda r: 0.001 * r.seed))
    run, done = Scheduler(Ledger(tmp_path / "l.sqlite"), quiet=True), []

    def check(kind, number):
        if kind == where and number == 7:
            raise ValueError("row 7: broken")

    def items():
        for number in range(10**9):
            check("items", number)
            yield number

    async def work(number):
        reply = await run.ask(agent, ask(f"row {number}", seed=number))
        check("work", number)
        return reply

    def keep(place, reply):
        check("done", place)
        done.append(place)

    with pytest.raises(ValueError, match=r"^row 7: broken$"):
        run.run(run.rows(items(), work, keep, desc="rows", agents=(agent,)))
    assert len(done) < 100 and getattr(agent, "running", 0) == 0
    assert getattr(agent, "closed", 1) == bool(getattr(agent, "asked", True))


# Catches: a store that fails in a callback, and rows that wait for it for ever.
@pytest.mark.parametrize("kind", [Echo, Instant, Timed])
@pytest.mark.parametrize("error", [OSError("ledger l: not written"), RuntimeError("other")])
def test_a_store_that_fails_ends_the_run(tmp_path, no_noise, monkeypatch, kind, error):
    ledger = Ledger(tmp_path / "l.sqlite")

    def store(calls):
        raise error

    monkeypatch.setattr(ledger, "store", store)
    with pytest.raises(type(error), match=str(error)):
        responses(kind("x"), [ask(f"q{number}") for number in range(30)], ledger)


def test_a_sync_that_fails_ends_the_run(tmp_path, no_noise, monkeypatch):
    ledger, syncs = Ledger(tmp_path / "l.sqlite"), []

    def sync():
        syncs.append(1)
        if len(syncs) == 2:
            raise OSError("ledger l: not written (I/O error)")

    monkeypatch.setattr(ledger, "sync", sync)
    monkeypatch.setattr(scheduler, "SYNC_SECONDS", 0.01)
    with pytest.raises(OSError, match="not written"):
        responses(Timed(seconds=lambda _: 60), [ask("q")], ledger)


def test_replies_are_in_the_file_before_their_row_goes_on(tmp_path):
    other = Ledger(tmp_path / "l.sqlite")
    for kind in (Echo, Timed):
        agent = kind(kind.__name__)
        agent.fingerprint, run = kind.__name__, Scheduler(Ledger(tmp_path / "l.sqlite"), quiet=True)

        async def work(number, run=run, agent=agent):
            request = ask(f"row {number}")
            reply = await run.ask(agent, request)
            key = scheduler.request_key(agent.fingerprint, request)
            assert other.lookup([key])[key].text == reply.text

        rows(run, range(20), work, agents=(agent,))


def test_replies_of_programs_are_in_the_file_after_their_turn(tmp_path):
    agent, run, other = Instant(), Scheduler(Ledger(tmp_path / "l.sqlite"), quiet=True), Ledger(tmp_path / "l.sqlite")

    async def work(number):
        requests = [ask(f"row {number}"), ask(f"row {number} again")]
        replies = [await run.ask(agent, request) for request in requests]
        assert await run.ask(agent, requests[0]) == replies[0]
        await asyncio.sleep(0)
        keys = [scheduler.request_key(agent.fingerprint, request) for request in requests]
        assert [other.lookup(keys)[key] for key in keys] == replies == [other.lookup_one(key) for key in keys]

    rows(run, range(20), work, agents=(agent,))
    assert run.served["answer"] == 20 and len(agent.batches) == 40
    run.run(run.ask(agent, ask("the last one")))
    assert len(list(other.calls())) == 41


def test_an_agent_that_has_ended_ends_the_run(tmp_path):
    agent = Timed()
    agent.ended = "budget: all is spent"
    ledger = Ledger(tmp_path / "l.sqlite")
    assert responses(agent, [ask("fine")], ledger)[0].ok
    with pytest.raises(ValueError, match="agent timed: budget: all is spent; what came is in the ledger"):
        responses(agent, [ask("fail")], ledger)


def test_the_bar_says_calls_tokens_failures_and_cost():
    class Priced(Timed):
        async def reply(self, request):
            reply = await super().reply(request)
            return Reply(reply.text, reply.error, tokens_in=3, tokens_out=4)

    run = Scheduler(quiet=True, prices={"timed": scheduler.Price(1e6, 2e6)})
    agent = Priced()
    rows(run, ["fail 1", "fail 2", "fine"], lambda text: run.ask(agent, ask(text)), agents=(agent,))
    assert (run.failed, run.asked, run.cost) == ({"timed out": 2}, {"answer": 3}, 33)
    text = run._bar.text(run._bar._start + 2.0)
    assert text == "3 calls, 1.5/s, 21 tokens, failed: timed out 2, cost 33.00"


# Catches: a bar that stands at 0 until the first of many open rows is done, at its end.
def test_the_bar_counts_the_calls_of_rows_that_are_open(monkeypatch):
    run, agent, seen = Scheduler(quiet=True), Timed(), []
    monkeypatch.setattr(metrics.Progress, "update", lambda self, n=1: seen.append(n))

    async def work(text):
        # The second row takes more calls than usual, the third fewer, the fourth none.
        for number in range({"two": 5, "three": 1, "four": 0}.get(text, 3)):
            await asyncio.gather(run.ask(agent, ask(f"{text} {number}")))
        seen.append(text)

    stage = {"desc": "battles", "total": 4, "calls": 3, "agents": [agent]}
    for text in ("one", "two", "three", "four"):
        seen.clear()
        run.run(run.rows([text], work, lambda place, done: None, **stage))
        assert sum(seen[: seen.index(text)]) == {"three": 1, "four": 0}.get(text, 2)
        assert sum(n for n in seen if n != text) == 3
    assert run._bar.text(run._bar._start + 1.0).startswith("1/4 rows, 0 calls")


# Catches: minutes without a sign while a model of this machine generates a batch.
def test_the_bar_is_drawn_while_a_batch_is_generated(monkeypatch):
    drawn = []

    class Slow:
        name = fingerprint = "slow"
        generating = (3, 8)

        def respond(self, requests):
            deadline = time.monotonic() + 20
            while not drawn and time.monotonic() < deadline:
                time.sleep(0.01)
            return [Reply("x") for _ in requests]

    monkeypatch.setattr(metrics.Progress, "set_postfix_str", lambda self, text, refresh: drawn.append((text, refresh)))
    monkeypatch.setattr(scheduler, "SYNC_SECONDS", 0.02)
    run, agent = Scheduler(), Slow()
    rows(run, ["a", "b"], lambda text: run.ask(agent, ask(text)), agents=(agent,))
    assert drawn[0] == ("0 calls, 0.0/s, generated 3 of 8", True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_at_once_and_the_same_run_goes_on(tmp_path, no_noise, number):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    agent, ledger = Timed(seconds=lambda r: 30 if r.seed == 5 else 0.001), Ledger(tmp_path / "l.sqlite")
    requests = [ask(f"q{seed}", seed=seed) for seed in range(10)]
    name, timer = signal.Signals(number).name, threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    began = time.monotonic()
    with pytest.raises(SystemExit, match=f"stopped by {name}; what was answered is in .*goes on"):
        responses(agent, requests, ledger)
    assert time.monotonic() - began < 5 and agent.closed == 1
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before
    agent.seconds, asked = lambda _: 0, len(agent.asked)
    assert len(responses(agent, requests, ledger)) == 10 and agent.asked[asked:] == ["q5"]


def test_a_signal_stops_a_batch_under_way(no_noise):
    class Long(Echo):
        is_stopped = False

        def stop(self):
            self.is_stopped = True

        def respond(self, requests):
            while not self.is_stopped:
                time.sleep(0.01)
            raise ValueError("ended")

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        responses(Long(), [ask("a")])


def test_items_are_taken_as_room_becomes_free(monkeypatch):
    clock.use(monkeypatch)
    taken, done, ahead = [], [], []
    agent, run = Timed("a", 4, shuffled), Scheduler(quiet=True)

    def items():
        for number in range(500):
            taken.append(number)
            ahead.append(len(taken) - len(done))
            yield number

    async def work(number):
        return await run.ask(agent, ask(f"{number}"))

    run.run(run.rows(items(), work, lambda place, _: done.append(place), desc="rows", agents=(agent,)))
    assert len(done) == 500 and max(ahead) <= run.window((agent,)) + 1 == 17


def test_rows_ahead_follow_what_the_agents_can_run():
    run, agents = Scheduler(batch_size=32, quiet=True), (Timed(concurrency=64), Timed(concurrency=16))
    assert run.window(agents) == 4 * 80 and run.window((agents[0], agents[0]), width=8) == 32
    assert run.window((Echo(),)) == 128 and run.window((agents[1],), width=100) == 4


def test_a_batch_is_filled_by_all_rows_and_others_go_on_meanwhile():
    echo, other, at_once = Echo(), Timed(), []

    class Slow(Echo):
        def respond(self, requests):
            time.sleep(0.1)
            at_once.append(len(other.asked))
            return super().respond(requests)

    slow, run = Slow(), Scheduler(batch_size=8, quiet=True)

    async def work(number):
        await run.ask(echo, ask(f"{number}"))
        await asyncio.gather(run.ask(slow, ask(f"{number}")), run.ask(other, ask(f"{number}")))

    rows(run, range(20), work, agents=(echo, slow))
    assert [len(batch) for batch in echo.batches] == [8, 8, 4] == [len(batch) for batch in slow.batches]
    assert at_once[0] >= 8


def test_rows_pass_a_place_in_order(monkeypatch):
    clock.use(monkeypatch)
    agent, run, order, passed = Timed("a", 32, shuffled), Scheduler(quiet=True), scheduler.InOrder(), []

    async def work(number):
        await run.ask(agent, ask(f"{number}"))
        if number % 3:
            await order.reach(number)
            passed.append(number)
        order.leave(number)
        return number

    assert len(rows(run, range(200), work, agents=(agent,))) == 200
    assert passed == [number for number in range(200) if number % 3]
