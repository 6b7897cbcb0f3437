"""Summary and report of a progressive run, from the files of its stages."""

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wizard_engine.agents.ledger import Ledger
from wizard_engine.data.final_answers import extract_answer
from wizard_engine.runtime.files import read_object, write_json
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.runtime.process import Runtime

from . import run_facts
from .method_search import method_searches
from .report import Details, write_report

Measured = tuple[int, str, Path]
PLAIN_ATTRIBUTES = ("topic", "language", "source", "skill", "difficulty", "toxic")


class Timing:
    """Seconds of each stage, kept over restarts in a JSON file, and beside it those of stages that were interrupted."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path, self.runtime = path, runtime
        self.seconds: dict[str, float] = read_object(path) or {}
        self.open_path = path.with_stem(f"{path.stem}_interrupted")
        self.open: dict[str, float] = read_object(self.open_path) or {}

    @contextmanager
    def of(self, name: str, out: Path) -> Iterator[None]:
        """Time a block; a skipped stage keeps its former time, and one that goes on has that of its former starts."""
        record = out / "stage.json"
        before = record.stat().st_mtime_ns if record.exists() else None
        began, is_whole = time.perf_counter(), False
        try:
            yield
            is_whole = True
        finally:
            spent = self.open.get(name, 0.0) + time.perf_counter() - began
            made = record.exists() and record.stat().st_mtime_ns != before
            if self.runtime.is_main and is_whole and (made or name not in self.seconds):
                self.seconds[name] = round(spent, 2)
                write_json(self.path, self.seconds)
            if self.runtime.is_main and (not is_whole or self.open.pop(name, None) is not None):
                self.open |= {} if is_whole else {name: round(spent, 2)}
                write_json(self.open_path, self.open)


def write_summary(
    out: Path,
    seed: int,
    seconds: float,
    measured: Sequence[Measured],
    arena: Path,
    timing: dict[str, float],
    *,
    slices: int,
    about: Details | None = None,
) -> dict[str, Any]:
    """Write OUT/summary.json and OUT/report.html; returns the summary.

    Args:
        measured: (slice, stage name, directory of recipes/accuracy.py), in order; may be empty.
        arena: directory of recipes/arena.py, which may be absent.
        timing: seconds per stage directory, relative to OUT.
        about: what the page says beside what the stages' files hold, for a run that is not of the embedded world.
    """
    measured = [(index, name, path) for index, name, path in measured if (path / "accuracy.json").exists()]
    stages = [_stage(index, name, path, timing) for index, name, path in measured]
    battles = _read(arena / "arena.json")
    keys = (
        "a",
        "b",
        "wins",
        "losses",
        "ties",
        "win_rate",
        "ci95",
        "win_rate_with_ties",
        "ci95_with_ties",
        "errors",
        "missing",
    )
    pairs = [{key: pair[key] for key in keys} for pair in battles.get("pairwise", [])]
    tests = {
        path.parent.name.removeprefix("mt_bench_"): _read(path) for path in sorted(out.glob("mt_bench_*/mt_bench.json"))
    }
    summary = {
        "seed": seed,
        "seconds": round(sum(timing.values()), 1),
        "seconds_last_start": round(seconds, 1),
        "stages": stages,
        "pairwise": pairs,
        "elo": battles.get("elo", []),
        "mt_bench": {name: _mt_scores(report) for name, report in tests.items()},
    }
    held_out = run_facts.held_out_measures(out)
    if held_out:
        summary["held_out"] = held_out
    write_json(out / "summary.json", summary)
    contents = details(out, slices, measured, battles, tests, timing)
    contents |= {"held_out": held_out} if held_out else {}
    if about is not None:
        contents = contents | about | own_details(out, about, summary, measured, tests, timing, slices)
    else:
        contents["command"] = f"make demo SEED={seed}"
    write_report(out / "report.html", summary, out, contents)
    return summary


def own_details(
    out: Path,
    about: Details,
    summary: dict[str, Any],
    measured: Sequence[Measured],
    tests: dict[str, Any],
    timing: dict[str, float],
    slices: int,
) -> Details:
    """Contents of the report of a run that is not of the embedded world."""
    starts = about.get("starts", {})
    bought = run_facts.own_shares(out) + run_facts.exact_answers(measured, starts)
    bought += run_facts.preferences(summary["pairwise"], slices, starts) + run_facts.ratings(tests, slices)
    graph = [stage | run_facts.stage_facts(out, stage["stage"], timing) for stage in about.get("graph", [])]
    prompts, held_out = about.get("prompts"), about.get("held_out_files", ())
    return {
        "data_flow": data_flow(out, slices),
        "graph": graph,
        "agents": run_facts.agents_used(out, about.get("agents", [])),
        "bought": bought,
        "learned": run_facts.learned_shares(out, slices),
        "own_examples": run_facts.examples(out, prompts, held_out, slices),
    }


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) or {}


def _stage(index: int, name: str, path: Path, timing: dict[str, float]) -> dict[str, Any]:
    counted = _read(path / "accuracy.json")
    spent = sum(
        value for key, value in timing.items() if key == ("base" if name == "base" else f"slice_{index}/{name}")
    )
    chosen = {key: counted[key] for key in ("accuracy", "correct", "total", "sampled_accuracy", "sampled_correct")}
    missing = {key: counted[key] for key in ("missing", "sampled_missing") if counted.get(key)}
    return {"slice": index, "name": name, **chosen, **missing, "seconds": spent}


def _mt_scores(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "overall": report["overall"]["score"],
        "turns": [turn["score"] for turn in report["turns"]],
        "missing": report["overall"]["missing"],
        "categories": {name: mean["score"] for name, mean in report["categories"].items()},
    }


def details(
    out: Path,
    last: int,
    measured: Sequence[Measured],
    battles: dict[str, Any],
    tests: dict[str, Any],
    timing: dict[str, float],
) -> Details:
    """Contents of the report beside the summary; last: the last slice."""
    return {
        "data_flow": data_flow(out, last, "mixed quality, skewed"),
        "attributes": attribute_shifts(_read(out / "sample" / "sampling.json")),
        "method_searches": method_searches(out, last),
        "evolved": evolved_chain(out),
        "curves": curves(out, last),
        "examples": examples([(name, path) for index, name, path in measured if index == last]),
        "elo": battles.get("elo", []),
        "mt_bench": [{"model": name, **_mt_scores(report)} for name, report in tests.items()],
        "calls": calls(out),
        "machine": machine(out),
        "timing": [{"name": name, "seconds": value} for name, value in timing.items()],
        "phases": phases(out, last),
    }


PHASES = ("hand_over", "generate", "score", "train")


def phases(out: Path, slices: int) -> list[dict[str, Any]]:
    """Mean seconds of each phase of a rollout step of RLEIF, slice by slice, without the first step, which warms up."""
    slice_phases = []
    for index in range(1, slices + 1):
        path = out / f"slice_{index}" / "rleif" / "metrics.jsonl"
        rows = [row for row in (read_metrics(path) if path.exists() else []) if "generate_seconds" in row][1:]
        if not rows:
            continue

        def mean(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return sum(row[name] for row in rows) / len(rows)

        slice_phases.append(
            {
                "name": f"slice {index}",
                "steps": len(rows),
                "step": mean("seconds"),
                "tail_idle": mean("tail_idle"),
                "seconds": {name: mean(f"{name}_seconds") for name in PHASES},
                "difference": max(row["ratio_error"] for row in rows),
            }
        )
    return slice_phases


def data_flow(out: Path, slices: int, about_rows: str = "") -> list[dict[str, Any]]:
    """The steps of the data, with counts.

    Args:
        about_rows: what is said of the natural rows.
    """
    sampling = _read(out / "sample" / "sampling.json").get("counts", {})
    nodes = [{"name": "Natural rows", "count": sampling.get("rows", 0), "note": about_rows}]
    reasons = ("exact_duplicate", "near_duplicate", "contaminated", "held_out")
    removed = {key: value for key, value in sampling.items() if key in reasons and value}
    note = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in removed.items())
    nodes.append({"name": "Clean rows", "count": sampling.get("clean", 0), "note": note})
    nodes.append({"name": "Weighted sample", "count": sampling.get("drawn", 0), "note": f"{slices} slices"})
    for index in range(1, slices + 1):
        at, lane = out / f"slice_{index}", f"Slice {index}"
        evolved = _read(at / "evol_instruct" / "report.json").get("counts", {})
        if evolved:
            note = f"{evolved['evolved']} evolved from {evolved['given']}"
            nodes.append(
                {"name": "Evol Lab", "count": evolved["given"] + evolved["evolved"], "note": note, "lane": lane}
            )
        taught = _read(at / "co_teach" / "report.json")
        if taught:
            nodes.append(
                {"name": "Co-teaching", "count": _lines(at / "co_teach" / "sft.jsonl"), "note": "lessons", "lane": lane}
            )
        nodes.append(
            {"name": "SFT rows", "count": _lines(at / "rows" / "slice_1.jsonl"), "note": "clean again", "lane": lane}
        )
        steps, mixed = _lines(at / "self_teach" / "processes.jsonl"), _read(at / "pairs" / "mix.json").get("files", [])
        sources = [f"{line['taken']} of {Path(line['file']).parent.name}" for line in mixed if line["taken"]]
        pairs = _lines(at / "pairs" / "rows.jsonl")
        nodes.append({"name": "Stage-DPO pairs", "count": pairs, "note": ", ".join(sources), "lane": lane})
        nodes.append({"name": "Labelled answers", "count": steps, "note": "for the process reward", "lane": lane})
    return nodes


def _lines(path: Path) -> int:
    return sum(1 for line in path.open("rb") if line.strip()) if path.exists() else 0


def attribute_shifts(report: dict[str, Any], most: int = 9) -> list[dict[str, Any]]:
    """Shares per value of the plain attributes: natural, target, drawn."""
    natural, target, drawn = (report.get(key, {}) for key in ("natural", "target", "drawn"))
    shifts = []
    for name in PLAIN_ATTRIBUTES:
        if name not in natural:
            continue
        values = sorted(natural[name], key=lambda value: -natural[name][value])[:most]
        shares = target.get(name)
        shifts.append(
            {
                "attribute": name,
                "values": values,
                "natural": [natural[name].get(value, 0.0) for value in values],
                "target": None if shares is None else [shares.get(value, 0.0) for value in values],
                "achieved": [drawn.get(name, {}).get(value, 0.0) for value in values],
            }
        )
    return shifts


def evolved_chain(out: Path) -> list[dict[str, str]]:
    """A natural row and its forms after Evol-Instruct and Evol-Answer: the first of the longest in-depth chains."""
    instructed = _rows(out / "slice_1" / "evol_instruct" / "rows.jsonl")
    answered = {row["messages"][-2]["content"]: row for row in _rows(out / "slice_1" / "evol_answer" / "rows.jsonl")}
    by_id = {row["id"]: row for row in instructed}
    best: list[dict] = []
    best_rank = (0, False)
    for row in instructed:
        chain = [row]
        while (parents := chain[0]["lineage"].get("parents")) and parents[0] in by_id:
            chain.insert(0, by_id[parents[0]])
        rank = (len(chain), row["lineage"].get("operator") != "breadth")
        if rank > best_rank and len(row["messages"]) == 2:
            best, best_rank = chain, rank
    steps = []
    for number, row in enumerate(best):
        question, answer = (message["content"] for message in row["messages"][-2:])
        steps.append(
            {
                "operator": row["lineage"].get("operator", "") if number else "",
                "instruction": question,
                "answer": answer,
            }
        )
        final = answered.get(question)
        if final and final["messages"][-1]["content"] != answer:
            text = final["messages"][-1]["content"]
            steps.append({"operator": "Evol-Answer", "instruction": question, "answer": text})
    return steps


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def curves(out: Path, slices: int) -> dict[str, list[tuple[float, float]]]:
    """Learning curves: losses of base, supervised and preference training, reward and KL of RLEIF, per slice."""
    series = {"base loss/base": _series(out / "base" / "metrics.jsonl", "loss")}
    for index in range(1, slices + 1):
        at, label = out / f"slice_{index}", f"slice {index}"
        series[f"supervised loss/{label}"] = _series(at / "sft" / "metrics.jsonl", "loss")
        series[f"RLEIF reward/{label}"] = _series(at / "rleif" / "metrics.jsonl", "reward")
        series[f"RLEIF KL to the reference, nats per token/{label}"] = _series(at / "rleif" / "metrics.jsonl", "kl_k1")
        dpo = [
            point for part in sorted(at.glob("stage_dpo/stage_*/metrics.jsonl")) for point in _series(part, "margin")
        ]
        series[f"Stage-DPO margin/{label}"] = [(float(n), value) for n, (_, value) in enumerate(dpo, 1)]
    return {name: points for name, points in series.items() if points}


def _series(path: Path, name: str, most: int = 120) -> list[tuple[float, float]]:
    """(step, value) of a metric, averaged over equal windows down to `most` points."""
    if not path.exists():
        return []
    points = [(float(line["step"]), float(line[name])) for line in read_metrics(path) if name in line]
    width = max(1, -(-len(points) // most))
    windows = [points[i : i + width] for i in range(0, len(points), width)]
    return [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]


def examples(stages: Sequence[tuple[str, Path]], most: int = 4) -> list[dict[str, Any]]:
    """Held-out problems that the first stage got wrong and the last one right: the answers of all stages."""
    if not stages:
        return []
    answers = {name: _rows(path / "answers.jsonl") for name, path in stages}
    first, final = (answers[stages[place][0]] for place in (0, -1))
    chosen = []
    for index, line in enumerate(final):
        reference = extract_answer(line["reference"])
        texts = {name: rows[index]["sampled"] for name, rows in answers.items()}
        right = {name: text is not None and extract_answer(text) == reference for name, text in texts.items()}
        if None not in texts.values() and right[stages[-1][0]] and not right[stages[0][0]] and len(line["prompt"]) > 90:
            chosen.append(
                {"prompt": line["prompt"], "reference": line["reference"], "answers": texts, "correct": right}
            )
        if len(chosen) == most:
            break
    return chosen if len(first) == len(final) else []


def calls(out: Path) -> list[dict[str, Any]]:
    """Calls and failures per agent and task, over all ledgers of the run."""
    totals: dict[tuple[str, str], list[int]] = {}
    for path in sorted(out.rglob("ledger*.sqlite")):
        ledger = Ledger(path)
        for agent, tasks in ledger.counts().items():
            for task, numbers in tasks.items():
                pair = totals.setdefault((_short(agent), task), [0, 0])
                pair[0] += numbers["replies"] + numbers["failures"]
                pair[1] += numbers["failures"]
        ledger.close()
    return [{"agent": a, "task": t, "calls": n, "failures": f} for (a, t), (n, f) in sorted(totals.items())]


def _short(agent: str) -> str:
    """Short name of an agent; of a checkpoint its slice and stage."""
    parts = Path(agent).parts
    return "/".join(part for part in parts[-3:] if part != "model") if len(parts) > 2 else agent


def machine(out: Path) -> dict[str, str]:
    """Hardware, software and the size of the student."""
    config = _read(out / "base" / "model" / "config.json")
    facts = {
        "CPU": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
    }
    if config:
        facts["student"] = (
            f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, {config['vocab_size']} tokens"
        )
    return facts
