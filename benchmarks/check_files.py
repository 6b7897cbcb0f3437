"""The folder of a GPU check: six flat files of bounded size, in which each row stands the moment it is known."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

ROWS, PHASES, SUMMARY, LOG = "rows.jsonl", "phases.jsonl", "summary.md", "log.txt"
ROOFLINE, TRACE = "roofline.html", "train_step.trace.json.gz"
FILES = (ROWS, PHASES, SUMMARY, LOG, ROOFLINE, TRACE)
FILE_BYTES = 16 * 2**20
# Of the rows: what is left to FILE_BYTES is room for the line that says what is missing.
ROW_BYTES = 15 * 2**20
# Characters of a line, of the log or of a row's text.
LINE_CHARACTERS = 2000
FULL = json.dumps({"cut": "this file is full: no further row has room"}).encode() + b"\n"


def append(path: Path, value: dict[str, Any]) -> bool:
    """Add a JSON line, on disk when this returns; False where the file is full, which its last line says."""
    line = json.dumps(value).encode() + b"\n"
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 100))
        end = file.read()
        if end.endswith(FULL):
            return False
        has_room = size + len(line) <= ROW_BYTES
        # A process that was killed while it wrote leaves half a line.
        file.write((b"\n" if end and not end.endswith(b"\n") else b"") + (line if has_room else FULL))
        file.flush()
        os.fsync(file.fileno())
    return has_room


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, {"cut": its beginning} for one that is no whole object; none where there is no file."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = {"cut": line[:80]}
        objects.append(value if isinstance(value, dict) else {"cut": line[:80]})
    return objects


def foreign(out: Path) -> list[str]:
    """What stands in a folder beside the files of a check; names, at most three."""
    return sorted(path.name for path in out.iterdir() if path.name not in FILES or not path.is_file())[:3]


def enforce(out: Path) -> list[str]:
    """Remove what is none of the check's files, and cut what is too large; one line for each thing done."""
    said, strangers = [], [path for path in out.iterdir() if path.name not in FILES or not path.is_file()]
    for path in strangers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if strangers:
        names = ", ".join(sorted(path.name for path in strangers)[:3])
        said.append(f"removed {len(strangers)} that are no files of the check: {names[:LINE_CHARACTERS]}")
    for path in out.iterdir():
        if path.stat().st_size > FILE_BYTES:
            said.append(_shorten(path))
    return said


def _shorten(path: Path) -> str:
    """Cut a text behind its last line that fits; a compressed file, which is worth nothing cut, is removed."""
    size = path.stat().st_size
    if path.suffix == ".gz":
        path.unlink()
        return f"{path.name}: removed, {size:,} bytes are more than {FILE_BYTES:,}"
    with open(path, "r+b") as file:
        kept = file.read(FILE_BYTES - LINE_CHARACTERS)
        kept = kept[: kept.rfind(b"\n") + 1] or kept
        text = f"cut here: {size - len(kept):,} of {size:,} bytes"
        file.seek(len(kept))
        file.write((json.dumps({"cut": text}) if path.suffix == ".jsonl" else text).encode() + b"\n")
        file.truncate()
    return f"{path.name}: {text}"
