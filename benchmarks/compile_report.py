"""Compiles every table entry for its architecture, with no GPU, and reports what the machine code takes and does.

  python -m benchmarks.compile_report                               all tables, sm_80, 86, 90 and 100
  python -m benchmarks.compile_report --arch 90 --kernel attention_forward --json report.json
  python -m benchmarks.compile_report --against OLD.json            what changed since an older report
  python -m benchmarks.compile_report --markdown                    the summary as a Markdown table
  python -m benchmarks.compile_report --model                       attention's variants, ranked by the issue model
  python -m benchmarks.compile_report --search attention_forward --arch 90 --width 128

Exit status: 0; 1 where an entry spills, takes too much shared memory, does not compile or breaks a promise (TMA, HGMMA,
asynchronous wgmma, overlap), each named; 2 for a wrong command line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import triton
from tqdm import tqdm
from triton import knobs

from benchmarks.__main__ import environment
from benchmarks.command_line import Parser
from benchmarks.compile_rows import Row, compile_all, problems
from benchmarks.launch_forms import Case, cases
from benchmarks.machine_code import ptxas_version
from kernels import configuration
from wizard_engine.runtime.files import write_text

ARCHS = ("80", "86", "90", "100")
COMMITTED = Path(__file__).parent / "results" / "compile_report.json"
# What two reports are compared in, besides the counts of instructions.
COMPARED = (
    "config",
    "registers",
    "spill_store_bytes",
    "spill_load_bytes",
    "stack_bytes",
    "shared_bytes",
    "num_warps",
    "blocks",
    "load_bytes",
    "store_bytes",
    "specialised",
    "serialised",
    "loop",
    "loop_spills",
    "overlapped",
    "error",
)


def about(arch: int) -> dict[str, str]:
    """What a row depends on besides its entry: commit, versions, date."""
    known = environment()
    versions = {"triton": triton.__version__, "torch": known["torch"], "ptxas": ptxas_version(arch)}
    return {"commit": known["commit"], **versions, "date": known["date"]}


def line_of(row: Row) -> str:
    """The aligned line of a row, its problems behind."""
    name = f"{row['label']:66}"
    wrong = "; ".join(problems(row))
    if "error" in row:
        return f"{name} {wrong}"
    shared, spilled = row["shared_bytes"] / 1024, row["spill_store_bytes"] + row["spill_load_bytes"]
    text = f"{name} {row['num_warps']:2} warps {row['registers']:3} registers {spilled:5} B spilled {shared:6.1f} KB"
    text += f" {row['blocks']:2} blocks {row['occupancy']:4.0%}  {row['load_bytes']:2}/{row['store_bytes']:<2} B wide"
    text += f"  loop {row['loop']:5}  " + " ".join(f"{name} {n}" for name, n in row["counts"].items())
    return f"{text}   {wrong}".rstrip()


def differences(old: Row, new: Row) -> list[str]:
    """`registers 187 -> 190` for everything that two rows of one label differ in."""
    changes = [f"{name} {old.get(name)} -> {new.get(name)}" for name in COMPARED if old.get(name) != new.get(name)]
    before, now = old.get("counts", {}), new.get("counts", {})
    names = sorted(before.keys() | now.keys())
    return changes + [f"{n} {before.get(n, 0)} -> {now.get(n, 0)}" for n in names if before.get(n, 0) != now.get(n, 0)]


def diff(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Lines for the rows that changed, came or went in the tables of `new`, and one that counts them."""
    before, now = {row["label"]: row for row in old}, {row["label"]: row for row in new}
    covered = {(row["kernel"], row["arch"]) for row in new}
    changed = {label: differences(before[label], row) for label, row in now.items() if label in before}
    lines = [f"{label}: {', '.join(changes)}" for label, changes in changed.items() if changes]
    came = [label for label in now if label not in before]
    went = [label for label, row in before.items() if label not in now and (row["kernel"], row["arch"]) in covered]
    counted = f"{len(lines)} changed, {len(changed) - len(lines)} same, {len(came)} new, {len(went)} gone"
    return lines + [f"{label}: new" for label in came] + [f"{label}: gone" for label in went] + [counted]


def markdown(rows: Sequence[Row]) -> str:
    """A table with a line per kernel and architecture: the most that an entry takes, and what is wrong."""
    lines = [
        "| kernel | sm_ | forms | registers | spilled | shared memory | blocks per SM | products | loads | wrong |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, arch in dict.fromkeys((row["kernel"], row["arch"]) for row in rows):
        lines.append(_summary(kernel, arch, [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]))
    versions = {(row["triton"], row["ptxas"]) for row in rows if "triton" in row}
    made = ", ".join(f"triton {t} with ptxas {p}" for t, p in sorted(versions))
    return "\n".join([*lines, "", f"Made by `python -m benchmarks.compile_report --markdown`: {made}."])


def _summary(kernel: str, arch: int, rows: Sequence[Row]) -> str:
    compiled = [row for row in rows if "error" not in row]
    wrong = sum(bool(problems(row)) for row in rows)
    if not compiled:
        return f"| {kernel} | {arch} | {len(rows)} | | | | | | | {wrong} |"

    def used(*names: str) -> str:
        return ", ".join(name for name in names if any(row["counts"].get(name) for row in compiled)) or "-"

    registers, blocks = [[row[name] for row in compiled] for name in ("registers", "blocks")]
    spilled = max(row["spill_store_bytes"] + row["spill_load_bytes"] for row in compiled)
    shared = max(row["shared_bytes"] for row in compiled) / 1024
    return (
        f"| {kernel} | {arch} | {len(rows)} | {min(registers)} to {max(registers)} | {spilled} B | {shared:.0f} KB | "
        f"{min(blocks)} to {max(blocks)} | {used('HGMMA', 'HMMA', 'UTCMMA')} | {used('UTMALDG', 'LDGSTS')} | {wrong} |"
    )


def report(chosen: Sequence[Case], jobs: int) -> list[Row]:
    """The rows of cases, with a bar, and a line for each."""
    with tqdm(total=len(chosen), desc="compile", unit="form", disable=None) as bar:
        rows = compile_all(chosen, jobs, bar.update)
    made = {arch: about(arch) for arch in dict.fromkeys(case.arch for case in chosen)}
    return [row | made[row["arch"]] for row in rows]


def as_json(rows: Sequence[Row]) -> str:
    """A JSON array with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.compile_report", __doc__ or "")
    parser.add_argument("--arch", nargs="+", metavar="N", help=f"of {', '.join(ARCHS)}; default: all")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="tables; default: all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows")
    parser.add_argument(
        "--against", type=Path, metavar="OLD.json", help="default: the committed report, if there is one"
    )
    parser.add_argument("--markdown", action="store_true", help="print the summary as a Markdown table")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes, 0: this one; default %(default)s")
    parser.add_argument("--model", action="store_true", help="rank variants of attention by the issue model")
    parser.add_argument("--search", metavar="KERNEL", help="rank configurations of an attention table")
    parser.add_argument("--width", nargs="+", type=int, metavar="N", help="head widths of --search; default 64 to 256")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line says; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    archs = [int(arch) for arch in parser.names("--arch", options.arch, ARCHS)]
    names = parser.names("--kernel", options.kernel, configuration.kernels())
    if options.jobs < 0:
        parser.error(f"--jobs: expected at least 0, got {options.jobs}")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: expected it unset, got 1, which compiles nothing; run env -u TRITON_INTERPRET")
    old = _older(parser, options.against)
    if options.search or options.model:
        from benchmarks import compile_search

        return compile_search.run(parser, options, archs if options.arch else [90])
    rows = report([case for name in names for arch in archs for case in cases(name, arch)], options.jobs)
    print("\n".join(line_of(row) for row in rows))
    if options.json:
        write_text(options.json, as_json(rows))
        print(f"written: {options.json}")
    if options.markdown:
        print(markdown(rows))
    if old is not None:
        print("\n".join(diff(old, rows)))
    return _verdict(rows)


def _older(parser: Parser, path: Path | None) -> list[Row] | None:
    """Rows of the report to compare with; None where none is asked for and none is committed."""
    if path is None and not COMMITTED.is_file():
        return None
    path = path or COMMITTED
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"--against: expected a report that --json wrote, got {path} ({error})")


def _verdict(rows: Sequence[Row]) -> int:
    wrong = {row["label"]: reasons for row in rows if (reasons := problems(row))}
    for label, reasons in wrong.items():
        print(f"wrong: {label}: {'; '.join(reasons)}", file=sys.stderr)
    print(f"{len(rows)} forms, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
