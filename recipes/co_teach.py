"""Co-teaching: models answer the same turns, a judge compares them, and the battles that ours lost become its lessons.

    python recipes/co_teach.py --data rows.jsonl --agents.ours runs/sft/model --out runs/co_teach
    python recipes/co_teach.py --data rows.jsonl --agents.ours A --agents.rivals B world:terse --chat-turns 2 --out X

Writes OUT/sft.jsonl (lessons), OUT/preferences.jsonl, OUT/battles.jsonl and OUT/report.json. Every call goes through
OUT/ledger.sqlite: a resumed run repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wizard_engine import world
from wizard_engine.agents import Cast
from wizard_engine.agents.calls import check_calls
from wizard_engine.agents.options import AgentSpecs
from wizard_engine.data.records import Conversation
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Count, NonNegative, Temperature
from wizard_engine.synthesis import co_teach
from wizard_engine.synthesis.inputs import Made, SynthesisOptions, call_settings, synthesize
from wizard_engine.synthesis.outputs import print_table, write_outputs


@dataclass(frozen=True)
class Agents(AgentSpecs):
    """The agent of each role: registered program (world:NAME; reference:judge, reference:labeller), model directory,
    endpoint (openai:MODEL@URL), or file of replies (scripted:FILE)."""

    ours: str
    """The student."""
    rivals: tuple[str, ...] = ("world:expert", "world:careless", "world:terse")
    judge: tuple[str, ...] = ("world:judge",)
    """Compares answers; of several judges the mean of their scores counts."""
    suggester: str | None = "world:judge"
    """Says what ours should change; None for no suggestions."""
    rewriter: str | None = None
    """Rewrites ours after a suggestion; default: the rival that won."""
    user: str | None = "world:evolver"
    """Writes the next user turns where --chat-turns is above 1."""


@dataclass(frozen=True, kw_only=True)
class Config(SynthesisOptions):
    """Co-teaching: battles, lessons and preference rows."""

    agents: Agents
    sft_threshold: NonNegative[float] = 3.0
    """K for lessons: points of score by which ours must lose. Arena Learning: 3 in its first round, then 1."""
    dpo_threshold: NonNegative[float] = 2.0
    """K for preference rows, points of score between best and worst answer."""
    chat_turns: Count[int] = 1
    """User turns of each chat that are judged."""
    lessons: NonNegative[int | None] = None
    """Most lessons, the weakest skills first; default: all."""
    temperature: Temperature[float] = 0.0
    """Of the contestants' answers."""


def teach(cfg: Config, cast: Cast, rows: Sequence[Conversation], rejected: int) -> Made:
    """The round of battles and its outputs."""
    who = cfg.agents
    taught = co_teach(
        rows,
        ours=cast.agent(who.ours),
        rivals=[cast.agent(spec) for spec in who.rivals],
        judge=[cast.agent(spec) for spec in who.judge],
        suggester=cast.optional(who.suggester),
        rewriter=cast.optional(who.rewriter),
        user=cast.optional(who.user),
        sft_threshold=cfg.sft_threshold,
        dpo_threshold=cfg.dpo_threshold,
        chat_turns=cfg.chat_turns,
        lessons=cfg.lessons,
        temperature=cfg.temperature,
        on_length=cfg.on_length,
        **call_settings(cfg, cast),
    )
    check_calls(taught.statistics["calls"], cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **taught.statistics}
    files = {"sft": taught.sft, "preferences": taught.preferences}
    outputs = write_outputs(cfg.out, files, {"battles": taught.battles}, report)
    if not cfg.quiet:
        print(
            f"{len(taught.sft)} lessons, {len(taught.preferences)} preference rows from {len(taught.battles)} battles, "
            f"{taught.statistics['missing']} missing"
        )
        print_table("rival", taught.statistics["rivals"])
        print_table("skill", taught.statistics["skills"])
    battles, missing = len(taught.battles), taught.statistics["missing"]
    return report, outputs, f"{missing} of {battles + missing} battles without a verdict"


def main(cfg: Config) -> dict:
    """Battle and teach; returns the report."""
    world.register()
    return synthesize(cfg, "co_teach", teach)


if __name__ == "__main__":
    launch(main, Config)
