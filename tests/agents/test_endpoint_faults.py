"""What endpoints do that they should not: each is named, counted, and costs neither the run nor a reply."""

import asyncio
import gzip
import json
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from asking import responses
from fake_endpoint import Fake, answer
from starlette.responses import JSONResponse, Response, StreamingResponse

from wizard_engine.agents import Calls, Cast, Ledger, Request, bounded_body, make_agent
from wizard_engine.agents.completions import read_answer, read_body
from wizard_engine.agents.endpoint import EndpointAgent, Options, _is_same_model
from wizard_engine.agents.missing import check_missing
from wizard_engine.agents.prices import Price
from wizard_engine.data.records import Message
from wizard_engine.runtime.process import Runtime


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")


def ask(count, task="answer", **changes):
    return [Request(task, (Message("user", f"Question {i}"),), **{"max_tokens": 20} | changes) for i in range(count)]


def agent(fake, **options):
    return EndpointAgent("m", fake.url, Options(**{"backoff": 0.01, "max_wait": 0.05} | options))


def refused(status, message, headers=None, **details):
    return JSONResponse({"error": {"message": message, **details}}, status, headers)


STREAM = 'data: {"choices": [{"delta": {"content": "hi"}}]}\n\ndata: [DONE]\n\n'
ENDLESS = {
    "html": (Response("<html><body>Bad Gateway</body></html>"), "no answer: HTML came with status 200"),
    "half a json": (Response('{"choices": [{"mess'), "no answer: text that is no JSON came with status 200"),
    "nothing": (Response(""), "no answer: an empty body came with status 200"),
    "empty choices": (answer() | {"choices": []}, "no text: an answer without a message"),
    "empty choice": (answer() | {"choices": [{}]}, "no text: an answer without a message"),
    "error object": ({"error": {"message": "overloaded", "code": 529}}, "error object: overloaded"),
    "error text": ({"error": "overloaded\x1b[2J"}, r"error object: overloaded\x1b[2J"),
    "half a character": (
        Response(b'{"choices": [{"message": {"content": "\xc3("}}]}'),
        "no answer: text that is no UTF-8",
    ),
    "a number without end": (
        Response('{"choices": [], "created": ' + "9" * 5000 + "}"),
        "no answer: text that is no JSON",
    ),
    "stream": (Response(STREAM, media_type="text/event-stream"), "stream: a stream of events came, and none was asked"),
    "stream as text": (Response(STREAM), "stream: a stream of events came"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_no_answer_is_named_and_ends_the_run_where_nothing_else_comes(tmp_path, kind):
    said, error = ENDLESS[kind]
    with Fake(lambda *_: said) as fake:
        ledger = Ledger(tmp_path / "l.sqlite")
        endpoint = agent(fake, retries=1, concurrency=2, give_up=4)
        with pytest.raises(ValueError, match=r"agent m@.*: 4 calls in a row failed, the last with: ") as ended:
            responses(endpoint, ask(12), ledger)
        assert error in str(ended.value) and len(fake.asked) < 24
        assert all(error in message for message in ledger.errors())
        # What a stream holds was paid for: it is not asked for again.
        assert kind.startswith("stream") == (endpoint.retried == 0)


@pytest.mark.parametrize("kind", ENDLESS)
def test_one_of_them_among_answers_loses_nothing_else(kind):
    said = ENDLESS[kind][0]
    with Fake(lambda body, times: said if "3" in str(body["messages"]) and times == 1 else answer()) as fake:
        replies = agent(fake).respond(ask(8))
        assert [reply.ok for reply in replies] == [not (kind.startswith("stream") and i == 3) for i in range(8)]


def test_nothing_for_long_is_a_timeout_that_counts_as_spent():
    async def slowly(body, _):
        await asyncio.sleep(60 if "3" in str(body["messages"]) else 0)
        return answer()

    with Fake(slowly) as fake:
        endpoint = agent(fake, timeout=0.3, retries=1)
        replies = endpoint.respond(ask(5))
        assert [reply.ok for reply in replies] == [True, True, True, False, True]
        assert (
            replies[3].reason == "timeout"
            and replies[3].tokens_out == 40
            and endpoint.spent >= 40 + replies[3].tokens_in
        )


def test_another_models_name_is_counted_and_named_at_the_end(tmp_path, capsys):
    def behave(body, _):
        return answer() | (
            {"model": "cheaper\x1b-7b"} if "3" in str(body["messages"]) else {"model": "org/M-2024-07-18"}
        )

    with Fake(behave) as fake:
        cast = Cast(tmp_path / "l.sqlite", Runtime(), quiet=True)
        endpoint = cast.agent(f"openai:m@{fake.url}#extras=error")
        assert all(reply.ok for reply in cast.scheduler.run(cast.scheduler.each(endpoint, ask(9))))
        cast.close()
    said = capsys.readouterr().err
    assert "of 9 replies, some name another model than m: cheaper\\x1b-7b (1)\n" in said and "not used" not in said


@pytest.mark.parametrize(
    ("given", "asked", "same"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("gpt-4o-mini", "gpt-4o", False),
        ("gpt-4", "gpt-4o", False),
        ("meta-llama/Llama-3-8B", "llama-3-8b", True),
        ("llama-3-8b", "meta-llama/Llama-3-8B", True),
        ("qwen:latest", "qwen", True),
        ("qwen", "qwen:7", True),
        ("other", "m", False),
        ("m", "m", True),
    ],
)
def test_names_of_models_are_told_apart(given, asked, same):
    assert _is_same_model(given, asked) == same


# Case: a model stops exactly at the limit and says "stop".
def test_a_stop_at_the_limit_is_a_cut():
    def behave(body, _):
        number = int(body["messages"][0]["content"].split()[-1])
        said = answer(["half an", "whole", ""][number])
        said["usage"]["completion_tokens"] = [20, 19, 20][number]
        return said

    with Fake(behave) as fake:
        replies = agent(fake).respond(ask(3))
    assert [reply.reason for reply in replies] == ["length", "", "length"]
    assert [reply.is_cut for reply in replies] == [True, False, False] and replies[2].error.startswith("length: all")


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ("<think>\nhm\n</think>\n\nfine", "fine", "hm"),
        ("hm, let me see\n</think>\n\nfine", "fine", "hm, let me see"),
        ("<think>hm</think>fine", "fine", "hm"),
        ("In XML, `</think>` ends it.", "In XML, `</think>` ends it.", ""),
        ("Write <think>a</think> here.", "Write <think>a</think> here.", ""),
        ("fine", "fine", ""),
        ("\ud83d\ude00", "😀", ""),
    ],
)
def test_reasoning_in_front_of_an_answer_is_no_part_of_it(content, text, reasoning):
    read = read_answer(answer(content), 9)
    assert (read.text, read.reasoning, read.error) == (text, reasoning, "")


def test_reasoning_that_is_cut_leaves_no_answer():
    read = read_answer(answer("<think>\nhm, 7 is", finish="length"), 9)
    assert read.text == "" and read.error.startswith("length: all of max_tokens=9 was spent on reasoning")


def test_reasoning_apart_is_kept_beside_the_reply(tmp_path):
    with Fake(lambda *_: Response(json.dumps(answer("fine", reasoning_content="hm \ud83d")))) as fake:
        ledger = Ledger(tmp_path / "l.sqlite")
        (reply,) = responses(agent(fake), ask(1), ledger)
        assert (reply.text, reply.reasoning) == ("fine", "hm \ufffd")
        (call,) = ledger.calls()
        assert call.reply == reply


def test_bodies_of_all_kinds():
    assert read_body("application/json", '\ufeff {"a": "é"}'.encode()) == {"a": "é"}
    for body in (b"", b" \n", b"<", b"{", b"[" * 100_000, b"data: {}", b"nul", b'"\xff"', b"\xff", b"9" * 5000):
        assert read_body("", body).error


@pytest.mark.parametrize("number", [-1, True, 7.0, "7", None, 10**30])
def test_a_usage_that_is_no_number_of_tokens_is_estimated(tmp_path, number):
    for name in ("prompt_tokens", "completion_tokens"):
        said = answer() | {"usage": {"prompt_tokens": 5, "completion_tokens": 7} | {name: number}}
        with Fake(lambda *_, said=said: said) as fake:
            endpoint = agent(fake, budget=1000)
            (reply,) = responses(endpoint, ask(1), Ledger(tmp_path / f"{name}.sqlite"))
            assert reply.ok and 12 < endpoint.spent < 100 and not endpoint.ended


# Catches: "Connection error." alone, which says nothing of what to mend.
def test_an_answer_that_http_cannot_read_is_named():
    with Fake(lambda *_: Response("plain", headers={"Content-Encoding": "gzip"})) as fake:
        (reply,) = agent(fake, retries=0).respond(ask(1))
    assert reply.error.startswith("APIConnectionError: Connection error. (") and "header" in reply.error


# Rates


def test_refusals_for_the_rate_lower_what_runs_at_once_and_lose_nothing():
    room, most, at_once = asyncio.Semaphore(6), [], []

    async def behave(body, _):
        at_once.append(1)
        try:
            if len(at_once) > 6:
                return refused(429, "slow down", {"Retry-After": "0.02"})
            most.append(len(at_once))
            await asyncio.sleep(0.02)
            return answer()
        finally:
            at_once.pop()

    with Fake(behave) as fake:
        endpoint = agent(fake, concurrency=48)
        replies = endpoint.respond(ask(150))
        assert all(reply.ok for reply in replies) and max(most) == 6 and room
        assert len(fake.asked) <= 150 + 150, f"{len(fake.asked) - 150} refusals"


def test_limits_of_headers_are_learned_and_held():
    began = []

    def behave(*_):
        began.append(asyncio.get_event_loop().time())
        headers = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "590"}
        return JSONResponse(answer(), headers=headers)

    with Fake(behave) as fake:
        assert all(reply.ok for reply in agent(fake, concurrency=4).respond(ask(70)))
    # A burst of five seconds, then ten a second.
    assert began[-1] - began[0] >= 1.0


def test_a_limit_of_the_spec_is_held():
    began = []

    def behave(*_):
        began.append(time.monotonic())
        return answer()

    with Fake(behave) as fake:
        endpoint = make_agent(f"openai:m@{fake.url}#requests_per_minute=600,concurrency=64")
        # Not since the first call came: a busy machine opens connections for long.
        start = time.monotonic()
        assert all(reply.ok for reply in endpoint.respond(ask(65)))
    assert 1.2 <= began[-1] - start <= 6.0


# Options that an endpoint wants otherwise


def wants_completion_tokens(body, _):
    if "max_tokens" in body:
        return refused(400, "Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead.", param="max_tokens")
    return answer()


# Catches: of 64 calls at once one that adapts and 63 that end the run.
@pytest.mark.parametrize("concurrency", [1, 64])
def test_the_other_name_of_the_limit_is_found_and_remembered(concurrency):
    with Fake(wants_completion_tokens) as fake:
        endpoint = agent(fake, concurrency=concurrency, retries=0)
        assert all(reply.ok for reply in endpoint.respond(ask(70)))
        refusals = [place for place, body in enumerate(fake.asked) if "max_tokens" in body]
        assert len(refusals) <= concurrency and len(fake.asked) == 70 + len(refusals)
        before = len(fake.asked)
        assert all(reply.ok for reply in endpoint.respond(ask(70)))
        assert len(fake.asked) == before + 70 and endpoint.failed == 0


def test_a_given_name_of_the_limit_is_not_changed():
    with Fake(wants_completion_tokens) as fake:
        endpoint = agent(fake, token_limit="max_tokens", concurrency=1)
        (reply,) = endpoint.respond(ask(1))
        assert not reply.ok and "refuses the option max_tokens" in endpoint.ended


SCHEMA = json.dumps({"type": "object", "properties": {"score": {"type": "number"}}})


@pytest.mark.parametrize(("takes", "forms"), [(3, ["json_schema"]), (2, ["json_object"]), (1, [None])])
def test_the_form_of_a_verdict_is_found_and_remembered(takes, forms):
    order = [None, "json_object", "json_schema"]

    def behave(body, _):
        form = body.get("response_format", {}).get("type")
        return answer() if order.index(form) < takes else refused(400, f"response_format: {form} is not supported")

    with Fake(behave) as fake:
        endpoint = agent(fake, concurrency=32)
        assert all(reply.ok for reply in endpoint.respond(ask(64, "judge", schema=SCHEMA)))
        before = len(fake.asked)
        assert all(reply.ok for reply in endpoint.respond(ask(20, "judge", schema=SCHEMA)))
        assert [body.get("response_format", {}).get("type") for body in fake.asked[before:]] == forms * 20
        assert "response_format" not in str([endpoint.respond(ask(1)), fake.asked[-1]])
    if takes == 3:
        sent = fake.asked[0]["response_format"]["json_schema"]
        assert sent == {"name": "judge", "strict": True, "schema": json.loads(SCHEMA)}


def test_a_form_that_is_refused_without_a_word_of_it_is_left():
    def behave(body, _):
        is_refused = "response_format" in body or body["messages"][0]["content"] == "Question 3"
        return refused(400, "Bad request") if is_refused else answer()

    with Fake(behave) as fake:
        endpoint = agent(fake)
        assert endpoint.respond(ask(1, "judge", schema=SCHEMA))[0].ok and len(fake.asked) == 3
        # What was found out is remembered, and a refused call has no part in it.
        replies = endpoint.respond(ask(8, "judge", schema=SCHEMA))
        assert [reply.ok for reply in replies] == [i != 3 for i in range(8)] and len(fake.asked) == 3 + 8


def test_a_refused_verdict_says_nothing_of_a_form_that_was_answered():
    with Fake(lambda body, _: refused(400, "No") if "Question 0" in str(body["messages"]) else answer()) as fake:
        endpoint = agent(fake)
        assert endpoint.respond(ask(2, "judge", schema=SCHEMA)[1:])[0].ok
        assert [reply.ok for reply in endpoint.respond(ask(4, "judge", schema=SCHEMA))] == [False, True, True, True]
        assert [body["response_format"]["type"] for body in fake.asked] == ["json_schema"] * 5


def test_the_form_of_the_spec_is_the_first_one_sent():
    with Fake(lambda *_: answer()) as fake:
        for form, sent in {"object": "json_object", "schema": "json_schema", "no": None}.items():
            agent(fake, json=form).respond(ask(1, "judge", schema=SCHEMA))
            assert fake.asked[-1].get("response_format", {}).get("type") == sent


def test_reasoning_effort_and_further_fields_are_sent_and_part_of_the_agent():
    with Fake(lambda *_: answer()) as fake:
        spec = f"openai:m@{fake.url}"
        further = 'extra_body={"chat_template_kwargs":{"thinking":false,"n#":"a,b"},"top_k":5}'
        options = ("", f"#concurrency=2,{further}", "#reasoning_effort=low")
        one, two, three = (make_agent(f"{spec}{rest}") for rest in options)
        for endpoint in (one, two, three):
            assert endpoint.respond(ask(1))[0].ok
        plain, extended, effort = fake.asked
        assert set(plain) == {"model", "messages", "max_tokens", "temperature"}
        assert extended == plain | {"top_k": 5, "chat_template_kwargs": {"thinking": False, "n#": "a,b"}}
        assert effort == plain | {"reasoning_effort": "low"}
        assert len({one.fingerprint, two.fingerprint, three.fingerprint}) == 3
        assert make_agent(f"{spec}#concurrency=3,retries=1").fingerprint == one.fingerprint
        agent(fake).respond(ask(1, top_p=0.5))
        assert fake.asked[-1]["top_p"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('extra_body={"model":"n"}', "extra_body: expected fields that the agent does not set itself, got model"),
        ('extra_body={"stream":true,"seed":3}', "got seed, stream"),
        ("extra_body=[1]", "extra_body: expected a JSON object"),
        ('extra_body={"a"', "extra_body: expected a JSON object"),
        ("json=yes", "json: expected auto or schema or object or no, got 'yes'"),
        ("price_in=many", "agent m: price_in: expected a number, got 'many'"),
        ("price_in=-1", "agent m: price_in: expected at least 0"),
        ("price_in=nan", "price_in: expected at least 0"),
        ("max_cost=3", "max_cost: expected what tokens cost beside it"),
        ("tokens_per_minute=-1", "tokens_per_minute: expected at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_agent(f"openai:m@http://127.0.0.1:1/v1#{options}")


# Budgets


# Catches: a budget that ends a run at its first burst, because calls reserve more than they take.
def test_a_budget_is_used_up_although_calls_at_once_reserve_more():
    with Fake(lambda *_: answer(tokens=10)) as fake:
        endpoint = agent(fake, budget=900, concurrency=64)
        replies = endpoint.respond(ask(200, max_tokens=200))
        assert 600 <= endpoint.spent <= 900 and sum(reply.ok for reply in replies) == endpoint.spent // 10
        assert {reply.reason for reply in replies if not reply.ok} == {"budget"}


@pytest.mark.parametrize(
    ("options", "prices", "most"), [("budget=400", {}, 400), ("max_cost=0.0004", {"m": Price(1.0, 1.0)}, 400)]
)
def test_budgets_hold_over_restarts(tmp_path, options, prices, most):
    with Fake(lambda *_: answer(tokens=30)) as fake:
        for start in range(4):
            cast = Cast(tmp_path / "l.sqlite", Runtime(), quiet=True, prices=prices)
            endpoint = cast.agent(f"openai:m@{fake.url}#{options},concurrency=4")
            requests = ask(3 * start + 3)
            if start < 2:
                assert all(reply.ok for reply in cast.scheduler.run(cast.scheduler.each(endpoint, requests)))
                assert cast.scheduler.cost == pytest.approx(90e-6 if prices else 0)
            else:
                with pytest.raises(ValueError, match=r"agent m@.*: budget: .* spent, this may take .*; what"):
                    cast.scheduler.run(cast.scheduler.each(endpoint, ask(40)))
            cast.close()
        assert 300 <= 30 * len(fake.asked) <= most and endpoint.spent == 30 * len(fake.asked)


def test_a_cut_answer_is_asked_longer_through_an_endpoint():
    def behave(body, _):
        return answer("whole") if body["max_tokens"] == 40 else answer("wh", finish="length")

    with Fake(behave) as fake:
        calls = Calls()
        messages = (Message("user", "q"),)
        calls.limits = calls.limits.__class__(answer=20)
        assert calls.scheduler.run(calls.converse(agent(fake), messages, 0, longer=True)) == "whole"
        assert calls.counts["answer"]["asked longer"] == 1 and len(fake.asked) == 2


async def without_end():
    """Far more than the limit; a server that goes on for ever would take the processor from the other tests."""
    for _ in range(80):
        yield b" " * 65536


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_without_end_is_read_to_a_limit(monkeypatch, status):
    monkeypatch.setattr(bounded_body, "MAX_BODY", 1 << 20)
    with Fake(lambda body, _: StreamingResponse(without_end(), status, media_type="application/json")) as fake:
        (reply,) = agent(fake, retries=0, timeout=60.0).respond(ask(1))
    assert reply.error == "too large: expected a body of at most 1048576 bytes, got more"
    assert reply.reason == "too large"


def test_a_compressed_answer_has_a_limit_of_its_own(monkeypatch):
    bomb = gzip.compress(json.dumps(answer("a" * 2_000_000)).encode())
    monkeypatch.setattr(bounded_body, "MAX_COMPRESSED_BODY", len(bomb) - 1)
    headers = {"content-encoding": "gzip"}
    with Fake(lambda body, _: Response(bomb, 200, headers, media_type="application/json")) as fake:
        (reply,) = agent(fake, retries=0).respond(ask(1))
        monkeypatch.setattr(bounded_body, "MAX_COMPRESSED_BODY", len(bomb))
        (whole,) = agent(fake, retries=0).respond(ask(1))
    assert reply.reason == "too large"
    assert len(whole.text) == 2_000_000


def test_too_many_failed_calls_are_shown_with_one_of_them(tmp_path):
    with Fake(lambda body, _: Response("<html></html>")) as fake:
        cast = Cast(tmp_path / "ledger.sqlite", Runtime(), quiet=True)
        model = cast.agent(f"openai:m@{fake.url}#retries=0")

        def work():
            (reply,) = cast.scheduler.run(cast.scheduler.each(model, ask(1)))
            check_missing("answers", {reply.reason: 1}, 1, 0.05)

        with pytest.raises(ValueError, match=r"\(no answer 1\); .*; one of them: no answer: HTML came with status 200"):
            cast.conduct(work)
        cast.close()
