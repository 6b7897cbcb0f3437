"""Evol-Instruct: conversations in, the same and harder ones out, after improving the evolving method where asked.

    python recipes/evol_instruct.py --data rows.jsonl --out runs/evol --rounds 2
    python recipes/evol_instruct.py --data rows.jsonl --out runs/evol --optimise.steps 5 --agents.ranker world:ranker

Writes OUT/rows.jsonl (the input rows, then the evolved ones), OUT/eliminated.jsonl, OUT/removed.jsonl (evolved rows
that repeat an evaluation text), OUT/rankings.jsonl (pairs of instructions for the instruction reward model, with
--agents.ranker), OUT/method.txt, OUT/method_failures.jsonl (what was found wrong under each method that was tried) and
OUT/report.json. Every call goes through OUT/ledger.sqlite: a resumed run repeats none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wizard_engine import world
from wizard_engine.agents import Cast
from wizard_engine.agents.calls import check_calls
from wizard_engine.agents.options import AgentSpecs
from wizard_engine.curation.selection import remove_contaminated
from wizard_engine.data.records import Conversation, Preference, read_prompts
from wizard_engine.data.text_files import read_text
from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, Count, Fraction, NonNegative, Temperature
from wizard_engine.runtime.spill import Spill
from wizard_engine.synthesis import evolve_instructions, instruction_groups, optimise_method, rank_instructions
from wizard_engine.synthesis.evol_instruct import OPERATORS
from wizard_engine.synthesis.failure_rate import Measure
from wizard_engine.synthesis.inputs import Made, SynthesisOptions, call_settings, synthesize
from wizard_engine.synthesis.outputs import print_table, rejections, write_outputs
from wizard_engine.synthesis.pairs import Joined, row_spill

# Evolved rows compared with the evaluation texts at once.
CHUNK_ROWS = 10_000


@dataclass(frozen=True)
class Agents(AgentSpecs):
    """The agent of each role: registered program (world:NAME; reference:judge, reference:labeller), model directory,
    endpoint (openai:MODEL@URL), or file of replies (scripted:FILE)."""

    evolver: str = "world:evolver"
    answerer: str = "world:expert"
    judge: str = "world:judge"
    """Says whether an evolved instruction differs from its parent, and how evolving failed (--optimise.failures)."""
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
    failures: Measure = "classes"
    """What the failure rate counts: classes of failure that programs and the judge find, or the paper's string rules
    alone (rules), which see no changed task, lost fact or leaked answer."""
    confidence: Fraction[float | None] = None
    """That a better failure rate is no chance, before a method replaces another; 0 takes any lower rate. Default: 0.9
    with classes, 0 with rules."""
    whole_prompt: bool = False
    """Whether the method is the whole evolving prompt, as in the paper, and not a section of it."""


@dataclass(frozen=True, kw_only=True)
class Config(SynthesisOptions):
    """Evol-Instruct, with elimination and optional method optimisation."""

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


def choose_method(
    cfg: Config, cast: Cast, rows: Sequence[Conversation]
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The evolving method, improved if requested, the record of the search, and the failures that it found."""
    method = read_text(cfg.method).strip() if cfg.method else ""
    if not cfg.optimise.steps:
        return method, {}, []
    settings = call_settings(cfg, cast)
    settings.pop("folder")
    # A method is judged by whole answers.
    settings["limits"] = replace(settings["limits"], answer=max(cfg.max_tokens, 512))
    optimised = optimise_method(
        rows,
        evolver=cast.agent(cfg.agents.evolver),
        optimizer=cast.agent(cfg.agents.optimizer),
        answerer=cast.agent(cfg.agents.answerer),
        judge=cast.agent(cfg.agents.judge),
        method=method,
        is_whole=cfg.optimise.whole_prompt,
        measure=cfg.optimise.failures,
        confidence=cfg.optimise.confidence,
        steps=cfg.optimise.steps,
        candidates=cfg.optimise.candidates,
        minibatch=cfg.optimise.minibatch,
        dev_size=cfg.optimise.dev_size,
        rounds=cfg.optimise.rounds,
        optimizer_temperature=cfg.optimise.temperature,
        **settings,
    )
    record = {"stopped": optimised.stopped, "measure": cfg.optimise.failures, "history": optimised.history}
    return optimised.method, record | optimised.statistics, optimised.failures


def rank(cfg: Config, cast: Cast, rows: Sequence[Conversation]) -> tuple[Sequence[Preference], dict[str, Any]]:
    """Ranking rows over the families of evolved instructions, and their statistics; none without a ranker."""
    if cfg.agents.ranker is None:
        return [], {}
    statistics: dict[str, Any] = {}
    ranker, groups = cast.agent(cfg.agents.ranker), instruction_groups(rows)
    return rank_instructions(groups, ranker=ranker, statistics=statistics, **call_settings(cfg, cast)), statistics


def decontaminate(cfg: Config, made: Spill[Conversation]) -> tuple[Spill[Conversation], list[dict[str, Any]]]:
    """The evolved rows that repeat no evaluation text, and the removed ones."""
    evaluation = [prompt for path in cfg.evaluation for prompt in read_prompts(path, on_error=cfg.on_error)]
    if not evaluation:
        return made, []
    clean, removed = row_spill(cfg.out), []
    for start in range(0, len(made), CHUNK_ROWS):
        part = [made[place] for place in range(start, min(start + CHUNK_ROWS, len(made)))]
        filtered = remove_contaminated(part, evaluation, n=cfg.ngram, desc="" if cfg.quiet else "held-out texts")
        removed += filtered.removed
        for row in filtered.rows:
            clean.append(row)
    return clean, removed


def print_search(search: dict[str, Any]) -> None:
    """Prints a line a step of the method's search: rate, interval, rows by class."""
    for step in search.get("history", []):
        low, high = step["ci95"]
        reasons = ", ".join(f"{name} {count}" for name, count in step["reasons"].items()) or "none"
        advice = "; a larger --optimise.dev-size shows smaller gains" if search["stopped"] == "within noise" else ""
        kept = "" if step["accepted"] else f"  ({search['stopped']}{advice})"
        rate = f"{step['failure_rate']:.1%} [{low:.1%}, {high:.1%}]"
        print(f"method, step {step['step']}: failures {rate}: {reasons}{kept}")


def evolve(cfg: Config, cast: Cast, rows: Sequence[Conversation], rejected: int) -> Made:
    """The evolved rows and their outputs."""
    method, search, failures = choose_method(cfg, cast, rows)
    evolved = evolve_instructions(
        rows,
        evolver=cast.agent(cfg.agents.evolver),
        answerer=cast.agent(cfg.agents.answerer),
        judge=cast.agent(cfg.agents.judge),
        rounds=cfg.rounds,
        operators=cfg.operators,
        method=method,
        temperature=cfg.temperature,
        on_length=cfg.on_length,
        **call_settings(cfg, cast),
    )
    clean, removed = decontaminate(cfg, evolved.made)
    rankings, ranking = rank(cfg, cast, Joined(rows, clean))
    for calls in (search.get("calls", {}), evolved.statistics["calls"], ranking.get("calls", {})):
        check_calls(calls, cfg.max_missing)
    counts = {"given": len(rows), "rejected": rejected, "evolved": len(clean), "contaminated": len(removed)}
    report = {"counts": counts, **evolved.statistics, "method": search, "ranking": ranking}
    write_text(cfg.out / "method.txt", method + "\n")
    files = {"rows": Joined(rows, clean), "rankings": rankings}
    objects = {"eliminated": evolved.eliminated, "removed": removed}
    objects |= {"method_failures": failures} if search else {}
    outputs = write_outputs(cfg.out, files, objects, report)
    if not cfg.quiet:
        print("  ".join(f"{name} {count}" for name, count in counts.items()))
        print_search(search)
        print_table("operator", evolved.statistics["operators"])
    note = rejections("evolved instructions", evolved.statistics["operators"], "kept")
    return report, [cfg.out / "method.txt", *outputs], note


def main(cfg: Config) -> dict:
    """Evolve; returns the report."""
    world.register()
    return synthesize(cfg, "evol_instruct", evolve)


if __name__ == "__main__":
    launch(main, Config)
