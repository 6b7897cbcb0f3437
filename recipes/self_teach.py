"""Self-teaching: a model's own samples of selected prompts become supervised and preference rows.

    python recipes/self_teach.py --data rows.jsonl --agents.student runs/sft/model --out runs/self_teach
    python recipes/self_teach.py --data gsm8k.jsonl --references answers --agents.student DIR --out X \
        --agents.judge reference:judge --agents.labeller reference:labeller

Writes OUT/sft.jsonl, OUT/preferences.jsonl, OUT/scores.jsonl (the active-learning score of every prompt),
OUT/processes.jsonl (answers with a label per step for the process reward model, with --agents.labeller) and
OUT/report.json. Every call goes through OUT/ledger.sqlite: a resumed run repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wizard_engine import world
from wizard_engine.agents import Cast
from wizard_engine.agents.calls import check_calls
from wizard_engine.agents.options import AgentSpecs
from wizard_engine.data.records import Conversation, Process
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import AtLeastTwo, Count, NonNegative, PositiveShare, Temperature, ranged
from wizard_engine.synthesis import label_processes, self_teach
from wizard_engine.synthesis.inputs import Made, SynthesisOptions, call_settings, synthesize
from wizard_engine.synthesis.outputs import write_outputs

Rating = ranged(0, 10)


@dataclass(frozen=True)
class Agents(AgentSpecs):
    """The agent of each role: registered program (world:NAME; reference:judge, reference:labeller), model directory,
    endpoint (openai:MODEL@URL), or file of replies (scripted:FILE)."""

    student: str
    """The model that teaches itself."""
    judge: str = "world:judge"
    evolver: str | None = None
    """Adds an evolution of every prompt; default: the prompts as they are."""
    labeller: str | None = None
    """Labels the steps of the student's answers; default: no process rows."""


@dataclass(frozen=True, kw_only=True)
class Config(SynthesisOptions):
    """Self-teaching: on-policy rows chosen by an active-learning score."""

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


def label(cfg: Config, cast: Cast, rows: Sequence[Conversation]) -> tuple[Sequence[Process], dict[str, Any]]:
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
        on_length=cfg.on_length,
        statistics=statistics,
        **call_settings(cfg, cast),
    )
    return processes, statistics


def teach(cfg: Config, cast: Cast, rows: Sequence[Conversation], rejected: int) -> Made:
    """Samples, verdicts, choice, and their outputs."""
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
        on_length=cfg.on_length,
        **call_settings(cfg, cast),
    )
    processes, labels = label(cfg, cast, rows)
    for calls in (selected.statistics["calls"], labels.get("calls", {})):
        check_calls(calls, cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **selected.statistics, "labels": labels}
    files = {"sft": selected.sft, "preferences": selected.preferences, "processes": processes}
    outputs = write_outputs(cfg.out, files, {"scores": selected.scores}, report)
    if not cfg.quiet:
        made = f"{len(selected.sft)} supervised, {len(selected.preferences)} preference, {len(processes)} process rows"
        print(f"{selected.statistics['selected']} of {selected.statistics['prompts']} prompts selected by {cfg.score}:")
        print(made)
    prompts, used = selected.statistics["prompts"], selected.statistics["selected"]
    return report, outputs, f"{prompts - used} of {prompts} prompts rejected"


def main(cfg: Config) -> dict:
    """Sample, judge, select; returns the report."""
    world.register()
    return synthesize(cfg, "self_teach", teach)


if __name__ == "__main__":
    launch(main, Config)
