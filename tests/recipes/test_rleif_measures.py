"""RLEIF by checked answers, its held-out measures, its supervised packs, and what it has in memory."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from forked import run_python
from safetensors.torch import load_file

from recipes import rleif
from wizard_engine.data.chat import encode_conversation
from wizard_engine.data.records import conversation
from wizard_engine.model import Transformer, load_model, save_model
from wizard_engine.parallel.mesh import Axis, Mesh
from wizard_engine.rl.options import CriticOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining


def checked(world, out, **changes):
    """A short run by checked answers alone."""
    options = {
        "data": (world.write("checked.jsonl", world.single[:5]),),
        "model": world.base,
        "reward": RewardOptions(factors=("checked",)),
        "training": OnlineTraining(lr=1e-3, pack_tokens=512, save_every=1),
        "critic": CriticOptions(lr=1e-3),
        "rollout": RolloutOptions(steps=2, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=10),
        "quiet": True,
    }
    return rleif.Config(out=out, **options | changes)


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    rleif.main(checked(world, out))
    return out


# Catches: reward models that a run loads or asks for where their factors are not used; factors of nothing in the log.
def test_checked_answers_alone_need_no_reward_model(world, plain, tmp_path, monkeypatch):
    lines = read_metrics(plain / "metrics.jsonl")
    # An answer that is cut off costs half a point.
    assert [line["reward"] for line in lines] == [line["checked"] - (1 - line["finished"]) / 2 for line in lines]
    assert not {"instruction_factor", "process_factor", "preference_factor", "mean_step_score"} & lines[0].keys()
    assert lines[0]["explained_variance"] is not None
    seen, right = [], rleif.Setup.score

    def score(setup, rollout, references, own):
        seen.append((setup, [reference.text for reference in references], rollout.prompts))
        return [dataclasses.replace(r, finished=True, is_right=True) for r in right(setup, rollout, references, own)]

    monkeypatch.setattr(rleif.Setup, "score", score)
    cfg = checked(world, tmp_path, rollout=dataclasses.replace(checked(world, tmp_path).rollout, steps=1))
    rleif.main(cfg)
    setup, references, prompts = seen[0]
    assert setup.instruction is setup.process is None and len(setup.frozen) == 1 and setup.critic is not None
    own = {row.instruction: row.answer for row in world.single[:5]}
    assert references == [own[prompt[-1].content] for prompt in prompts] and len(set(references)) == 2
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["checked"] == 1.0
    critic = load_model(world.base)[0].state_dict()
    assert {name for name in critic} == {name for name, _ in setup.critic.body.named_parameters()}


@pytest.mark.parametrize("name", ["instruction", "process"])
def test_factor_without_its_model_is_refused(name):
    with pytest.raises(ValueError, match=rf"reward\.{name}_model: expected a directory .* give --reward\.{name}-model"):
        RewardOptions(factors=(name, "checked"))


def test_rows_without_a_reference_are_refused_or_counted(world, tmp_path):
    rows = [*world.single[:2], conversation("Why?", "Because nobody knows."), world.single[2]]
    cfg = checked(world, tmp_path, data=(world.write("unread.jsonl", rows),))
    with pytest.raises(ValueError, match=r"unread\.jsonl:3: reference: expected a number, got 'Because"):
        rleif.main(cfg)
    assert rleif.main(dataclasses.replace(cfg, on_error="skip"))["rejected"] == 1
    assert "unread.jsonl:3" in (tmp_path / "rejects.jsonl").read_text()


# Catches: a measurement that draws from the run's random numbers, changes a cache or is lost by a kill.
def test_held_out_measures_change_nothing_and_outlive_a_kill(world, plain, tmp_path, monkeypatch, capsys):
    rows = [*world.single[7:10], conversation("Why?", "Because nobody knows.")]
    held = {
        "held_out": (world.write("held.jsonl", rows),),
        "eval_every": 1,
        "rollout": RolloutOptions(steps=2, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=10),
    }
    with pytest.raises(ValueError, match=r"held\.jsonl:4: reference: expected a number"):
        rleif.main(checked(world, tmp_path / "refused", **held))
    held["on_error"] = "skip"
    result = rleif.main(checked(world, tmp_path / "whole", **held))["held_out"]
    assert same(weights(plain), weights(tmp_path / "whole"))
    measures = {"reward", "checked", "length", "finished"}
    assert result["rows"] == 3 and result["before"].keys() == result["difference"].keys() == measures
    lines = [json.loads(line) for line in (tmp_path / "whole" / "held_out.jsonl").read_text().splitlines()]
    assert [line["row"].rpartition(":")[2] for line in lines] == ["1", "2", "3"]
    lengths = [line["after"]["length"] - line["before"]["length"] for line in lines]
    assert result["difference"]["length"][0] == pytest.approx(sum(lengths) / 3)
    logged = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["held_out_length"] > 0 and line["held_out_seconds"] > 0 for line in logged)
    assert logged[-1]["held_out_length"] == pytest.approx(result["after"]["length"][0])
    right = OnlineRun.record

    def killed(self, *arguments):
        if self.step == 1:
            self.close()
            raise KeyboardInterrupt
        right(self, *arguments)

    monkeypatch.setattr(OnlineRun, "record", killed)
    cut = checked(world, tmp_path / "cut", **held)
    with pytest.raises(KeyboardInterrupt):
        rleif.main(cut)
    monkeypatch.setattr(OnlineRun, "record", right)
    capsys.readouterr()
    again = rleif.main(dataclasses.replace(cut, quiet=False))["held_out"]
    out, err = capsys.readouterr()
    assert again == result and "held-out: reward " in out and "3 rows)" in out
    assert "rleif: load policy" in err and "memory: policy 0.0, critic 0.0" in err
    assert [json.loads(x) for x in (tmp_path / "cut" / "held_out.jsonl").read_text().splitlines()] == lines
    with pytest.raises(ValueError, match=r"eval_every: expected --held-out with it, got 3 alone"):
        checked(world, tmp_path, eval_every=3)


# Catches: held-out rows in the identity of a run, whose change would train it again; a start that is measured on the
# weights of a checkpoint; rollouts that are made again.
def test_a_finished_run_is_measured_without_another_rollout(world, plain, tmp_path, monkeypatch, capsys):
    others = {"held_out": (world.write("four.jsonl", world.single[7:11]),)}
    wanted = rleif.main(checked(world, tmp_path / "at_once", **others))["held_out"]
    shutil.copytree(plain, tmp_path / "later")
    before = (tmp_path / "later" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(rleif, "train_step", lambda *_: pytest.fail("a rollout was made"))
    result = rleif.main(checked(world, tmp_path / "later", **others))
    assert result["held_out"] == wanted and result["steps"] == 2
    answers, wanted_answers = (
        [json.loads(line) for line in (tmp_path / name / "held_out.jsonl").read_text().splitlines()]
        for name in ("later", "at_once")
    )
    assert answers == wanted_answers and any(line["before"] != line["after"] for line in answers)
    assert same(weights(plain), weights(tmp_path / "later"))
    assert (tmp_path / "later" / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert rleif.main(checked(world, tmp_path / "later", quiet=False)) == result, (
        "that it measures nothing is no change"
    )
    assert "done before, nothing to do" in capsys.readouterr().out


# Catches: answers whose random numbers depend on when they are sampled.
def test_held_out_answers_of_the_same_weights_are_the_same(world, tmp_path):
    waiting = CriticOptions(lr=1e-3, warmup_steps=2)
    held_out = world.write("three.jsonl", world.single[7:10])
    result = rleif.main(checked(world, tmp_path, critic=waiting, held_out=(held_out,)))["held_out"]
    assert set(map(tuple, result["difference"].values())) == {(0.0, 0.0)} and result["before"]["length"][0] > 0
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert all(line["before"] == line["after"] for line in lines)


# Catches: packs whose losses have denominators of their own, and rows that are in none or in two.
def test_supervised_packs_have_the_gradient_of_one_batch(world):
    gradients, packs = [], []
    for capacity in (4096, 150):
        policy, tokenizer = load_model(world.base)
        run = SimpleNamespace(totals=lambda *x: x, device=torch.device("cpu"), share=lambda **_: None)
        samples = [encode_conversation(tokenizer, row.messages) for row in world.single[:12]]
        cfg = SimpleNamespace(ptx=PTXOptions(coefficient=0.5), training=OnlineTraining(pack_tokens=capacity))
        rleif._add_supervised(cfg, run, policy, samples)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        packs.append(rleif.supervised_groups(samples, capacity))
    assert packs[0] == [samples] or [len(pack) for pack in packs[0]] == [12]
    assert len(packs[1]) > 3 and all(sum(len(s.tokens) - 1 for s in pack) <= 150 for pack in packs[1])
    assert [a.tokens.tolist() for a in packs[0][0]] == [a.tokens.tolist() for a in samples], "one pack keeps the order"
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert rleif.supervised_groups([], 150) == []


@pytest.mark.parametrize(
    ("options", "data", "row", "sequences"),
    [
        ({"prompts_per_step": 4, "samples_per_prompt": 2}, 1, 1, 8),
        ({"prompts_per_step": 48, "samples_per_prompt": 4}, 1, 1, 128),
        ({"prompts_per_step": 4, "samples_per_prompt": 2}, 2, 1, 4),
        ({"prompts_per_step": 3, "samples_per_prompt": 2, "tp": 2}, 1, 2, 8),
    ],
)
def test_sampler_has_room_for_what_is_sampled(options, data, row, sequences):
    mesh = dataclasses.replace(Mesh(torch.device("cpu")), data=Axis(data), row=Axis(row))
    assert rleif.sampled_at_once(RolloutOptions(**options), mesh) == sequences


MEASURED = """
import json, sys
from pathlib import Path
import torch
from recipes import rleif
from wizard_engine.rl.options import *
from wizard_engine.training.options import OnlineTraining

torch.set_num_threads(1)
data, model, out = map(Path, sys.argv[1:])

def memory(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024

shown = {}
right = rleif.memory
rleif.memory = lambda *arguments: shown.setdefault("memory", right(*arguments))
Path("/proc/self/clear_refs").write_text("5")
before = memory("RssAnon")
rleif.main(rleif.Config(
    data=(data,), out=out, model=str(model), reward=RewardOptions(factors=("checked",)), audit=False,
    training=OnlineTraining(lr=1e-5, pack_tokens=512, save_every=0), ptx=PTXOptions(coefficient=0.1, rows=8),
    rollout=RolloutOptions(steps=1, prompts_per_step=3, samples_per_prompt=2, max_new_tokens=16),
    device="cpu", on_error="skip",
))
# Pages of files are those of libraries, and only become more.
print(json.dumps([memory("VmHWM") - memory("RssFile") - before, shown["memory"].total]))
"""


# Catches: a part that is not counted, or counted twice. The interpreter and its allocator take up to 64 MiB more.
def test_memory_is_what_the_arithmetic_says(world, tmp_path):
    small, tokenizer = load_model(world.base)
    config = dataclasses.replace(small.config, vocab_size=32768, width=192, max_positions=512)
    save_model(Transformer(config, seed=0), tokenizer, tmp_path / "model")
    data = world.write("some.jsonl", world.single[:8])
    done = run_python("-c", MEASURED, data, tmp_path / "model", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    measured, bound = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 * bound <= measured <= bound + 64 * 2**20, (measured, bound)
