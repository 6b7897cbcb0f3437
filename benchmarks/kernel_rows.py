"""Result rows of the kernel benchmarks: their line, their file, their comparison with older ones, their Markdown table.

A row is one variant of one case: op, phase, label, dtype, variant, `status` (right, wrong, error, absent, profiled),
and where it was timed, right or wrong, kernel_us and wall_us ({p20, p50, p80}), `us` (the median that rates are
computed from), tflops, gbps, shares of the ceilings of the same run, and `speedup` over each peer; with everything that
the figures depend on, from commit to seed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
SHORT = {"forward": "fwd", "backward": "bwd", "step": "step"}
EQUAL_FLOPS = "matmul equal"


def add_rates(row: Row, flops: int, moved: int, us: float, is_matrix: bool, ceilings: Mapping[str, float]) -> None:
    """Rates of a timed row, and their shares of the matrix rate and copy bandwidth that the same run measured."""
    row |= {"tflops": flops / us / 1e6, "gbps": moved / us / 1e3}
    row["share_of_copy"] = row["gbps"] / ceilings["copy_gbps"]
    if is_matrix:
        row["share_of_matrix"] = row["tflops"] / ceilings["matrix_tflops"]


def add_ratios(rows: Sequence[Row]) -> None:
    """To the timed rows of one case: `speedup` over every other right peer, and the share of the equal-FLOP product.

    A wrong row has neither, and is nobody's peer.
    """
    timed = [row for row in rows if "us" in row and row["status"] != "wrong"]
    equal = next((row["tflops"] for row in timed if row["variant"] == EQUAL_FLOPS), None)
    peers = {row["variant"]: row["us"] for row in timed if not row["is_ours"] and row["variant"] != EQUAL_FLOPS}
    for row in timed:
        if row["variant"] == EQUAL_FLOPS:
            continue
        row["speedup"] = {name: us / row["us"] for name, us in peers.items() if name != row["variant"]}
        if equal is not None:
            row["share_of_equal"] = row["tflops"] / equal


def line_of(row: Row) -> str:
    """The aligned line of a row: op, phase, shape, variant, times, rate, its share of the ceiling, ratios, memory."""
    head = f"{row['op']:10}{SHORT[row['phase']]:5}{row['label']:62}{row['variant']:20}"
    if "us" not in row:
        return f"{head}{row['status']}: {row.get('note', '')}".rstrip(": ").rstrip()
    times = row["kernel_us"] or row["wall_us"]
    text = f"{head}{times['p50']:10.1f} us ({times['p20']:.1f} to {times['p80']:.1f})"
    text = f"{text:134}" + (f"wall {row['wall_us']['p50']:8.1f}  " if row["kernel_us"] else "wall  ")
    text += rate_of(row)
    text += "".join(f"  {ratio:.2f}x {name}" for name, ratio in row.get("speedup", {}).items())
    if row.get("peak_memory_gib") is not None:
        text += f"  peak {row['peak_memory_gib']:.2f} GiB"
    text += "  WRONG" if row["status"] == "wrong" else ""
    return text + (f"  [{row['note']}]" if row.get("note") else "")


def rate_of(row: Row) -> str:
    """The rate that bounds the row, with its share of the ceiling of the same kind."""
    if "share_of_matrix" not in row:
        return f"{row['gbps']:6.0f} GB/s {row['share_of_copy']:4.0%} of copy"
    shares = f"{row['share_of_matrix']:4.0%} of matmul"
    if "share_of_equal" in row:
        shares += f" {row['share_of_equal']:4.0%} at equal FLOPs"
    return f"{row['tflops']:6.1f} TFLOP/s {shares}"


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a file of JSON lines.

    Raises:
        ValueError: no such file, or a line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a results file, found none; write one with --json {path}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]!r} ({error.msg})") from error
        if not isinstance(row, dict) or "op" not in row:
            raise ValueError(f"{path}:{number}: expected a result row with `op`, got {line[:40]!r}")
        rows.append(row)
    return rows


class Change(NamedTuple):
    """A row that is in both files: how many times as long it takes now, and whether that is a loss."""

    key: tuple[str, ...]
    text: str
    is_worse: bool


def key_of(row: Row) -> tuple[str, ...]:
    """What names a row: op, phase, shape, variant."""
    return row["op"], row["phase"], row["label"], row["variant"]


def compare(new: Iterable[Row], old: Iterable[Row], limit: float) -> list[Change]:
    """Changes of the rows that both have, this project's and peers'; only this project's can be worse.

    Worse is: median time longer by more than `limit`, with percentiles (20th now, 80th then) that do not overlap; or
    right before and now wrong or an error.

    Raises:
        ValueError: the rows are of different hardware.
    """
    before = {key_of(row): row for row in old}
    pairs = [(row, before[key_of(row)]) for row in new if key_of(row) in before]
    for now, then in pairs:
        mine, other = (row.get("gpu") or row.get("hardware") for row in (now, then))
        if mine != other:
            raise ValueError(f"--compare: expected results of {mine}, got some of {other}; measure both on one machine")
    return [change for now, then in pairs if (change := _change(now, then, limit))]


def _change(now: Row, then: Row, limit: float) -> Change | None:
    name = " ".join(key_of(now))
    if then["status"] == "right" and now["status"] in ("wrong", "error"):
        return Change(key_of(now), f"{name}: {now['status']} now: {now.get('note', '')}", now["is_ours"])
    if "us" not in now or "us" not in then:
        return None
    times, earlier = (row["kernel_us"] or row["wall_us"] for row in (now, then))
    ratio = times["p50"] / earlier["p50"]
    is_slower = ratio > 1 + limit and times["p20"] > earlier["p80"]
    text = f"{name}: {earlier['p50']:.1f} -> {times['p50']:.1f} us, {ratio - 1:+.1%}"
    if ratio > 1 + limit and not is_slower:
        text += " (within the noise)"
    return Change(key_of(now), text, is_slower and now["is_ours"])


def report(changes: Sequence[Change], limit: float) -> str:
    """What a comparison shows: the rows that are worse, then all others that moved by more than the limit."""
    worse = [change.text for change in changes if change.is_worse]
    lines = [f"{len(changes)} rows in both files, {len(worse)} worse by more than {limit:.0%} beyond their noise"]
    return "\n".join(lines + [f"  worse: {text}" for text in worse])


TITLE = ("operation", "shape", "us (20th to 80th)", "rate", "of the ceiling", "times as fast as")


def markdown(rows: Sequence[Row]) -> str:
    """Markdown tables of this project's right, timed rows, one per machine and command, with what they depend on."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("is_ours") and "us" in row and row["status"] != "wrong":
            groups.setdefault((row.get("gpu") or row.get("hardware"), row.get("command", "")), []).append(row)
    return "\n\n".join(_table(hardware, command, some) for (hardware, command), some in groups.items())


def _table(hardware: str, command: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("driver", "torch", "triton", "ptxas") if first.get(name))
    ceilings = first.get("ceilings", {})
    copy, matrix = ceilings.get("copy_gbps", 0), ceilings.get("matrix_tflops", 0)
    about = f"{hardware}, {versions}, commit {first['commit']}, {first['date'][:10]}; `{command}`."
    about += f" Measured in the same run: copy {copy:,.0f} GB/s, matrix product {matrix:,.0f} TFLOP/s."
    lines = [about, "", f"| {' | '.join(TITLE)} |", "|" + "---|" * len(TITLE)]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows])


def _cells(row: Row) -> list[str]:
    times = row["kernel_us"] or row["wall_us"]
    name = f"{row['op']} {row['phase']}" + ("" if row["variant"] in ("triton", "reference") else f" ({row['variant']})")
    timing = f"{times['p50']:,.1f} ({times['p20']:,.1f} to {times['p80']:,.1f})"
    is_matrix = "share_of_matrix" in row
    rate = f"{row['tflops']:,.0f} TFLOP/s" if is_matrix else f"{row['gbps']:,.0f} GB/s"
    share = f"{row['share_of_matrix']:.0%} of matmul" if is_matrix else f"{row['share_of_copy']:.0%} of copy"
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.get("speedup", {}).items())
    return [name, row["label"], timing, rate, share, ratios or "–"]
