"""Who may call, and what slow, wrong and greedy clients can do to the others: nothing."""

import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import httpx
from served_model import Serving

from recipes import serve
from wizard_engine.serving import driver
from wizard_engine.serving.guard import access_of
from wizard_engine.serving.server import checked_key

GOOD = {"model": "small", "messages": [{"role": "user", "content": "two"}], "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def serving():
    with Serving() as server:
        yield server
        server.until(server.is_idle)


def ask(serving, headers=None, method="POST", path="/v1/chat/completions"):
    content = None if method == "GET" else json.dumps(GOOD)
    return serving.web.request(method, path, content=content, headers=headers).status_code


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({}, 200),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        (JSON | {"Host": "localhost"}, 200),
        (JSON | {"Host": "LOCALHOST.:80"}, 200),
        (JSON | {"Host": "[::1]:8000"}, 200),
        (JSON | {"Host": "127.9.9.9"}, 200),
        (JSON | {"Host": "evil.example"}, 403),
        (JSON | {"Host": "127.0.0.1.evil.example"}, 403),
        (JSON | {"Host": "localhost.evil.example:80"}, 403),
        (JSON | {"Host": "169.254.169.254"}, 403),
        (JSON | {"Origin": "https://evil.example"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Origin": "http://localhost:3000"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/plain;application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ([("Content-Type", "application/json"), ("Content-Type", "text/plain")], 415),
        ([("Content-Type", "text/plain"), ("Content-Type", "application/json")], 415),
        (JSON | {"Sec-Fetch-Site": "cross-site"}, 403),
        (JSON | {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        (JSON | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        (JSON | {"Sec-Fetch-Site": "same-origin"}, 200),
        (JSON | {"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_a_browser_page_of_another_site_is_refused(serving, headers, status):
    assert ask(serving, headers) == status
    if status == 415:
        answer = serving.web.post("/v1/chat/completions", content=json.dumps(GOOD), headers=headers)
        assert "--allow-content-type" in answer.json()["error"]["message"]
    if status == 403:
        assert all(ask(serving, headers, "GET", path) == 403 for path in ("/metrics", "/v1/models", "/health", "/no"))


def test_options_allow_hosts_origins_and_types():
    allowed = {"hosts": ("box.lan",), "origins": ("https://app.example",), "content_types": ("text/plain",)}
    with Serving(access=allowed) as serving:
        assert ask(serving, {"Host": "box.lan:80", "Content-Type": "text/plain"}) == 200
        assert ask(serving, {"Host": "other.lan"}) == 403
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        url = serving.url + "/v1/chat/completions"
        good = serving.web.options(url, headers=preflight | {"Origin": "https://app.example"})
        assert good.status_code == 200 and good.headers["access-control-allow-origin"] == "https://app.example"
        answer = httpx.post(url, json=GOOD, headers={"Origin": "https://app.example"}, timeout=30)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
        assert serving.web.options(url, headers=preflight | {"Origin": "https://evil.example"}).status_code == 400
        assert ask(serving, JSON | {"Origin": "https://evil.example"}) == 403


def test_access_by_address():
    assert access_of("0.0.0.0", has_key=False).hosts is None and access_of("0.0.0.0", has_key=False).refuses_origins
    assert access_of("::1", has_key=False).hosts == {"localhost", "::1"}
    with_key = access_of("127.0.0.1", has_key=True)
    assert with_key.hosts is None and not with_key.refuses_origins and with_key.content_types is None


@pytest.mark.parametrize("key", ["", " ", "\t", "a ", " a", "a\nb", "a\x00"])
def test_keys_that_no_client_can_send_are_refused_at_the_start(key):
    with pytest.raises(ValueError, match="api key: expected visible characters"):
        checked_key(key)


def test_the_recipe_refuses_a_blank_key(tmp_path, monkeypatch):
    monkeypatch.setenv(serve.KEY, "")
    with pytest.raises(ValueError, match="api key: expected visible characters"):
        serve.main(serve.Config(tmp_path))


# Catches: a key that is compared as text, in another encoding than it was sent in.
def test_keys_are_compared_as_bytes():
    with Serving(api_key="schlüssel🔑") as serving:
        for sent, status in (("schlüssel🔑", 200), ("schlüssel", 401), ("", 401), ("Schlüssel🔑", 401)):
            assert ask(serving, {"Authorization": f"Bearer {sent}".strip().encode()}) == status
            assert ask(serving, {"Authorization": f"bearer  {sent}".strip().encode(), "Host": "any.example"}) == status


def raw(serving, *parts, wait=5.0):
    """All that comes back for some bytes, and whether the server closed."""
    with socket.create_connection(("127.0.0.1", serving.port), timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while data := connection.recv(65536):
                received += data
            return received, True
        return received, False


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def test_two_lengths_of_a_body_are_refused_and_the_connection_closed(serving):
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for order in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    ):
        received, is_closed = raw(serving, HEAD + order + b"\r\n" + smuggled)
        assert b" 400 " in received.split(b"\r\n")[0] and is_closed
        assert received.count(b"HTTP/1.1") == 1 and b"got both" in received


# Catches: an answer in two writes of which the second waits 40 ms for the client's acknowledgement of the first.
def test_answers_wait_for_no_acknowledgement(serving):
    serving.web.get("/health")
    sockets = [each.transport.get_extra_info("socket") for each in serving.uvicorn.server_state.connections]
    assert sockets and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("Identity", 200), ("", 200)])
def test_packed_bodies_are_refused_by_name(serving, encoding, status):
    answer = serving.web.post("/v1/chat/completions", json=GOOD, headers={"Content-Encoding": encoding})
    assert answer.status_code == status and (status == 200 or "content-encoding" in answer.text)


def test_a_long_method_is_not_sent_back_whole(serving):
    received, _ = raw(serving, b"A" * 5000 + b" /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b" 405 " in received.split(b"\r\n")[0] and len(received) < 1000


def test_every_5xx_is_counted(serving, monkeypatch):
    def statuses():
        lines = serving.web.get("/metrics").text.splitlines()
        return sum(
            float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("wizard_requests_total") and 'status="5' in x
        )

    before = statuses()
    monkeypatch.setattr(serving.server.reader, "parse", lambda *_: 1 / 0)
    failed = serving.web.post("/v1/chat/completions", json=GOOD)
    assert failed.status_code == 500 and failed.headers["connection"] == "close" and statuses() == before + 1
    monkeypatch.undo()
    monkeypatch.setattr("wizard_engine.serving.driver._piece", lambda *_: 1 / 0)
    assert ask(serving) == 500 and statuses() == before + 2
    monkeypatch.undo()
    assert ask(serving) == 200 and statuses() == before + 2


# Catches: an exception of one sequence that ends the engine.
def test_a_choice_that_fails_leaves_the_others_alone(serving, monkeypatch):
    def post(**changes):
        return serving.web.post("/v1/chat/completions", json=GOOD | changes)

    right, piece = post().json()["choices"], driver._piece

    def failing(job, choice, sequence):
        if job.n == 2 and choice == 1 and sequence.steps == 2:
            raise KeyError("planted")
        return piece(job, choice, sequence)

    monkeypatch.setattr(driver, "_piece", failing)
    failed = post(n=2)
    assert failed.status_code == 500 and "KeyError" in failed.json()["error"]["message"]
    streamed = post(n=2, stream=True).text
    assert "sequence_failed" in streamed and "[DONE]" not in streamed
    assert post().json()["choices"] == right
    serving.until(serving.is_idle)


# Slow clients


def test_half_headers_time_out_and_trickled_ones_too():
    with Serving(head_seconds=0.3) as serving:
        began = time.monotonic()
        assert raw(serving, HEAD)[0].startswith(b"HTTP/1.1 408")
        assert raw(serving)[1]
        with socket.create_connection(("127.0.0.1", serving.port)) as slow:
            with contextlib.suppress(OSError):
                for byte in HEAD:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.02)
            assert time.monotonic() - began < 5
        # A second request on one connection has its own time.
        with socket.create_connection(("127.0.0.1", serving.port), timeout=5) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b'"open"' not in answer:
                answer += kept.recv(4096)
            time.sleep(0.5)
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            assert b" 408 " in kept.recv(4096)


def slow_clients(serving, kinds, count):
    """Connections of clients that never end what they began, or never read."""
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 100}).encode()
    whole = json.dumps({"model": "small", "prompt": "two", "max_tokens": 100, "n": 8, "logprobs": 5}).encode()
    starts = {
        "silent": b"",
        "half a line": b"POST /v1/ch",
        "half headers": HEAD + b"X-A: b\r\n",
        "half a body": HEAD + b"Content-Length: 100\r\n\r\n{",
        "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        "reads no stream": HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "reads no answer": HEAD.replace(b"chat/", b"") + b"Content-Length: %d\r\n\r\n" % len(whole) + whole,
        "keeps alive": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }
    opened = []
    for kind in kinds:
        for _ in range(count if kind[:5] != "reads" else 2):
            connection = socket.create_connection(("127.0.0.1", serving.port))
            connection.sendall(starts[kind])
            opened.append(connection)
    return opened


SLOW = ("silent", "half a line", "half headers", "half a body", "half a chunk", "keeps alive")
SLOW += ("reads no stream", "reads no answer")


@pytest.fixture(scope="module")
def crowded():
    with Serving(most_waiting=16) as server:
        yield server


# Catches: connections that wait without an end, and keep others out.
@pytest.mark.parametrize("kind", SLOW)
def test_an_ordinary_client_is_answered_beside_slow_ones(crowded, kind):
    opened = slow_clients(crowded, [kind], 60)
    try:
        for _ in range(3):
            began = time.perf_counter()
            with httpx.Client(base_url=crowded.url, verify=False) as newcomer:
                assert newcomer.get("/health").status_code == 200
                assert newcomer.post("/v1/chat/completions", json=GOOD, timeout=30).status_code == 200
            assert time.perf_counter() - began < 5
        assert len(crowded.uvicorn.server_state.connections) <= 16 + 4
    finally:
        for connection in opened:
            connection.close()
    crowded.until(crowded.is_idle)


@pytest.mark.slow
def test_thousands_of_half_open_connections_keep_nobody_out():
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 8192:
        pytest.skip(f"needs 8192 open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, hard))
    with Serving(most_waiting=512) as serving:
        opened = slow_clients(serving, ["half headers"], 2600)
        try:
            assert all(ask(serving) == 200 for _ in range(5))
            assert serving.pool.closed >= 2000
        finally:
            for connection in opened:
                connection.close()


def test_a_client_that_reads_no_answer_is_disconnected():
    with Serving(write_seconds=0.3) as serving:
        serving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps({"model": "small", "prompt": "two", "max_tokens": 100, "n": 16, "logprobs": 20}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", serving.port))
            slow.sendall(HEAD.replace(b"chat/", b"") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            serving.until(lambda: serving.uvicorn.server_state.tasks, 30)
            serving.until(lambda: not serving.uvicorn.server_state.tasks, 30)
            serving.until(lambda: not serving.uvicorn.server_state.connections, 30)


# Large requests


def bodies():
    """Requests that cost much to parse, check or encode."""
    million = b"1," * 1_000_000 + b"1"
    return {
        "ids": b'{"model": "small", "max_tokens": 1, "prompt": [' + million + b"]}",
        "lists": b'{"model": "small", "max_tokens": 1, "prompt": [' + b"[]," * 1_000_000 + b"[]]}",
        "fewer ids": b'{"model": "small", "max_tokens": 1, "prompt": [' + b"1," * 100_000 + b"1]}",
        "text": json.dumps({"model": "small", "max_tokens": 1, "prompt": "two three é " * 200_000}).encode(),
        "one word": json.dumps({"model": "small", "max_tokens": 1, "prompt": "x" * 2_000_000}).encode(),
        "bias": json.dumps(
            {"model": "small", "prompt": "x", "logit_bias": {str(i): 1 for i in range(100_000)}}
        ).encode(),
    }


@pytest.mark.parametrize("kind", bodies())
def test_health_is_answered_beside_large_requests(serving, kind):
    body, answers = bodies()[kind], []

    def send():
        answers.append(httpx.post(serving.url + "/v1/completions", content=body, timeout=60).status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    waits = []
    with httpx.Client(base_url=serving.url) as client:
        client.get("/health")
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            began = time.perf_counter()
            assert client.get("/health").status_code == 200
            waits.append(time.perf_counter() - began)
    assert set(answers) <= {400, 413} and len(answers) == 4
    # Its clients share the interpreter with the server here, and other programs the machine.
    assert sorted(waits)[len(waits) // 2] < 0.1 and max(waits) < 1.0, max(waits)


# A browser

PAGE = """<script>
const url = "%s/v1/chat/completions", body = JSON.stringify(%s);
const tries = [{"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}];
const asked = tries.map(headers => fetch(url, {method: "POST", headers, body}));
asked.push(fetch(url, {method: "POST", mode: "no-cors", body}), fetch("%s/metrics"));
Promise.all(asked.map(x => x.then(r => r.type + r.status, () => "refused")))
  .then(got => { document.title = "done"; document.body.innerHTML = got.join(" "); });
</script><body>waiting</body>"""


@pytest.mark.slow
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_page_of_another_origin_gets_no_answer_in_chromium(tmp_path, is_allowed):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{pages.server_port}"
        with Serving(access={"origins": (origin,)} if is_allowed else None) as serving:
            (tmp_path / "index.html").write_text(PAGE % (serving.url, json.dumps(GOOD), serving.url))
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
            command += ["--virtual-time-budget=8000", "--dump-dom", origin + "/index.html"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            steps = serving.engine.steps
        pages.shutdown()
    assert "waiting" not in done.stdout, done.stdout + done.stderr[-2000:]
    if is_allowed:
        assert "cors200" in done.stdout and steps > 0
    else:
        assert "200" not in done.stdout and steps == 0, done.stdout
