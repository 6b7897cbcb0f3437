"""Synthesis over many rows: memory that stays, kills at any moment, and ranks with a local model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wizard_engine.agents import Ledger
from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.records import conversation, write_rows
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, Transformer, save_model

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
AGENTS = HERE.parent / "agents"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, AGENTS))), "OMP_NUM_THREADS": "1"}
OUTPUTS = ("sft.jsonl", "preferences.jsonl", "battles.jsonl", "report.json")


def measured(folder, number):
    """What measured_co_teach.py prints for so many rows."""
    command = [sys.executable, str(HERE / "measured_co_teach.py"), str(folder), str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("number", "most"),
    [pytest.param(5_000, 2_000, marks=pytest.mark.slow), pytest.param(100_000, 600, marks=pytest.mark.soak)],
    ids=["5000", "100000"],
)
def test_memory_does_not_grow_with_the_texts_of_the_rows(number, most, tmp_path, capsys):
    result = measured(tmp_path, number)
    growth = 1024 * (result["peak_kib"] - result["kib"]["tenth"]) / (0.9 * number)
    with capsys.disabled():
        print(f"\n{result}, {growth:.0f} bytes a row")
    assert result["lessons"] > number / 20 and result["pairs"] > number / 20
    assert growth < most, "a row has about 1,500 bytes of text"


ENDPOINT = """
import asyncio, json, sys, time
from fake_endpoint import Fake
from passing_endpoint import passing

async def behave(body, count):
    await asyncio.sleep(0.005 + 0.02 * (hash(json.dumps(body)) % 100 / 100))
    with open(sys.argv[1], "a") as log:
        log.write(json.dumps([body["model"], body["messages"], body["max_tokens"]]) + "\\n")
    return passing(body, count)

with Fake(behave) as fake:
    print(fake.url, flush=True)
    sys.stdin.read()
"""


def asked(log):
    """The calls that the endpoint answered, in order."""
    return log.read_text().splitlines() if log.exists() else []


def stored(path):
    """The calls whose replies a ledger holds, in the form of the endpoint's log."""
    ledger = Ledger(path)
    calls = {
        json.dumps(
            [call.agent.partition("@")[0], [m._asdict() for m in call.request.messages], call.request.max_tokens]
        )
        for call in ledger.calls()
    }
    ledger.close()
    return calls


def command_of(rows, url, out):
    one, two, three = (f"openai:{name}@{url}#concurrency=4" for name in ("one", "two", "three"))
    options = ["--data", rows, "--out", out, "--agents.ours", one, "--agents.rivals", two, "--agents.judge", three]
    options += ["--agents.suggester", "None", "--sft-threshold", "1", "--device", "cpu", "--quiet"]
    return [sys.executable, str(ROOT / "recipes" / "co_teach.py"), *map(str, options)]


@pytest.mark.slow
def test_co_teaching_killed_at_ten_moments_gives_the_same_and_repeats_no_stored_call(tmp_path):
    rows, log, out = tmp_path / "rows.jsonl", tmp_path / "log", tmp_path / "killed"
    write_rows(rows, [conversation(f"Why is thing {i} so?", "It is.") for i in range(100)])
    endpoint = subprocess.Popen(
        [sys.executable, "-c", ENDPOINT, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        url = endpoint.stdout.readline().strip()
        command, before = command_of(rows, url, out), 0
        for kill in range(10):
            process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
            while len(asked(log)) < before + 12 + kill and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            time.sleep(0.3)  # Calls in flight end at the endpoint.
            before, known = len(asked(log)), stored(out / "ledger.sqlite")
            assert known <= set(asked(log)) and before - len(known) <= 12 * (kill + 1), "those in flight alone are lost"
            if kill == 9:
                break
        subprocess.run(command, check=True, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        assert not known & set(asked(log)[before:]), "a stored call was made again"
        subprocess.run(command_of(rows, url, tmp_path / "whole"), check=True, env=ENVIRONMENT)
    finally:
        endpoint.communicate("")
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (out / "sft.jsonl").read_text()


def save_small(path):
    """Save a small random model with room for a conversation."""
    texts = [f"Why is thing {i} so? It is {i}." for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=320, atoms=CHAT_ATOMS)
    shape = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "head_width": 16, "ffn_width": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_positions=1024, init_std=0.3, **shape)
    save_model(Transformer(config, seed=0), tokenizer, path)


RUNS = {
    "co_teach": ("--agents.ours", "{model}", "--agents.rivals", "world:expert", "world:terse", "--chat-turns", "2"),
    "self_teach": ("--agents.student", "{model}", "--agents.labeller", "world:judge", "--samples", "3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_two_ranks_with_a_local_model_give_what_one_gives(recipe, tmp_path):
    from wizard_engine.world import natural_corpus

    save_small(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", natural_corpus(24, seed=3))
    options = [option.format(model=tmp_path / "model") for option in RUNS[recipe]]
    options += ["--data", str(tmp_path / "rows.jsonl"), "--max-tokens", "12", "--on-length", "keep", "--device", "cpu"]
    script = [str(ROOT / "recipes" / f"{recipe}.py"), *options, "--quiet", "--max-missing", "1", "--batch-size", "8"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", [sys.executable]), ("two", two)):
        command = [*launcher, *script, "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.name in READ}
    assert {name: (tmp_path / "two" / name).read_bytes() for name in written} == written and len(written) > 3


READ = {*OUTPUTS, "scores.jsonl", "processes.jsonl"}
