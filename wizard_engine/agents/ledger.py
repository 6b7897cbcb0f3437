"""A ledger of every call to an agent, so that no successful call is made twice.

SQLite in write-ahead mode. The key of a reply is the content of its request and the fingerprint of its agent. A stored
reply survives the end of its process at once, and a power failure after `sync`, which the scheduler calls every second.
Failed calls are stored in a separate table, counted and never served. Several processes may share a ledger: if two of
them ask the same, both serve the reply that was stored first. A row has a checksum, which every reader of it compares.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from wizard_engine.data.records import Message

from .ledger_file import FAILURE_FIELDS, REPLY_FIELDS, TABLES, LedgerFile, checksum
from .protocol import Reply, Request

_KEYS_PER_QUERY = 500
# json.dumps makes an encoder for every call that is not of its defaults.
_encode_content = json.JSONEncoder(separators=(",", ":")).encode
_encode_messages = json.JSONEncoder(ensure_ascii=False).encode


class Call(NamedTuple):
    """One stored call: agent, request and reply. For a failed one the request has no messages, and no settings."""

    agent: str
    fingerprint: str
    request: Request
    reply: Reply
    key: bytes = b""

    @property
    def text(self) -> str:
        """Of the reply."""
        return self.reply.text


class Stored(NamedTuple):
    """A reply to store: who gave it, its key, request and reply."""

    agent: str
    fingerprint: str
    key: bytes
    request: Request
    reply: Reply


def request_key(fingerprint: str, request: Request) -> bytes:
    """SHA-256 of everything a reply may depend on: the agent's fingerprint and the whole request."""
    # Messages are tuples, which JSON writes as lists.
    content = [
        fingerprint,
        request.task,
        request.messages,
        request.seed,
        float(request.temperature),
        request.max_tokens,
    ]
    options = _options(request)
    return hashlib.sha256(_encode_content([*content, options] if options else content).encode()).digest()


def _options(request: Request) -> str:
    """Settings that most requests leave at their defaults, as JSON; "" without any."""
    return _written_options(request.top_p, request.schema) if request.top_p != 1 or request.schema else ""


@lru_cache(256)
def _written_options(top_p: float, schema: str) -> str:
    options = {"top_p": top_p} if top_p != 1 else {}
    return _encode_content(options | ({"schema": schema} if schema else {}))


class Ledger:
    """The calls of all agents that share one file.

    A file of an earlier version is brought to this one when it is opened.

    Args:
        path: SQLite file; created with its folder if it does not exist.
        timeout_seconds: longest wait for the write of another process.
        read_only: the file must exist, and is not written, unless it is of an earlier version.
    Raises:
        ValueError: the file is no ledger, one of another version, or damaged; so do all methods that read.
        OSError: the file cannot be written; so do all methods.
    """

    def __init__(self, path: Path | str, *, timeout_seconds: float = 60.0, read_only: bool = False) -> None:
        self._file = LedgerFile(path, timeout_seconds=timeout_seconds, read_only=read_only)
        self.path = self._file.path

    def lookup_one(self, key: bytes) -> Reply | None:
        """The stored reply of a key, None without one."""
        with self._file.naming_errors():
            row = self._file.database.execute(_SELECT_REPLY, (key,)).fetchone()
            return None if row is None else self._checked(row)[1]

    def _checked(self, row: tuple) -> tuple[bytes, Reply]:
        key, agent, task, text, given, *rest = row
        if checksum(key, agent, task, text, *rest) != given:
            raise self._file.damage("replies", f"of key {key.hex()[:16]}")
        return key, _reply(text, rest)

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """The stored replies of the keys that have one."""
        stored: dict[bytes, Reply] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            slots = ",".join("?" * len(part))
            query = f"SELECT {_LOOKED_UP} FROM replies WHERE key IN ({slots})"
            with self._file.naming_errors():
                stored.update(self._checked(row) for row in self._file.database.execute(query, part))
        return stored

    def store(self, calls: Sequence[Stored]) -> bool:
        """Writes replies in one transaction; they survive the process on return, and a power failure after `sync`.

        Returns:
            Whether none of them was stored before, by another process.
        """
        succeeded, failed = [], []
        for agent, fingerprint, key, request, reply in calls:
            if reply.ok:
                rest = _reply_fields(request, reply)
                settings = (request.seed, request.temperature, request.max_tokens)
                proof = checksum(key, agent, request.task, reply.text, *rest)
                row = (key, agent, fingerprint, request.task, _pack(request.messages), *settings, reply.text, proof)
                succeeded.append((*row, *rest))
            else:
                rest = (reply.tokens_in, reply.tokens_out, request.row)
                proof = checksum(key, agent, request.task, reply.error, "stop", *rest)
                failed.append((key, agent, fingerprint, request.task, reply.error, proof, *rest))
        with self._file.naming_errors(), self._file.transaction():
            database = self._file.database
            stored = database.executemany(_INSERT_REPLY, succeeded)
            database.executemany(_INSERT_FAILURE, failed)
        return not succeeded or stored.rowcount == len(succeeded)

    def sync(self) -> None:
        """What was stored before survives a power failure."""
        self._file.sync()

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """agent -> task -> {"replies": stored calls, "failures": failed calls}, over the life of the file."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for table in TABLES:
            rows = Counter((agent, task) for agent, task, _ in self._rows(table))
            for (agent, task), number in sorted(rows.items()):
                counts.setdefault(agent, {}).setdefault(task, {"replies": 0, "failures": 0})[table] = number
        return counts

    def totals(self) -> dict[str, dict[str, float]]:
        """agent -> {"replies", "failures", "tokens_in", "tokens_out", "seconds"}, over the life of the file."""
        totals: dict[str, dict[str, float]] = {}
        for table in TABLES:
            seconds = "SUM(seconds)" if "seconds" in _FIELDS[table] else "0"
            query = f"SELECT agent, COUNT(*), SUM(tokens_in), SUM(tokens_out), {seconds} FROM {table} GROUP BY agent"
            with self._file.naming_errors():
                rows = self._file.database.execute(f"{query} ORDER BY agent").fetchall()
            for agent, number, *sums in rows:
                of_agent = totals.setdefault(agent, dict.fromkeys(("replies", "failures", *_SUMMED), 0))
                of_agent[table] = number
                for name, value in zip(_SUMMED, sums):
                    of_agent[name] += value
        return totals

    def reasons(self) -> dict[str, dict[str, int]]:
        """agent -> reason in a word or two (see `Reply.reason`) -> number of calls that failed for it."""
        reasons: dict[str, Counter[str]] = {}
        for agent, _, error in self._rows("failures"):
            reasons.setdefault(agent, Counter())[Reply("", error).reason] += 1
        return {agent: dict(counts.most_common()) for agent, counts in sorted(reasons.items())}

    def errors(self) -> dict[str, int]:
        """Error text -> number of failed calls with it."""
        return dict(sorted(Counter(error for _, _, error in self._rows("failures")).items()))

    def spent(self, fingerprint: str) -> tuple[int, int]:
        """Tokens of prompts and of replies that an agent was given and gave, failed calls included, since ever."""
        totals = [0, 0]
        for table in TABLES:
            sums = "COALESCE(SUM(tokens_in), 0), COALESCE(SUM(tokens_out), 0)"
            query = f"SELECT {sums} FROM {table} WHERE fingerprint = ?"
            with self._file.naming_errors():
                for place, total in enumerate(self._file.database.execute(query, (fingerprint,)).fetchone()):
                    totals[place] += int(total)
        return totals[0], totals[1]

    def averages(self, fingerprint: str) -> dict[str, tuple[int, float, float, float]]:
        """task -> calls, mean tokens of prompt and of reply, mean seconds, of the stored calls that say them."""
        query = (
            "SELECT task, COUNT(*), AVG(tokens_in), AVG(tokens_out), AVG(seconds) FROM replies "
            "WHERE fingerprint = ? AND tokens_out > 0 GROUP BY task ORDER BY task"
        )
        with self._file.naming_errors():
            return {task: tuple(values) for task, *values in self._file.database.execute(query, (fingerprint,))}

    def _rows(self, table: str) -> Iterator[tuple[str, str, str]]:
        """Agent, task and text or error of every row of a table, each of them compared with its checksum."""
        columns = _REPLY_COLUMNS if table == "replies" else ", ".join(FAILURE_FIELDS)
        query = f"SELECT number, key, agent, task, {TABLES[table]}, checksum, {columns} FROM {table} ORDER BY number"
        with self._file.naming_errors():
            self._file.check_structure()
            for number, key, agent, task, text, given, *rest in self._file.database.execute(query):
                fields = rest if table == "replies" else ("stop", *rest)
                if checksum(key, agent, task, text, *fields) != given:
                    raise self._file.damage(table, number)
                yield agent, task, text

    def calls(self, *, agent: str | None = None, task: str | None = None, row: str | None = None) -> Iterator[Call]:
        """Yields the stored calls, optionally of one agent, task or row, in the order they were stored."""
        query = (
            f"SELECT number, key, checksum, agent, fingerprint, task, messages, seed, temperature, max_tokens, text, "
            f"{_REPLY_COLUMNS} FROM replies WHERE agent = COALESCE(?1, agent) AND task = COALESCE(?2, task) "
            "AND row = COALESCE(?3, row) ORDER BY number"
        )
        with self._file.naming_errors():
            self._file.check_structure()
            rows = self._file.database.execute(query, (agent, task, row))
            for number, key, given, name, fingerprint, task_, messages, *fields in rows:
                settings, text, rest = fields[:3], fields[3], fields[4:]
                if checksum(key, name, task_, text, *rest) != given:
                    raise self._file.damage("replies", number)
                request = _request(task_, _unpack(messages), settings, rest)
                if request_key(fingerprint, request) != key:
                    raise self._file.damage("replies", number)
                yield Call(name, fingerprint, request, _reply(text, rest), key)

    def failures(self, *, agent: str | None = None, task: str | None = None, row: str | None = None) -> Iterator[Call]:
        """Yields the failed calls, each without its messages, in the order they were stored."""
        columns = ", ".join(FAILURE_FIELDS)
        query = (
            f"SELECT number, key, checksum, agent, fingerprint, task, error, {columns} FROM failures WHERE "
            "agent = COALESCE(?1, agent) AND task = COALESCE(?2, task) AND row = COALESCE(?3, row) ORDER BY number"
        )
        with self._file.naming_errors():
            rows = self._file.database.execute(query, (agent, task, row))
            for number, key, given, name, fingerprint, task_, error, *rest in rows:
                if checksum(key, name, task_, error, "stop", *rest) != given:
                    raise self._file.damage("failures", number)
                tokens_in, tokens_out, asked_for = rest
                reply = Reply("", error, tokens_in=tokens_in, tokens_out=tokens_out)
                yield Call(name, fingerprint, Request(task_, (), row=asked_for), reply, key)

    def forget(self, keys: Sequence[bytes]) -> int:
        """Removes the replies of these keys, so that they are asked for again; returns how many were there."""
        with self._file.naming_errors(), self._file.transaction():
            return sum(
                self._file.database.execute("DELETE FROM replies WHERE key = ?", (key,)).rowcount for key in keys
            )

    def close(self) -> None:
        """Closes the file; no further calls are possible."""
        self._file.close()


_FIELDS = {"replies": REPLY_FIELDS, "failures": FAILURE_FIELDS}
_SUMMED = ("tokens_in", "tokens_out", "seconds")
_REPLY_COLUMNS = ", ".join(REPLY_FIELDS)
_LOOKED_UP = f"key, agent, task, text, checksum, {_REPLY_COLUMNS}"
_SELECT_REPLY = f"SELECT {_LOOKED_UP} FROM replies WHERE key = ?"
_INSERT_REPLY = f"INSERT OR IGNORE INTO replies VALUES (NULL,{','.join('?' * (10 + len(REPLY_FIELDS)))})"
_INSERT_FAILURE = f"INSERT INTO failures VALUES (NULL,{','.join('?' * (6 + len(FAILURE_FIELDS)))})"


def _reply_fields(request: Request, reply: Reply) -> tuple:
    """Values of REPLY_FIELDS."""
    measured = (reply.tokens_in, reply.tokens_out, round(float(reply.seconds), 3))
    return (reply.finish, reply.reasoning, *measured, request.row, _options(request))


def _reply(text: str, rest: Sequence) -> Reply:
    finish, reasoning, tokens_in, tokens_out, seconds, _, _ = rest
    return Reply(text, None, finish, reasoning, tokens_in, tokens_out, seconds)


def _request(task: str, messages: tuple[Message, ...], settings: Sequence, rest: Sequence) -> Request:
    *_, row, options = rest
    return Request(task, messages, *settings, row=row, **(json.loads(options) if options else {}))


def _pack(messages: Sequence[Message]) -> bytes:
    return zlib.compress(_encode_messages(messages).encode(), 1)


def _unpack(blob: bytes) -> tuple[Message, ...]:
    return tuple(Message(*message) for message in json.loads(zlib.decompress(blob)))
