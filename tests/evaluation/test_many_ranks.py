"""Evaluation recipes on two ranks give what one gives; an arena that is killed goes on where it was."""

import json
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from forked import ENVIRONMENT, ROOT
from many_ranks import torchrun

from wizard_engine import world
from wizard_engine.agents import Ledger
from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.records import conversation, write_rows
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, Transformer, save_model

pytestmark = pytest.mark.slow

RECIPES = {
    "arena": (
        "--models",
        "good=world:expert",
        "bad=world:terse",
        "small={base}",
        "--limit",
        "30",
        "--max-new-tokens",
        8,
    ),
    "mt_bench": ("--model", "{base}", "--limit", "12", "--max-new-tokens", "8", "--repeats", "2"),
    "accuracy": ("--model", "world:expert", "--data", "{rows}"),
    "analyze": ("--data", "{rows}", "--tagger", "{base}", "--judge-max-tokens", "16"),
}


def save_small(path):
    """Save a small random model with room for the prompts of judges."""
    texts = [message.content for row in world.held_out(60, 1) for message in row.messages]
    tokenizer = train_tokenizer([*texts, "Topic: Skill: Difficulty: [[7]]"], vocab_size=500, atoms=CHAT_ATOMS)
    shape = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "head_width": 16, "ffn_width": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_positions=4096, init_std=0.2, **shape)
    save_model(Transformer(config, seed=0), tokenizer, path)


def read_all(folder):
    """Results by their names, without records of the stage and the ledger."""
    names = ("*.jsonl", "answers/*.jsonl", "arena.json", "mt_bench.json", "accuracy.json", "analysis.json")
    return {path.relative_to(folder): path.read_bytes() for name in names for path in sorted(folder.glob(name))}


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_give_what_one_gives(tmp_path, name):
    save_small(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", world.held_out(20, 1))
    places = {"base": tmp_path / "base", "rows": tmp_path / "rows.jsonl"}
    options = [str(option).format(**places) for option in RECIPES[name]]
    options += ["--max-missing", "1", "--device", "cpu", "--seed", "3"]
    script = ROOT / "recipes" / f"{name}.py"
    for ranks in (1, 2):
        done = torchrun(ranks, script, *options, "--out", tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_all(tmp_path / "1"), read_all(tmp_path / "2")
    assert one and one == two


@pytest.mark.parametrize("kind", ["spec", "ledger"])
def test_an_error_of_rank_0_ends_both_ranks(tmp_path, kind):
    message = {"spec": "did you mean 'world:expert'", "ledger": "expected a file, got another kind of entry"}[kind]
    (tmp_path / "o" / "ledger.sqlite" if kind == "ledger" else tmp_path / "o").mkdir(parents=True)
    second = "b=world:exprt" if kind == "spec" else "b=world:terse"
    options = ("--models", "a=world:expert", second, "--out", tmp_path / "o", "--device", "cpu")
    done = torchrun(2, ROOT / "recipes" / "arena.py", *options, timeout=100)
    assert done.returncode != 0 and message in done.stderr


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from scripted import Late, judge, rival, verdict
from recipes import arena
from wizard_engine.agents import register
out = Path(sys.argv[2])
log = open(out / "asked.log", "a")
class Logged(Late):
    async def reply(self, request):
        print(self.name, request.task, repr(request.messages[0].content), file=log, flush=True)
        return await super().reply(request)
for name in "abc":
    register(f"late:{name}", lambda name=name: Logged(name, rival(name).say, turns=30))
for name in "jk":
    register(f"late:{name}", lambda name=name: Logged(name, verdict, turns=30))
models = tuple(f"{name}=late:{name}" for name in "abc")
arena.main(arena.Config(models=models, judge=("late:j", "late:k"), n=int(sys.argv[3]), prompts=out / "rows.jsonl",
                        out=out / "o", quiet=True))
"""


def stored(path):
    """The calls in a ledger, as the script logs them."""
    if not path.exists():
        return set()
    ledger = Ledger(path)
    calls = {f"{call.agent} {call.request.task} {call.request.messages[0].content!r}" for call in ledger.calls()}
    ledger.close()
    return calls


def number_stored(path):
    """How many calls a ledger holds, also while a run writes it."""
    if not path.exists():
        return 0
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        database.close()


def run_and_kill(command, log, ledger, more):
    """Run the script, and kill it when it has stored so many more calls; None: let it end."""
    log.unlink(missing_ok=True)
    most = None if more is None else number_stored(ledger) + more
    run = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)
    while most is not None and run.poll() is None:
        if log.exists() and number_stored(ledger) >= most:
            run.kill()
            break
        time.sleep(0.002)
    return run.wait()


def test_an_arena_killed_at_any_moment_writes_the_same_bytes_and_repeats_no_stored_call(tmp_path):
    outputs, known = {}, []
    for kind, moments in (("whole", []), ("killed", [0, 1, 1, 100, 200, 200, 200, 200, 100, 50])):
        folder = tmp_path / kind
        write_rows(folder / "rows.jsonl", [conversation(f"What is {i} and 1?", "2") for i in range(200)])
        command = [sys.executable, "-c", KILLED, str(ROOT / "tests" / "evaluation"), str(folder), "200"]
        for asked in [*moments, None]:
            before = stored(folder / "o" / "ledger.sqlite")
            known.append(len(before))
            ended = run_and_kill(command, folder / "asked.log", folder / "o" / "ledger.sqlite", asked)
            assert ended == (0 if asked is None else -signal.SIGKILL)
            assert not before & set((folder / "asked.log").read_text().splitlines())
        outputs[kind] = read_all(folder / "o")
        calls = json.loads((folder / "o" / "arena.json").read_text())["calls"]
        assert {name: calls[name]["answer"]["replies"] for name in "abc"} == dict.fromkeys("abc", 200)
        assert {name: calls[name]["judge"]["replies"] for name in "jk"} == dict.fromkeys("jk", 1200)
    assert outputs["whole"] == outputs["killed"]
    assert known == sorted(known) and 0 < known[5] < 3000, "calls were stored between the kills"
