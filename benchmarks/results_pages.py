"""The tables of docs/results out of the committed rows of benchmarks/results.

    python -m benchmarks.results_pages            write them into the pages
    python -m benchmarks.results_pages --check    exit status 1 where a page holds another table than its rows make

A page holds `<!-- rows: NAME -->`, the table, `<!-- /rows -->`; everything else in it is written by hand.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import Parser

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
MARKED = re.compile(r"<!-- rows: (\w+) -->\n.*?<!-- /rows -->", re.DOTALL)
ARCHS = (80, 86, 90, 100)

Row = dict[str, Any]


def read_lines(name: str) -> list[Row]:
    """Objects of a JSON lines file."""
    return [json.loads(line) for line in (ROWS / name).read_text(encoding="utf-8").splitlines()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def made_by(file: str, rows: Sequence[Row]) -> str:
    """Where rows come from: file, commits, hardware, versions, dates."""

    def of(name: str) -> str:
        return " and ".join(dict.fromkeys(str(row[name]) for row in rows if name in row))

    commits = re.sub(r"(\w+)\+changes", r"\1 with changes that were not yet committed", of("commit"))
    days = sorted({row["date"][:10] for row in rows})
    fields = [f"`benchmarks/results/{file}`", f"commit {commits}"]
    fields += [of("hardware")] if of("hardware") else []
    fields += [f"threads {of('threads')}"] if of("threads") else []
    fields += [f"torch {of('torch')}"] + ([f"triton {of('triton')}"] if of("triton") else [])
    return f"Rows: {', '.join(fields)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}."


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def generation() -> str:
    """Tokens/s of the engine and of transformers."""
    rows = [row for row in read_lines("generation_cpu.jsonl") if row["op"] == "generation"]
    lines = []
    for engine_row in (row for row in rows if "ratio" in row):
        peer = next(
            row for row in rows if row["shape"] == engine_row["shape"] and row["variant"] == engine_row["ratio"]["peer"]
        )
        ratio = engine_row["ratio"]
        lines.append(
            [
                engine_row["shape"].split(" V=")[0],
                f"{engine_row['rate']:,.0f}",
                f"{peer['rate']:,.0f}",
                f"{ratio['p50']:.2f}x [{ratio['p20']:.2f}, {ratio['p80']:.2f}]",
            ]
        )
    head = ["shape", "engine, tokens/s", "transformers, tokens/s", "ratio [20th, 80th percentile]"]
    return f"{table(head, lines)}\n\n{made_by('generation_cpu.jsonl', rows)}"


def serving() -> str:
    """Latencies of the server under load."""
    rows = [row for row in read_lines("generation_cpu.jsonl") if row["op"] == "serve"]
    lines = [
        [
            row["variant"],
            *(f"{1e3 * row['seconds'][key]:,.0f} ms" for key in ("p50", "p95", "p99")),
            f"{row['rate']:,.0f}",
        ]
        for row in rows
    ]
    head = ["time to", "median", "95th percentile", "99th percentile", "tokens/s of the run"]
    return f"{table(head, lines)}\n\n{made_by('generation_cpu.jsonl', rows)}"


def sharded() -> str:
    """A sharded step against torch's fully_shard."""
    rows = read_lines("sharded_cpu.jsonl")
    lines = []
    for row in rows:
        engine, peer = row["seconds"]["this engine"], row["seconds"]["fully_shard"]
        low, middle, high = percentiles([b / a for a, b in zip(engine, peer)])
        cells = [f"{1e3 * m:.0f} ms [{1e3 * a:.0f}, {1e3 * b:.0f}]" for a, m, b in map(percentiles, (engine, peer))]
        memory = f"{row['memory']['this engine']:.1f}, {row['memory']['fully_shard']:.1f} MiB"
        lines.append([str(row["ranks"]), *cells, f"{middle:.2f}x [{low:.2f}, {high:.2f}]", memory])
    head = ["ranks", "this engine", "fully_shard", "ratio of each turn", "peak memory: this engine, fully_shard"]
    return f"{table(head, lines)}\n\n{made_by('sharded_cpu.jsonl', rows)}"


def train_step() -> str:
    """Steps of every recipe on CPU ranks."""
    rows = read_lines("train_step_cpu.jsonl")
    lines = []
    for row in rows:
        waits = sum(share for axis, share in row["exposed_share"].items() if axis != "numbers")
        layout = f"{row['mesh']}, recompute {row['sharding']['recompute']}"
        lines.append(
            [
                row["recipe"],
                str(row["ranks"]),
                layout,
                f"{row['tokens_per_second_per_gpu']:,.0f}",
                f"{100 * waits:.1f} %",
                f"{row['peak_memory_gib']:.2f} GiB",
                "yes" if row["bytes_as_planned"] else "no",
            ]
        )
    head = ["recipe", "ranks", "layout", "tokens/s per rank", "waits for tensors", "peak memory", "bytes as planned"]
    return f"{table(head, lines)}\n\n{made_by('train_step_cpu.jsonl', rows)}"


def mixture() -> str:
    """A mixture of experts against a dense model."""
    result = json.loads((ROWS / "mixture_world.json").read_text(encoding="utf-8"))
    lines, means = [], {"dense": [], "mixture": []}
    for seed in dict.fromkeys(row["seed"] for row in result["rows"]):
        pair = {row["model"]: row for row in result["rows"] if row["seed"] == seed}
        cells = []
        for name, values in means.items():
            values.append((pair[name]["loss"], pair[name]["accuracy"]))
            cells.append(f"{values[-1][0]:.3f}, {100 * values[-1][1]:.1f} %")
        lines.append([str(seed), *cells, f"{max(pair['mixture']['load_base'] + pair['mixture']['load_sft']):.2f}"])
    average = [
        f"{statistics.fmean(x):.3f}, {100 * statistics.fmean(y):.1f} %"
        for x, y in (zip(*values) for values in means.values())
    ]
    lines.append(["mean", *average, ""])
    head = ["seed", "dense: loss, accuracy", "mixture: loss, accuracy", "largest share"]
    made = made_by("mixture_world.json", [result["environment"]])
    return f"{table(head, lines)}\n\n{made} Command: `{result['command']}`."


def launches() -> str:
    """The ledger's predictions for 7B on one H200."""
    rows = read_lines("launches_7b.jsonl")
    lines = []
    for row in rows:
        is_decode = row["step"] == "decode"
        many = f"{row['tokens']} sequence" + ("s" if row["tokens"] > 1 else "")
        kind = "online (RLEIF)" if row["step"] == "rleif" else "training"
        what = f"decode, {many}" if is_decode else f"{kind}, {row['tokens']:,} tokens"
        share = f"{100 * row['share_of_copy']:.0f} % of copy" if is_decode else f"{100 * row['mfu']:.1f} % MFU"
        code = row["code"] if "before" in row["code"] else f"after: {row['commit']}"
        lines.append(
            [
                code,
                what,
                "-" if is_decode else row["recompute"],
                f"{row['launches']:,}",
                str(row["host_syncs"]),
                f"{1e3 * row['predicted_seconds']:,.1f} ms",
                share,
            ]
        )
    head = ["code", "step", "recompute", "launches", "waits of the host", "predicted", "predicted rate"]
    return f"{table(head, lines)}\n\n{made_by('launches_7b.jsonl', rows)}"


def compiled() -> str:
    """The most registers and shared memory that a form of a table takes."""
    rows = json.loads((ROWS / "compile_report.json").read_text(encoding="utf-8"))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        kernel_rows = [row for row in rows if row["kernel"] == kernel]
        cells = []
        for arch in ARCHS:
            forms = [row for row in kernel_rows if row["arch"] == arch]
            cells.append(f"{max(r['registers'] for r in forms)}, {max(r['shared_bytes'] for r in forms) / 1024:.0f}")
        names = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
        used = [name for name in names if any(r["counts"].get(name) for r in kernel_rows if r["arch"] == 90)]
        lines.append([kernel, str(len(kernel_rows)), *cells, ", ".join(used) or "-"])
    spilled = sum(bool(row["spill_store_bytes"] + row["spill_load_bytes"]) for row in rows)
    head = ["table", "forms", *(f"sm_{arch}: registers, KB" for arch in ARCHS), "products and loads on sm_90"]
    note = f"{len(rows):,} forms, of which {spilled or 'none'} spill."
    return f"{table(head, lines)}\n\n{note} {made_by('compile_report.json', rows)}"


TABLES: dict[str, Callable[[], str]] = {
    "generation": generation,
    "serving": serving,
    "sharded": sharded,
    "train_step": train_step,
    "mixture": mixture,
    "launches": launches,
    "compiled": compiled,
}


def filled(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: the page names a table that is not known.
    """
    return MARKED.sub(lambda m: f"<!-- rows: {m[1]} -->\n{TABLES[m[1]]()}\n<!-- /rows -->", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; returns the exit status."""
    parser = Parser("python -m benchmarks.results_pages", __doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is not what its rows make")
    options = parser.parse_args(arguments)
    stale = []
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new == text:
            continue
        stale.append(path)
        if not options.check:
            path.write_text(new, encoding="utf-8")
        print(f"{'stale' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
