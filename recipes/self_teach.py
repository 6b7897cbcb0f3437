"""Self-teaching: a model's own samples of selected prompts become supervised and preference rows.

    python recipes/self_teach.py --data rows.jsonl --agents.student runs/sft/model --out runs/self_teach
    python recipes/self_teach.py --data rows.jsonl --agents.student DIR --agents.labeller world:judge --out X

Writes OUT/sft.jsonl, OUT/preferences.jsonl, OUT/scores.jsonl (the active-learning score of every prompt),
OUT/processes.jsonl (answers with a label per step for the process reward model, with --agents.labeller) and
OUT/report.json. Every call goes through OUT/ledger.sqlite: a resumed run repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime, world
from wizard_engine.agents import Cast
from wizard_engine.agents.missing import MAX_MISSING, check_share
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Conversation, Process
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import (
    AtLeastTwo,
    Checked,
    Count,
    NonNegative,
    PositiveShare,
    Seed,
    Share,
    Temperature,
    ranged,
)
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.synthesis import label_processes, self_teach
from wizard_engine.synthesis.calls import JUDGE_TOKENS, check_calls
from wizard_engine.synthesis.inputs import open_inputs
from wizard_engine.synthesis.outputs import write_outputs

Rating = ranged(0, 10)


@dataclass(frozen=True)
class Agents:
    """The agent of each role: registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""

    student: str
    """The model that teaches itself."""
    judge: str = "world:judge"
    evolver: str | None = None
    """Adds an evolution of every prompt; default: the prompts as they are."""
    labeller: str | None = None
    """Labels the steps of the student's answers; default: no process rows."""


@dataclass(frozen=True)
class Config(Checked):
    """Self-teaching: on-policy rows chosen by an active-learning score."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K; their last answers are not used."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory."""
    agents: Agents
    samples: AtLeastTwo[int] = 4
    """Samples a prompt."""
    score: Literal["spread", "flip", "margin"] = "spread"
    """spread: deviation of the samples' ratings; flip: doubt of the judge; margin: gap of best and worst."""
    keep: PositiveShare[float] = 0.5
    """Fraction of the prompts that give rows, highest scores first."""
    min_gap: NonNegative[float] = 1.0
    """Smallest gap of a preference row, points of score."""
    min_score: Rating[float] = 6.0
    """Lowest rating of a supervised row, 1 to 10."""
    label_samples: Count[int] = 2
    """Answers a prompt whose steps are labelled."""
    temperature: Temperature[float] = 1.0
    """Of the student's samples."""
    max_tokens: Count[int] = 256
    """Longest reply, tokens."""
    judge_max_tokens: Count[int] = JUDGE_TOKENS
    """Longest verdict of a judge with its explanation, tokens."""
    on_length: Literal["drop", "keep"] = "drop"
    """An answer that reached its limit: drop counts it as a failed call, keep uses it; its row has finish=length."""
    max_missing: Share[float] = field(default=MAX_MISSING, metadata=INCIDENTAL)
    """Largest share of a task's calls, 0 to 1, that may give nothing; above it the stage ends with an error."""
    limit: Count[int | None] = None
    """Rows read at most."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    seed: Seed[int] = 0
    chat_format: ChatFormatChoice = "auto"
    """Of local models: auto is a directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a
    .jinja file."""
    batch_size: Count[int] = field(default=256, metadata=INCIDENTAL)
    """Calls of one transaction, and conversations generated together."""
    device: str = field(default="auto", metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)


def label(cfg: Config, cast: Cast, rows: Sequence[Conversation]) -> tuple[list[Process], dict[str, Any]]:
    """Process rows from the student's answers, and their statistics; none without a labeller."""
    if cfg.agents.labeller is None:
        return [], {}
    statistics: dict[str, Any] = {}
    processes = label_processes(
        rows,
        student=cast.agent(cfg.agents.student),
        labeller=cast.agent(cfg.agents.labeller),
        samples=cfg.label_samples,
        temperature=cfg.temperature,
        seed=cfg.seed,
        max_tokens=cfg.max_tokens,
        judge_max_tokens=cfg.judge_max_tokens,
        on_length=cfg.on_length,
        statistics=statistics,
    )
    return processes, statistics


def main(cfg: Config) -> dict:
    """Sample, judge, select; returns the report."""
    check_share(cfg.max_missing)
    rt = runtime.start(cfg.device)
    world.register()
    stage = open_stage(cfg, "self_teach", rt)
    if stage.done:
        return stage.result()
    cast, rows, rejected = open_inputs(cfg, rt)
    selected = self_teach(
        rows,
        student=cast.agent(cfg.agents.student),
        judge=cast.agent(cfg.agents.judge),
        evolver=cast.optional(cfg.agents.evolver),
        samples=cfg.samples,
        score=cfg.score,
        keep=cfg.keep,
        min_gap=cfg.min_gap,
        min_score=cfg.min_score,
        temperature=cfg.temperature,
        seed=cfg.seed,
        max_tokens=cfg.max_tokens,
        judge_max_tokens=cfg.judge_max_tokens,
        on_length=cfg.on_length,
    )
    processes, labels = label(cfg, cast, rows)
    for calls in (selected.statistics["calls"], labels.get("calls", {})):
        check_calls(calls, cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **selected.statistics, "labels": labels}
    files = {"sft": selected.sft, "preferences": selected.preferences, "processes": processes}
    outputs = from_main(rt, lambda: write_outputs(cfg.out, files, {"scores": selected.scores}, report))
    cast.close()
    if rt.is_main and not cfg.quiet:
        print(f"{selected.statistics['selected']} of {selected.statistics['prompts']} prompts selected by {cfg.score}:")
        print(f"{len(selected.sft)} supervised, {len(selected.preferences)} preference, {len(processes)} process rows")
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
