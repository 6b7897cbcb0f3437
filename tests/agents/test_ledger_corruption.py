"""Damage of a ledger: an error that names the file and says what to do, or the same replies and counts."""

import os
import random
import shutil
import sqlite3
import zlib
from pathlib import Path

import pytest
from asking import responses

from wizard_engine.agents import Ledger, Reply, Request, request_key
from wizard_engine.agents.ledger import Stored
from wizard_engine.data.records import Message

COUNTS = [10, pytest.param(20, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.soak)]
CALLS = 150


class Same:
    """Gives the same reply to the same request; fails where the request says so."""

    name = fingerprint = "same"

    def respond(self, requests):
        texts = [request.messages[-1].content for request in requests]
        return [Reply("", error="timed out") if "fail" in t else Reply(f"reply to {t} " * 3) for t in texts]


REQUESTS = [
    Request(f"task {n % 3}", (Message("user", f"question {n} {'fail' if n % 40 == 7 else ''}"),), seed=n)
    for n in range(CALLS)
]


def written(path: Path) -> Path:
    ledger = Ledger(path)
    responses(Same(), REQUESTS, ledger)
    ledger.close()
    assert not path.with_name(path.name + "-wal").exists()
    return path


def read_back(path: Path) -> list:
    """Stored calls, counts and errors, and the replies of a run with this ledger."""
    ledger = Ledger(path)
    try:
        replies = [reply.text for reply in responses(Same(), REQUESTS, ledger) if reply.ok]
        return [replies, ledger.counts(), ledger.errors(), list(ledger.calls())]
    finally:
        ledger.close()


def damage(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "bit", "bit", "bytes", "page", "swapped pages", "cut", "row"])
    page = 4096
    pages = len(content) // page
    at = rng.randrange(len(content))
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        content[at : at + 16] = rng.randbytes(min(16, len(content) - at))
    elif kind == "page":
        start = page * rng.randrange(1, pages)
        content[start : start + page] = rng.choice([bytes(page), rng.randbytes(page)])
    elif kind == "swapped pages":
        a, b = (page * n for n in rng.sample(range(1, pages), 2))
        content[a : a + page], content[b : b + page] = content[b : b + page], content[a : a + page]
    elif kind == "cut":
        del content[max(page, at) :]
    path.write_bytes(bytes(content))
    if kind == "row":
        change_row(path, rng)
    return kind


def change_row(path: Path, rng: random.Random) -> None:
    """A value of a stored row is another one, in a file that SQLite finds whole."""
    change = rng.choice(
        [
            "UPDATE replies SET text = text || '.' WHERE number = ?",
            "UPDATE replies SET task = 'task 9' WHERE number = ?",
            "UPDATE replies SET agent = 'other' WHERE number = ?",
            "UPDATE replies SET checksum = checksum + 1 WHERE number = ?",
            "UPDATE replies SET text = X'ff00' WHERE number = ?",
            "UPDATE replies SET messages = X'00' WHERE number = ?",
            "UPDATE replies SET seed = seed + 1 WHERE number = ?",
            "UPDATE failures SET error = 'other' WHERE number = 1 + ? % 2",
        ]
    )
    database = sqlite3.connect(path)
    with database:
        assert database.execute(change, (rng.randrange(1, 100),)).rowcount == 1
    database.close()


def attack(whole: Path, copy: Path, seed: int, expected: list) -> str:
    for name in (copy.name, copy.name + "-wal", copy.name + "-shm"):
        copy.with_name(name).unlink(missing_ok=True)
    shutil.copy(whole, copy)
    kind = damage(copy, random.Random(seed))
    try:
        value = read_back(copy)
    except (ValueError, OSError) as error:
        return "refused" if str(copy) in str(error) else f"seed {seed}, {kind}: file not named: {error}"
    return "same" if value == expected else f"seed {seed}, {kind}: other values in silence"


# Catches: a reply, a count or an error that a flipped bit has changed; rows that a damaged page hides; SQLite's errors.
@pytest.mark.parametrize("count", COUNTS)
def test_damage_of_a_ledger_is_named_or_changes_nothing(tmp_path, count):
    whole = written(tmp_path / "whole.sqlite")
    shutil.copy(whole, tmp_path / "fresh.sqlite")
    expected = read_back(tmp_path / "fresh.sqlite")
    outcomes = [attack(whole, tmp_path / "copy.sqlite", seed, expected) for seed in range(count)]
    assert [outcome for outcome in outcomes if outcome not in ("refused", "same")] == []
    assert "refused" in outcomes


@pytest.mark.parametrize(
    "change",
    [
        "text = text || '.'",
        "task = 'x'",
        "agent = 'x'",
        "text = X'ff'",
        "checksum = 0",
        "finish = 'length'",
        "reasoning = 'hm'",
        "tokens_in = 7",
        "seconds = 7",
        "row = 'x'",
        "options = '{}'",
        "messages = X'00'",
        "seed = -1",
    ],
)
def test_changed_row_is_named_with_what_to_do(tmp_path, change):
    path = written(tmp_path / "l.sqlite")
    database = sqlite3.connect(path)
    with database:
        database.execute(f"UPDATE replies SET {change} WHERE number = 5")
    database.close()
    ledger = Ledger(path)
    with pytest.raises(ValueError, match=r"ledger .*l\.sqlite: .*damaged.*the same command asks for its replies again"):
        list(ledger.calls())
    ledger.close()


# Catches: a reply that is served without a look at its checksum.
@pytest.mark.parametrize("change", ["text = text || '.'", "text = X'ff'", "agent = 'x'", "checksum = 0"])
def test_changed_reply_is_not_served(tmp_path, change):
    path = written(tmp_path / "l.sqlite")
    database = sqlite3.connect(path)
    with database:
        database.execute(f"UPDATE replies SET {change} WHERE number = 5")
    database.close()
    ledger = Ledger(path)
    assert responses(Same(), REQUESTS[:3], ledger)[0].text == "reply to question 0  " * 3
    with pytest.raises(ValueError, match=r"ledger .*l\.sqlite: .*damaged.*the same command asks for its replies again"):
        responses(Same(), REQUESTS, ledger)
    ledger.close()


# Catches: rows that SQLite itself does not miss, for a page says that it has fewer.
@pytest.mark.parametrize("read", [Ledger.counts, lambda ledger: list(ledger.calls())])
def test_rows_that_a_damaged_page_hides_are_missed(tmp_path, read):
    content = written(tmp_path / "whole.sqlite").read_bytes()
    leaves = [at for at in range(4096, len(content), 4096) if content[at] == 13 and content[at + 4] > 1]
    assert len(leaves) > 2
    for number, at in enumerate(leaves):
        damaged = bytearray(content)
        damaged[at + 4] -= 1
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(damaged)
        ledger = Ledger(path)
        with pytest.raises(ValueError, match=r"ledger .*\.sqlite: damaged \(.*move it away"):
            read(ledger)
        ledger.close()


VERSION_2 = """
CREATE TABLE replies (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, agent TEXT NOT NULL, fingerprint TEXT NOT NULL,
    task TEXT NOT NULL, messages BLOB NOT NULL, seed INTEGER NOT NULL, temperature REAL NOT NULL,
    max_tokens INTEGER NOT NULL, text TEXT NOT NULL, checksum INTEGER NOT NULL DEFAULT -1,
    finish TEXT NOT NULL DEFAULT 'stop'
);
CREATE TABLE failures (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL, agent TEXT NOT NULL, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    error TEXT NOT NULL, checksum INTEGER NOT NULL DEFAULT -1
);
"""


def of_version(path: Path, version: int) -> Path:
    """A ledger as an earlier version wrote it, with the replies and failures of a present one; two were cut."""
    now = sqlite3.connect(written(path.with_name("now.sqlite")))
    replies = now.execute("SELECT * FROM replies").fetchall()
    failures = now.execute("SELECT * FROM failures").fetchall()
    now.close()
    database = sqlite3.connect(path)
    with database:
        database.executescript(VERSION_2)
        for row in replies:
            number, key, agent, _, task, *_ = row
            cut = number in (3, 9) and version == 2
            proof = zlib.crc32(f"{agent}\0{task}\0{row[9]}{chr(0) + 'length' if cut else ''}".encode(), zlib.crc32(key))
            values = (*row[:10], proof, "length" if cut else "stop")
            database.execute(f"INSERT INTO replies VALUES ({','.join('?' * 12)})", values)
        database.executemany("INSERT INTO failures VALUES (?,?,?,?,?,?,?)", [row[:7] for row in failures])
        if version == 1:
            for table in ("replies", "failures"):
                database.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
            database.execute("ALTER TABLE replies DROP COLUMN finish")
        database.execute("PRAGMA application_id = 0x57495a4c")
        database.execute(f"PRAGMA user_version = {version}")
    database.close()
    return path


# Catches: rows that a change of version loses, or columns that come to stand in another order and are filled wrongly.
@pytest.mark.parametrize("version", [1, 2])
def test_ledger_of_a_former_version_has_equal_rows_and_takes_new_ones(tmp_path, capsys, version):
    path = of_version(tmp_path / "l.sqlite", version)
    expected = read_back(tmp_path / "now.sqlite")
    capsys.readouterr()
    replies, counts, errors, calls = read_back(path)
    assert (replies, errors) == (expected[0], expected[2] if version == 2 else errors)
    assert {agent: sum(t["replies"] for t in tasks.values()) for agent, tasks in counts.items()} == {"same": 146}
    cut = {2, 8} if version == 2 else set()
    for place, (call, same) in enumerate(zip(calls, expected[3], strict=True)):
        assert call.request == same.request and call.text == same.text and call.key == same.key
        assert call.reply.is_cut == (place in cut)
    line = "l.sqlite: of version 1, without checksums; its rows are taken as they are"
    assert (line in capsys.readouterr().err) == (version == 1)
    ledger = Ledger(path)
    more = Request("task 0", (Message("user", "one more"),), top_p=0.5, schema="{}", row="r7")
    said = Reply("fine", finish="length", reasoning="hm", tokens_in=3, tokens_out=4, seconds=0.25)
    key = request_key("same", more)
    assert ledger.store([Stored("same", "same", key, more, said)])
    assert ledger.lookup([key]) == {key: said} and capsys.readouterr().err == ""
    (call,) = ledger.calls(row="r7")
    assert (call.request, call.request.row, call.reply) == (more, "r7", said)
    ledger.close()


@pytest.mark.parametrize("version", [0, 4])
def test_ledger_of_a_later_version_is_named(tmp_path, version):
    path = written(tmp_path / "l.sqlite")
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    with pytest.raises(
        ValueError, match=rf"ledger .*l\.sqlite: expected a ledger of version 3 or earlier, .*{version}"
    ):
        Ledger(path)


def test_ledger_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a file, got another kind of entry"):
            Ledger(path)
