"""Evol-Instruct: conversations in, the same and harder ones out, after improving the evolving method where asked.

    python recipes/evol_instruct.py --data rows.jsonl --out runs/evol --rounds 2
    python recipes/evol_instruct.py --data rows.jsonl --out runs/evol --optimise.steps 5 --agents.ranker world:ranker

Writes OUT/rows.jsonl (the input rows, then the evolved ones), OUT/eliminated.jsonl, OUT/removed.jsonl (evolved rows
that repeat an evaluation text), OUT/rankings.jsonl (pairs of instructions for the instruction reward model, with
--agents.ranker), OUT/method.txt and OUT/report.json. Every call goes through OUT/ledger.sqlite: a resumed run
repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime, world
from wizard_engine.agents import Cast
from wizard_engine.agents.missing import MAX_MISSING, check_share
from wizard_engine.curation.selection import Filtered, remove_contaminated
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Conversation, read_prompts
from wizard_engine.data.text_files import read_text
from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Seed, Share, Temperature
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.synthesis import evolve_instructions, instruction_groups, optimise_method, rank_instructions
from wizard_engine.synthesis.calls import JUDGE_TOKENS, check_calls
from wizard_engine.synthesis.evol_instruct import OPERATORS, Evolved
from wizard_engine.synthesis.inputs import open_inputs
from wizard_engine.synthesis.outputs import print_table, write_outputs


@dataclass(frozen=True)
class Agents:
    """The agent of each role: registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""

    evolver: str = "world:evolver"
    answerer: str = "world:expert"
    judge: str = "world:judge"
    """Says whether an evolved instruction differs from its parent."""
    optimizer: str = "world:optimizer"
    """Improves the evolving method."""
    ranker: str | None = None
    """Ranks the evolutions of an instruction; default: no rankings."""


@dataclass(frozen=True)
class Optimise(Checked):
    """Automatic improvement of the evolving method."""

    steps: NonNegative[int] = 0
    """Most steps; 0 keeps the method. The paper reports that more than about 12 make it worse."""
    candidates: Count[int] = 5
    """Methods tried a step."""
    minibatch: Count[int] = 10
    """Rows of the trajectory that is analysed."""
    dev_size: Count[int] = 50
    """Rows that the failure rate is measured on."""
    rounds: Count[int] = 1
    """Times each row of the trajectory is evolved."""
    temperature: Temperature[float] = 0.6
    """Of the optimizer."""


@dataclass(frozen=True)
class Config(Checked):
    """Evol-Instruct, with elimination and optional method optimisation."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory."""
    agents: Agents = field(default_factory=Agents)
    rounds: NonNegative[int] = 1
    """Times the pool is evolved."""
    operators: tuple[str, ...] = OPERATORS
    method: Path | None = None
    """Text file of an evolving method; default: the prompt's own."""
    optimise: Optimise = field(default_factory=Optimise)
    evaluation: tuple[Path, ...] = ()
    """Held-out files; evolved rows that repeat one of their prompts are removed."""
    ngram: Count[int] = 13
    """Words of an n-gram that counts as repeated."""
    temperature: Temperature[float] = 0.0
    """Of the evolver."""
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


def choose_method(cfg: Config, cast: Cast, rows: Sequence[Conversation]) -> tuple[str, dict[str, Any]]:
    """The evolving method, improved if requested, and the record of the search."""
    method = read_text(cfg.method).strip() if cfg.method else ""
    if not cfg.optimise.steps:
        return method, {}
    optimised = optimise_method(
        rows,
        evolver=cast.agent(cfg.agents.evolver),
        optimizer=cast.agent(cfg.agents.optimizer),
        answerer=cast.agent(cfg.agents.answerer),
        method=method,
        steps=cfg.optimise.steps,
        candidates=cfg.optimise.candidates,
        minibatch=cfg.optimise.minibatch,
        dev_size=cfg.optimise.dev_size,
        rounds=cfg.optimise.rounds,
        optimizer_temperature=cfg.optimise.temperature,
        seed=cfg.seed,
        max_tokens=max(cfg.max_tokens, 512),
    )
    return optimised.method, {"stopped": optimised.stopped, "history": optimised.history, **optimised.statistics}


def rank(cfg: Config, cast: Cast, rows: Sequence[Conversation]) -> tuple[list, dict[str, Any]]:
    """Ranking rows over the families of evolved instructions, and their statistics; none without a ranker."""
    if cfg.agents.ranker is None:
        return [], {}
    statistics: dict[str, Any] = {}
    ranker = cast.agent(cfg.agents.ranker)
    settings = {"seed": cfg.seed, "judge_max_tokens": cfg.judge_max_tokens, "statistics": statistics}
    return rank_instructions(instruction_groups(rows), ranker=ranker, **settings), statistics


def decontaminate(cfg: Config, evolved: Evolved, num_inputs: int) -> Filtered:
    """The evolved rows that repeat no evaluation text."""
    evaluation = [prompt for path in cfg.evaluation for prompt in read_prompts(path, on_error=cfg.on_error)]
    made = evolved.rows[num_inputs:]
    return remove_contaminated(made, evaluation, n=cfg.ngram) if evaluation else Filtered(made, [])


def main(cfg: Config) -> dict:
    """Evolve; returns the report."""
    check_share(cfg.max_missing)
    rt = runtime.start(cfg.device)
    world.register()
    stage = open_stage(cfg, "evol_instruct", rt)
    if stage.done:
        return stage.result()
    cast, rows, rejected = open_inputs(cfg, rt)
    method, search = choose_method(cfg, cast, rows)
    evolved = evolve_instructions(
        rows,
        evolver=cast.agent(cfg.agents.evolver),
        answerer=cast.agent(cfg.agents.answerer),
        judge=cast.agent(cfg.agents.judge),
        rounds=cfg.rounds,
        operators=cfg.operators,
        method=method,
        seed=cfg.seed,
        temperature=cfg.temperature,
        max_tokens=cfg.max_tokens,
        judge_max_tokens=cfg.judge_max_tokens,
        on_length=cfg.on_length,
    )
    clean = decontaminate(cfg, evolved, len(rows))
    rankings, ranking = rank(cfg, cast, [*rows, *clean.rows])
    for calls in (search.get("calls", {}), evolved.statistics["calls"], ranking.get("calls", {})):
        check_calls(calls, cfg.max_missing)
    counts = {"given": len(rows), "rejected": rejected, "evolved": len(clean.rows), "contaminated": len(clean.removed)}
    report = {"counts": counts, **evolved.statistics, "method": search, "ranking": ranking}

    def write() -> list[Path]:
        write_text(cfg.out / "method.txt", method + "\n")
        files = {"rows": [*rows, *clean.rows], "rankings": rankings}
        objects = {"eliminated": evolved.eliminated, "removed": clean.removed}
        return [cfg.out / "method.txt", *write_outputs(cfg.out, files, objects, report)]

    outputs = from_main(rt, write)
    cast.close()
    if rt.is_main and not cfg.quiet:
        print("  ".join(f"{name} {count}" for name, count in counts.items()))
        print_table("operator", evolved.statistics["operators"])
    return finish_stage(stage, rt, report, outputs)


if __name__ == "__main__":
    launch(main, Config)
