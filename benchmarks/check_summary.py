"""summary.md and roofline.html of a GPU check, out of the rows that are there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kernel_rows, roofline
from benchmarks.check_files import LINE_CHARACTERS, ROOFLINE, ROWS, SUMMARY, read_lines
from benchmarks.phase_processes import Outcome
from wizard_engine.runtime.files import write_text

Row = dict[str, Any]
KEPT = ("driver", "torch", "triton", "ptxas", "cuda", "python", "commit", "power_limit_watt", "max_sm_mhz")
MOST_LINES = 200


def report(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Write both files anew."""
    rows = read_lines(out / ROWS)
    write_text(out / SUMMARY, summary(rows, outcomes))
    if kernels := [row for row in rows if "op" in row]:
        write_text(out / ROOFLINE, roofline.page_of(kernels))


def figures(rows: Sequence[Row], name: str) -> list[Any]:
    """What rows say under a name, in their order."""
    return [row[name] for row in rows if name in row]


def summary(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    """Phases, environment, ceilings, what is wrong, training step, rollout, kernels."""
    about = next(iter(figures(rows, "environment")), {})
    sections = [f"# GPU check: {about.get('gpu', 'unknown GPU')}, {about.get('date', '')[:10]}", "`make gpu-check`"]
    sections.append(", ".join(f"{name} {about[name]}" for name in KEPT if about.get(name)))
    lines = [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.note.replace('|', '/')} |" for o in outcomes]
    sections.append("\n".join(["| phase | status | s | |", "|---|---|---|---|", *lines]))
    sections += _ceilings_text(figures(rows, "ceilings"))
    sections += (
        _wrong_text(rows) + _training_text(rows) + _rollout_text(rows) + _entries_text(rows) + _kernels_text(rows)
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _ceilings_text(ceilings: Sequence[dict[str, float]]) -> list[str]:
    """Lowest and highest rate of copies and matrix products over the phases that measured them."""
    if not ceilings:
        return []
    copy, matrix = ([row[name] for row in ceilings] for name in ("copy_gbps", "matrix_tflops"))
    return [
        f"Measured {len(ceilings)} times: copy {min(copy):,.0f} to {max(copy):,.0f} GB/s, "
        f"matrix product {min(matrix):,.0f} to {max(matrix):,.0f} TFLOP/s."
    ]


def _wrong_text(rows: Sequence[Row]) -> list[str]:
    """Everything of this project's that is wrong, failed or lost the device."""
    bad = [row for row in rows if row.get("status") in ("wrong", "error", "lost") and row.get("is_ours", True)]
    lines = [
        f"- {row.get('from', '')} {row.get('case', '')} {row.get('variant', '')} {row['status']}: {row.get('note', '')}"
        for row in bad
    ]
    notices = [row["cut"] for row in rows if "cut" in row]
    lines = [line[:LINE_CHARACTERS] for line in lines[:MOST_LINES]] + [f"- rows cut: {text}" for text in notices[:3]]
    return ["## Not right", "\n".join(lines)] if lines else []


def _training_text(rows: Sequence[Row]) -> list[str]:
    steps, planned = figures(rows, "train_step"), [row for row in rows if "prediction" in row]
    if not steps:
        return []
    from benchmarks import train_step

    lines = [f"- {train_step.text_of(row)}" for row in steps]
    lines += [
        f"- predicted {row['prediction']['predicted_seconds']:.3f} s, measured {row['measured_seconds']:.3f} s: "
        f"{row['measured_over_predicted']:.2f} times as long"
        for row in planned
    ]
    return ["## Training step", "\n".join(lines)]


def _rollout_text(rows: Sequence[Row]) -> list[str]:
    rollouts = figures(rows, "rollout")
    if not rollouts:
        return []
    from benchmarks import rollout

    return ["## Rollout", "\n".join(f"- {rollout.text_of(row)}" for row in rollouts)]


def _entries_text(rows: Sequence[Row]) -> list[str]:
    entries = figures(rows, "entry")
    if not entries:
        return []
    return ["## Table entries", f"{len(entries)} checked, {sum(bool(row['wrong']) for row in entries)} wrong"]


def _kernels_text(rows: Sequence[Row]) -> list[str]:
    kernels = [row for row in rows if "op" in row]
    wrong = [kernel_rows.line_of(row) for row in kernels if row["status"] in ("wrong", "error")][:MOST_LINES]
    shown = ["```\n" + "\n".join(wrong) + "\n```"] if wrong else []
    return ["## Kernels", kernel_rows.markdown(kernels), *shown] if kernels else []
