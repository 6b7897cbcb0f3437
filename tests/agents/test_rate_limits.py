"""Limits a minute, given or learned, are held in every minute and used; refusals halve what runs at once."""

import asyncio
import random
import time
from email.utils import formatdate
from itertools import pairwise

import pytest
from clock import run
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.agents.rate_limits import Gate, read_duration, read_retry_after


def passing(calls, *, concurrency=64, seconds=1.0, requests=0, tokens=0, most=100, used=100):
    """(when it began, tokens it used) of calls through a gate, in the order in which they began."""

    async def all_calls():
        gate, began = Gate(concurrency, requests, tokens), []
        now = asyncio.get_running_loop().time

        async def call(number):
            took = used(number) if callable(used) else used
            entered = await gate.enter(max(most, took))
            began.append((now(), took, number))
            await asyncio.sleep(seconds(number) if callable(seconds) else seconds)
            gate.leave(entered, took)

        await asyncio.gather(*map(call, range(calls)))
        assert gate.running == 0
        return began

    return run(all_calls())


def most_in_a_minute(began, weight):
    return max(sum(weight(b) for b in began if start[0] <= b[0] < start[0] + 60) for start in began)


@pytest.mark.parametrize(("per_minute", "calls"), [(3, 12), (60, 240), (600, 1500)])
def test_requests_a_minute_are_held_and_used(per_minute, calls):
    began = passing(calls, requests=per_minute)
    assert most_in_a_minute(began, lambda _: 1) <= per_minute
    assert began[-1][0] - began[0][0] <= 1.05 * 60 * calls / per_minute
    assert [number for _, _, number in began] == list(range(calls)), "first come, first served"


# Catches: a limit that counts what calls might take, and uses a sixth of the rate.
def test_tokens_a_minute_are_held_by_what_calls_took():
    began = passing(1000, tokens=60_000, most=1900, used=300, seconds=0.5)
    assert most_in_a_minute(began, lambda b: b[1]) <= 60_000
    assert began[-1][0] - began[0][0] <= 1.1 * 60 * 1000 * 300 / 60_000


def test_a_call_of_more_than_a_minute_passes_alone():
    began = passing(3, tokens=1000, most=5000, used=5000)
    times = [when for when, *_ in began]
    assert len(times) == 3 and min(b - a for a, b in pairwise(times)) >= 60


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(200, 9000), st.integers(1, 30), st.integers(0, 10**6))
def test_no_minute_has_more_than_its_units_whatever_calls_take(requests, tokens, concurrency, seed):
    rng = random.Random(seed)
    sizes = [rng.randrange(1, min(200, tokens)) for _ in range(60)]
    times = [rng.expovariate(0.3) for _ in sizes]
    began = passing(
        60, concurrency=concurrency, requests=requests, tokens=tokens, used=sizes.__getitem__, seconds=times.__getitem__
    )
    assert len(began) == 60
    assert most_in_a_minute(began, lambda _: 1) <= requests
    assert most_in_a_minute(began, lambda b: b[1]) <= tokens


# Catches: a burst of 64 refusals that leaves one call at once.
def test_refusals_of_a_round_halve_once_and_answers_give_back():
    async def rounds():
        gate = Gate(64)
        entered = [await gate.enter(1) for _ in range(64)]
        await asyncio.sleep(1)
        for call in entered:
            gate.slow_down(call, 0.0)
            gate.leave(call, 0)
        assert gate.allowed == 32
        again = [await gate.enter(1) for _ in range(32)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gate.enter(1), 5)
        await asyncio.sleep(1)
        for call in again:
            gate.slow_down(call, 7.0)
            gate.leave(call, 0)
        assert gate.allowed == 16
        now = asyncio.get_running_loop().time
        refused = now()
        call = await gate.enter(1)
        assert now() - refused >= 7
        for _ in range(3000):
            gate.succeed()
        assert gate.allowed == 64
        for _ in range(99):
            await asyncio.sleep(1)
            gate.slow_down(call, 0.0)
            gate.leave(call, 0)
            call = await gate.enter(1)
        assert gate.allowed == 1

    run(rounds())


HEADERS = {"x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "100"}


def test_limits_are_learned_from_headers_and_the_smallest_counts():
    async def learned():
        gate = Gate(8, requests_per_minute=90)
        gate.learn(HEADERS)
        assert gate.requests.per_minute == 90
        gate = Gate(8)
        gate.learn(HEADERS | {"x-ratelimit-limit-tokens": "9000"})
        assert (gate.requests.per_minute, gate.tokens.per_minute) == (120, 9000)
        gate.learn({"x-ratelimit-limit-requests": "60"})
        gate.learn({"x-ratelimit-limit-requests": "many", "x-ratelimit-remaining-requests": "-"})
        gate.learn({"x-ratelimit-limit-requests": "²"})
        assert gate.requests.per_minute == 60
        now = asyncio.get_running_loop().time
        before = now()
        gate.learn({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"})
        gate.leave(await gate.enter(1), 1)
        assert 60 <= now() - before < 70

    run(learned())


# Catches: a limit that others share, of which this process takes all.
def test_what_others_took_of_a_limit_counts():
    async def shared():
        gate, now = Gate(500), asyncio.get_running_loop().time
        gate.learn({"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "10"})
        began, times = now(), []
        for _ in range(20):
            gate.leave(await gate.enter(1), 1)
            times.append(now() - began)
        assert sum(when < 60 for when in times) == 10 and times[-1] < 80

    run(shared())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("20ms", 0.02),
        ("6m0s", 360),
        ("1h2m3s", 3723),
        ("1d", 86400),
        (" 3s ", 3),
        ("", None),
        (None, None),
        ("Wed, 21 Oct 2026", None),
        ("-3", None),
        ("1x", None),
        ("٣", None),
    ],
)
def test_durations_of_headers(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["-5", "1e9", "soon", "", "nan", "Mon, 99 Foo 2026", "Mon, 01 Jan 99999 00:00:00 GMT"])
def test_a_retry_after_that_says_no_time_is_left_out(text):
    assert read_retry_after(text) is None


def test_a_retry_after_may_be_a_date():
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and read_retry_after("7") == 7.0
    assert 50 < read_retry_after(formatdate(time.time() + 60, usegmt=True)) < 61
