"""A tiny world and a tiny model of it, made once for the tests of training recipes."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from recipes import make_world, sft
from wizard_engine.data.records import Conversation, Preference, Process, read_rows, write_rows
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.training.options import Training

QUICK = {"pack_tokens": 384, "packs_per_step": 2, "lr": 2e-3}


@dataclass(frozen=True)
class World:
    """Files made by the world, and a base model."""

    root: Path
    corpus: list[Conversation]
    base: str

    def write(self, name: str, rows: list) -> Path:
        """Rows as a file of the world."""
        write_rows(self.root / name, rows)
        return self.root / name

    @property
    def single(self) -> list[Conversation]:
        """Rows of one question and one answer."""
        return [row for row in self.corpus if len(row.messages) == 2 and len(row.answer) < 250]

    def preferences(self, count: int) -> list[Preference]:
        """Each answer against that of the next row."""
        rows = [row for row in self.single if len(row.instruction) < 250][: count + 1]
        return [
            Preference(tuple(a.messages[:-1]), a.answer, b.answer) for a, b in pairwise(rows) if a.answer != b.answer
        ]

    def rankings(self, count: int) -> list[Preference]:
        """Long instructions over short ones."""
        texts = sorted({row.instruction for row in self.single}, key=len)
        pairs = zip(texts[:count], texts[count : 2 * count])
        return [Preference((), longer, shorter, attributes={"margin": 0.1}) for shorter, longer in pairs]

    def processes(self, count: int) -> list[Process]:
        """Steps with labels in turns."""
        rows = [(tuple(row.messages[:-1]), tuple(step_texts(row.answer))) for row in self.single]
        rows = [(prompt, steps) for prompt, steps in rows if len(steps) > 1][:count]
        return [
            Process(prompt, steps, tuple((1, 0, -1)[(n + i) % 3] for i in range(len(steps))))
            for n, (prompt, steps) in enumerate(rows)
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world.main(make_world.Config(out=root, corpus=160, held_out=12, plain=60, questions=3, quiet=True))
    base = sft.Config(
        data=(root / "plain.jsonl",),
        out=root / "base",
        model="tiny",
        tokenizer=root / "tokenizer",
        kind="text",
        training=Training(**QUICK, max_steps=3),
        quiet=True,
    )
    sft.main(base)
    return World(root, read_rows(root / "corpus.jsonl", kind="conversation"), str(root / "base" / "model"))
