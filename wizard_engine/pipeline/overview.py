"""What a run has, in a few lines before it starts: base model, rows and pairs, and what it measures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wizard_engine.data.chat import encode_conversation, use_chat_format
from wizard_engine.data.records import Conversation, Preference, Row, read_files
from wizard_engine.data.samples import Pair, answer_pair
from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.model import ModelConfig, ModelDirectory
from wizard_engine.rl.rewards import rated_pair
from wizard_engine.runtime.files import read_object
from wizard_engine.training.options import sample_limit

from .graph import Node
from .plan import Plan
from .run_file import RunFile

# Rows of the files that are tokenized.
TOKENIZED = 200
# Stages that learn from pairs of answers -> what makes a sample of a row.
PAIRED: dict[str, Callable[..., Pair]] = {"stage_dpo": answer_pair, "preference_reward": rated_pair}


def overview(run: RunFile, plan: Plan) -> str:
    """The lines; "" for a run whose base model a stage makes."""
    if run.base.model is None or not run.rows.data:
        return ""
    with ModelDirectory(run.base.model) as directory:
        config, parameters = directory.config, directory.parameter_count
    rate = "the recipes' own" if plan.size == "demo" else f"those of {plan.size}"
    base = f"{run.base.model}: {parameters / 1e6:,.1f} million parameters, context of {config.max_positions:,} tokens"
    lines = {"base": f"{base}; learning rates: {rate}", "rows": _rows(run, plan, config)}
    if run.rows.pairs:
        lines["pairs"] = _pairs(run, plan, config)
    lines["measured"] = "; ".join(measures_of(run, plan))
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())


def _first(plan: Plan, table: str) -> Node | None:
    return next((node for node in plan.nodes if node.table == table), None)


def _read(run: RunFile, files: Sequence[Path]) -> list[Row]:
    return read_files(files, on_error="skip", unknown_fields=run.rows.unknown_fields, allow_empty=True)[0]


def _tokenizer(node: Node, base: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in the format that a stage trains in."""
    tokenizer = load_tokenizer(base)
    options = {"training": True, "needs_marks": True, "vocab_size": config.vocab_size}
    use_chat_format(tokenizer, node.config.chat_format, **options)
    return tokenizer


def _rows(run: RunFile, plan: Plan, config: ModelConfig) -> str:
    """How many rows, how many of them held out, and how many are too long for supervised learning."""
    rows = _read(run, run.rows.data)
    text = f"{len(rows):,} in {_names(run.rows.data)}"
    if run.rows.held_out:
        held_out, limit = len(_read(run, run.rows.held_out)), run.rows.held_out_limit
        text += f"; held out: {held_out:,} in {_names(run.rows.held_out)}"
        text += f", {min(limit, held_out):,} of them to measure on" if limit else ""
    elif _first(plan, "sample") is None:
        text += f"; drawn before: {plan.drawn}"
    elif run.rows.hold_out:
        text += f"; {min(run.rows.hold_out, len(rows) // 2):,} of them held out"
    node = _first(plan, "sft")
    if node is None:
        return text
    limit = sample_limit(node.config.max_length, config, node.config.training)
    tokenizer = _tokenizer(node, run.base.model, config)
    chosen = [row for row in rows if isinstance(row, Conversation)]
    return text + _refused(
        chosen, lambda row: encode_conversation(tokenizer, row.messages, weights=row.weights, max_length=limit), "sft"
    )


def _pairs(run: RunFile, plan: Plan, config: ModelConfig) -> str:
    """How many pairs of one's own, and how many are too long for the stages that learn from them."""
    pairs = [row for row in _read(run, run.rows.pairs) if isinstance(row, Preference)]
    text = f"{len(pairs):,} in {_names(run.rows.pairs)}, for every slice"
    nodes = [node for table in PAIRED if (node := _first(plan, table)) is not None]
    for node in nodes:
        limit = sample_limit(node.config.max_length, config, node.config.training)
        tokenizer = _tokenizer(node, run.base.model, config)
        read = partial(PAIRED[node.table], tokenizer, max_length=limit, capacity=node.config.training.pack_tokens)
        text += _refused(pairs, read, node.table)
    return text if nodes else f"{text}; neither stage_dpo nor preference_reward learns from them"


def _refused(rows: Sequence[Row], encode: Callable[[Any], object], table: str) -> str:
    """The share of rows that a stage cannot learn from, by some of them, and the first cause."""
    chosen, causes = rows[:: max(1, len(rows) // TOKENIZED)], []
    for row in chosen:
        try:
            encode(row)
        except ValueError as error:
            causes.append(str(error))
    if not causes:
        return ""
    return f"; {table} leaves out about {100 * len(causes) / len(chosen):.0f} in 100 ({causes[0]})"


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def rejected_rows(out: Path) -> str:
    """How many rows a finished stage rejected, as the report says it; "" for none."""
    result = (read_object(out / "stage.json") or {}).get("result", {})
    rejected = result.get("rejected") or result.get("counts", {}).get("rejected")
    return f"rejected rows: {rejected:,}" if rejected else ""


def measures_of(run: RunFile, plan: Plan) -> list[str]:
    """What is measured on held-out rows, and what is not, with the reason."""
    if not plan.held_out:
        return ["nothing on held-out rows: there are none (rows.held-out, rows.hold-out)"]
    parts = []
    if run.measure.in_training:
        learn = [node.table for node in plan.nodes if getattr(node.config, "held_out", ())]
        parts.append(f"held-out measures of {', '.join(dict.fromkeys(learn))}")
    if plan.has_answers:
        parts.append("exact answers of every model")
    elif run.measure.accuracy is None:
        parts.append("no exact answers: fewer than nine in ten held-out rows have an answer that can be checked")
    games = _first(plan, "arena")
    parts.append("games judged by " + ", ".join(games.config.judge) if games else "no games")
    return parts
