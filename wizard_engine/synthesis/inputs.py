"""What the recipes of synthesis share: their options, and a stage from rows and agents to its report."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from wizard_engine import runtime
from wizard_engine.agents import Cast
from wizard_engine.agents.calls import EVOLVE_TOKENS, REWRITE_TOKENS, Limits
from wizard_engine.agents.estimate import count_tokens
from wizard_engine.agents.options import AgentOptions, estimated, open_cast
from wizard_engine.data.records import Conversation
from wizard_engine.data.references import References
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Count, Seed
from wizard_engine.runtime.spill import Spill
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage

from .outputs import read_conversations
from .pairs import row_spill

C = TypeVar("C", bound="SynthesisOptions")
# Report, written files, and what the last line says beside them.
Made = tuple[dict[str, Any], list[Path], str]


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions(AgentOptions):
    """Options that the recipes of synthesis share."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K, ..."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory."""
    max_tokens: Count[int] = 256
    """Longest answer, tokens."""
    evolve_max_tokens: Count[int] = EVOLVE_TOKENS
    """Longest evolved instruction, tokens."""
    rewrite_max_tokens: Count[int] = REWRITE_TOKENS
    """Longest rewritten answer, suggestion, review or method, tokens."""
    on_length: Literal["drop", "keep"] = "drop"
    """An answer that reached its limit: drop counts it as a failed call, keep uses it; its row has finish=length."""
    limit: Count[int | None] = None
    """Rows read at most."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    references: References = "attribute"
    """Where the answer known to be right is: the row's attribute `reference`, or answers: also its own last answer.
    Judges see it, and reference: agents judge by it."""
    seed: Seed[int] = 0


def synthesize(cfg: C, name: str, work: Callable[[C, Cast, Spill[Conversation], int], Made]) -> dict:
    """A stage of synthesis; returns its report.

    Args:
        name: of the stage.
        work: done on rank 0: (options, agents, rows, number of rejected records) -> report, written files,
            and what the last line says beside them.
    Raises:
        ValueError: a bad record, or one of another kind (with on_error="raise"); no row at all; what `work` raises.
    """
    rt = runtime.start(cfg.device)
    if cfg.estimate:
        return from_main(rt, lambda: _estimated(cfg, work))
    stage = open_stage(cfg, name, rt)
    if stage.done:
        return stage.result()
    cast = open_cast(cfg.out, cfg, rt)

    def lead() -> Made:
        rows, rejected = read_stage_rows(cfg)
        return work(cfg, cast, rows, rejected)

    try:
        report, outputs, note = cast.conduct(lead)
    finally:
        cast.close()
    return finish_stage(stage, rt, report, outputs, note)


def _estimated(cfg: C, work: Callable[[C, Cast, Spill[Conversation], int], Made]) -> dict[str, Any]:
    """What the stage will ask. Answers are taken to be as long as those of the rows."""
    with tempfile.TemporaryDirectory(prefix="wizard-estimate-") as folder:
        rows, rejected = read_stage_rows(replace(cfg, out=Path(folder)))
        lengths = [count_tokens(rows[place].answer) for place in range(0, len(rows), max(1, len(rows) // 1000))]
        usual = min(cfg.max_tokens, max(1, round(sum(lengths) / len(lengths))))
        return estimated(cfg, lambda options, cast: work(options, cast, rows, rejected), answer_tokens=usual)


def read_stage_rows(cfg: SynthesisOptions) -> tuple[Spill[Conversation], int]:
    """The rows of the stage, on disk, and the number of rejected records."""
    options = {"on_error": cfg.on_error, "unknown_fields": cfg.unknown_fields, "limit": cfg.limit}
    options |= {"references": cfg.references}
    return read_conversations(cfg.data, rejects=cfg.out / "rejects.jsonl", rows=row_spill(cfg.out), **options)


def call_settings(cfg: SynthesisOptions, cast: Cast) -> dict[str, Any]:
    """Arguments that every function of synthesis takes."""
    limits = Limits(cfg.max_tokens, cfg.evolve_max_tokens, cfg.rewrite_max_tokens, cfg.judge_max_tokens)
    return {
        "seed": cfg.seed,
        "limits": limits,
        "top_p": cfg.top_p,
        "scheduler": cast.scheduler,
        "folder": cfg.out,
    }
