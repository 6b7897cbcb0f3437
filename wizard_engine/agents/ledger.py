"""A ledger of every call to an agent, so that no successful call is made twice.

SQLite in write-ahead mode. The key of a reply is the content of its request and the fingerprint of its agent. Each
batch is one transaction, on disk before the batch is returned. Failed calls are stored in a separate table, counted and
never served. Several processes may share a ledger: if two of them ask the same, both serve the reply that was stored
first. A row has a checksum, which every reader of it compares.
"""

import hashlib
import json
import os
import sqlite3
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from wizard_engine.data.records import Message
from wizard_engine.runtime.metrics import progress

from .protocol import Agent, Reply, Request

# 1 had no checksums, and did not say how a reply ended.
_VERSION = 2
_APPLICATION = 0x57495A4C
_KEYS_PER_QUERY = 500
_SCHEMA = """
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
_TABLES = {"replies": "text", "failures": "error"}
_ADVICE = (
    "move it away, and the same command asks for its replies again; or restore a copy; or let the program sqlite3 "
    "recover what it can: sqlite3 OLD .recover | sqlite3 NEW"
)
_NOT_WRITTEN = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
# json.dumps makes an encoder for every call that is not of its defaults.
_encode_content = json.JSONEncoder(separators=(",", ":")).encode
_encode_messages = json.JSONEncoder(ensure_ascii=False).encode
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


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
    return hashlib.sha256(_encode_content(content).encode()).digest()


def _checksum(key: bytes, agent: str, task: str, text: str, finish: str = "stop") -> int:
    """Of a row. The key itself is a checksum of the request and of the agent's fingerprint."""
    ending = "" if finish == "stop" else f"\0{finish}"
    return zlib.crc32(f"{agent}\0{task}\0{text}{ending}".encode(), zlib.crc32(key))


class Ledger:
    """The calls of all agents that share one file.

    A file of version 1, without checksums, is given them when it is opened, with a line on stderr.

    Args:
        path: SQLite file; created with its folder if it does not exist.
        timeout_seconds: longest wait for the write of another process.
    Raises:
        ValueError: the file is no ledger, one of another version, or damaged; so do all methods that read.
        OSError: the file cannot be written; so do all methods.
    """

    def __init__(self, path: Path | str, *, timeout_seconds: float = 60.0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ValueError(f"ledger {self.path}: expected a file, got another kind of entry; give another path")
        with self._naming_errors():
            self._database = sqlite3.connect(self.path, timeout=timeout_seconds, isolation_level=None)
        try:
            with self._naming_errors():
                self._enter_wal(timeout_seconds)
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """The stored replies of the keys that have one."""
        stored: dict[bytes, Reply] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            slots = ",".join("?" * len(part))
            query = f"SELECT key, agent, task, text, finish, checksum FROM replies WHERE key IN ({slots})"
            with self._naming_errors():
                for key, agent, task, text, finish, checksum in self._database.execute(query, part):
                    if _checksum(key, agent, task, text, finish) != checksum:
                        raise self._damage("replies", f"of key {key.hex()[:16]}")
                    stored[key] = Reply(text, finish=finish)
        return stored

    def store(self, agent: Agent, keys: Sequence[bytes], requests: Sequence[Request], replies: Sequence[Reply]) -> bool:
        """Writes the replies of a batch in one transaction; it is on disk on return.

        Returns:
            Whether none of them was stored before, by another process.
        """
        who = (agent.name, agent.fingerprint)
        succeeded, failed = [], []
        for key, request, reply in zip(keys, requests, replies, strict=True):
            text = reply.text if reply.ok else reply.error
            finish = reply.finish if reply.ok else "stop"
            checksum = _checksum(key, agent.name, request.task, text, finish)
            if reply.ok:
                settings = _settings(request)
                succeeded.append((key, *who, request.task, _pack(request.messages), *settings, text, checksum, finish))
            else:
                failed.append((key, *who, request.task, text, checksum))
        with self._naming_errors(), self._transaction():
            database = self._database
            slots = ",".join("?" * 11)
            stored = database.executemany(f"INSERT OR IGNORE INTO replies VALUES (NULL,{slots})", succeeded)
            database.executemany("INSERT INTO failures VALUES (NULL,?,?,?,?,?,?)", failed)
        return not succeeded or stored.rowcount == len(succeeded)

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """agent -> task -> {"replies": stored calls, "failures": failed calls}, over the life of the file."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for table in _TABLES:
            found = Counter((agent, task) for agent, task, _ in self._rows(table))
            for (agent, task), number in sorted(found.items()):
                counts.setdefault(agent, {}).setdefault(task, {"replies": 0, "failures": 0})[table] = number
        return counts

    def errors(self) -> dict[str, int]:
        """Error text -> number of failed calls with it."""
        return dict(sorted(Counter(error for _, _, error in self._rows("failures")).items()))

    def _rows(self, table: str) -> Iterator[tuple[str, str, str]]:
        """Agent, task and text or error of every row of a table, each of them compared with its checksum."""
        finish = "finish" if table == "replies" else "'stop'"
        query = f"SELECT number, key, agent, task, {_TABLES[table]}, {finish}, checksum FROM {table} ORDER BY number"
        with self._naming_errors():
            self._check_structure()
            for number, key, agent, task, text, finish, checksum in self._database.execute(query):
                if _checksum(key, agent, task, text, finish) != checksum:
                    raise self._damage(table, number)
                yield agent, task, text

    def calls(self, *, agent: str | None = None, task: str | None = None) -> Iterator[Call]:
        """Yields the stored calls, optionally of one agent or task, in the order they were stored."""
        query = (
            "SELECT number, key, checksum, finish, agent, fingerprint, task, messages, seed, temperature, max_tokens,"
            " text FROM replies WHERE agent = COALESCE(?1, agent) AND task = COALESCE(?2, task) ORDER BY number"
        )
        with self._naming_errors():
            self._check_structure()
            rows = self._database.execute(query, (agent, task))
            for number, key, checksum, finish, name, fingerprint, task_, messages, *settings, text in rows:
                if _checksum(key, name, task_, text, finish) != checksum:
                    raise self._damage("replies", number)
                request = Request(task_, _unpack(messages), *settings)
                if request_key(fingerprint, request) != key:
                    raise self._damage("replies", number)
                yield Call(name, fingerprint, request, text)

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
        database.execute("PRAGMA cell_size_check = ON")
        database.create_function("row_checksum", 4, _checksum, deterministic=True)
        with self._transaction():
            self._create_or_check()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All statements of the block, on disk at its end, or none."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # A full disk ends the transaction by itself.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """SQLite's errors, and those of reading damaged values, with the file and what to do."""
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _NOT_WRITTEN:
                raise OSError(
                    f"ledger {self.path}: not written ({error}); what was stored before is intact: see that the disk "
                    "has room and the file may be written, and the same command goes on"
                ) from None
            if code in _BUSY:
                raise OSError(
                    f"ledger {self.path}: expected a turn to write, got {error}: another process keeps it; the same "
                    "command goes on"
                ) from None
            if code == sqlite3.SQLITE_NOTADB:
                raise ValueError(
                    f"ledger {self.path}: expected a SQLite ledger, got {error}; give another path, or {_ADVICE}"
                ) from None
            raise ValueError(f"ledger {self.path}: damaged ({error}): {_ADVICE}") from None
        except (TypeError, AttributeError, UnicodeError, zlib.error, RecursionError, json.JSONDecodeError) as error:
            # A damaged row has values of other types.
            raise ValueError(f"ledger {self.path}: damaged ({error}): {_ADVICE}") from None

    def _damage(self, table: str, number: int | str) -> ValueError:
        return ValueError(
            f"ledger {self.path}: row {number} of table {table}: damaged: it does not fit its checksum: {_ADVICE}"
        )

    def _check_structure(self) -> None:
        """Compare tables and index: a damaged page hides rows without an error."""
        complaint = " ".join(self._database.execute("PRAGMA integrity_check(1)").fetchone()[0].split())
        if complaint != "ok":
            raise ValueError(f"ledger {self.path}: damaged ({complaint}): {_ADVICE}")

    def _create_or_check(self) -> None:
        database = self._database
        has_tables = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        marks = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if not has_tables and marks == [0, 0]:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
            return
        if marks == [_APPLICATION, 1]:
            self._add_checksums()
        elif marks != [_APPLICATION, _VERSION]:
            raise ValueError(
                f"ledger {self.path}: expected a ledger of version {_VERSION}, got another SQLite file {marks};"
                " give another path"
            )

    def _add_checksums(self) -> None:
        """Make a ledger of version 1 one of version 2."""
        for table, text in _TABLES.items():
            self._database.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER NOT NULL DEFAULT -1")
            self._database.execute(f"UPDATE {table} SET checksum = row_checksum(key, agent, task, {text})")
        self._database.execute("ALTER TABLE replies ADD COLUMN finish TEXT NOT NULL DEFAULT 'stop'")
        self._database.execute("PRAGMA user_version = 2")
        print(
            f"ledger {self.path}: of version 1, without checksums; its rows are taken as they are and have them now",
            file=sys.stderr,
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
        replies = self.ledger.lookup(list(batch))
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
        are_first = self.ledger.store(self.agent, keys, requests, replies)
        ended = getattr(self.agent, "ended", "")
        if ended:
            raise ValueError(
                f"agent {self.name}: {ended}; what came is in the ledger, and the same command goes on from there"
            )
        self.asked.update(request.task for request in requests)
        self.served.subtract(request.task for request in requests)
        first = {} if are_first else self.ledger.lookup([key for key, reply in zip(keys, replies) if reply.ok])
        return {key: first.get(key, reply) for key, reply in zip(keys, replies)}


def _settings(request: Request) -> tuple[int, float, int]:
    return request.seed, request.temperature, request.max_tokens


def _pack(messages: Sequence[Message]) -> bytes:
    return zlib.compress(_encode_messages(messages).encode(), 1)


def _unpack(blob: bytes) -> tuple[Message, ...]:
    return tuple(Message(*message) for message in json.loads(zlib.decompress(blob)))
