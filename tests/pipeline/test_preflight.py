"""What is looked at before a run: what would end it later is named, with what to change, and nothing starts."""

import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import run_python
from many_ranks import save_base

from recipes import progressive
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.pipeline import preflight
from wizard_engine.pipeline.run_file import read_run_file
from wizard_engine.runtime.run_lock import RunLock

REAL = Path(progressive.__file__).parent / "runs" / "real"
RUN = """
out = "{folder}/run"
slices = 1
quiet = true
threads = 1
stages = ["sft"]
[rows]
data = ["{folder}/rows.jsonl"]
hold-out = 6
[base]
model = "{folder}/base"
[agents]
judge = "reference:judge"
labeller = "reference:labeller"
[measure]
arena = false
[sft]
training = {{ lr = 1e-3, max-steps = 2, pack-tokens = 256, save-every = 1 }}
"""
TAUGHT = ('stages = ["sft"]', 'stages = ["sft", "self_teach"]')
OWN_ANSWERS = ("hold-out = 6", "hold-out = 6\nreference-answers = true")
CHECKED = ('stages = ["sft"]', 'stages = ["sft", "rleif"]\n[rleif.reward]\nfactors = ["checked"]')
ESSAYS = [{"instruction": f"Write about the sea, {n} times.", "output": "The sea is blue and wide."} for n in range(24)]


@pytest.fixture
def folder(tmp_path):
    """A folder with rows, a base model and a run file."""
    rows = [{"instruction": f"What is {n} + {n * n}?", "output": f"{n} + {n * n} = {n + n * n}"} for n in range(24)]
    write(tmp_path / "rows.jsonl", rows)
    save_base(tmp_path / "base", [f"{row['instruction']} {row['output']}" for row in rows], layers=1, max_positions=256)
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_tokenizer(folder):
    for path in (folder / "base").glob("tokenizer*"):
        path.unlink()


def other_tokenizer(folder, texts, vocab_size):
    """Another model's tokenizer, with its own names for the ends of texts, beside the model's configuration."""
    no_tokenizer(folder)
    train_tokenizer(texts, vocab_size=vocab_size).save(folder / "base")


def shifted_tokenizer(folder):
    """A tokenizer in which the id of the model's EOS is that of a text."""
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | {"eos_token_id": 70}))


def cut(folder):
    path = folder / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def essays(folder):
    write(folder / "rows.jsonl", ESSAYS)


def unanswered(folder):
    write(folder / "rows.jsonl", [{"instruction": row["instruction"], "output": ""} for row in ESSAYS])


WRONG = {
    "a misspelt stage": (
        ['stages = ["sft"]', 'stages = ["sfd"]'],
        None,
        r"stages of a slice, got 'sfd'; the nearest is sft",
    ),
    "a misspelt table": (["[sft]", "[sfd]"], None, r"run.toml: sfd: expected a stage or a group, .*nearest is sft"),
    "a misspelt option": (
        ["max-steps", "max-step"],
        None,
        r"sft.training.max-step: expected a known option, .* max-steps",
    ),
    "self-teaching left out": (
        ['"sft"]', '"sft", "process_reward"]'],
        None,
        r"answers of self_teach with agents.labeller \(for slice_1/process_reward\); .*leave the stage out of `stages`",
    ),
    "nobody to rank": (
        ['"sft"]', '"sft", "instruction_reward"]'],
        None,
        r"rankings of evol_instruct with agents.ranker \(for slice_1/instruction_reward\)",
    ),
    "no pairs": (['"sft"]', '"sft", "stage_dpo"]'], None, r"preference rows \(for slice_1/stage_dpo\): rows.pairs, or"),
    "no reward model": (['"sft"]', '"sft", "rleif"]'], None, r"process_reward before it \(for slice_1/rleif\)"),
    "no preference model": (
        ['"sft"]', '"sft", "rleif"]\n[rleif.reward]\nfactors = ["preference"]'],
        None,
        r"preference_reward before it \(for slice_1/rleif\)",
    ),
    "no pairs for a preference model": (
        ['"sft"]', '"sft", "preference_reward"]'],
        None,
        r"preference rows \(for slice_1/preference_reward\): rows.pairs, or",
    ),
    "a reward model of a later slice": (
        [
            'slices = 1\nquiet = true\nthreads = 1\nstages = ["sft"]',
            'slices = 2\nstages = ["self_teach", "process_reward", "rleif"]\n[process_reward]\nin-slices = [2]\n'
            '[rleif.reward]\nfactors = ["process"]',
        ],
        None,
        r"process_reward before it \(for slice_1/rleif\)",
    ),
    "no tokenizer": ([], no_tokenizer, r"base.model: .*base: expected tokenizer.json or a \*.model file .*got neither"),
    "a larger tokenizer": (
        [],
        lambda folder: other_tokenizer(folder, ["".join(word) for word in product("abcdefg", repeat=3)], 900),
        r"base.model: .*tokenizer: expected at most \d+ ids, .*choose the model's own tokenizer",
    ),
    "an EOS that is a text": (
        [],
        shifted_tokenizer,
        r"base.model: .*expected the EOS id 70 of config.json to have no text, got '.': another family's tokenizer",
    ),
    "a cut model": ([], cut, r"model.safetensors: "),
    "rows without answers": (
        [],
        unanswered,
        r"rows.jsonl:1: messages\[1\].content: expected text, got ''",
    ),
    "the same, skipped": (
        ["hold-out = 6", 'hold-out = 6\non-error = "skip"', "arena = false", "arena = false\naccuracy = false"],
        unanswered,
        r"rows.data: expected rows with an answer, got none that can be read; the first: .*rows.jsonl:1: messages",
    ),
    "rows that name no reference": (
        [*TAUGHT],
        None,
        r"slice_1/self_teach: reference:judge and reference:labeller: expected rows with an answer known to be right "
        r"that can be compared with, got 24 of 24 without; say rows.reference-answers = true",
    ),
    "answers that are no numbers": (
        [TAUGHT[0], TAUGHT[1], *OWN_ANSWERS],
        essays,
        r"slice_1/self_teach: reference:judge and reference:labeller: .*got 24 of 24 without; .*name another agent",
    ),
    "a reward that compares numbers": (
        [*CHECKED],
        essays,
        r"slice_1/rleif: expected rows whose answer can be compared with, got 24 of 24 without; say rows.on-error",
    ),
    "accuracy of essays": (
        ["arena = false", "arena = false\naccuracy = true"],
        essays,
        r"slice_1/accuracy_base, slice_1/accuracy_sft: expected rows whose answer can be compared with, got 24 of 24",
    ),
    "questions without references": (
        ["hold-out = 6", f'hold-out = 6\nquestions = "{REAL}/questions.jsonl"'],
        None,
        r"mt_bench_base, mt_bench_sft: reference:judge: expected questions with references that can be compared with, "
        r"got 21 of 48 turns without; name another judge, or say mt_bench.max-missing = 0.44",
    ),
    "an endpoint that is down": (
        [*TAUGHT, "reference:judge", "openai:m@http://127.0.0.1:9/v1", *OWN_ANSWERS],
        None,
        r"agent openai:m@http://127.0.0.1:9/v1: expected an endpoint that answers, got .*[Cc]onnection refused",
    ),
    "a file that is not there": (
        ["hold-out = 6", 'held-out = ["none.jsonl"]'],
        None,
        r"rows.held-out: expected a file, got none at none.jsonl",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_end_a_run_is_named_before_it(folder, case):
    changes, prepare, message = WRONG[case]
    path = folder / "run.toml"
    text = path.read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    if prepare is not None:
        prepare(folder)
    for flag in ({"dry_run": True}, {}):
        with pytest.raises(ValueError, match=message):
            progressive.main(progressive.Config(path, **flag))
    assert not (folder / "run").exists()


def test_a_run_of_which_nothing_is_wrong_passes(folder):
    progressive.main(progressive.Config(folder / "run.toml", dry_run=True))
    assert not (folder / "run").exists()


def test_a_disk_that_will_not_hold_the_run(folder, monkeypatch):
    run = read_run_file(folder / "run.toml")
    nodes = progressive.plan_of(run).nodes
    size = (folder / "base/model.safetensors").stat().st_size
    # A model and the one checkpoint that is certain: four times the weights in fp32.
    for free, is_enough in ((5 * size, True), (3 * size, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        if is_enough:
            preflight.check_run(run, nodes)
        else:
            with pytest.raises(
                ValueError, match=r"run: expected 0.0 GiB for models and checkpoints, got 0.0 GiB free; ch"
            ):
                preflight.check_run(run, nodes)


def content(folder):
    """Every file of a folder with its bytes, but the files of locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# Catches: work of a run that is thrown away because a line of its file was changed.
@pytest.mark.parametrize("is_half", [False, True])
def test_a_changed_file_over_a_run_lists_what_is_stale_and_deletes_nothing(folder, capsys, is_half):
    path, out = folder / "run.toml", folder / "run"
    progressive.main(progressive.Config(path))
    if is_half:
        # As where the run was stopped in the middle of supervised learning.
        (out / "slice_1/sft/stage.json").unlink()
        shutil.rmtree(out / "slice_1/sft/model")
        shutil.rmtree(out / "slice_1/accuracy_sft")
        assert list((out / "slice_1/sft/checkpoints").iterdir())
    before = content(out)
    path.write_text(path.read_text().replace("lr = 1e-3", "lr = 5e-4"))
    progressive.main(progressive.Config(path, dry_run=True))
    graph = capsys.readouterr().out.partition("\n\n")[0]
    shown = {line.split()[0]: line for line in graph.splitlines()}
    assert "stale" in shown["slice_1/sft"] and "config.training.lr (0.001 -> 0.0005)" in shown["slice_1/sft"]
    assert " done " in shown["slice_1/rows"] and (" to run " if is_half else "stale") in shown["slice_1/accuracy_sft"]
    message = r"expected the run that is there, got another: slice_1/sft \(config.training.lr \(0.001 -> 0.0005\)\)"
    message += (
        "; nothing was" if is_half else r"; slice_1/accuracy_sft \(reads what slice_1/sft will write anew\); nothing"
    )
    with pytest.raises(ValueError, match=message):
        progressive.main(progressive.Config(path))
    assert content(out) == before
    path.write_text(path.read_text().replace("lr = 5e-4", "lr = 1e-3"))
    progressive.main(progressive.Config(path))
    assert (out / "slice_1/accuracy_sft/stage.json").exists()


def test_a_second_driver_is_refused_by_the_first_ones_number(folder):
    path = folder / "run.toml"
    lock = RunLock.take(folder / "run")
    try:
        done = run_python(progressive.__file__, path)
        looked = run_python(progressive.__file__, path, "--dry-run")
    finally:
        lock.release()
    assert done.returncode and "expected no other run in this directory, got one: process" in done.stderr
    assert looked.returncode == 0 and "slice_1/sft" in looked.stdout
    assert not [other for other in (folder / "run").iterdir() if other.is_dir()]
