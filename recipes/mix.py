"""Mixing: rows of several stages into one file, a share of each, counted by where they came from.

    python recipes/mix.py --data self_teach/preferences.jsonl co_teach/preferences.jsonl --shares 1 0.5 --out runs/pairs
    python recipes/mix.py --data pairs.jsonl --hold-out 200 --out runs/pairs

Writes OUT/rows.jsonl, OUT/held_out.jsonl (empty without --hold-out) and OUT/mix.json. Which rows a share takes follows
from their ids. A row that came before, by its id, is left out. Rows with the same prompt are held out together.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime
from wizard_engine.data.records import Conversation, Row, read_rows, write_rows
from wizard_engine.runtime.files import write_json
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Seed, Share
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage


@dataclass(frozen=True)
class Config(Checked):
    """Rows of several files, mixed."""

    data: tuple[Path, ...]
    """Row files; one without rows is no error."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for rows.jsonl, held_out.jsonl and mix.json."""
    shares: Share[tuple[float, ...]] = ()
    """Share of each file's rows, 0 to 1; default: all rows of all files."""
    fallback: Path | None = None
    """Rows to take where the others give none."""
    limit: Count[int | None] = None
    """Rows taken at most, drawn from all of them; default: all."""
    hold_out: NonNegative[int] = 0
    """Rows kept apart in OUT/held_out.jsonl, with all that have the same prompts; at most half of them."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    seed: Seed[int] = 0
    """Of the choice of rows."""
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares and len(self.shares) != len(self.data):
            raise ValueError(f"shares: expected one a file, {len(self.data)}, got {len(self.shares)}")


def place(seed: int, *texts: str) -> float:
    """A number in [0, 1) that depends on texts alone, the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, *texts]).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def prompt_of(row: Row) -> str:
    """What a row answers, as a text."""
    messages = row.messages[:-1] if isinstance(row, Conversation) else row.prompt
    return json.dumps([message.content for message in messages])


def mixed(cfg: Config, counts: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows in the order of the files; `counts` gets a line for each file."""
    seen: set[str] = set()
    shares = cfg.shares or (1.0,) * len(cfg.data)
    sources = [*zip(cfg.data, shares)]
    for number, (path, share) in enumerate([*sources, *([(cfg.fallback, 1.0)] if cfg.fallback else [])]):
        if number == len(sources) and seen:
            counts.append({"file": str(path), "given": 0, "taken": 0, "note": "not needed"})
            continue
        rows = read(cfg, path, number)
        taken = [row for row in rows if row.id not in seen and place(cfg.seed, "share", row.id) < share]
        repeated = sum(row.id in seen for row in rows)
        seen.update(row.id for row in taken)
        counts.append({"file": str(path), "given": len(rows), "taken": len(taken), "repeated": repeated})
        yield from taken


def read(cfg: Config, path: Path, number: int) -> list[Row]:
    """The rows of a file, none where it is empty."""
    rejects = cfg.out / (f"rejects_{number + 1}.jsonl" if len(cfg.data) > 1 else "rejects.jsonl")
    options = {"on_error": cfg.on_error, "unknown_fields": cfg.unknown_fields, "rejects": rejects}
    return read_rows(path, allow_empty=True, **options)


def limited(cfg: Config, rows: list[Row]) -> list[Row]:
    """The rows that the limit leaves, in their order."""
    if cfg.limit is None:
        return rows
    chosen = {row.id for row in sorted(rows, key=lambda row: place(cfg.seed, "limit", row.id))[: cfg.limit]}
    return [row for row in rows if row.id in chosen]


def held_out_prompts(cfg: Config, rows: list[Row]) -> set[str]:
    """The prompts whose rows are kept apart."""
    most, chosen, count = min(cfg.hold_out, len(rows) // 2), set(), 0
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[prompt_of(row)] = sizes.get(prompt_of(row), 0) + 1
    for prompt in sorted(sizes, key=lambda prompt: place(cfg.seed, "hold out", prompt)):
        if count + sizes[prompt] <= most:
            chosen.add(prompt)
            count += sizes[prompt]
    return chosen


def mix(cfg: Config) -> tuple[dict[str, Any], list[Path]]:
    """Read, choose and write; the report and the paths."""
    counts: list[dict[str, Any]] = []
    rows = limited(cfg, list(mixed(cfg, counts)))
    apart = held_out_prompts(cfg, rows)
    files = {
        "rows": [row for row in rows if prompt_of(row) not in apart],
        "held_out": [row for row in rows if prompt_of(row) in apart],
    }
    for name, chosen in files.items():
        write_rows(cfg.out / f"{name}.jsonl", chosen)
    report = {"files": counts, **{name: len(chosen) for name, chosen in files.items()}}
    write_json(cfg.out / "mix.json", report)
    return report, [cfg.out / name for name in ("rows.jsonl", "held_out.jsonl", "mix.json")]


def main(cfg: Config) -> dict:
    """Mix; returns the report of mix.json."""
    rt = runtime.start("cpu")
    stage = open_stage(cfg, "mix", rt)
    if stage.done:
        return stage.result()
    report, outputs = from_main(rt, lambda: mix(cfg))
    if rt.is_main and not cfg.quiet:
        for line in report["files"]:
            print(f"{line['taken']} of {line['given']} rows of {line['file']}")
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
