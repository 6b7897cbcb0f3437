"""A ledger of every call to an agent, so that no successful call is made twice.

SQLite in write-ahead mode. The key of a reply is the content of its request and the fingerprint of its agent. Each
batch is one transaction, on disk before the batch is returned. Failed calls are stored in a separate table, counted and
never served. Several processes may share a ledger: if two of them ask the same, both serve the reply that was stored
first.
"""

import hashlib
import json
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from wizard_engine.data.records import Message
from wizard_engine.runtime.metrics import progress

from .protocol import Agent, Reply, Request

_VERSION = 1
_APPLICATION = 0x57495A4C
_KEYS_PER_QUERY = 500
_SCHEMA = """
CREATE TABLE replies (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, agent TEXT NOT NULL, fingerprint TEXT NOT NULL,
    task TEXT NOT NULL, messages BLOB NOT NULL, seed INTEGER NOT NULL, temperature REAL NOT NULL,
    max_tokens INTEGER NOT NULL, text TEXT NOT NULL
);
CREATE TABLE failures (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL, agent TEXT NOT NULL, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    error TEXT NOT NULL
);
"""
# Of replies that did not end by themselves; ledgers from before it have none.
_MARKS = "CREATE TABLE IF NOT EXISTS marks (key BLOB PRIMARY KEY, finish TEXT NOT NULL)"


class Call(NamedTuple):
    """One stored call: agent, request and reply."""

    agent: str
    fingerprint: str
    request: Request
    text: str


def request_key(fingerprint: str, request: Request) -> bytes:
    """SHA-256 of everything a reply may depend on: the agent's fingerprint and the whole request."""
    content = [
        fingerprint,
        request.task,
        [list(message) for message in request.messages],
        request.seed,
        float(request.temperature),
        request.max_tokens,
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()


class Ledger:
    """The calls of all agents that share one file.

    Args:
        path: SQLite file; created with its folder if it does not exist.
        timeout_seconds: longest wait for the write of another process.
    Raises:
        ValueError: the file is no ledger, or one of another version.
    """

    def __init__(self, path: Path | str, *, timeout_seconds: float = 60.0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self.path, timeout=timeout_seconds, isolation_level=None)
        try:
            self._enter_wal(timeout_seconds)
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"ledger {self.path}: expected a SQLite ledger, got {error}; give another path") from None

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The stored replies of the keys that have one."""
        return self._select("SELECT key, text FROM replies", keys)

    def marks(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """How the stored replies ended, where not by themselves: "length"."""
        return self._select("SELECT key, finish FROM marks", keys)

    def _select(self, query: str, keys: Sequence[bytes]) -> dict[bytes, str]:
        stored: dict[bytes, str] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            stored.update(self._database.execute(f"{query} WHERE key IN ({marks})", part))
        return stored

    def store(self, agent: Agent, keys: Sequence[bytes], requests: Sequence[Request], replies: Sequence[Reply]) -> None:
        """Writes the replies of a batch in one transaction; it is on disk on return."""
        who = (agent.name, agent.fingerprint)
        succeeded, failed = [], []
        marks = [(key, reply.finish) for key, reply in zip(keys, replies) if reply.is_cut]
        for key, request, reply in zip(keys, requests, replies, strict=True):
            if reply.ok:
                succeeded.append((key, *who, request.task, _pack(request.messages), *_settings(request), reply.text))
            else:
                failed.append((key, *who, request.task, reply.error))
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            # A reply that another process stored first keeps its own mark.
            known = self.lookup([key for key, _ in marks])
            marks = [mark for mark in marks if mark[0] not in known]
            database.executemany("INSERT OR IGNORE INTO marks VALUES (?,?)", marks)
            database.executemany("INSERT OR IGNORE INTO replies VALUES (NULL,?,?,?,?,?,?,?,?,?)", succeeded)
            database.executemany("INSERT INTO failures (key,agent,fingerprint,task,error) VALUES (?,?,?,?,?)", failed)
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """agent -> task -> {"replies": stored calls, "failures": failed calls}, over the life of the file."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for table in ("replies", "failures"):
            query = f"SELECT agent, task, COUNT(*) FROM {table} GROUP BY agent, task ORDER BY agent, task"
            for agent, task, number in self._database.execute(query):
                counts.setdefault(agent, {}).setdefault(task, {"replies": 0, "failures": 0})[table] = number
        return counts

    def errors(self) -> dict[str, int]:
        """Error text -> number of failed calls with it."""
        return dict(self._database.execute("SELECT error, COUNT(*) FROM failures GROUP BY error ORDER BY error"))

    def calls(self, *, agent: str | None = None, task: str | None = None) -> Iterator[Call]:
        """Yields the stored calls, optionally of one agent or task, in the order they were stored."""
        query = (
            "SELECT agent, fingerprint, task, messages, seed, temperature, max_tokens, text FROM replies"
            " WHERE agent = COALESCE(?1, agent) AND task = COALESCE(?2, task) ORDER BY number"
        )
        for name, fingerprint, task_, messages, *settings, text in self._database.execute(query, (agent, task)):
            yield Call(name, fingerprint, Request(task_, _unpack(messages), *settings), text)

    def close(self) -> None:
        """Closes the file; no further calls are possible."""
        self._database.close()

    def _enter_wal(self, timeout_seconds: float) -> None:
        """Switch to write-ahead mode. SQLite's own timeout does not cover this switch, so it is retried here."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")
        try:
            self._create_or_check()
            database.execute(_MARKS)
        finally:
            if database.in_transaction:
                database.execute("COMMIT")

    def _create_or_check(self) -> None:
        database = self._database
        has_tables = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not has_tables:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
            return
        marks = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if marks != [_APPLICATION, _VERSION]:
            raise ValueError(
                f"ledger {self.path}: expected a ledger of version {_VERSION}, got another SQLite file {marks};"
                " give another path"
            )


class LedgeredAgent:
    """An agent that asks only for what its ledger lacks, with a progress bar on stderr.

    Equal requests are asked once, in batches of `batch_size`. Batches are cut before stored requests are skipped, so
    that a resumed run asks for the same batches as an uninterrupted one.

    An agent with a reason in `ended` (its budget is spent, or its endpoint is down) ends the run with that reason.

    Args:
        batch_size: calls of one transaction.
        quiet: no progress bar.

    Attributes:
        served: task -> replies returned without a call, in this process.
        asked: task -> calls made, in this process.
    """

    def __init__(self, agent: Agent, ledger: Ledger, *, batch_size: int = 256, quiet: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}; give the calls of one transaction")
        self.agent, self.ledger, self.batch_size, self.quiet = agent, ledger, batch_size, quiet
        self.name, self.fingerprint = agent.name, agent.fingerprint
        self.served: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, from the ledger if stored, else from the agent."""
        keys = [request_key(self.fingerprint, request) for request in requests]
        unique = dict(zip(keys, requests))
        order, replies = list(unique), {}
        tasks = "+".join(dict.fromkeys(request.task for request in requests))
        with progress(desc=f"{tasks} {self.name}", unit="call", total=len(order), quiet=self.quiet) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = {key: unique[key] for key in order[start : start + self.batch_size]}
                replies.update(self._batch(batch))
                bar.update(len(batch))
        self.served.update(request.task for request in requests)
        return [replies[key] for key in keys]

    def _batch(self, batch: dict[bytes, Request]) -> dict[bytes, Reply]:
        replies = self._stored(list(batch))
        missing = [key for key in batch if key not in replies]
        if missing:
            replies.update(self._ask(missing, [batch[key] for key in missing]))
        return replies

    def _ask(self, keys: list[bytes], requests: list[Request]) -> dict[bytes, Reply]:
        replies = self.agent.respond(requests)
        if len(replies) != len(requests):
            raise ValueError(
                f"agent {self.name}: expected {len(requests)} replies, got {len(replies)}; return one a request"
            )
        self.ledger.store(self.agent, keys, requests, replies)
        ended = getattr(self.agent, "ended", "")
        if ended:
            raise ValueError(
                f"agent {self.name}: {ended}; what came is in the ledger, and the same command goes on from there"
            )
        self.asked.update(request.task for request in requests)
        self.served.subtract(request.task for request in requests)
        first = self._stored([key for key, reply in zip(keys, replies) if reply.ok])
        return {key: first.get(key, reply) for key, reply in zip(keys, replies)}

    def _stored(self, keys: list[bytes]) -> dict[bytes, Reply]:
        """The replies of the ledger, as they ended."""
        marks = self.ledger.marks(keys)
        return {key: Reply(text, finish=marks.get(key, "stop")) for key, text in self.ledger.lookup(keys).items()}


def _settings(request: Request) -> tuple[int, float, int]:
    return request.seed, request.temperature, request.max_tokens


def _pack(messages: Sequence[Message]) -> bytes:
    return zlib.compress(json.dumps(messages, ensure_ascii=False).encode(), 1)


def _unpack(blob: bytes) -> tuple[Message, ...]:
    return tuple(Message(*message) for message in json.loads(zlib.decompress(blob)))
