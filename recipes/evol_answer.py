"""Evol-Answer: conversations with rewritten answers, and preference pairs of the rewrites.

    python recipes/evol_answer.py --data runs/evol/rows.jsonl --out runs/answers --rounds 3
    python recipes/evol_answer.py --data rows.jsonl --out runs/answers --agents.rewriter runs/sft/model

Writes OUT/rows.jsonl, OUT/preferences.jsonl, OUT/chains.jsonl (every rewrite with its verdict) and OUT/report.json.
Every call goes through OUT/ledger.sqlite: a resumed run repeats none.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wizard_engine import runtime, world
from wizard_engine.agents.missing import MAX_MISSING, check_share
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import AtLeastOne, Checked, Count, NonNegative, Seed, Share
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.synthesis import evolve_answers
from wizard_engine.synthesis.calls import JUDGE_TOKENS, check_calls
from wizard_engine.synthesis.evol_answer import OPERATORS
from wizard_engine.synthesis.inputs import open_inputs
from wizard_engine.synthesis.outputs import print_table, write_outputs


@dataclass(frozen=True)
class Agents:
    """The agent of each role: registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""

    rewriter: str = "world:expert"
    judge: str = "world:judge"


@dataclass(frozen=True)
class Config(Checked):
    """Evol-Answer: rewrites that a judge prefers."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory."""
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
    max_tokens: Count[int] = 256
    """Longest reply, tokens."""
    judge_max_tokens: Count[int] = JUDGE_TOKENS
    """Longest verdict of a judge with its explanation, tokens."""
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
    """Rewrite; returns the report."""
    check_share(cfg.max_missing)
    rt = runtime.start(cfg.device)
    world.register()
    stage = open_stage(cfg, "evol_answer", rt)
    if stage.done:
        return stage.result()
    cast, rows, rejected = open_inputs(cfg, rt)
    rewritten = evolve_answers(
        rows,
        rewriter=cast.agent(cfg.agents.rewriter),
        judge=cast.agent(cfg.agents.judge),
        rounds=cfg.rounds,
        operators=cfg.operators,
        length_cap=cfg.length_cap,
        result_margin=cfg.result_margin,
        min_gap=cfg.min_gap,
        seed=cfg.seed,
        max_tokens=cfg.max_tokens,
        judge_max_tokens=cfg.judge_max_tokens,
    )
    check_calls(rewritten.statistics["calls"], cfg.max_missing)
    report = {"counts": {"given": len(rows), "rejected": rejected}, **rewritten.statistics}
    files = {"rows": rewritten.rows, "preferences": rewritten.preferences}
    outputs = from_main(rt, lambda: write_outputs(cfg.out, files, {"chains": rewritten.chains}, report))
    cast.close()
    if rt.is_main and not cfg.quiet:
        changed, pairs = rewritten.statistics["rows_changed"], len(rewritten.preferences)
        print(f"{changed} of {len(rows)} answers changed, {pairs} preference rows")
        print_table("operator", rewritten.statistics["operators"])
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
