"""Exact-answer accuracy of a checkpoint, or of any agent, on held-out problems: greedy, and one sample per problem.

python recipes/accuracy.py --model DIR --data held_out.jsonl --out runs/accuracy
python recipes/accuracy.py --model openai:MODEL@http://127.0.0.1:8000/v1 --data held_out.jsonl --out runs/accuracy
"""

import asyncio
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime, world
from wizard_engine.agents import Cast, Request
from wizard_engine.agents.estimate import StandInCast, count_tokens
from wizard_engine.agents.missing import Missing, check_missing, count_reasons, shown_reasons
from wizard_engine.agents.options import CallOptions, estimated, open_cast
from wizard_engine.data.chat import use_chat_format
from wizard_engine.data.latex_answers import library
from wizard_engine.data.records import Conversation, read_located
from wizard_engine.data.text_files import keeping
from wizard_engine.evaluation.accuracy import Accuracy, accuracy, check_reference
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.generation import answer_texts
from wizard_engine.model.loading import language_model
from wizard_engine.rl.trajectories import step_seed
from wizard_engine.runtime.files import write_json, write_json_lines
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.metrics import progress
from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.ranges import Count, Seed, Temperature
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage

LOG = logging.getLogger("wizard_engine.data")
Answers = dict[str, list[str | Missing]]


@dataclass(frozen=True)
class Config(CallOptions):
    """Greedy and sampled accuracy."""

    model: str
    """Model directory, registered program (world:NAME), endpoint (openai:MODEL@URL) or answers (scripted:FILE)."""
    data: Path
    """Conversation rows; the last answer of each is the reference."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for answers.jsonl and accuracy.json."""
    temperature: Temperature[float] = 1.0
    """Of the sampled answers; the others are greedy."""
    max_new_tokens: Count[int] = 128
    """Longest answer, tokens."""
    on_length: Literal["missing", "keep"] | None = None
    """An answer that reached its limit: missing, or keep and judge it as it is. Default: missing for an endpoint,
    whose answers are whole or none, and keep for a checkpoint."""
    limit: Count[int | None] = None
    """Rows read at most; default: all."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read: stop, or leave it out and count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    seed: Seed[int] = 0
    batch_size: Count[int] = field(default=128, kw_only=True, metadata=INCIDENTAL)
    """Answers that a model of this machine generates together, on each rank."""


def main(cfg: Config) -> dict:
    """Generate answers and count the right ones; returns the content of accuracy.json."""
    rt = runtime.start(cfg.device)
    if Path(cfg.model).is_dir():
        # A resolved path contains "/", so that the stage hashes the content of the directory and not its name.
        cfg = replace(cfg, model=str(Path(cfg.model).resolve()))
    if cfg.estimate:
        return from_main(rt, lambda: estimate(cfg))
    stage = open_stage(cfg, "accuracy", rt)
    if stage.done:
        return stage.result()
    rows, rejected = read(cfg)
    if Path(cfg.model).is_dir():
        answers = _by_checkpoint(cfg, rt, [row.messages[:-1] for row in rows])
        result = from_main(rt, lambda: _finished(cfg, rows, rejected, answers))
    else:
        result = _by_agent(cfg, rt, rows, rejected)
    if rt.is_main and not cfg.quiet:
        print(shown(result))
    return finish_stage(stage, rt, result, [cfg.out / "answers.jsonl", cfg.out / "accuracy.json"])


def read(cfg: Config) -> tuple[list[Conversation], int]:
    """The rows, and how many were rejected; a row without a reference to compare with is found before any answer."""
    located, bad = read_located(
        [cfg.data],
        kind="conversation",
        on_error=cfg.on_error,
        unknown_fields=cfg.unknown_fields,
        rejects=cfg.out / "rejects.jsonl",
    )
    rows: list[Conversation] = []
    refused: list[str] = []
    for where, row in located[: cfg.limit]:
        checked = keeping(cfg.on_error, refused, partial(check_reference, row.answer), f"{where}: ")
        rows += [row for _ in checked]
    if refused:
        LOG.warning("%s: %d rows without a reference left out; first: %s", cfg.data, len(refused), refused[0])
    if not rows:
        raise ValueError(f"{cfg.data}:1: file: expected rows with a reference answer, got none; see the log")
    return rows, len(bad) + len(refused)


def estimate(cfg: Config) -> dict[str, Any]:
    """What the answers take, without a call; nothing for a checkpoint."""
    if Path(cfg.model).is_dir():
        raise ValueError(
            f"--estimate: expected an agent that costs something, got checkpoint {cfg.model}; leave it out"
        )
    world.register()
    with tempfile.TemporaryDirectory(prefix="wizard-estimate-") as folder:
        rows, _ = read(replace(cfg, out=Path(folder)))

    def work(options: Config, cast: StandInCast) -> None:
        answers: Answers = {name: [Missing("")] * len(rows) for name in _temperatures(options)}
        cast.scheduler.run(_ask_all(options, cast, rows, answers))

    usual = sum(count_tokens(row.answer) for row in rows[:1000]) // min(len(rows), 1000)
    return estimated(cfg, work, answer_tokens=usual)


def _temperatures(cfg: Config) -> dict[str, float]:
    return {"greedy": 0.0, "sampled": cfg.temperature}


def _by_checkpoint(cfg: Config, rt: runtime.Runtime, prompts: list) -> dict[str, list[str]]:
    """Answers of a checkpoint, the problems sharded over the ranks."""
    model, tokenizer = language_model(cfg.model, None, seed=0, device=rt.device)
    use_chat_format(tokenizer, cfg.chat_format, vocab_size=model.config.vocab_size)
    answers: dict[str, list[str]] = {}
    for name, temperature in _temperatures(cfg).items():
        local_prompts = prompts[rt.rank :: rt.world_size]
        with progress(desc=f"{name} answers", unit="answer", total=len(local_prompts), quiet=cfg.quiet) as bar:
            texts = answer_texts(
                model,
                tokenizer,
                local_prompts,
                max_new_tokens=cfg.max_new_tokens,
                temperature=temperature,
                seed=step_seed(cfg.seed, rt.rank),
                batch_size=cfg.batch_size,
                top_p=None if cfg.top_p == 1 else cfg.top_p,
                on_finished=bar.update,
            )
        answers[name] = [""] * len(prompts)
        for rank, local_texts in enumerate(gather_objects(texts)):
            answers[name][rank :: rt.world_size] = local_texts
    return answers


def _by_agent(cfg: Config, rt: runtime.Runtime, rows: Sequence[Conversation], rejected: int) -> dict[str, Any]:
    """The result of an agent, asked through the ledger."""
    world.register()
    cast = open_cast(cfg.out, cfg, rt)

    def work() -> dict[str, Any]:
        answers: Answers = {name: [Missing("")] * len(rows) for name in _temperatures(cfg)}
        cast.scheduler.run(_ask_all(cfg, cast, rows, answers))
        return _finished(cfg, rows, rejected, answers)

    try:
        return cast.conduct(work)
    finally:
        cast.close()


async def _ask_all(cfg: Config, cast: Cast, rows: Sequence[Conversation], answers: Answers) -> None:
    """Both answers to every problem, Missing where none came."""
    agent, on_length = cast.agent(cfg.model), on_length_of(cfg.model, cfg.on_length)
    heat = _temperatures(cfg)

    async def work(item: tuple[int, Conversation]) -> list[str | Missing]:
        place, row = item
        limits = {"max_tokens": cfg.max_new_tokens, "top_p": cfg.top_p, "row": row.id}
        prompt, seed = tuple(row.messages[:-1]), step_seed(cfg.seed, place)
        requests = [Request("answer", prompt, seed, temperature, **limits) for temperature in heat.values()]
        replies = await asyncio.gather(*(cast.scheduler.ask(agent, request) for request in requests))
        return [received(reply, on_length) for reply in replies]

    def done(place: int, said: list[str | Missing]) -> None:
        for name, answer in zip(heat, said):
            answers[name][place] = answer

    stage = {"desc": "problems", "total": len(rows), "width": len(heat), "calls": len(heat), "agents": [agent]}
    await cast.scheduler.rows(enumerate(rows), work, done, **stage)


def _finished(cfg: Config, rows: Sequence[Conversation], rejected: int, answers: Answers) -> dict[str, Any]:
    """The content of accuracy.json, written with the answers."""
    for name, texts in answers.items():
        what = f"{name} answers of {cfg.model}"
        check_missing(what, count_reasons(texts), len(texts), cfg.max_missing, "raise --max-new-tokens")
    result = _count(answers, [row.answer for row in rows]) | {"latex_reader": library()}
    if rejected:
        result |= {"rejected": rejected}
    write_json_lines(cfg.out / "answers.jsonl", _lines(rows, answers))
    write_json(cfg.out / "accuracy.json", result)
    return result


def _count(answers: Answers, references: list[str]) -> dict[str, Any]:
    greedy, sampled = (accuracy(answers[name], references) for name in ("greedy", "sampled"))
    return _counted(greedy, sampled) | {
        "missing": greedy.missing,
        "sampled_missing": sampled.missing,
        "missing_reasons": {name: reasons for name in answers if (reasons := count_reasons(answers[name]))},
    }


def shown(result: dict[str, Any]) -> str:
    """Both accuracies on one line, each with the answers that are missing."""
    parts = []
    for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
        reasons = shown_reasons(result["missing_reasons"].get(name, {}))
        missing = f"{result[f'{prefix}missing']} missing" + (f" ({reasons})" if reasons else "")
        total = result["total"] + result["missing"] - result[f"{prefix}missing"]
        share = f"{100 * result[f'{prefix}accuracy']:.1f} ± {100 * result[f'{prefix}se']:.1f} %"
        parts.append(f"{name} {share} ({result[f'{prefix}correct']} of {total}), {missing}")
    return "; ".join(parts)


def _counted(greedy: Accuracy, sampled: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": greedy.accuracy,
        "correct": greedy.correct,
        "total": greedy.total,
        "se": greedy.se,
        "sampled_accuracy": sampled.accuracy,
        "sampled_correct": sampled.correct,
        "sampled_se": sampled.se,
    }


def _lines(rows: Sequence[Conversation], answers: Answers) -> Iterator[dict[str, Any]]:
    for row, *pair in zip(rows, answers["greedy"], answers["sampled"]):
        said = dict(zip(("greedy", "sampled"), pair))
        missing = {name: answer.reason for name, answer in said.items() if isinstance(answer, Missing)}
        texts = {name: None if name in missing else answer for name, answer in said.items()}
        line = {"prompt": row.instruction, "reference": row.answer, **texts}
        yield line | ({"missing": missing} if missing else {})


if __name__ == "__main__":
    launch(main, Config)
