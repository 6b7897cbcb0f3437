"""Inputs and outputs of the synthesis recipes: files of rows, files of objects, one report."""

from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

from wizard_engine.data.records import Conversation, Reject, Row, stream_located, write_rows
from wizard_engine.data.references import References, with_reference
from wizard_engine.runtime.files import write_json, write_json_lines
from wizard_engine.runtime.spill import Spill
from wizard_engine.runtime.text_lines import printable


def read_conversations(
    paths: Sequence[Path],
    *,
    on_error: str = "raise",
    unknown_fields: str = "refuse",
    rejects: Path | None = None,
    limit: int | None = None,
    references: References = "attribute",
    rows: MutableSequence[Conversation] | Spill[Conversation] | None = None,
) -> tuple[Sequence[Conversation], int]:
    """The supervised rows of several files, at most `limit`, and the number of rejected records.

    Args:
        references: "answers" makes each row's last answer its reference (see data.references).
        rows: where the rows are put; None for a list.
    Raises:
        ValueError: a bad record, or one of another kind (with on_error="raise"); no row at all.
    """
    rows = [] if rows is None else rows
    bad: list[Reject] = []
    options = {"on_error": on_error, "unknown_fields": unknown_fields, "rejects": rejects}
    for number, (_, row) in enumerate(stream_located(paths, bad, kind="conversation", **options)):
        if limit is None or number < limit:
            rows.append(with_reference(row, references))
    if not len(rows):
        raise ValueError(f"{paths[0] if paths else 'data'}: expected conversations, got none; see {rejects}")
    return rows, len(bad)


def write_outputs(
    out: Path, rows: Mapping[str, Iterable[Row]], objects: Mapping[str, Iterable[dict]], report: dict[str, Any]
) -> list[Path]:
    """Writes OUT/NAME.jsonl for each name, and OUT/report.json; returns the paths."""
    paths = []
    for name, file_rows in rows.items():
        paths.append(out / f"{name}.jsonl")
        write_rows(paths[-1], file_rows)
    for name, items in objects.items():
        paths.append(out / f"{name}.jsonl")
        write_json_lines(paths[-1], items)
    write_json(out / "report.json", report)
    return [*paths, out / "report.json"]


def print_table(title: str, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a table with a line a key; columns in the order of their first appearance.

    Keys may come from rows: line ends and controls in them are shown escaped, and end no line.
    """
    columns = list(dict.fromkeys(name for line in table.values() for name in line))
    print(f"{title:<18}" + "".join(f"{printable(name):>{max(9, len(name) + 2)}}" for name in columns))
    for key, line in table.items():
        cells = (f"{_cell(line.get(name, 0)):>{max(9, len(name) + 2)}}" for name in columns)
        print(f"  {printable(key)[:15]:<16}" + "".join(cells))


def rejections(what: str, counts: Mapping[str, Mapping[str, int]], kept: str) -> str:
    """`212 of 300 WHAT rejected`, over all keys of a table whose columns are `tried` and `kept`.

    >>> rejections("rewrites", {"short": {"tried": 3, "accepted": 1}, "long": {"tried": 2}}, "accepted")
    '4 of 5 rewrites rejected'
    """
    tried, passed = (sum(count.get(name, 0) for count in counts.values()) for name in ("tried", kept))
    return f"{tried - passed} of {tried} {what} rejected"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
