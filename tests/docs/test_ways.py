"""The ways of a batch and of a prompt in the design notes are those that the programs take."""

import re
import sys
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from many_ranks import save_base, word_texts

from recipes import sft
from wizard_engine.data.records import Conversation, Message, write_rows
from wizard_engine.generation.offline import answer_texts
from wizard_engine.model import load_model
from wizard_engine.training.options import Training

ROOT = Path(__file__).parents[2]
NOTES = (ROOT / "docs" / "design_notes.md").read_text()


def documented(heading: str) -> list[list[str]]:
    """The tables of functions below a heading, as "file function"."""
    section = NOTES.split(f"## {heading}\n")[1].split("\n## ")[0]
    tables = re.split(r"\| function .*\n\|---.*\n", section)[1:]
    return [[" ".join(row) for row in re.findall(r"^\| `(\S+)` `(\S+)` \|", table, re.M)] for table in tables]


def called(program) -> list[str]:
    """The project's functions in the order in which a program enters them, as "file function"."""
    calls: list[str] = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            calls.append(f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}")

    sys.setprofile(note)
    try:
        program()
    finally:
        sys.setprofile(None)
    return calls


def check_order(way: list[str], calls: list[str]) -> None:
    """Each function of a way is entered behind the one before it."""
    remaining = iter(calls)
    for function in way:
        assert function in calls, f"{function}: never called"
        assert function in remaining, f"{function}: not called behind the one before it"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("ways")
    texts = word_texts(20)
    save_base(root / "base", texts, width=16, layers=1, heads=4, kv_heads=2, head_width=8, ffn_width=24)
    rows = [Conversation((Message("user", a), Message("assistant", b))) for a, b in pairwise(texts)]
    write_rows(root / "rows.jsonl", rows)
    return root


@pytest.mark.skipif(torch.cuda.is_available(), reason="other kernels on a GPU")
def test_a_batch_goes_the_documented_way_and_enters_no_room_twice(base):
    training = Training(pack_tokens=100, packs_per_step=1, max_steps=1)
    cfg = sft.Config(
        (base / "rows.jsonl",),
        base / "out",
        str(base / "base"),
        training=training,
        device="cpu",
        audit=False,
        quiet=True,
    )
    calls = called(lambda: sft.main(cfg))
    way, update = documented("The way of a batch")
    assert len(way) > 6 and len(update) > 3
    check_order(way + update, calls)
    rooms = [room for room, _ in groupby(str(Path(function.split()[0]).parent) for function in way)]
    assert len(rooms) == len(set(rooms)), rooms


@pytest.mark.skipif(torch.cuda.is_available(), reason="other kernels on a GPU")
def test_a_prompt_goes_the_documented_way(base):
    model, tokenizer = load_model(base / "base")
    (way,) = documented("The way of a prompt")
    assert len(way) > 10
    check_order(
        way,
        called(
            lambda: answer_texts(
                model, tokenizer, [(Message("user", "one two"),)], max_new_tokens=3, temperature=0.0, seed=0
            )
        ),
    )
