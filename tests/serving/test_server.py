"""The server with the unmodified `openai` client, with clients that behave badly, and under load."""

import asyncio
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
import torch  # noqa: E402
from forked import ENVIRONMENT, ROOT, run_python  # noqa: E402
from many_ranks import torchrun_command  # noqa: E402
from served_model import Serving, small_model  # noqa: E402

from wizard_engine.data.chat import encode_prompt  # noqa: E402
from wizard_engine.data.records import Message  # noqa: E402
from wizard_engine.generation import generate  # noqa: E402
from wizard_engine.generation.scoring import prompt_logprobs  # noqa: E402
from wizard_engine.model import save_model  # noqa: E402

ASK = [{"role": "user", "content": "What is two and three?"}]


@pytest.fixture(scope="module")
def serving():
    with Serving() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "serving" in request.fixturenames:
        server = request.getfixturevalue("serving")
        server.slow = 0.0
        server.until(server.is_idle)


def client(serving, key="none"):
    return openai.OpenAI(base_url=serving.url + "/v1", api_key=key, max_retries=0)


def expected(serving, count, how, messages=ASK):
    prompt = encode_prompt(serving.tokenizer, [Message(m["role"], m["content"]) for m in messages])
    n = how.pop("n", 1)
    generation = generate(
        serving.model,
        [prompt] * n,
        max_new_tokens=count,
        eos_ids=serving.tokenizer.eos_ids,
        **{"temperature": 1.0, "top_p": 1.0} | how,
    )
    return [serving.tokenizer.decode(tokens).strip() for tokens in generation.tokens], generation


# Chat, n, seed, stop, log-probabilities


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"seed": 7}, {"seed": 7, "temperature": 0.7, "top_p": 0.8}])
def test_chat_answers_as_generation_does(serving, how):
    answer = client(serving).chat.completions.create(model="small", messages=ASK, max_tokens=30, n=3, **how)
    texts, generation = expected(serving, 30, {**how, "n": 3})
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.finish_reason for choice in answer.choices] == [
        "stop" if x else "length" for x in generation.finished
    ]
    usage = answer.usage
    assert usage.completion_tokens == sum(map(len, generation.tokens)) and answer.model == "small"
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and answer.system_fingerprint


def test_answers_without_a_seed_differ_and_with_one_do_not(serving):
    def ask(**how):
        return client(serving).chat.completions.create(model="small", messages=ASK, max_tokens=40, **how)

    texts = {ask().choices[0].message.content for _ in range(4)}
    assert len(texts) > 1 and len({ask(seed=3).choices[0].message.content for _ in range(3)}) == 1


def test_streams_hold_the_text_of_the_whole_answer(serving):
    how = {"model": "small", "messages": ASK, "max_tokens": 40, "n": 2, "seed": 5}
    whole = client(serving).chat.completions.create(**how)
    stream = client(serving).chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    texts, reasons, usage, chunks = ["", ""], [None, None], None, 0
    for chunk in stream:
        chunks += 1
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and chunks > 10
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(serving, stream):
    text = client(serving).chat.completions.create(model="small", messages=ASK, max_tokens=60, seed=1).choices[0]
    stop = text.message.content[9:12]
    how = {"model": "small", "messages": ASK, "max_tokens": 60, "seed": 1, "stop": ["zzzz", stop]}
    if stream:
        events = list(client(serving).chat.completions.create(**how, stream=True))
        streamed = "".join(event.choices[0].delta.content or "" for event in events)
        reason = events[-1].choices[0].finish_reason
    else:
        choice = client(serving).chat.completions.create(**how).choices[0]
        streamed, reason = choice.message.content, choice.finish_reason
    whole = text.message.content
    assert streamed == whole[: whole.index(stop)].rstrip() and reason == "stop" and stop not in streamed


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_tokens(serving, stream):
    # A short answer that ends with EOS, which is none of the tokens shown.
    seed = next(i for i in range(200) if expected(serving, 40, {"seed": i})[1].finished[0])
    how = {"model": "small", "messages": ASK, "max_tokens": 40, "seed": seed, "logprobs": True, "top_logprobs": 4}
    if stream:
        chunks = [c.choices[0] for c in client(serving).chat.completions.create(**how, stream=True)]
        content = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    else:
        content = client(serving).chat.completions.create(**how).choices[0].logprobs.content
    texts, generation = expected(serving, 40, {"seed": seed})
    count = len(generation.tokens[0]) - 1
    assert len(content) == count
    assert [token.logprob for token in content] == pytest.approx(generation.logprobs[0][:count], abs=1e-5)
    assert "".join(token.token for token in content).strip() == texts[0]
    for token in content:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True)
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == texts[0]


def test_completions_accept_texts_ids_and_multiple_prompts(serving):
    tokenizer = serving.tokenizer
    how = {"model": "small", "max_tokens": 9, "temperature": 0}
    create = client(serving).completions.create
    # The random model writes halves of characters too, whose tokens have no text of their own.
    texts = [text for text in ("two", "ten", "six", "one", "is it", "five", "to", "What") if whole(create, text, how)]
    first, second = texts[:2]
    ids = [tokenizer.bos_id, *tokenizer.encode(first)]
    one, two = create(prompt=first, **how), create(prompt=ids, **how)
    right = generate(serving.model, [ids], max_new_tokens=9, eos_ids=tokenizer.eos_ids)
    visible = [t for t in right.tokens[0] if t != tokenizer.eos_id]
    assert one.choices[0].text == two.choices[0].text == tokenizer.decode(visible)
    two_prompts = create(prompt=[first, second], n=2, logprobs=2, **how)
    assert [choice.index for choice in two_prompts.choices] == [0, 1, 2, 3]
    assert two_prompts.choices[0].text == two_prompts.choices[1].text == one.choices[0].text
    assert two_prompts.choices[2].text == create(prompt=second, **how).choices[0].text
    logprobs = two_prompts.choices[0].logprobs
    assert "".join(logprobs.tokens) == one.choices[0].text and len(logprobs.top_logprobs[0]) == 2
    assert all(one.choices[0].text[i:].startswith(t) for i, t in zip(logprobs.text_offset, logprobs.tokens))
    assert logprobs.token_logprobs == pytest.approx(right.logprobs[0][: len(logprobs.tokens)], abs=1e-5)
    streamed = [c.choices[0].text for c in create(prompt=first, stream=True, **how)]
    assert "".join(streamed) == one.choices[0].text


def whole(create, text, how):
    return "\ufffd" not in create(prompt=text, **how).choices[0].text


def test_models_health_and_metrics(serving):
    models = client(serving).models
    assert [model.id for model in models.list()] == ["small"] and models.retrieve("small").object == "model"
    with pytest.raises(openai.NotFoundError):
        models.retrieve("other/one")
    assert httpx.get(serving.url + "/health").json()["status"] == "ok"
    text = httpx.get(serving.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["wizard_pages_free"]) == float(values["wizard_pages"]) == serving.engine.pages
    assert float(values["wizard_tokens_drawn_total"]) == serving.engine.generated > 0
    assert float(values["wizard_graph_captures_total"]) == serving.engine.captures == 0
    assert float(values['wizard_requests_total{route="/v1/chat/completions",status="200"}']) > 0
    buckets = [float(v) for k, v in values.items() if k.startswith("wizard_first_token_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == float(values["wizard_first_token_seconds_count"])


# Bad input


def post(serving, path="/v1/chat/completions", **options):
    return httpx.post(serving.url + path, timeout=30, **options)


GOOD = {"model": "small", "messages": ASK, "max_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "model: expected 'small', got 'gpt-4'"),
        ({"messages": []}, 400, "messages: expected 1 to 4096 items"),
        ({"messages": "hi"}, 400, "messages: expected array, got 'hi'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, r"messages[0].role: expected 'system'"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content: expected one, got none"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content: expected"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "two " * 300}]}, 400, "prompt: expected 1 to 252 tokens"),
        ({"max_tokens": 0}, 400, "max_tokens: expected 1 to 128, got 0"),
        ({"max_tokens": 10**9}, 400, "max_tokens: expected 1 to 128"),
        ({"max_tokens": "4"}, 400, "max_tokens: expected integer or null, got '4'"),
        ({"max_tokens": 4.5}, 400, "max_tokens: expected integer"),
        ({"max_tokens": True}, 400, "max_tokens: expected integer"),
        ({"temperature": -0.1}, 400, "temperature: expected 0 to 10"),
        ({"top_p": 0}, 400, "top_p: expected above 0, at most 1"),
        ({"n": 65}, 400, "n: expected 1 to 64"),
        ({"stop": ["x"] * 17}, 400, "stop: expected 0 to 16 items"),
        ({"seed": 2**63}, 400, "seed: expected"),
        ({"tempratur": 1}, 400, "tempratur: unknown field; did you mean 'temperature'?"),
        ({"tools": [{"type": "function"}]}, 400, "tools: expected"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty: expected -2 to 2, got 2.5"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias.5: expected -100 to 100"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: expected 'text'"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs: expected 0 to 20"),
    ],
)
def test_requests_that_do_not_fit_are_refused_by_field(serving, changes, status, message):
    answer = post(serving, json=GOOD | changes)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(message) and error["type"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([0, 10**6], "prompt[1]: expected 0 to 277, got 1000000"),
        ([[1], [-1]], "prompt[1][0]: expected 0 to 277"),
        ([], "prompt: expected"),
        ([[]], "prompt[0]: expected"),
        (["two", 3], "prompt["),
        (3, "prompt: expected"),
    ],
)
def test_prompts_that_are_none_are_refused(serving, prompt, message):
    answer = post(serving, "/v1/completions", json={"model": "small", "prompt": prompt, "max_tokens": 3})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message), answer.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"model": 1e999}', b"\x00"],
    ids=range(9),
)
def test_bodies_that_are_no_request_are_refused(serving, body):
    answer = post(serving, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a" * 100, "\N{REPLACEMENT CHARACTER}", "🧙 " * 5, " "])
def test_strange_texts_are_answered_or_refused(serving, text):
    content = json.dumps(GOOD | {"messages": [{"role": "user", "content": text}]}).encode()
    assert post(serving, content=content).status_code in (200, 400)


def test_paths_and_methods_that_are_not_there(serving):
    assert post(serving, "/v1/nothing", json={}).status_code == 404
    assert httpx.get(serving.url + "/v1/chat/completions").status_code == 405


def test_too_long_and_too_slow_bodies_are_refused():
    with Serving(body_bytes=2000, read_seconds=0.3) as serving:
        assert post(serving, content=b" " * 2001).status_code == 413
        with socket.create_connection(("127.0.0.1", serving.port)) as half:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b"408" in half.recv(4096)
        with socket.create_connection(("127.0.0.1", serving.port)) as gone:
            gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert post(serving, json=GOOD).status_code == 200
        serving.until(serving.is_idle)


@pytest.mark.parametrize("key", ["right", "wrong", "rig", None])
def test_keys_are_asked_for(key):
    with Serving(api_key="right") as serving:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        answer = post(serving, json=GOOD, headers=headers)
        assert answer.status_code == (200 if key == "right" else 401)
        assert httpx.get(serving.url + "/metrics", headers=headers).status_code == answer.status_code
        assert httpx.get(serving.url + "/health").status_code == 200


def test_a_flood_is_refused_with_429_and_nothing_is_lost():
    with Serving(max_jobs=8, max_sequences=4) as serving:
        serving.slow = 0.02

        async def flood():
            async with httpx.AsyncClient(timeout=60) as web:
                asks = [web.post(serving.url + "/v1/chat/completions", json=GOOD | {"seed": i}) for i in range(60)]
                return await asyncio.gather(*asks)

        answers = asyncio.run(flood())
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 8
        refused = answers[statuses.index(429)]
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"
        # More choices than are ever taken.
        assert post(serving, json=GOOD | {"n": 9}).status_code == 429
        serving.slow = 0
        serving.until(serving.is_idle)


def test_more_choices_than_the_cache_holds_are_answered_in_turn():
    with Serving(cache_tokens=16 * 9, max_sequences=16) as serving:
        answer = post(serving, json=GOOD | {"n": 12, "max_tokens": 40, "seed": 4})
        texts, _ = expected(serving, 40, {"seed": 4, "n": 12})
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == texts
        serving.until(serving.is_idle)


# Clients that leave, or do not read


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_pages(serving, stream):
    serving.slow = 0.05
    body = json.dumps(GOOD | {"max_tokens": 120, "n": 3, "stream": stream, "seed": 12}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", serving.port)) as leaving:
        leaving.sendall(head + body)
        serving.until(lambda: len(serving.engine.scheduler.running) == 3)
        steps = serving.engine.steps
    serving.until(serving.is_idle)
    assert serving.engine.steps < steps + 60


def test_server_disconnects_a_client_that_does_not_read():
    with Serving(write_seconds=0.3) as serving:
        ask = {"model": "small", "prompt": "two", "max_tokens": 128, "n": 64, "stream": True, "logprobs": 5}
        body = json.dumps(ask).encode()
        # Little is kept on the way, so that the server soon has to wait.
        serving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", serving.port))
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            serving.until(lambda: serving.driver.open == 64 or serving.engine.generated > 100)
            serving.until(serving.is_idle, 30)
            # Its handler has ended, too, while the connection is still there.
            serving.until(lambda: not serving.uvicorn.server_state.tasks, 5)
            assert post(serving, json=GOOD).status_code == 200


def test_a_failed_engine_is_told_and_does_not_hang(monkeypatch):
    with Serving() as serving:
        serving.slow = 0.02
        monkeypatch.setattr(type(serving.engine), "_launch", lambda *_: 1 / 0)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        answer = post(serving, json=GOOD)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
        assert httpx.get(serving.url + "/health").status_code == 503
        assert post(serving, json=GOOD).status_code == 503


# Load


@pytest.mark.slow
def test_a_thousand_requests_with_cancellations_lose_none(serving):
    draw = random.Random(0)

    async def one(web, number, gate):
        text = " ".join(draw.choice(["one", "two", "three", "ten"]) for _ in range(draw.randint(1, 12)))
        body = GOOD | {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": draw.randint(1, 24),
            "seed": number,
            "stream": number % 3 == 0,
        }
        leaves = number % 7 == 0
        async with gate:
            if not body["stream"]:
                task = asyncio.create_task(web.post("/v1/chat/completions", json=body))
                if leaves:
                    await asyncio.sleep(draw.random() * 0.02)
                    task.cancel()
                try:
                    answer = await task
                except asyncio.CancelledError:
                    return "left"
                return "done" if answer.status_code == 200 and answer.json()["choices"] else answer.text
            async with web.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = []
                async for line in stream.aiter_lines():
                    lines.append(line)
                    if leaves and len(lines) > 3:
                        return "left"
                return "done" if "data: [DONE]" in lines else str(lines[-3:])

    async def load():
        gate, limits = asyncio.Semaphore(48), httpx.Limits(max_connections=48)
        async with httpx.AsyncClient(base_url=serving.url, timeout=60, limits=limits) as web:
            return await asyncio.gather(*(one(web, number, gate) for number in range(1000)))

    results = asyncio.run(load())
    assert set(results) <= {"done", "left"} and results.count("done") >= 857
    serving.until(serving.is_idle)


@pytest.mark.slow
def test_a_fuzzed_client_finds_no_5xx(serving, tmp_path):
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance"
    arguments = ["run", serving.url + "/openapi.json", "--max-examples", "15", "--seed", "3", "--checks", checks]
    arguments += ["--phases", "examples,fuzzing"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# The recipe


def test_the_recipe_serves_drains_and_ends(tmp_path):
    model, tokenizer = small_model()
    save_model(model, tokenizer, tmp_path / "tiny")
    arguments = [sys.executable, str(ROOT / "recipes" / "serve.py"), "--model", str(tmp_path / "tiny"), "--port", "0"]
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"WIZARD_API_KEY": "secret"}
    ) as process:
        try:
            line = process.stderr.readline()
            assert "with the key of WIZARD_API_KEY" in line and "secret" not in line
            url = line.split(" on ")[1].split(",")[0]
            web = openai.OpenAI(base_url=url, api_key="secret")
            stream = web.chat.completions.create(model="tiny", messages=ASK, max_tokens=200, stream=True, seed=1)
            first = next(iter(stream))
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            rest = [chunk.choices[0].finish_reason for chunk in stream]
            assert first and rest[-1] in ("stop", "length")
            assert process.wait(20) == 0
            assert "served " in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.slow
def test_two_ranks_serve_one_model(tmp_path):
    model, tokenizer = small_model(tied=False)
    prompt = encode_prompt(tokenizer, [Message("user", ASK[0]["content"])])
    how = {"eos_ids": tokenizer.eos_ids, "temperature": 1.0, "top_p": 1.0}
    right = generate(model, [prompt] * 3, max_new_tokens=20, seed=4, **how)
    streamed = generate(model, [prompt], max_new_tokens=128, seed=1, **how)
    scored, _ = prompt_logprobs(model, prompt)
    # An id whose row has no numbers fails the requests that have it, on both ranks.
    used = {*prompt, *itertools.chain(*right.tokens, *streamed.tokens)}
    broken = next(i for i in range(model.config.vocab_size) if i not in used)
    with torch.no_grad():
        model.embedding.weight[broken] = float("nan")
    save_model(model, tokenizer, tmp_path / "tiny")
    arguments = torchrun_command(2, ROOT / "recipes" / "serve.py", "--model", tmp_path / "tiny", "--port", 0, "--tp", 2)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            line = ""
            while " on http" not in line:
                line = process.stderr.readline()
                assert line, "the server never said where it listens"
            web = openai.OpenAI(base_url=line.split(" on ")[1].split(",")[0], api_key="none", max_retries=0)
            for more in ({}, {"echo": True, "logprobs": 1}):
                with pytest.raises(openai.InternalServerError, match="logits: expected numbers"):
                    web.completions.create(model="tiny", prompt=[*prompt, broken], max_tokens=4, n=2, **more)
            echo = web.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
            assert echo.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scored, abs=1e-4)
            answer = web.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, n=3, seed=4)
            texts = [tokenizer.decode(tokens).strip() for tokens in right.tokens]
            assert [choice.message.content for choice in answer.choices] == texts
            # torchrun tells both ranks to end; the answer on its way still comes.
            stream = web.chat.completions.create(model="tiny", messages=ASK, max_tokens=128, stream=True, seed=1)
            first = next(iter(stream))
            process.send_signal(signal.SIGTERM)
            rest = [chunk.choices[0].finish_reason for chunk in stream]
            assert first and rest[-1] in ("stop", "length")
            process.wait(30)
        finally:
            process.kill()


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "0"], "tp: expected at least 1"),
        (["--tp", "2"], "tp: expected the 1 ranks of this run"),
        (["--port", "70000"], "port: expected 0 to 65535"),
        (["--cache-gib", "0"], "--cache-gib: expected above 0"),
        (["--modle", "x"], "modle"),
    ],
)
def test_options_of_the_recipe_that_do_not_fit(tmp_path, options, message):
    model, tokenizer = small_model()
    save_model(model, tokenizer, tmp_path / "tiny")
    done = run_python(ROOT / "recipes" / "serve.py", "--model", tmp_path / "tiny", *options, timeout=60)
    assert done.returncode != 0 and message in done.stderr + done.stdout


def test_a_port_that_is_taken_is_named(tmp_path):
    model, tokenizer = small_model()
    save_model(model, tokenizer, tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_python(ROOT / "recipes" / "serve.py", "--model", tmp_path / "tiny", "--port", port, timeout=60)
    assert done.returncode == 1
    assert f"host, port: expected a free address, got 127.0.0.1:{port}: Address already in use" in done.stderr
