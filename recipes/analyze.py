"""Data analysis: attributes of every row, a table per attribute and per pair, as JSON and as an HTML page.

    python recipes/analyze.py --data alpaca_en.json alpaca_zh.json gsm8k/train.jsonl --out runs/analysis
    python recipes/analyze.py --data rows.jsonl --out runs/analysis --checkpoint runs/sft/model
    python recipes/analyze.py --data rows.jsonl --out runs/analysis --tagger openai:MODEL@http://127.0.0.1:8000/v1

Writes OUT/rows.jsonl (the rows with their attributes), OUT/analysis.json and OUT/analysis.html. Perplexity is that of
the answers under the checkpoint; without one there is none.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime
from wizard_engine.agents import Calls, Cast, Limits
from wizard_engine.agents.missing import check_missing
from wizard_engine.agents.options import AgentOptions, estimated, open_cast
from wizard_engine.curation.analysis import Analysis, analyze, answered
from wizard_engine.curation.analysis_page import write_analysis
from wizard_engine.data.chat import use_chat_format
from wizard_engine.data.records import Row, read_files
from wizard_engine.data.references import References, with_reference
from wizard_engine.generation import perplexities
from wizard_engine.model.loading import language_model
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.ranges import Count, Seed
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.runtime.text_lines import printable
from wizard_engine.synthesis.tagging import tags_of, with_tags


@dataclass(frozen=True)
class Config(AgentOptions):
    """Data analysis."""

    data: tuple[Path, ...]
    """Row files: JSONL, Alpaca, ShareGPT, GSM8K, preference pairs, ..."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for rows.jsonl, analysis.json and analysis.html."""
    checkpoint: Path | None = None
    """Model directory whose perplexity is an attribute; default: none."""
    tagger: str | None = None
    """Agent that names topic, skill and difficulty of rows that do not bring them along: a model directory or an
    endpoint, openai:MODEL@URL. Default: heuristics name them."""
    limit: Count[int | None] = None
    """Rows read at most; default: all."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a record that cannot be read: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    references: References = "attribute"
    """Where the answer known to be right is: the row's attribute `reference`, or answers: also its own last answer,
    which rows.jsonl then has as that attribute. Judges see it, and reference: agents judge by it."""
    seed: Seed[int] = 0
    """Of the clusters that name topics beyond the lexicon."""


def checkpoint_perplexities(cfg: Config, rows: list[Row], rt: runtime.Runtime) -> list[float] | None:
    """Perplexity of each answered row under the checkpoint, the rows sharded over the ranks; None without one."""
    if cfg.checkpoint is None:
        return None
    model, tokenizer = language_model(str(cfg.checkpoint), None, seed=0, device=rt.device)
    # Perplexities are of answers, which a template need not mark: the format that the model was trained in here.
    use_chat_format(tokenizer, training=True)
    conversations = answered(rows)
    values = [math.nan] * len(conversations)
    desc = "" if cfg.quiet else "perplexities"
    local_values = perplexities(model, tokenizer, conversations[rt.rank :: rt.world_size], desc=desc)
    for rank, rank_values in enumerate(gather_objects(local_values)):
        values[rank :: rt.world_size] = rank_values
    return values


def tagged(cfg: Config, rows: list[Row], rt: runtime.Runtime) -> tuple[list[Row], dict[str, int]]:
    """Rows with the tagger's attributes, and the counts; unchanged rows without a tagger."""
    if cfg.tagger is None:
        return rows, {}
    cast = open_cast(cfg.out, cfg, rt)

    def work() -> tuple[dict[int, dict[str, str]], dict[str, int]]:
        tags, counts = ask_tags(cfg, cast, rows)
        missing = {name[8:]: count for name, count in counts.items() if name.startswith("failed: ")}
        missing |= {"unreadable": counts["unreadable"]} if counts["unreadable"] else {}
        asked = len(rows) - counts["kept"]
        check_missing(f"tags of {cfg.tagger}", missing, asked, cfg.max_missing, "raise --judge-max-tokens")
        return tags, counts

    try:
        tags, counts = cast.conduct(work)
        return with_tags(rows, tags), counts
    finally:
        cast.close()


def ask_tags(cfg: Config, cast: Cast, rows: list[Row]) -> tuple[dict[int, dict[str, str]], dict[str, int]]:
    """The tagger's attributes by row, and the counts."""
    calls = Calls(cast.scheduler, limits=Limits(judge=cfg.judge_max_tokens), top_p=cfg.top_p)
    return tags_of(rows, cast.agent(cfg.tagger), calls, seed=cfg.seed)


def estimate(cfg: Config) -> dict[str, Any]:
    """What the tags take, without a call."""
    if cfg.tagger is None:
        raise ValueError("--estimate: expected --tagger, the agent that costs something, got none; leave it out")
    rows, _ = read_files(cfg.data, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields)
    return estimated(cfg, lambda options, cast: ask_tags(options, cast, rows[: cfg.limit]))


def brief(analysis: Analysis, rejected: int) -> dict[str, Any]:
    """Counts of a run, for stage.json: rows, rejects, and per attribute its kind and number of values."""
    tables = analysis.tables.items()
    values = {name: {"kind": table["kind"], "values": len(table["values"])} for name, table in tables}
    return {"rows": len(analysis.rows), "rejected": rejected, "attributes": values, "notes": analysis.notes}


def print_tables(analysis: Analysis, shown: int = 8) -> None:
    """Prints the most frequent values of each attribute."""
    for name, table in analysis.tables.items():
        values = [f"{printable(str(line['value']))} {100 * line['share']:.1f} %" for line in table["values"][:shown]]
        rest = len(table["values"]) - shown
        print(f"{printable(name):11} " + ("  ".join(values) or "unknown") + (f"  and {rest} more" if rest > 0 else ""))
    print("\n".join(map(printable, analysis.notes)))


def main(cfg: Config) -> dict:
    """Analyses and writes; returns the result that stage.json records."""
    rt = runtime.start(cfg.device)
    if cfg.estimate:
        return from_main(rt, lambda: estimate(cfg))
    stage = open_stage(cfg, "analyze", rt)
    if stage.done:
        return stage.result()
    rows, bad = read_files(
        cfg.data, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields, rejects=cfg.out / "rejects.jsonl"
    )
    rows = [with_reference(row, cfg.references) for row in rows[: cfg.limit]]
    rows, tags = tagged(cfg, rows, rt)
    values = checkpoint_perplexities(cfg, rows, rt)

    def work() -> tuple[dict[str, Any], list[Path]]:
        perplexity = None if values is None else lambda conversations: values
        analysis = analyze(rows, perplexity=perplexity, seed=cfg.seed, quiet=cfg.quiet)
        if not cfg.quiet:
            print_tables(analysis)
        return brief(analysis, len(bad)) | ({"tags": tags} if tags else {}), list(
            write_analysis(analysis, cfg.out).values()
        )

    result, outputs = from_main(rt, work)
    return finish_stage(stage, rt, result, outputs)


if __name__ == "__main__":
    launch(main, Config)
