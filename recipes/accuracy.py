"""Exact-answer accuracy of a checkpoint on held-out problems: greedy, and one sample per problem.

python recipes/accuracy.py --model DIR --data held_out.jsonl --out runs/accuracy
"""

import json
from dataclasses import dataclass
from pathlib import Path

from wizard_engine import runtime
from wizard_engine.data.records import read_rows
from wizard_engine.evaluation.accuracy import accuracy
from wizard_engine.files import write_json, write_text
from wizard_engine.parallel.data_parallel import gather_objects
from wizard_engine.recipe import finish_stage, language_model, launch, on_main, open_stage
from wizard_engine.rollout import answer_texts
from wizard_engine.rollout.trajectories import step_seed


@dataclass(frozen=True)
class Config:
    """Greedy and sampled accuracy."""

    model: Path
    data: Path
    """Conversation rows; the last answer of each is the reference."""
    out: Path
    """Directory for answers.jsonl and accuracy.json."""
    temperature: float = 1.0
    """Of the sampled answers; the others are greedy."""
    max_new_tokens: int = 128
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False


def main(cfg: Config) -> dict:
    """Answer and count; returns what accuracy.json holds."""
    rt = runtime.start(cfg.device)
    stage = open_stage(cfg, "accuracy", rt)
    if stage.done:
        return stage.result()
    model, tokenizer = language_model(str(cfg.model), None, seed=0, device=rt.device)
    rows = read_rows(cfg.data, kind="conversation")
    mine = range(rt.rank, len(rows), rt.world_size)
    prompts = [rows[i].messages[:-1] for i in mine]
    answers: dict[str, list[str]] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", cfg.temperature)):
        texts = answer_texts(
            model, tokenizer, prompts, max_new_tokens=cfg.max_new_tokens, temperature=temperature,
            seed=step_seed(cfg.seed, rt.rank), batch_size=cfg.batch_size,
        )  # fmt: skip
        merged = [""] * len(rows)
        for rank, part in enumerate(gather_objects(texts)):
            merged[rank :: rt.world_size] = part
        answers[name] = merged
    result = _count(answers, [row.answer for row in rows])
    on_main(rt, lambda: _write(cfg.out, rows, answers, result))
    return finish_stage(stage, rt, result, [cfg.out / "answers.jsonl", cfg.out / "accuracy.json"])


def _count(answers: dict[str, list[str]], references: list[str]) -> dict:
    greedy, sampled = (accuracy(answers[name], references) for name in ("greedy", "sampled"))
    return {
        "accuracy": greedy.accuracy, "correct": greedy.correct, "total": greedy.total, "se": greedy.se,
        "sampled_accuracy": sampled.accuracy, "sampled_correct": sampled.correct, "sampled_se": sampled.se,
    }  # fmt: skip


def _write(out: Path, rows, answers: dict[str, list[str]], result: dict) -> None:
    lines = [
        {"prompt": row.instruction, "reference": row.answer, "greedy": greedy, "sampled": sampled}
        for row, greedy, sampled in zip(rows, answers["greedy"], answers["sampled"])
    ]
    write_text(out / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(out / "accuracy.json", result)


if __name__ == "__main__":
    launch(main, Config)
