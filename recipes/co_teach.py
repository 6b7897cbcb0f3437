"""Co-teaching: models answer the same turns, a judge compares them, and the battles that ours lost become its lessons.

    python recipes/co_teach.py --data rows.jsonl --agents.ours runs/sft/model --out runs/co_teach
    python recipes/co_teach.py --data rows.jsonl --agents.ours A --agents.rivals B world:terse --chat-turns 2 --out X

Writes OUT/sft.jsonl (lessons), OUT/preferences.jsonl, OUT/battles.jsonl and OUT/report.json. Every call goes through
OUT/ledger.sqlite: a resumed run repeats none.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wizard_engine import runtime, world
from wizard_engine.agents.missing import MAX_MISSING, check_share
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Seed, Share, Temperature
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.synthesis import co_teach
from wizard_engine.synthesis.calls import JUDGE_TOKENS, check_calls
from wizard_engine.synthesis.inputs import open_inputs
from wizard_engine.synthesis.outputs import print_table, write_outputs


@dataclass(frozen=True)
class Agents:
    """The agent of each role: registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""

    ours: str
    """The student."""
    rivals: tuple[str, ...] = ("world:expert", "world:careless", "world:terse")
    judge: str = "world:judge"
    suggester: str | None = "world:judge"
    """Says what ours should change; None for no suggestions."""
    rewriter: str | None = None
    """Rewrites ours after a suggestion; default: the rival that won."""
    user: str | None = "world:evolver"
    """Writes the next user turns where --chat-turns is above 1."""


@dataclass(frozen=True)
class Config(Checked):
    """Co-teaching: battles, lessons and preference rows."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K; their last answers are not used."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory."""
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


def main(cfg: Config) -> dict:
    """Battle and teach; returns the report."""
    check_share(cfg.max_missing)
    rt = runtime.start(cfg.device)
    world.register()
    stage = open_stage(cfg, "co_teach", rt)
    if stage.done:
        return stage.result()
    cast, rows, rejected = open_inputs(cfg, rt)
    who = cfg.agents
    taught = co_teach(
        rows,
        ours=cast.agent(who.ours),
        rivals=[cast.agent(spec) for spec in who.rivals],
        judge=cast.agent(who.judge),
        suggester=cast.optional(who.suggester),
        rewriter=cast.optional(who.rewriter),
        user=cast.optional(who.user),
        sft_threshold=cfg.sft_threshold,
        dpo_threshold=cfg.dpo_threshold,
        chat_turns=cfg.chat_turns,
        lessons=cfg.lessons,
        seed=cfg.seed,
        temperature=cfg.temperature,
        max_tokens=cfg.max_tokens,
        judge_max_tokens=cfg.judge_max_tokens,
        on_length=cfg.on_length,
    )
    check_calls(taught.statistics["calls"], cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **taught.statistics}
    files = {"sft": taught.sft, "preferences": taught.preferences}
    outputs = from_main(rt, lambda: write_outputs(cfg.out, files, {"battles": taught.battles}, report))
    cast.close()
    if rt.is_main and not cfg.quiet:
        print(
            f"{len(taught.sft)} lessons, {len(taught.preferences)} preference rows from {len(taught.battles)} battles, "
            f"{taught.statistics['missing']} missing"
        )
        print_table("rival", taught.statistics["rivals"])
        print_table("skill", taught.statistics["skills"])
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
