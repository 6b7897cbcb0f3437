"""Damage of a ledger: an error that names the file and says what to do, or the same replies and counts."""

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from wizard_engine.agents import Ledger, LedgeredAgent, Reply, Request
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
    LedgeredAgent(Same(), ledger, quiet=True).respond(REQUESTS)
    ledger.close()
    assert not path.with_name(path.name + "-wal").exists()
    return path


def read_back(path: Path) -> list:
    """Stored calls, counts and errors, and the replies of a run with this ledger."""
    ledger = Ledger(path)
    try:
        agent = LedgeredAgent(Same(), ledger, quiet=True)
        replies = [reply.text for reply in agent.respond(REQUESTS) if reply.ok]
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
    agent = LedgeredAgent(Same(), ledger, quiet=True)
    assert agent.respond(REQUESTS[:3])[0].text == "reply to question 0  " * 3
    with pytest.raises(ValueError, match=r"ledger .*l\.sqlite: .*damaged.*the same command asks for its replies again"):
        agent.respond(REQUESTS)
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


def test_ledger_of_the_former_version_is_given_checksums_with_a_line(tmp_path, capsys):
    path = written(tmp_path / "l.sqlite")
    expected = read_back(path)
    database = sqlite3.connect(path)
    with database:
        for table in ("replies", "failures"):
            database.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
        database.execute("ALTER TABLE replies DROP COLUMN finish")
        database.execute("PRAGMA user_version = 1")
    database.close()
    capsys.readouterr()
    assert read_back(path)[0] == expected[0]
    assert "l.sqlite: of version 1, without checksums; its rows are taken as they are" in capsys.readouterr().err
    ledger = Ledger(path)
    assert capsys.readouterr().err == "" and len(list(ledger.calls())) == len(expected[3])
    ledger.close()


def test_ledger_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a file, got another kind of entry"):
            Ledger(path)
