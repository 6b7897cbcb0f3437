"""The ledger: nothing that returned is asked again, whatever happened in between; failures are counted, not kept."""

import hashlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from asking import Echo, ask, responses, texts
from forked import run_together

from wizard_engine.agents import Ledger, Reply, Request, Scheduler, replies, request_key
from wizard_engine.agents.ledger import Stored
from wizard_engine.data.records import Message


def test_ledger_serves_what_returned_and_asks_the_rest_in_order(tmp_path):
    echo, ledger = Echo(), Ledger(tmp_path / "deep" / "ledger.sqlite")
    run = Scheduler(ledger, batch_size=2, quiet=True)
    assert texts(run.run(run.each(echo, [ask("a"), ask("b"), ask("c")]))) == ["a/0/1", "b/0/1", "c/0/2"]
    again = run.run(run.each(echo, [ask("d"), ask("b"), ask("a"), ask("e")]))
    assert texts(again) == ["d/0/3", "b/0/1", "a/0/1", "e/0/3"]
    assert echo.batches == [["a", "b"], ["c"], ["d", "e"]]
    assert (run.asked["answer"], run.served["answer"]) == (5, 2)


def test_ledger_asks_equal_requests_once(tmp_path):
    echo = Echo()
    replies = responses(echo, [ask("a"), ask("b"), ask("a")], Ledger(tmp_path / "l.sqlite"))
    assert texts(replies) == ["a/0/1", "b/0/1", "a/0/1"]
    assert echo.batches == [["a", "b"]]


def test_ledger_survives_closing(tmp_path):
    path, echo = tmp_path / "l.sqlite", Echo()
    first = Ledger(path)
    responses(echo, [ask("é中\n\u2028")], first)
    first.close()
    assert texts(responses(echo, [ask("é中\n\u2028")], Ledger(path))) == ["é中\n\u2028/0/1"]
    assert len(echo.batches) == 1


@pytest.mark.parametrize(
    "changed",
    [
        ask("b"),
        ask("a", seed=1),
        ask("a", task="user"),
        ask("a", temperature=0.5),
        ask("a", max_tokens=5),
        ask("a", top_p=0.5),
        ask("a", schema="{}"),
        Request("answer", (Message("system", "s"), Message("user", "a"))),
        Request("answer", (Message("assistant", "a"),)),
    ],
)
def test_key_covers_all_of_the_request(changed):
    assert request_key("1", ask("a")) != request_key("1", changed)


def test_key_is_that_of_earlier_releases_and_leaves_the_row_out():
    assert request_key("1", ask("a", row="r7")) == request_key("1", ask("a"))
    # Stored by a ledger of version 1.
    known = "e6103b07f2f79f91"
    assert request_key("1", ask("a")).hex().startswith(known)


def test_keys_with_options_and_schemas_are_those_of_earlier_releases():
    fields = {"answer_steps": "a\n\nb\nc", "instructions": "1. x\n2. y"}
    messages, digest = (Message("user", 'Ü\n"x"'), Message("assistant", "y")), hashlib.sha256()
    # The order of earlier releases, which had no other tasks.
    for task in (name for name in replies.READERS if name != "diagnose"):
        for top_p in (1.0, 0.9, 1):
            schema = replies.schema_of(task, fields)
            digest.update(request_key("f/1", Request(task, messages, 7, 0.5, 99, top_p, schema, "r")))
    assert digest.hexdigest()[:16] == "1d3c14c29168b1fe"


def test_key_covers_the_agent_and_not_its_name(tmp_path):
    ledger, other = Ledger(tmp_path / "l.sqlite"), Echo(fingerprint="2")
    responses(Echo(), [ask("a")], ledger)
    assert texts(responses(other, [ask("a")], ledger)) == ["a/0/1"]
    assert other.batches == [["a"]]
    renamed = Echo(name="another")
    responses(renamed, [ask("a")], ledger)
    assert renamed.batches == []


def test_failures_are_counted_but_never_served(tmp_path):
    ledger, echo = Ledger(tmp_path / "l.sqlite"), Echo()
    replies = responses(echo, [ask("a"), ask("fail"), ask("b", task="user")], ledger)
    assert [reply.ok for reply in replies] == [True, False, True]
    assert not responses(echo, [ask("fail")], ledger)[0].ok
    assert ledger.counts() == {"echo": {"answer": {"replies": 1, "failures": 2}, "user": {"replies": 1, "failures": 0}}}
    assert ledger.errors() == {"timed out": 2}
    echo.fail = ""
    assert texts(responses(echo, [ask("fail")], ledger)) == ["fail/0/3"]
    assert texts(responses(echo, [ask("fail")], ledger)) == ["fail/0/3"]


def test_ledger_shows_its_calls(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    request = ask("a", seed=7, temperature=1.0, max_tokens=9)
    responses(Echo(), [request, ask("b", task="user")], ledger)
    (call,) = ledger.calls(task="answer")
    assert (call.agent, call.fingerprint, call.request, call.text) == ("echo", "1", request, "a/7/1")
    assert len(list(ledger.calls(agent="echo"))) == 2
    assert list(ledger.calls(agent="nobody")) == []


def test_two_open_ledgers_serve_the_reply_that_was_stored_first(tmp_path):
    one, two = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "l.sqlite")

    class Late(Echo):
        concurrency, ended = 1, ""

        async def reply(self, request):
            key = request_key(self.fingerprint, request)
            one.store([Stored("echo", self.fingerprint, key, request, Reply("first"))])
            return Reply("late")

        async def aclose(self):
            pass

    assert texts(responses(Late(), [ask("a")], two)) == ["first"]
    assert texts(responses(Echo(), [ask("a")], one)) == ["first"]


def test_ledger_keeps_an_uncommitted_batch_out(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger, echo = Ledger(path), Echo()

    class Broken(Echo):
        def respond(self, requests):
            return [Reply("fine"), Reply(object())]

    with pytest.raises(sqlite3.Error):
        responses(Broken(), [ask("a"), ask("b")], ledger)
    assert ledger.counts() == {}
    assert texts(responses(echo, [ask("a")], ledger)) == ["a/0/1"]


def test_ledger_refuses_other_files(tmp_path):
    junk, foreign = tmp_path / "junk", tmp_path / "foreign.sqlite"
    junk.write_bytes(b"not a database, only text" * 100)
    with pytest.raises(ValueError, match=r"ledger .*junk: expected a SQLite ledger"):
        Ledger(junk)
    database = sqlite3.connect(foreign)
    database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(ValueError, match="expected a ledger of version 3 or earlier, got another SQLite file"):
        Ledger(foreign)


def test_scheduler_refuses_wrong_numbers(tmp_path):
    class Short(Echo):
        def respond(self, requests):
            return []

    ledger = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(ValueError, match="agent echo: expected 1 replies, got 0"):
        responses(Short(), [ask("a")], ledger)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        Scheduler(ledger, batch_size=0)


def test_a_ledger_that_another_process_keeps_is_named(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", timeout_seconds=0.1)
    other = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    message = r"ledger .*l\.sqlite: expected a turn to write, got database is locked: another process keeps it"
    with pytest.raises(OSError, match=message):
        Ledger(tmp_path / "l.sqlite", timeout_seconds=0.1)
    with pytest.raises(OSError, match=message):
        responses(Echo(), [ask("a")], ledger)
    other.execute("ROLLBACK")
    other.close()
    assert texts(responses(Echo(), [ask("a")], ledger)) == ["a/0/1"]


def test_a_full_disk_ends_the_run_and_the_same_run_goes_on(tmp_path):
    ledger, echo = Ledger(tmp_path / "l.sqlite"), Echo()
    assert len(responses(echo, [ask(f"q{number}") for number in range(20)], ledger)) == 20
    size = (tmp_path / "l.sqlite-wal").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=r"ledger .*l\.sqlite: not written .*what was stored before is intact"):
            responses(echo, [ask(f"q{number} " + "x" * 9000) for number in range(30)], ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    asked = len(echo.batches)
    assert (
        len(responses(echo, [ask(f"q{number}") for number in range(20)], ledger)) == 20 and len(echo.batches) == asked
    )
    assert responses(echo, [ask("q")], ledger)[0].ok


def test_a_sync_that_fails_names_the_ledger(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "l.sqlite")
    responses(Echo(), [ask("a")], ledger)

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"ledger .*l\.sqlite: not written \(.*Input/output error\); see that the disk"):
        ledger.sync()
    with pytest.raises(OSError, match="not written"):
        responses(Echo(), [ask("b")], ledger)


def test_ledger_adds_little_time(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    requests = [ask(f"{number} " + "word " * 200) for number in range(4_000)]
    start = time.process_time()
    responses(Echo(), requests, ledger)
    asked = time.process_time() - start
    responses(Echo(), requests, ledger)
    # 0.4 ms a call, on a slow machine; a commit a call or a scan of the file takes many times that.
    assert asked < 1.6 and time.process_time() - start < 2.4


OPENED = """
import sys
sys.path.insert(0, {root!r})
from wizard_engine.agents import Ledger, Reply, Request, Scheduler
from wizard_engine.data.records import Message

class Named:
    name = fingerprint = "named"
    def respond(self, requests):
        return [Reply(sys.argv[1]) for _ in requests]

run = Scheduler(Ledger({ledger!r}), batch_size=5, quiet=True)
replies = run.run(run.each(Named(), [Request("answer", (Message("user", str(n)),)) for n in range(200)]))
print("".join(reply.text for reply in replies))
"""


def test_processes_that_open_one_ledger_at_once_serve_the_same(tmp_path):
    script = OPENED.format(root=str(Path(__file__).parents[2]), ledger=str(tmp_path / "l.sqlite"))
    printed = set(run_together([("-c", script, name) for name in "abcd"]).stdout.split())
    assert len(printed) == 1 and len(printed.pop()) == 200


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from wizard_engine.agents import Ledger, Reply, Request, Scheduler
from wizard_engine.data.records import Message

class Slow:
    name, fingerprint = "slow", "1"
    def respond(self, requests):
        texts = [request.messages[-1].content for request in requests]
        time.sleep(0.02)
        with open({log!r}, "a") as log:
            log.write("".join(text + chr(10) for text in texts))
        return [Reply(text.upper()) for text in texts]

run = Scheduler(Ledger({ledger!r}), batch_size=7, quiet=True)
requests = [Request("answer", (Message("user", f"q{{n % 200}}"),)) for n in range(300)]
replies = run.run(run.each(Slow(), requests))
Path({out!r}).write_text(" ".join(reply.text for reply in replies))
"""


@pytest.mark.slow
def test_killed_run_repeats_no_returned_call(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("log", "ledger", "out")}
    script = KILLED.format(root=str(Path(__file__).parents[2]), **paths)
    command = [sys.executable, "-c", script]
    for delay in (0.15, 0.3):
        process = subprocess.Popen(command)
        wait_for_lines(tmp_path / "log", process, more=14)
        time.sleep(delay / 10)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    stored = sum(task["replies"] for task in Ledger(paths["ledger"]).counts()["slow"].values())
    before = len((tmp_path / "log").read_text().split())
    assert 0 < stored < 200
    subprocess.run(command, check=True)
    asked = (tmp_path / "log").read_text().split()
    assert len(asked) - before == 200 - stored
    assert before - stored <= 2 * 7
    assert (tmp_path / "out").read_text().split() == [f"Q{n % 200}" for n in range(300)]


def wait_for_lines(path, process, *, more):
    """Waits until the running process has appended `more` lines."""
    start = len(path.read_text().split()) if path.exists() else 0
    while process.poll() is None:
        if path.exists() and len(path.read_text().split()) >= start + more:
            return
        time.sleep(0.005)
