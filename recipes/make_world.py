"""The embedded world on disk: natural corpus, held-out problems, plain text, two-turn questions, and a tokenizer.

python recipes/make_world.py --out runs/world --corpus 10000 --seed 0
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from wizard_engine import runtime, world
from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.records import write_rows
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Seed
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage


@dataclass(frozen=True)
class Config(Checked):
    """The embedded world: problems, answers and text."""

    out: Path = field(metadata=INCIDENTAL)
    """Directory for corpus.jsonl, held_out.jsonl, plain.jsonl, questions.jsonl and tokenizer/."""
    corpus: Count[int] = 10_000
    """Rows of the natural corpus."""
    held_out: NonNegative[int] = 1500
    """Held-out problems."""
    plain: NonNegative[int] = 40_000
    """Documents of plain text."""
    questions: NonNegative[int] = 80
    """Two-turn questions."""
    vocabulary: Count[int] = 720
    """Most tokens of the tokenizer."""
    seed: Seed[int] = 0
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    quiet: bool = field(default=False, metadata=INCIDENTAL)


def write(cfg: Config) -> tuple[dict, list[Path]]:
    """Make and write everything; returns the counts and the paths."""
    corpus, held_out = world.natural_corpus(cfg.corpus, cfg.seed), world.held_out(cfg.held_out, cfg.seed)
    plain, questions = world.plain_text(cfg.plain, cfg.seed), world.mt_questions(cfg.questions, cfg.seed)
    write_rows(cfg.out / "corpus.jsonl", corpus)
    write_rows(cfg.out / "held_out.jsonl", held_out)
    _write_lines(cfg.out / "plain.jsonl", [{"text": text} for text in plain])
    lines = [
        {"question_id": q.id, "category": q.category, "turns": list(q.turns), "references": list(q.references)}
        for q in questions
    ]
    _write_lines(cfg.out / "questions.jsonl", lines)
    texts = [" " + message.content for row in corpus for message in row.messages] + plain[:5000]
    atoms = [str(number) for number in range(world.LARGEST + 1)]
    tokenizer = train_tokenizer(texts, vocab_size=cfg.vocabulary, atoms=(*CHAT_ATOMS, *atoms))
    tokenizer.save(cfg.out / "tokenizer")
    names = ("corpus.jsonl", "held_out.jsonl", "plain.jsonl", "questions.jsonl", "tokenizer")
    counts = {"corpus": len(corpus), "held_out": len(held_out), "plain": len(plain), "questions": len(questions)}
    return counts | {"vocabulary": tokenizer.vocab_size}, [cfg.out / name for name in names]


def _write_lines(path: Path, lines: list[dict]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main(cfg: Config) -> dict:
    """Make the world; returns the counts."""
    rt = runtime.start("cpu")
    stage = open_stage(cfg, "make_world", rt)
    if stage.done:
        return stage.result()
    counts, outputs = from_main(rt, lambda: write(cfg))
    return finish_stage(stage, rt, counts, outputs)


if __name__ == "__main__":
    launch(main, Config)
