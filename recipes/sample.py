"""Weighted sampling: cleans and decontaminates rows, draws them to target marginals, and writes slices.

    python recipes/sample.py --data rows.jsonl --out runs/sample --targets targets.json --slices 3
    python recipes/sample.py --data alpaca.json gsm8k.jsonl --evaluation test.jsonl --uniform source --out runs/sample

`targets.json` holds {attribute: {value: share}}; the attributes come from recipes/analyze.py or from the data itself.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime
from wizard_engine.curation.sampling import uniform_target
from wizard_engine.curation.selection import Selection, select
from wizard_engine.data.records import Row, read_files, read_prompts, write_rows
from wizard_engine.data.text_files import read_json
from wizard_engine.runtime.files import write_json, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import AtLeastOne, Checked, Count, NonNegative, PositiveShare, Seed, Share
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.runtime.text_lines import printable


@dataclass(frozen=True)
class Dedupe(Checked):
    """Near-duplicate removal."""

    threshold: PositiveShare[float] = 0.8
    """Smallest Jaccard index of word shingles at which two rows with the same numbers are duplicates; 0 to 1."""
    shingle: Count[int] = 3
    """Words of a shingle."""
    by: Literal["prompt", "row"] = "prompt"
    """Compare the user turns, or all turns."""


@dataclass(frozen=True)
class Decontaminate(Checked):
    """Removal of rows that repeat evaluation texts."""

    n: Count[int] = 13
    """Words of an n-gram; a shorter text is compared whole."""
    min_share: Share[float] = 0.0
    """Smallest fraction of an evaluation text's n-grams for a match; 0: any one n-gram."""


@dataclass(frozen=True)
class Config(Checked):
    """Weighted sampling and partition into slices."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K, ...; of several, one may have no rows."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for slice_1.jsonl, slice_2.jsonl, ..., removed.jsonl and sampling.json."""
    evaluation: tuple[Path, ...] = ()
    """Held-out files: rows, or questions with `turns`; rows that repeat one of their prompts are removed."""
    hold_out: NonNegative[int] = 0
    """Rows to keep apart, in OUT/held_out.jsonl, before the draw; at most half of the clean ones."""
    targets: Path | None = None
    """JSON file {attribute: {value: share}}; a value may be a range of numbers, "10..20"."""
    uniform: tuple[str, ...] = ()
    """Attributes whose values all get the same share."""
    cap: AtLeastOne[float] = 5.0
    """Largest weight of a row, in mean weights."""
    size: Count[int | None] = None
    """Rows to draw; default: as many as the weights allow without repeating a row."""
    slices: Count[int] = 3
    """Random slices of equal size."""
    dedupe: Dedupe = field(default_factory=Dedupe)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    seed: Seed[int] = 0
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < self.slices:
            raise ValueError(f"size: expected at least slices={self.slices}, a row each, got {self.size}")


def read_targets(path: Path | None) -> dict[str, dict[str, float]]:
    """Targets of a JSON file, {} without one; ValueError where it is no object of objects."""
    if path is None:
        return {}
    targets = read_json(path)
    if not isinstance(targets, dict) or not all(isinstance(shares, dict) for shares in targets.values()):
        raise ValueError(f"{path}:1: expected {{attribute: {{value: share}}}}, got something else; correct the file")
    return targets


def all_targets(cfg: Config, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Targets of the file, and equal shares for the attributes of --uniform."""
    targets = read_targets(cfg.targets)
    for name in cfg.uniform:
        if name in targets:
            raise ValueError(f"uniform: expected attributes without a target in {cfg.targets}, got {name}; choose one")
        targets[name] = uniform_target([row.attributes.get(name) for row in rows])
    return targets


def write(out: Path, selection: Selection, report: dict[str, Any]) -> list[Path]:
    """Writes the slices, the removed rows' reasons and the report; returns their paths."""
    paths = [out / f"slice_{index}.jsonl" for index in range(1, len(selection.slices) + 1)]
    for path, rows in zip(paths, selection.slices):
        write_rows(path, rows)
    removed = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in selection.removed)
    write_text(out / "removed.jsonl", removed)
    write_json(out / "sampling.json", report)
    if selection.held_out:
        write_rows(out / "held_out.jsonl", selection.held_out)
        paths.append(out / "held_out.jsonl")
    return [*paths, out / "removed.jsonl", out / "sampling.json"]


def sample(cfg: Config) -> tuple[dict[str, Any], list[Path]]:
    """Reads, selects and writes; returns the report and the files written."""
    # A stage of a run may have made none, such as no answer of a model that was good enough.
    how = {"on_error": cfg.on_error, "unknown_fields": cfg.unknown_fields, "allow_empty": len(cfg.data) > 1}
    rows, bad = read_files(cfg.data, rejects=cfg.out / "rejects.jsonl", **how)
    evaluation = [prompt for path in cfg.evaluation for prompt in read_prompts(path, on_error=cfg.on_error)]
    selection = select(
        rows,
        evaluation,
        all_targets(cfg, rows),
        size=cfg.size,
        slices=cfg.slices,
        seed=cfg.seed,
        cap=cfg.cap,
        dedupe=asdict(cfg.dedupe),
        decontaminate=asdict(cfg.decontaminate),
        hold_out=cfg.hold_out,
        quiet=cfg.quiet,
    )
    report = selection.report
    report["counts"] = {"rejected": len(bad)} | report["counts"] | {"evaluation": len(evaluation)}
    return report, write(cfg.out, selection, report)


def print_report(report: dict[str, Any]) -> None:
    """Prints the counts, and natural, target, achieved and drawn shares of each targeted attribute."""
    print("  ".join(f"{name} {count}" for name, count in report["counts"].items()))
    print(f"effective sample size {report['effective_sample_size']:.0f} of {report['rows']} rows")
    for name, target in report["target"].items():
        print(f"{printable(name):24}{'natural':>9}{'target':>9}{'achieved':>9}{'drawn':>9}")
        for value, target_share in sorted(target.items(), key=lambda item: -item[1])[:20]:
            columns = [report[kind][name].get(value, 0.0) for kind in ("natural", "achieved", "drawn")]
            print(f"  {printable(value)[:21]:22}{columns[0]:9.3f}{target_share:9.3f}{columns[1]:9.3f}{columns[2]:9.3f}")


def main(cfg: Config) -> dict:
    """Samples; returns the report of sampling.json."""
    rt = runtime.start("cpu")
    stage = open_stage(cfg, "sample", rt)
    if stage.done:
        return stage.result()
    report, outputs = from_main(rt, lambda: sample(cfg))
    if rt.is_main and not cfg.quiet:
        print_report(report)
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
