"""The command `ledger`: lists, counts, exports and forgets calls, also while a run has the file open."""

import json
import shutil
import sqlite3
import sys

import pytest
from asking import Echo, ask, responses

from wizard_engine import __main__ as command
from wizard_engine.agents import Ledger, Reply, ledger_report, prompts, replies, request_key
from wizard_engine.agents.ledger import Stored

FIELDS = {"criteria": "math", "instruction": "What is 2 + 3?", "answer": "5\x1b[2J", "question": "What is 2 + 3?"}


def stored(ledger, text, task="judge", row="", agent="m@h", **reply):
    fields = prompts.load_template("judge").fields
    request = ask(prompts.render("judge", **{name: FIELDS.get(name, name) for name in fields}), task=task)
    request = request.__class__(task, request.messages, seed=len(text), row=row)
    key = request_key("f1", request)
    ledger.store([Stored(agent, "f1", key, request, Reply(text, **reply))])
    return key


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(replies, "read_reply", lambda task, text, fields: "[[" in text or None, raising=False)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    stored(ledger, "fine [[7]] [[4]]", row="r1", tokens_in=300, tokens_out=20, seconds=1.5)
    stored(ledger, "I cannot\nsay \x1b[2Jwhich \u202e", row="r1", tokens_in=300, tokens_out=40, seconds=0.5)
    stored(ledger, "half of [[", row="r2", finish="length")
    stored(ledger, "x" * 500, task="answer", row="r2", agent="other")
    stored(ledger, "", error="status 400: too long", row="r2", tokens_in=9)
    yield ledger
    ledger.close()


def run(tmp_path, capsys, *options, path=None):
    """Status, lines and error line of the command."""
    arguments = ["wizard_engine", "ledger", str(path or tmp_path / "ledger.sqlite"), *map(str, options)]
    before, sys.argv = sys.argv, arguments
    try:
        status = command.main()
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.strip()


def test_calls_stand_one_in_a_line_and_then_their_numbers(tmp_path, capsys, ledger):
    status, lines, error = run(tmp_path, capsys)
    assert (status, error, len(lines)) == (0, "", 6)
    assert lines[0].endswith("  m@h  judge  r1  stop  300+20 tokens  fine [[7]] [[4]]")
    assert lines[1].endswith("I cannot\\nsay \\x1b[2Jwhich \\u202e") and "\x1b" not in "".join(lines)
    assert "  m@h  judge  r2  length  0+0 tokens  half of [[" in lines[2]
    assert lines[3].endswith("  " + "x" * 60 + "...") and "  other  answer  r2  stop  " in lines[3]
    counts = "3 replies, 1 cut, 1 unreadable, 1 failed, tokens 609 in 60 out, 0.67 s a call"
    assert lines[4] == f"m@h  judge  {counts}"
    assert lines[5].startswith("other  answer  1 replies, 0 cut, 0 unreadable, 0 failed")
    key = lines[0].split()[0]
    assert key in {call.key.hex()[:12] for call in ledger.calls()}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--task", "answer"), ["xxx"]),
        (("--agent", "m@h", "--row", "r2"), ["half"]),
        (("--row", "r1"), ["fine", "I cannot"]),
        (("--unreadable",), ["I cannot"]),
        (("--unreadable", "--task", "answer"), []),
        (("--failures",), ["status 400"]),
        (("--failures", "--task", "answer"), []),
        (("--agent", "nobody"), []),
    ],
)
def test_calls_are_chosen(tmp_path, capsys, ledger, options, shown):
    status, lines, _ = run(tmp_path, capsys, *options)
    calls = [line for line in lines if " tokens  " in line]
    assert status == 0 and len(calls) == len(shown) and all(text in line for text, line in zip(shown, calls))


# Catches: silence after a misspelt name.
def test_a_choice_of_no_call_is_said(tmp_path, capsys, ledger):
    status, (line,), _ = run(tmp_path, capsys, "--task", "jugde", "--row", "r\x1b9")
    assert status == 0 and "\x1b" not in line
    assert line == r"no call of task=jugde, row=r\x1b9; the ledger holds m@h (judge), other (answer)"


def test_calls_are_exported_as_json_lines(tmp_path, capsys, ledger):
    status, lines, _ = run(tmp_path, capsys, "--export", tmp_path / "out" / "calls.jsonl", "--row", "r1")
    objects = [json.loads(line) for line in (tmp_path / "out" / "calls.jsonl").read_text().splitlines()]
    assert status == 0 and len(lines) == 1 and len(objects) == 2
    for found, call in zip(objects, ledger.calls(row="r1")):
        assert found["key"] == call.key.hex() and found["text"] == call.text and found["row"] == "r1"
        assert found["messages"] == [message._asdict() for message in call.request.messages]
        assert (found["tokens_in"], found["seconds"], found["error"]) == (300, call.reply.seconds, None)
    status, _, _ = run(tmp_path, capsys, "--failures", "--export", tmp_path / "failed.jsonl")
    (failed,) = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert failed["error"] == "status 400: too long" and failed["tokens_in"] == 9


# Catches: replies that nobody can read, and that are served for ever.
def test_forgotten_replies_are_asked_for_again(tmp_path, capsys, ledger):
    echo, requests = Echo(), [ask("a"), ask("b"), ask("a", task="user")]
    responses(echo, requests, ledger)
    status, lines, _ = run(tmp_path, capsys, "--agent", "echo", "--task", "answer", "--forget")
    assert status == 0 and lines[-1] == "2 replies removed; the same command of the recipe asks for them again"
    responses(echo, requests, ledger)
    assert echo.batches == [["a", "b", "a"], ["a", "b"]]
    _, lines, _ = run(tmp_path, capsys, "--unreadable", "--forget")
    assert "I cannot" in lines[0] and lines[-1].startswith("1 replies removed")
    assert len(list(ledger.calls(agent="m@h"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--forget",), "--forget: expected --agent, --task, --row or --unreadable beside it, got none"),
        (("--failures", "--forget", "--task", "judge"), "--forget: expected replies, got --failures beside it"),
        (("--failures", "--unreadable"), "--unreadable: expected replies, got --failures beside it"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, capsys, ledger, options, message):
    status, lines, error = run(tmp_path, capsys, *options)
    assert (status, lines) == (1, []) and error.startswith(f"ledger: error: {message}") and "\n" not in error
    assert len(list(ledger.calls())) == 4
    with pytest.raises(SystemExit):
        run(tmp_path, capsys, "--unreadble")
    assert "--unreadble: expected a known option" in capsys.readouterr().err


def test_files_that_are_no_ledgers_are_named_and_none_is_made(tmp_path, capsys, ledger):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 500)
    sqlite3.connect(tmp_path / "foreign.sqlite").execute("CREATE TABLE mine (x)")
    for name, message in {
        "none.sqlite": "none.sqlite: expected a file, got none; give the ledger.sqlite of a run",
        "rows.jsonl": "rows.jsonl: expected a SQLite ledger",
        "foreign.sqlite": "foreign.sqlite: expected a ledger of version 3 or earlier",
    }.items():
        status, lines, error = run(tmp_path, capsys, path=tmp_path / name)
        assert (status, lines) == (1, []) and message in error and error.startswith("ledger: error: ")
    assert not (tmp_path / "none.sqlite").exists()
    status, lines, _ = run(tmp_path, capsys, path=tmp_path)
    assert status == 0 and len(lines) == 6
    _, _, error = run(tmp_path, capsys, path=tmp_path / "\x1b[2J")
    assert "\x1b" not in error
    status, _, error = run(tmp_path, capsys, "--export", tmp_path / "ledger.sqlite")
    assert status == 1 and "--export: expected another file, got the ledger itself" in error


def test_reading_changes_nothing_and_waits_for_nobody(tmp_path, capsys, ledger):
    writer = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM replies")
    status, lines, _ = run(tmp_path, capsys)
    assert status == 0 and len(lines) == 6
    writer.execute("ROLLBACK")
    writer.close()
    reader = Ledger(tmp_path / "ledger.sqlite", read_only=True)
    with pytest.raises(OSError, match="not written"):
        reader.forget([next(iter(ledger.calls())).key])
    reader.close()
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "copy of it.sqlite")
    assert run(tmp_path, capsys, path=tmp_path / "copy of it.sqlite")[0] == 0


def test_a_reply_is_read_by_its_task(tmp_path, monkeypatch, ledger):
    asked = []
    monkeypatch.setattr(replies, "read_reply", lambda *arguments: asked.append(arguments))
    calls = list(ledger.calls())
    assert [ledger_report.is_readable(call) for call in calls] == [False, False, False, True]
    task, text, fields = asked[0]
    assert (task, text) == ("judge", "fine [[7]] [[4]]") and set(fields) == set(prompts.load_template("judge").fields)
