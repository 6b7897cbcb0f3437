"""Layouts of a file, each under torchrun of its own: rows, a table, and a plot of tokens/s per GPU over ranks.

A TOML file has options for all layouts at its top and a table `[[layout]]` for each; a JSON-lines file has an object a
line. Their keys are `name`, `ranks` and the options of benchmarks.train_step:

    preset = "7b"
    tokens = 16384
    document_tokens = 4096

    [[layout]]
    name = "shard"
    ranks = 8
    sharding.recompute = "full"

A layout that fails gives a row with the reason, and the next one starts. Layouts of one name are one line of the plot.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import environment
from benchmarks.command_line import nearest
from benchmarks.train_row import Options, append, check_values, line_of
from wizard_engine.html import charts
from wizard_engine.runtime.cli import cli, option_names
from wizard_engine.runtime.files import write_text

# Options of the sweep itself, not of its layouts.
SWEEP_OPTIONS = ("sweep", "plot", "json", "trace", "memory", "name")
PANEL, WIDTH = 210.0, 640.0


@dataclass(frozen=True)
class Layout:
    """A row of the file: its name, how many ranks it starts, and the arguments of its command."""

    name: str
    ranks: int
    flags: tuple[str, ...]
    recipes: tuple[str, ...]


# The file


def read_layouts(path: Path, base: Mapping[str, Any]) -> list[Layout]:
    """The layouts of a file.

    Args:
        base: option -> value, for layouts that do not say otherwise.
    Raises:
        ValueError: the file cannot be read, has no layouts, or one has an option or a value that does not exist.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: expected a file of layouts, got {error.strerror}") from error
    tables = _toml(path, content) if path.suffix == ".toml" else _json_lines(path, content)
    if not tables:
        raise ValueError(f"{path}: expected at least one layout, got none; write a [[layout]] table")
    return [_layout(where, dict(base) | flat(table)) for where, table in tables]


def _toml(path: Path, content: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        tables = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from error
    layouts = tables.pop("layout", [])
    if not isinstance(layouts, list):
        raise ValueError(f"{path}: layout: expected tables [[layout]], got {layouts!r}")
    return [(f"{path}: layout {number}", flat(tables) | flat(table)) for number, table in enumerate(layouts, 1)]


def _json_lines(path: Path, content: str) -> list[tuple[str, dict[str, Any]]]:
    objects = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {value!r}")
        objects.append((f"{path}:{number}", value))
    return objects


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted name, out of nested tables; - and _ are the same."""
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key.replace("-", "_")
        options |= flat(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return options


def _layout(where: str, options: dict[str, Any]) -> Layout:
    ranks, name = options.pop("ranks", 1), str(options.pop("name", ""))
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"{where}: ranks: expected a whole number of at least 1, got {ranks!r}")
    known = [option.removeprefix("--").replace("-", "_") for option in option_names(Options)]
    known = [option for option in known if option not in SWEEP_OPTIONS]
    for option in options:
        if option not in known:
            raise ValueError(f"{where}: {option}: expected a known option{nearest(option, ['name', 'ranks', *known])}")
    flags = tuple(argument for option, value in options.items() for argument in flags_of(option, value))
    try:
        options_read = cli(Options, args=flags)
        check_values(options_read)
    except SystemExit:
        raise ValueError(f"{where}: expected options of a layout, got {' '.join(flags)}; see above") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Layout(name or f"{ranks} ranks", ranks, flags, options_read.recipe)


def flags_of(option: str, value: Any) -> list[str]:
    """An option as command-line arguments."""
    typed = "--" + option.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = typed[2:].rpartition(".")
        return [typed if value else f"--{head}{'.' if head else ''}no-{last}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [typed, *map(str, values)]


def changed(options: Options) -> dict[str, Any]:
    """Options of the command line that are not the defaults, without the sweep's own."""
    values, usual = flat(asdict(options)), flat(asdict(Options()))
    return {name: value for name, value in values.items() if value != usual[name] and name not in SWEEP_OPTIONS}


# Running


def sweep(options: Options) -> int:
    """Start every layout; returns the exit status: 1 where one failed.

    Raises:
        ValueError: as `read_layouts`, or this is itself one of several ranks.
    """
    if "RANK" in os.environ:
        raise ValueError("sweep: expected a single process, got one under torchrun; the sweep starts torchrun itself")
    layouts = read_layouts(options.sweep, changed(options))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = options.json or Path(folder, "rows.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        for layout in layouts:
            rows += started(layout, path)
            if options.plot is not None and any("error" not in row for row in rows):
                write_text(options.plot, scaling(rows))
    print(table(rows))
    if options.plot is not None and options.plot.exists():
        print(f"written: {options.plot}")
    return int(any("error" in row for row in rows))


def started(layout: Layout, path: Path) -> list[dict[str, Any]]:
    """Rows of a layout, which its ranks write to `path` as they come; the last says why, where it failed."""
    before = path.stat().st_size if path.exists() else 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
    command += ["-m", "benchmarks.train_step", *layout.flags, "--name", layout.name, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = _rows_after(path, before)
    if done.returncode:
        left = [recipe for recipe in layout.recipes if recipe not in [row["recipe"] for row in rows]]
        failed = {
            "benchmark": "train_step",
            **environment(),
            "name": layout.name,
            "ranks": layout.ranks,
            "recipe": left[0] if left else "",
            "options": " ".join(layout.flags),
            "error": reason(done.stderr),
        }
        append(path, failed)
        rows.append(failed)
    return rows


def _rows_after(path: Path, offset: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        file.seek(offset)
        return [json.loads(line) for line in file]


def reason(printed: str) -> str:
    """Of what a failed start printed, the line that says why."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"\berror: ", line)]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (said or raised or lines or ["it printed nothing"])[0][:500]


# What was found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned lines, under the name of their layout."""
    lines, shown = [], None
    for row in rows:
        if row["name"] != shown:
            shown = row["name"]
            lines.append(f"{shown}:")
        failed = f"{row['recipe']:10}{row['ranks']:>3} ranks  failed: {row.get('error')}"
        lines.append("  " + (failed if "error" in row else line_of(row)))
    return "\n".join(lines)


def scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG with a panel a recipe: tokens/s per GPU over ranks, a line for each layout, the planner's dashed."""
    good = [row for row in rows if "error" not in row]
    recipes = list(dict.fromkeys(row["recipe"] for row in good))
    body: list[str] = []
    for number, recipe in enumerate(recipes):
        body += _panel(recipe, [row for row in good if row["recipe"] == recipe], number * PANEL)
    return charts.frame(WIDTH, PANEL * len(recipes), body, "tokens/s per GPU over ranks")


def _panel(recipe: str, rows: Sequence[Mapping[str, Any]], top: float) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in rows))
    counts = sorted({row["ranks"] for row in rows})
    planned = [row["predicted"]["tokens_per_second_per_gpu"] for row in rows]
    rates = [row["tokens_per_second_per_gpu"] for row in rows]
    measured_on = f"{rows[0]['device']}, {rows[0]['backend'] if len(counts) == 1 else rows[-1]['backend']}"
    high = charts.ticks(0.0, max([*rates, *(x for x in planned if x is not None)]))
    left, right, upper, lower = 64.0, WIDTH - 190.0, top + 30.0, top + PANEL - 34.0

    def place(ranks: int, rate: float) -> tuple[float, float]:
        across = left + 12 + (right - left - 24) * (counts.index(ranks) / max(1, len(counts) - 1))
        return across, lower - (lower - upper) * rate / high[-1]

    body = [charts.text(0, top + 16, f"{recipe}: tokens/s per GPU, {rows[0]['preset']}, {measured_on}", size=13)]
    for tick in high:
        y = place(counts[0], tick)[1]
        body += [
            charts.line(left, y, right, y),
            charts.text(left - 6, y + 4, charts.number(tick), size=11, anchor="end"),
        ]
    for ranks in counts:
        body.append(charts.text(place(ranks, 0)[0], lower + 16, f"{ranks} ranks", size=11, anchor="middle"))
    for number, name in enumerate(names):
        layout_rows, colour = [row for row in rows if row["name"] == name], charts.SERIES[number % len(charts.SERIES)]
        body += _line([place(r["ranks"], r["tokens_per_second_per_gpu"]) for r in layout_rows], colour)
        body.append(charts.text(right + 14, upper + 14 + 34 * number, name, size=12, fill=colour))
        expected = [(r["ranks"], r["predicted"]["tokens_per_second_per_gpu"]) for r in layout_rows]
        if all(rate is not None for _, rate in expected):
            body += _line([place(*point) for point in expected], colour, dash="4 3")
            body.append(charts.text(right + 14, upper + 28 + 34 * number, "planned, dashed", size=11, fill=charts.SOFT))
    return body


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str = "none") -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [] if dash != "none" else [charts.dot(x, y, 3.5, fill=colour) for x, y in points]
    return [charts.path(path, colour=colour, width=2, dash=dash), *dots]
