"""Evol-Answer: conversations with rewritten answers, and preference pairs of the rewrites.

    python recipes/evol_answer.py --data runs/evol/rows.jsonl --out runs/answers --rounds 3
    python recipes/evol_answer.py --data rows.jsonl --out runs/answers --agents.rewriter runs/sft/model

Writes OUT/rows.jsonl, OUT/preferences.jsonl, OUT/chains.jsonl (every rewrite with its verdict) and OUT/report.json.
Every call goes through OUT/ledger.sqlite: a resumed run repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from wizard_engine import world
from wizard_engine.agents import Cast
from wizard_engine.agents.calls import check_calls
from wizard_engine.agents.options import AgentSpecs
from wizard_engine.data.records import Conversation
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import AtLeastOne, NonNegative
from wizard_engine.synthesis import evolve_answers
from wizard_engine.synthesis.evol_answer import OPERATORS
from wizard_engine.synthesis.inputs import Made, SynthesisOptions, call_settings, synthesize
from wizard_engine.synthesis.outputs import print_table, rejections, write_outputs


@dataclass(frozen=True)
class Agents(AgentSpecs):
    """The agent of each role: registered program (world:NAME; reference:judge, reference:labeller), model directory,
    endpoint (openai:MODEL@URL), or file of replies (scripted:FILE)."""

    rewriter: str = "world:expert"
    judge: str = "world:judge"


@dataclass(frozen=True, kw_only=True)
class Config(SynthesisOptions):
    """Evol-Answer: rewrites that a judge prefers."""

    agents: Agents = field(default_factory=Agents)
    rounds: NonNegative[int] = 2
    """Rewrites of each answer."""
    operators: tuple[str, ...] = OPERATORS
    length_cap: AtLeastOne[float] = 4.0
    """Longest rewrite, as a multiple of the first answer's characters."""
    result_margin: NonNegative[float] = 2.0
    """Points of score, in both orders, by which a rewrite with another result must win."""
    min_gap: NonNegative[float] = 0.5
    """Smallest gap of a preference row, points of score."""


def rewrite(cfg: Config, cast: Cast, rows: Sequence[Conversation], rejected: int) -> Made:
    """The rewritten answers and their outputs."""
    rewritten = evolve_answers(
        rows,
        rewriter=cast.agent(cfg.agents.rewriter),
        judge=cast.agent(cfg.agents.judge),
        rounds=cfg.rounds,
        operators=cfg.operators,
        length_cap=cfg.length_cap,
        result_margin=cfg.result_margin,
        min_gap=cfg.min_gap,
        **call_settings(cfg, cast),
    )
    check_calls(rewritten.statistics["calls"], cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **rewritten.statistics}
    files = {"rows": rewritten.rows, "preferences": rewritten.preferences}
    outputs = write_outputs(cfg.out, files, {"chains": rewritten.chains}, report)
    if not cfg.quiet:
        changed, pairs = rewritten.statistics["rows_changed"], len(rewritten.preferences)
        print(f"{changed} of {len(rows)} answers changed, {pairs} preference rows")
        print_table("operator", rewritten.statistics["operators"])
    return report, outputs, rejections("rewritten answers", rewritten.statistics["operators"], "accepted")


def main(cfg: Config) -> dict:
    """Rewrite; returns the report."""
    world.register()
    return synthesize(cfg, "evol_answer", rewrite)


if __name__ == "__main__":
    launch(main, Config)
