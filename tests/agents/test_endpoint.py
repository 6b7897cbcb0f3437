"""Endpoints that answer, refuse, hang, answer rubbish; budgets, ledgers, keys that nobody ever reads."""

import asyncio
import json
import logging
import os
import time

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
from asking import responses  # noqa: E402
from fake_endpoint import Fake, answer  # noqa: E402
from served_model import Serving, small_model  # noqa: E402
from starlette.responses import JSONResponse, Response  # noqa: E402

from wizard_engine.agents import Ledger, Request, make_agent, prompts  # noqa: E402
from wizard_engine.agents.endpoint import EndpointAgent, Options, _wait_seconds, parse_spec  # noqa: E402
from wizard_engine.agents.local import LocalAgent  # noqa: E402
from wizard_engine.data.records import Message, conversation, read_rows, write_rows  # noqa: E402

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def ask(count, task="answer", **changes):
    return [
        Request(
            task, (Message("user", f"Question {i}"),), **{"seed": i, "temperature": 1.0, "max_tokens": 20} | changes
        )
        for i in range(count)
    ]


def agent(fake, **options):
    return EndpointAgent("m", fake.url, Options(**{"backoff": 0.01, "max_wait": 0.05} | options))


def test_replies_come_in_order_and_no_more_at_once_than_allowed():
    async def behave(body, _):
        number = int(body["messages"][0]["content"].split()[-1])
        await asyncio.sleep(0.03 if number % 2 else 0.001)
        return answer(f" reply {number}\n", 7)

    with Fake(behave) as fake:
        endpoint = agent(fake, concurrency=3)
        replies = endpoint.respond(ask(12))
        assert [reply.text for reply in replies] == [f"reply {i}" for i in range(12)] and all(r.ok for r in replies)
        assert (
            fake.most == 3
            and endpoint.spent == 12 * 7
            and (endpoint.calls, endpoint.retried, endpoint.failed) == (12, 0, 0)
        )
        body = fake.asked[0]
        assert body["model"] == "m" and body["max_tokens"] == 20 and body["temperature"] == 1.0 and "seed" in body
        assert fake.keys == {f"Bearer {KEY}"}
        assert "seed" not in {k for b in fake.asked[12:] for k in b}
        agent(fake).respond(ask(1, temperature=0.0))
        assert "seed" not in fake.asked[-1]


BROKEN = {
    "429": lambda: JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    "500": lambda: JSONResponse({"error": {"message": "oh"}}, 500),
    "503 without a body": lambda: Response(status_code=503),
    "html": lambda: Response("<html>welcome</html>", media_type="text/html"),
    "no json": lambda: Response("{", media_type="application/json"),
    "no choices": lambda: {"object": "chat.completion"},
    "empty choices": lambda: answer() | {"choices": []},
    "null": lambda: answer(None),
    "list": lambda: Response("[1, 2]", media_type="application/json"),
    "wrong types": lambda: answer() | {"choices": [7], "usage": "many"},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_answer_is_asked_again(kind):
    with Fake(lambda _, times: answer("at last") if times > 2 else BROKEN[kind]()) as fake:
        endpoint = agent(fake)
        assert [reply.text for reply in endpoint.respond(ask(3))] == ["at last"] * 3
        assert endpoint.retried == 6 and endpoint.calls == 9 and endpoint.failed == 0


@pytest.mark.parametrize("kind", BROKEN)
def test_what_never_is_an_answer_is_a_failed_call(kind):
    with Fake(lambda *_: BROKEN[kind]()) as fake:
        endpoint = agent(fake, retries=2)
        replies = endpoint.respond(ask(3))
        assert not any(reply.ok for reply in replies) and endpoint.failed == 3 and len(fake.asked) == 9
        assert all(reply.error and reply.text == "" and KEY not in reply.error for reply in replies)


def test_an_endpoint_that_hangs_is_left():
    async def hang(*_):
        await asyncio.sleep(30)

    with Fake(hang) as fake:
        began = time.monotonic()
        replies = agent(fake, timeout=0.2, retries=1).respond(ask(4))
        assert time.monotonic() - began < 5
        assert {reply.error for reply in replies} == {"timeout: no answer within 0.2 seconds"} and len(fake.asked) == 8


def test_nobody_there_is_a_failed_call():
    endpoint = EndpointAgent("m", "http://127.0.0.1:9/v1", Options(backoff=0.01, retries=1))
    assert "APIConnectionError" in endpoint.respond(ask(1))[0].error


def test_bad_requests_are_not_repeated_and_a_refused_key_ends_all():
    with Fake(lambda *_: JSONResponse({"error": {"message": "too long"}}, 400)) as fake:
        assert "status 400" in agent(fake).respond(ask(1))[0].error and len(fake.asked) == 1
    with Fake(lambda *_: JSONResponse({"error": {"message": f"bad key {KEY}"}}, 401)) as fake:
        endpoint = agent(fake, concurrency=1)
        errors = {reply.error for reply in endpoint.respond(ask(5))}
        assert len(fake.asked) == 1 and len(errors) == 2 and not any(KEY in error for error in errors)


def test_endpoint_gives_up_after_consecutive_failures():
    with Fake(lambda *_: BROKEN["500"]()) as fake:
        endpoint = agent(fake, retries=0, give_up=5, concurrency=1)
        replies = endpoint.respond(ask(40))
        assert len(fake.asked) == 5 and endpoint.failed == 40 and "5 calls in a row failed" in replies[-1].error


def test_no_call_is_made_that_could_pass_the_budget():
    with Fake(lambda *_: answer(tokens=40)) as fake:
        endpoint = agent(fake, budget=300, concurrency=4)
        replies = endpoint.respond(ask(50))
        done = sum(reply.ok for reply in replies)
        assert endpoint.spent == 40 * done == 40 * len(fake.asked) <= 300 and done >= 4
        assert "budget: " in replies[-1].error
        assert not endpoint.respond(ask(1))[0].ok or endpoint.spent <= 300


# Catches: tries of one call that together pass the budget; calls that are billed and never answered.
@pytest.mark.parametrize("kind", ["null", "hang"])
def test_tries_without_an_answer_spend_the_budget_too(kind):
    async def hang():
        await asyncio.sleep(30)

    with Fake(lambda *_: hang() if kind == "hang" else answer(None, tokens=40)) as fake:
        endpoint = agent(fake, budget=200, retries=9, concurrency=1, timeout=0.2)
        (reply,) = endpoint.respond(ask(1))
        assert reply.error.startswith("budget: ") and endpoint.spent <= 200 and 2 <= len(fake.asked) <= 5
        assert not endpoint.respond(ask(1))[0].ok and len(fake.asked) <= 5


def test_retries_wait_longer_each_time_and_as_long_as_the_endpoint_asks():
    options = Options(backoff=1.0, max_wait=10.0)
    request = ask(1)[0]
    waits = [_wait_seconds(options, request, attempt) for attempt in range(8)]
    assert all(0.5 * min(2**i, 10) <= w <= 10 for i, w in enumerate(waits)) and waits[-1] == 10.0
    assert _wait_seconds(options, request, 0, "7") == 7.0 and _wait_seconds(options, request, 0, "1000") == 10.0
    assert _wait_seconds(options, request, 0, "Wed, 21 Oct 2026") < 1.01


def test_a_stopped_run_goes_on_from_its_ledger(tmp_path):
    failing = True

    def behave(body, _):
        number = int(body["messages"][0]["content"].split()[-1])
        return BROKEN["500"]() if failing and number % 2 else answer(f"reply {number}")

    with Fake(behave) as fake:
        for attempt in range(2):
            ledger = Ledger(tmp_path / "ledger.sqlite")
            replies = responses(agent(fake, retries=0), ask(10), ledger)
            assert [reply.ok for reply in replies] == [bool(attempt) or not i % 2 for i in range(10)]
            assert ledger.counts()["m@" + fake.url[7:-3]]["answer"]["failures"] == 5
            ledger.close()
            failing = False
        assert len(fake.asked) == 15
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert KEY.encode() not in written


# Catches: a run that goes on to its end with nothing but failed calls, and is taken for done.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 120, "concurrency": 1}, "budget: .* what came is in the ledger"),
        ({"retries": 0, "give_up": 5}, "5 calls in a row failed, the last with: status 500"),
    ],
)
def test_an_endpoint_that_has_ended_ends_the_run_and_the_ledger_goes_on(tmp_path, options, message):
    works = "budget" in options
    with Fake(lambda *_: answer(tokens=40) if works else BROKEN["500"]()) as fake:
        ledger = Ledger(tmp_path / "ledger.sqlite")
        with pytest.raises(ValueError, match=f"agent m@.*{message}"):
            responses(agent(fake, **options), ask(6), ledger)
        asked, works = len(fake.asked), True
        assert all(reply.ok for reply in responses(agent(fake), ask(6), ledger))
        assert len(fake.asked) - asked == (6 - asked if "budget" in options else 6)


def test_a_request_at_fault_ends_no_run(tmp_path):
    def behave(body, _):
        return JSONResponse({"error": {"message": f"too long: {body['messages'][0]['content']}"}}, 400)

    with Fake(behave) as fake:
        replies = responses(agent(fake, give_up=2), ask(5), Ledger(tmp_path / "l.sqlite"))
        assert len(fake.asked) == 5 and all("status 400" in reply.error for reply in replies)


def test_the_key_is_in_no_log_and_no_representation(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with Fake(lambda *_: BROKEN["500"]()) as fake:
        endpoint = agent(fake, retries=1)
        endpoint.respond(ask(2))
        assert KEY not in endpoint.fingerprint + endpoint.name + repr(endpoint.options)
    assert KEY not in caplog.text
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openai:", "got no model"),
        ("openai:m@ftp://x", "expected an address such as"),
        ("openai:m@https://user:secret@x/v1", "without a key in it"),
        ("openai:m@https://x/v1?key=secret", "without a key in it"),
        ("openai:m@http://x#speed=3", "expected options of concurrency"),
        ("openai:m#retries=many", "agent m: retries: expected a whole number"),
        ("openai:m#temperature=maybe", "temperature: expected yes or no"),
        ("openai:m#token_limit=most", "token_limit: expected auto or max_tokens or max_completion_tokens, got 'most'"),
        ("openai:m#extras=hide", "extras: expected count or error"),
        ("openai:m#concurrency=0", "concurrency: expected at least 1"),
        ("openai:m#timeout=0", "timeout: expected above 0"),
        ("openai:m#key_env=sk-abc", "expected the name of an environment variable"),
        ("openai:m@https://example.org/v1#key_env=NOT_THERE", "expected a key in NOT_THERE"),
    ],
)
def test_specs_that_cannot_be_asked_are_refused_without_their_secrets(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_agent(spec)
    assert "secret" not in str(caught.value)


def test_specs_say_model_address_and_options():
    assert parse_spec("openai:org/model:7b") == ("org/model:7b", None, Options())
    model, url, options = parse_spec("openai:a@b@http://127.0.0.1:1/v1/#concurrency=3,budget=9,timeout=0.5,seed=no")
    assert (model, url) == ("a@b", "http://127.0.0.1:1/v1")
    assert options == Options(concurrency=3, budget=9, timeout=0.5, seed=False)
    first, second = (EndpointAgent("m", f"http://127.0.0.1:{port}/v1") for port in (1, 2))
    assert first.fingerprint != second.fingerprint != EndpointAgent("n", "http://127.0.0.1:2/v1").fingerprint


# Against the project's own server, by option alone


def test_our_server_answers_as_the_local_agent_does(tmp_path):
    with Serving() as serving:
        local = LocalAgent(*small_model(), "local")
        remote = make_agent(f"openai:small@{serving.url}/v1")
        requests = [
            Request("answer", (Message("user", text),), max_tokens=16) for text in ("two and three?", "Count", "ten")
        ]
        assert [r.text for r in remote.respond(requests)] == [r.text for r in local.respond(requests)]
        talk = (Message("user", "Count"), Message("assistant", "one"))
        reply = remote.respond([Request("user", talk, max_tokens=200)])[0]
        assert reply.ok or "expected 1 to" in reply.error
        refused = remote.respond([Request("answer", (Message("user", "two " * 400),), max_tokens=16)])[0]
        assert "status 400" in refused.error and "prompt: expected 1 to" in refused.error


def test_recipes_run_on_an_endpoint_by_option_alone(tmp_path, monkeypatch):
    from recipes import accuracy, analyze, mt_bench

    def behave(body, _):
        text = body["messages"][-1]["content"]
        if "#Tags#:" in text:
            return answer("Topic: Counting\nSkill: **addition**\nDifficulty: Easy")
        return answer("It is fine. [[7]]" if "Assessment" in text else "It is five.")

    rows = [conversation("What is two and three?", "The answer is 5."), conversation("Count to ten.", "10")]
    write_rows(tmp_path / "rows.jsonl", rows)
    with Fake(behave) as fake:
        spec = f"openai:m@{fake.url}"
        report = analyze.main(
            analyze.Config(data=(tmp_path / "rows.jsonl",), out=tmp_path / "a", tagger=spec, quiet=True)
        )
        assert report["tags"] == {"tagged": 2, "kept": 0, "failed": 0, "unreadable": 0}
        tagged = [row.attributes for row in read_rows(tmp_path / "a" / "rows.jsonl")]
        assert {(a["topic"], a["skill"], a["difficulty"]) for a in tagged} == {("counting", "addition", "easy")}
        (tmp_path / "questions.jsonl").write_text(
            json.dumps({"question_id": 1, "category": "math", "turns": ["What is 2 + 3?", "And 4?"]}) + "\n"
        )
        result = mt_bench.main(
            mt_bench.Config(
                model=spec, judge=spec, questions=tmp_path / "questions.jsonl", out=tmp_path / "mt", quiet=True
            )
        )
        assert result and os.path.exists(tmp_path / "mt" / "ledger.sqlite")
        counted = accuracy.main(
            accuracy.Config(model=spec, data=tmp_path / "rows.jsonl", out=tmp_path / "accuracy", quiet=True)
        )
        assert counted["total"] == 2 and counted["missing"] == counted["sampled_missing"] == 0
        assert prompts.load_template("user").fields == ("history",)
