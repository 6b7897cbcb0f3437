"""Configurations of attention ranked by the issue model, before a GPU is at hand: alternatives to the tables' entries.

`--model` ranks variants that are worth comparing and the entries, at width 128 in bf16, and a probe with specialised
warps beside them. `--search` ranks what
`benchmarks.tune` would try for a table: blocks of 32 to 128 rows and columns, 4 and 8 warps, 1 to 3 stages, the
variants of the forward, only TMA where the entry uses it, less what cannot fit. Those come first whose every form
(causal, windowed, full) compiles without a spill, fits and keeps its promises. Shares are modelled: of the tensor
cores' peak in the main loop, unmasked blocks, at equal clocks. They are for ranking.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks import attention_probes
from benchmarks.command_line import Parser
from benchmarks.compile_rows import Row, compile_all, compile_case, problems
from benchmarks.issue_costs import TENSOR_FLOPS
from benchmarks.issue_model import PRODUCTS, estimate
from benchmarks.launch_forms import Case, cases_of, launch_of, text_of
from benchmarks.machine_code import compile_launch
from benchmarks.tune_targets import Target, candidates
from kernels import configuration

WIDTHS = (64, 96, 128, 256)
SEARCHED_FORMS = ("causal bf16", "windowed bf16", "full bf16")
# Variants whose order is known from publications (see `issue_model`), and tiles next to theirs.
COMPARED: dict[str, tuple[dict[str, Any], ...]] = {
    "attention_forward": tuple(
        {"VARIANT": variant, "BLOCK_M": m, "BLOCK_N": n, "TMA": True, "num_warps": warps, "num_stages": stages}
        for variant, m, n, warps, stages in (
            ("plain", 128, 128, 8, 2),
            ("plain", 128, 128, 8, 3),
            ("plain", 128, 64, 8, 3),
            ("rotated", 128, 128, 8, 2),
            ("rotated", 128, 64, 8, 2),
            ("rotated", 128, 64, 8, 3),
        )
    ),
    "attention_backward_kv": tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "TMA": True, "num_warps": 8, "num_stages": stages}
        for m, n, stages in ((64, 128, 2), (64, 128, 1), (32, 128, 3), (32, 128, 2), (64, 64, 3))
    ),
    "attention_backward_q": tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "TMA": True, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 1), (128, 128, 8, 2), (64, 64, 4, 2))
    ),
}


def modelled(case: Case) -> Row:
    """The row of a case with what the issue model makes of its main loop, under `model`, where it compiles."""
    row = compile_case(case)
    if "error" in row:
        return row
    launch = launch_of(case)
    code = compile_launch(launch, case.arch)
    model = estimate(code, launch)
    if model is not None:
        row["model"] = {
            "share": model.share,
            "cycles": model.cycles,
            "roof": model.roof,
            "serial": model.serial,
            "limit": model.limit,
            "overlapped": model.overlapped,
            "pipes": model.pipes,
        }
    return row


def ranked(groups: Mapping[str, Sequence[Row]]) -> list[tuple[str, Sequence[Row]]]:
    """Configurations by their name, those that keep every promise first, then by the mean of their forms' shares."""

    def key(item: tuple[str, Sequence[Row]]) -> tuple[bool, float]:
        rows = item[1]
        shares = [row.get("model", {}).get("share", 0.0) for row in rows]
        return any(problems(row) for row in rows), -sum(shares) / len(shares)

    return sorted(groups.items(), key=key)


def line_of(name: str, rows: Sequence[Row]) -> str:
    """Share of peak and limit of each form, resources, and the first thing that is wrong."""
    wrong = [f"{row['form']}: {reasons[0]}" for row in rows if (reasons := problems(row))]
    text = f"{name:72}"
    for row in rows:
        model = row.get("model")
        text += f" {row['form'].split()[0]:8} {model['share']:4.0%} {model['limit']:14}" if model else f" {'':27}"
    compiled = [row for row in rows if "error" not in row]
    if compiled:
        text += f" {max(row['registers'] for row in compiled):3} registers"
        text += f" {max(row['shared_bytes'] for row in compiled) // 1024:3} KB {compiled[0]['blocks']} blocks"
    return f"{text}   {'; '.join(wrong)}".rstrip()


def compare(table: str, arch: int, width: int, configs: Sequence[Mapping[str, Any]], jobs: int) -> list[str]:
    """Lines of the configurations of one class, best first."""
    shape = {"width": width, "bytes": 2}
    unique = {text_of(tuple(config.items())): config for config in configs}
    chosen = {
        name: [case for case in cases_of(table, arch, shape, config) if case.form in SEARCHED_FORMS]
        for name, config in unique.items()
    }
    flat = [case for cases in chosen.values() for case in cases]
    with tqdm(total=len(flat), desc=f"{table} sm_{arch} width {width}", unit="form", disable=None) as bar:
        rows = compile_all(flat, jobs, bar.update, modelled)
    groups: dict[str, list[Row]] = {name: [] for name in chosen}
    for row in rows:
        groups[text_of(tuple(row["config"].items()))].append(row)
    return [line_of(name, group) for name, group in ranked(groups)]


def searched(table: str, arch: int, width: int) -> list[dict[str, Any]]:
    """The entry of a class and its alternatives; only those with TMA where the entry has it."""
    target = Target.of(table, {"width": width, "bytes": 2})
    entry = entry_of(table, arch, width)
    return [config for config in candidates(target, arch, entry) if config["TMA"] or not entry["TMA"]]


def entry_of(table: str, arch: int, width: int) -> dict[str, Any]:
    """Configuration that a table gives for bf16 heads of a width."""
    keys = {"width": width, "bytes": 2}
    entries = [e for e in configuration.table(table) if e["class"] == keys and e["arch"] == arch]
    if not entries:
        raise ValueError(f"{table}: expected an entry for {keys} on sm_{arch}, found none; choose another --width")
    return entries[0]["config"]


def run(parser: Parser, options: Namespace, archs: Sequence[int]) -> int:
    """Prints what `--model` or `--search` asks for."""
    if options.search and options.search not in PRODUCTS:
        parser.names("--search", [options.search], tuple(PRODUCTS))
    for arch in archs:
        if arch not in TENSOR_FLOPS:
            parser.error(f"--arch: expected some of {', '.join(map(str, TENSOR_FLOPS))} for the model, got {arch}")
    try:
        for arch in archs:
            _print(options, arch)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _print(options: Namespace, arch: int) -> None:
    tables = [options.search] if options.search else list(PRODUCTS)
    for table in tables:
        for width in (options.width or WIDTHS) if options.search else (128,):
            entry = entry_of(table, arch, width)
            configs = searched(table, arch, width) if options.search else [entry, *COMPARED[table]]
            print(f"\n{table} sm_{arch} width {width} bf16; the table has {text_of(tuple(entry.items()))}", flush=True)
            print("\n".join(compare(table, arch, width, configs, options.jobs)), flush=True)
            if table == "attention_forward" and arch == 90 and not options.search:
                print("\n".join(attention_probes.lines(arch)), flush=True)
