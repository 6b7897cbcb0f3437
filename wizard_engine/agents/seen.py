"""Keys that came before, on disk."""

import sqlite3
import tempfile


class Seen:
    """Which of many keys came before, kept in a temporary file: memory does not grow with their number."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA cache_size = -8192")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY)")
        self._database.execute("BEGIN")

    def is_new(self, key: bytes) -> bool:
        """Whether a key comes for the first time."""
        number = int.from_bytes(key[:8], "big", signed=True)
        try:
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{tempfile.gettempdir()}: expected room for a temporary file, got {error}; make room"
            ) from None

    def close(self) -> None:
        """Remove the file."""
        self._database.close()
