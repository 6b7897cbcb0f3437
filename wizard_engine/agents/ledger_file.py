"""The SQLite file of a ledger: schema and versions, transactions, and errors that name the file and what to do."""

import json
import os
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

# 1 had no checksums, and did not say how a reply ended; 2 had no tokens, seconds, reasoning, row and options.
VERSION = 3
APPLICATION = 0x57495A4C
SCHEMA = """
CREATE TABLE replies (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, agent TEXT NOT NULL, fingerprint TEXT NOT NULL,
    task TEXT NOT NULL, messages BLOB NOT NULL, seed INTEGER NOT NULL, temperature REAL NOT NULL,
    max_tokens INTEGER NOT NULL, text TEXT NOT NULL, checksum INTEGER NOT NULL DEFAULT -1,
    finish TEXT NOT NULL DEFAULT 'stop', reasoning TEXT NOT NULL DEFAULT '', tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, row TEXT NOT NULL DEFAULT '',
    options TEXT NOT NULL DEFAULT ''
);
CREATE TABLE failures (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL, agent TEXT NOT NULL, fingerprint TEXT NOT NULL, task TEXT NOT NULL,
    error TEXT NOT NULL, checksum INTEGER NOT NULL DEFAULT -1, tokens_in INTEGER NOT NULL DEFAULT 0,
    tokens_out INTEGER NOT NULL DEFAULT 0, row TEXT NOT NULL DEFAULT ''
);
"""
TABLES = {"replies": "text", "failures": "error"}
# What a row says beside its text, in the order in which the checksum reads it.
REPLY_FIELDS = ("finish", "reasoning", "tokens_in", "tokens_out", "seconds", "row", "options")
FAILURE_FIELDS = ("tokens_in", "tokens_out", "row")
ADVICE = (
    "move it away, and the same command asks for its replies again; or restore a copy; or let the program sqlite3 "
    "recover what it can: sqlite3 OLD .recover | sqlite3 NEW"
)
_NOT_WRITTEN = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def checksum(key: bytes, agent: str, task: str, text: str, finish: str = "stop", *rest: str | float) -> int:
    """Of a row, `finish` and `rest` being its REPLY_FIELDS, for a failed call "stop" and its FAILURE_FIELDS.

    The key is a checksum of the request and of the agent's fingerprint. Fields that say nothing do not enter it, so
    rows of version 2 keep theirs.
    """
    ending = "" if finish == "stop" else f"\0{finish}"
    ending += "\0" + "\0".join(map(str, rest)) if any(rest) else ""
    return zlib.crc32(f"{agent}\0{task}\0{text}{ending}".encode(), zlib.crc32(key))


class LedgerFile:
    """An open database of a ledger.

    Args:
        path: SQLite file; created with its folder if it does not exist.
        timeout_seconds: longest wait for the write of another process.
        read_only: the file must exist, and is not written, unless it is of an earlier version.
    Raises:
        ValueError: the file is no ledger, one of another version, or damaged; so do all methods that read.
        OSError: the file cannot be written; so do all methods.
    """

    def __init__(self, path: Path | str, *, timeout_seconds: float = 60.0, read_only: bool = False) -> None:
        self.path = Path(path)
        if os.path.lexists(self.path) and not self.path.is_file():
            raise ValueError(f"ledger {self.path}: expected a file, got another kind of entry; give another path")
        if read_only and self._open_to_read(timeout_seconds):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.naming_errors():
            self.database = sqlite3.connect(self.path, timeout=timeout_seconds, isolation_level=None)
        try:
            with self.naming_errors():
                self._enter_wal(timeout_seconds)
                self._prepare()
        except BaseException:
            self.database.close()
            raise

    def _open_to_read(self, timeout_seconds: float) -> bool:
        """Whether the file is of this version and is open now; one of an earlier version has to be written first."""
        address = f"file:{quote(str(self.path.absolute()))}?mode=ro"
        with self.naming_errors():
            self.database = sqlite3.connect(address, timeout=timeout_seconds, isolation_level=None, uri=True)
            try:
                is_present = self._marks() == [APPLICATION, VERSION]
            except BaseException:
                self.database.close()
                raise
        if not is_present:
            self.database.close()
        return is_present

    def _marks(self) -> list[int]:
        """Application and version that the file is marked with."""
        return [self.database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]

    def sync(self) -> None:
        """What was stored before is on disk, so that it survives a power failure."""
        try:
            descriptor = os.open(f"{self.path}-wal", os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise OSError(f"ledger {self.path}: not written ({error}); see that the disk has room") from None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Closes the file; no further calls are possible."""
        self.database.close()

    def _enter_wal(self, timeout_seconds: float) -> None:
        """Switch to write-ahead mode. SQLite's own timeout does not cover this switch, so it is retried here."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self.database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _prepare(self) -> None:
        # A commit is a write to the log, which survives the process; `sync` brings the log to the disk.
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.database.execute("PRAGMA cell_size_check = ON")
        self.database.create_function("row_checksum", 4, checksum, deterministic=True)
        with self.transaction():
            self._create_or_check()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements of the block, on disk at its end, or none."""
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.database.execute("COMMIT")
        except BaseException:
            # A full disk ends the transaction by itself.
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
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
                    f"ledger {self.path}: expected a SQLite ledger, got {error}; give another path, or {ADVICE}"
                ) from None
            raise ValueError(f"ledger {self.path}: damaged ({error}): {ADVICE}") from None
        except (TypeError, AttributeError, UnicodeError, zlib.error, RecursionError, json.JSONDecodeError) as error:
            # A damaged row has values of other types.
            raise ValueError(f"ledger {self.path}: damaged ({error}): {ADVICE}") from None

    def damage(self, table: str, number: int | str) -> ValueError:
        return ValueError(
            f"ledger {self.path}: row {number} of table {table}: damaged: it does not fit its checksum: {ADVICE}"
        )

    def check_structure(self) -> None:
        """Compare tables and index: a damaged page hides rows without an error."""
        complaint = " ".join(self.database.execute("PRAGMA integrity_check(1)").fetchone()[0].split())
        if complaint != "ok":
            raise ValueError(f"ledger {self.path}: damaged ({complaint}): {ADVICE}")

    def _create_or_check(self) -> None:
        database = self.database
        has_tables = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        marks = self._marks()
        if not has_tables and marks == [0, 0]:
            for statement in filter(str.strip, SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {VERSION}")
            return
        if marks == [APPLICATION, 1]:
            self._add_checksums()
            marks[1] = 2
        if marks == [APPLICATION, 2]:
            self._add_columns()
            marks[1] = VERSION
        if marks != [APPLICATION, VERSION]:
            raise ValueError(
                f"ledger {self.path}: expected a ledger of version {VERSION} or earlier, got another SQLite file "
                f"{marks}; give another path"
            )

    def _add_checksums(self) -> None:
        """Make a ledger of version 1 one of version 2."""
        for table, text in TABLES.items():
            self.database.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER NOT NULL DEFAULT -1")
            self.database.execute(f"UPDATE {table} SET checksum = row_checksum(key, agent, task, {text})")
        self.database.execute("ALTER TABLE replies ADD COLUMN finish TEXT NOT NULL DEFAULT 'stop'")
        print(
            f"ledger {self.path}: of version 1, without checksums; its rows are taken as they are and have them now",
            file=sys.stderr,
        )

    def _add_columns(self) -> None:
        """Make a ledger of version 2 one of version 3."""
        present = {name for _, name, *_ in self.database.execute("PRAGMA table_info(replies)")}
        for table, names in (("replies", REPLY_FIELDS), ("failures", FAILURE_FIELDS)):
            for name in names:
                if name not in present or table == "failures":
                    self.database.execute(f"ALTER TABLE {table} ADD COLUMN {name} {_TYPES[name]}")
        self.database.execute(f"PRAGMA user_version = {VERSION}")


_TYPES = {
    **dict.fromkeys(("reasoning", "row", "options"), "TEXT NOT NULL DEFAULT ''"),
    **dict.fromkeys(("tokens_in", "tokens_out"), "INTEGER NOT NULL DEFAULT 0"),
    "seconds": "REAL NOT NULL DEFAULT 0",
}
