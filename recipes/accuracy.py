"""Exact-answer accuracy of a checkpoint, or of any agent, on held-out problems: greedy, and one sample per problem.

python recipes/accuracy.py --model DIR --data held_out.jsonl --out runs/accuracy
python recipes/accuracy.py --model openai:MODEL@http://127.0.0.1:8000/v1 --data held_out.jsonl --out runs/accuracy
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wizard_engine import runtime, world
from wizard_engine.agents import Cast, Request
from wizard_engine.agents.missing import MAX_MISSING, Missing, check_missing, check_share, count_reasons, shown_reasons
from wizard_engine.data.chat import use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.latex_answers import library
from wizard_engine.evaluation.accuracy import Accuracy, accuracy
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.generation import answer_texts
from wizard_engine.model.loading import language_model
from wizard_engine.rl.trajectories import step_seed
from wizard_engine.runtime.files import write_json, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.metrics import progress
from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.ranges import Checked, Count, Seed, Share, Temperature
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.synthesis.outputs import read_conversations


@dataclass(frozen=True)
class Config(Checked):
    """Greedy and sampled accuracy."""

    model: str
    """Model directory, registered program (world:NAME) or endpoint (openai:MODEL@URL)."""
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
    max_missing: Share[float] = field(default=MAX_MISSING, metadata=INCIDENTAL)
    """Largest share of answers, 0 to 1, that may be missing; above it the stage ends with an error."""
    limit: Count[int | None] = None
    """Rows read at most; default: all."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read: stop, or leave it out and count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    chat_format: ChatFormatChoice = "auto"
    """Of local models: auto is a directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a
    .jinja file."""
    batch_size: Count[int] = field(default=128, metadata=INCIDENTAL)
    """Answers generated together; calls of one transaction."""
    seed: Seed[int] = 0
    device: str = field(default="auto", metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    quiet: bool = field(default=False, metadata=INCIDENTAL)


def main(cfg: Config) -> dict:
    """Generate answers and count the right ones; returns the content of accuracy.json."""
    check_share(cfg.max_missing)
    rt = runtime.start(cfg.device)
    if Path(cfg.model).is_dir():
        # A resolved path contains "/", so that the stage hashes the content of the directory and not its name.
        cfg = replace(cfg, model=str(Path(cfg.model).resolve()))
    stage = open_stage(cfg, "accuracy", rt)
    if stage.done:
        return stage.result()
    rows, rejected = read_conversations(
        [cfg.data],
        on_error=cfg.on_error,
        unknown_fields=cfg.unknown_fields,
        rejects=cfg.out / "rejects.jsonl",
        limit=cfg.limit,
    )
    prompts = [row.messages[:-1] for row in rows]
    by_checkpoint = Path(cfg.model).is_dir()
    answers = _by_checkpoint(cfg, rt, prompts) if by_checkpoint else _by_agent(cfg, rt, prompts)
    for name, texts in answers.items():
        what = f"{name} answers of {cfg.model}"
        check_missing(what, count_reasons(texts), len(texts), cfg.max_missing, "raise --max-new-tokens")
    result = _count(answers, [row.answer for row in rows]) | {"latex_reader": library()}
    if rejected:
        result |= {"rejected": rejected}
    from_main(rt, lambda: _write(cfg.out, rows, answers, result))
    if rt.is_main and not cfg.quiet:
        print(shown(result))
    return finish_stage(stage, rt, result, [cfg.out / "answers.jsonl", cfg.out / "accuracy.json"])


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
                on_finished=bar.update,
            )
        answers[name] = [""] * len(prompts)
        for rank, local_texts in enumerate(gather_objects(texts)):
            answers[name][rank :: rt.world_size] = local_texts
    return answers


def _by_agent(cfg: Config, rt: runtime.Runtime, prompts: list) -> dict[str, list[str | Missing]]:
    """Answers of an agent, through the ledger, Missing where none came."""
    world.register()
    cast = Cast(cfg.out / "ledger.sqlite", rt, batch_size=cfg.batch_size, quiet=cfg.quiet, chat_format=cfg.chat_format)
    answers = {}
    try:
        agent = cast.agent(cfg.model)
        for name, temperature in _temperatures(cfg).items():
            replies = agent.respond(
                [
                    Request("answer", prompt, step_seed(cfg.seed, i), temperature, cfg.max_new_tokens)
                    for i, prompt in enumerate(prompts)
                ]
            )
            answers[name] = received(replies, on_length_of(cfg.model, cfg.on_length))
    finally:
        cast.close()
    return answers


def _count(answers: dict[str, list[str | Missing]], references: list[str]) -> dict[str, Any]:
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


def _write(out: Path, rows, answers: dict[str, list[str | Missing]], result: dict) -> None:
    lines = []
    for row, *pair in zip(rows, answers["greedy"], answers["sampled"]):
        said = dict(zip(("greedy", "sampled"), pair))
        missing = {name: answer.reason for name, answer in said.items() if isinstance(answer, Missing)}
        texts = {name: None if name in missing else answer for name, answer in said.items()}
        line = {"prompt": row.instruction, "reference": row.answer, **texts}
        lines.append(line | ({"missing": missing} if missing else {}))
    write_text(out / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "accuracy.json", result)


if __name__ == "__main__":
    launch(main, Config)
