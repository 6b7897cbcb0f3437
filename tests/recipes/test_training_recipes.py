"""Training recipes end to end on a tiny world: what they write, what is skipped, what resumes, what is refused."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from recipes import accuracy, make_world, reward, rleif, sft, stage_dpo
from wizard_engine.data.chat import Sample
from wizard_engine.data.records import conversation, read_rows
from wizard_engine.data.samples import Pair, answer_pair
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.model import ScoringModel, load_model
from wizard_engine.parallel import Sharding
from wizard_engine.rl.options import CriticOptions, PPOOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.training import reference_logprobs
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining, Training
from wizard_engine.training.preference_slices import order_slices

QUICK = {"pack_tokens": 384, "packs_per_step": 2, "lr": 2e-3}


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_make_world_writes_what_it_counts_and_repeats(world, tmp_path):
    record = json.loads((world.root / "stage.json").read_text())["result"]
    assert record["corpus"] == len(world.corpus) == 160 and record["held_out"] == 12
    assert len(read_rows(world.root / "held_out.jsonl", kind="conversation")) == 12
    make_world.main(make_world.Config(out=tmp_path, corpus=160, held_out=12, plain=60, questions=3, quiet=True))
    for name in ("corpus.jsonl", "held_out.jsonl", "plain.jsonl", "questions.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (world.root / name).read_bytes()


def supervised(world, out, **changes):
    training = Training(**QUICK, max_steps=changes.pop("steps", 4))
    data = changes.pop("data", None) or world.write("few.jsonl", world.single[:40])
    return sft.Config(data=(data,), out=out, model=world.base, training=training, quiet=True, **changes)


# Catches: a finished run that is skipped or refused where it is given more steps, or that begins anew.
def test_sft_goes_on_where_it_is_given_more_steps(world, tmp_path):
    cfg = supervised(world, tmp_path, steps=2)
    assert sft.main(cfg)["steps"] == 2
    first, shorter = read_metrics(tmp_path / "metrics.jsonl"), weights(tmp_path)
    assert sft.main(supervised(world, tmp_path, steps=3))["steps"] == 3
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[:2] == first and len(lines) == 3 and not same(shorter, weights(tmp_path))
    with pytest.raises(ValueError, match=r"another: config\.training\.max_steps \(3 -> 2\)"):
        sft.main(cfg)


def test_sft_learns_writes_a_model_and_is_skipped_when_done(world, tmp_path):
    cfg = supervised(world, tmp_path, steps=8)
    result = sft.main(cfg)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert result["steps"] == len(lines) and lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert result["samples"] == 40 and result["rejected"] == 0
    assert not same(weights(tmp_path), load_file(world.root / "base" / "model" / "model.safetensors"))
    written = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert sft.main(dataclasses.replace(cfg, audit=False)) == result
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"another: config\.seed \(0 -> 1\); choose another --out, or --overwrite"):
        sft.main(dataclasses.replace(cfg, seed=1))
    assert sft.main(dataclasses.replace(cfg, seed=1, overwrite=True))["steps"] == result["steps"]


LONG = conversation("How many?", "one apple " * 700)


def bad_rows(world, name):
    """Line 2 is too long, line 3 is no JSON, line 5 has roles that do not alternate."""
    path = world.write(name, [world.single[0], LONG, *world.single[1:6]])
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    lines[4] = lines[4].replace('"assistant"', '"user"')
    path.write_text("\n".join(lines) + "\n")
    return path


def test_sft_refuses_bad_rows_by_line_or_counts_them(world, tmp_path):
    path = bad_rows(world, "bad.jsonl")
    with pytest.raises(ValueError, match=r"bad\.jsonl:\d: "):
        sft.main(supervised(world, tmp_path / "raise", data=path))
    assert not (tmp_path / "raise" / "model").exists()
    only_long = world.write("long.jsonl", [world.single[0], LONG])
    with pytest.raises(ValueError, match=r"long\.jsonl:2: sample: expected at most 385 tokens, got \d+"):
        sft.main(supervised(world, tmp_path / "long", data=only_long))
    result = sft.main(supervised(world, tmp_path / "skip", data=path, on_error="skip", steps=1))
    assert result["samples"] == 4 and result["rejected"] == 3
    cut = sft.main(supervised(world, tmp_path / "cut", data=path, on_error="skip", truncate=True, steps=1))
    assert (cut["samples"], cut["rejected"], cut["truncated"]) == (5, 2, 1) and cut["truncated_tokens"] > 100
    listed = "".join(file.read_text() for file in (tmp_path / "skip").glob("*rejects.jsonl"))
    assert all(f"bad.jsonl:{line}" in listed for line in (2, 3, 5))


def test_sft_refuses_more_than_the_context_and_models_it_cannot_open(world, tmp_path):
    with pytest.raises(ValueError, match=r"max_length: expected 2 to 512 \(the model's context\), got 513"):
        sft.main(supervised(world, tmp_path / "a", max_length=513))
    with pytest.raises(ValueError, match=r"input data: expected a file or directory, got none at .*none\.jsonl"):
        sft.main(supervised(world, tmp_path / "b", data=tmp_path / "none.jsonl"))
    for model, message in (("nowhere", "expected a model directory or one of"), ("tiny", "which --tokenizer it shall")):
        with pytest.raises(ValueError, match=message):
            sft.main(dataclasses.replace(supervised(world, tmp_path / model), model=model))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--modle", "x"], 2, "--modle: expected a known option, got an unknown one; the nearest is --model"),
        (["--training.lrr", "1"], 2, "the nearest is --training.lr"),
        (["--kind", "speech"], 2, "--kind"),
        ([], 1, "sft.py: error: sft: input data: expected a file or directory, got none at"),
    ],
)
def test_command_line_says_in_one_line_what_is_wrong(world, tmp_path, monkeypatch, capsys, options, code, message):
    options = ["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path), "--model", world.base, *options]
    monkeypatch.setattr(sys, "argv", ["sft.py", *options])
    with pytest.raises(SystemExit) as caught:
        launch(sft.main, sft.Config)
    assert caught.value.code == code and message in capsys.readouterr().err


def staged(world, out, **changes):
    training = Training(**{**QUICK, "lr": 1e-3}, epochs=2)
    options = {
        "slices": 2,
        "beta": 0.5,
        "training": training,
        "data": (world.write("pairs.jsonl", world.preferences(14)),),
    }
    return stage_dpo.Config(out=out, model=world.base, quiet=True, **{**options, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"reference": "initial", "cumulative": True, "nll": 0.2}, {"variant": "ipo", "label_smoothing": 0.0}],
    ids=["previous", "initial", "ipo"],
)
def test_stage_dpo_starts_at_its_reference_and_drifts(world, tmp_path, changes):
    result = stage_dpo.main(staged(world, tmp_path, **changes))
    first, second = (read_metrics(tmp_path / f"stage_{n}" / "metrics.jsonl") for n in (1, 2))
    start = 1.0 if changes.get("variant") == "ipo" else torch.tensor(2.0).log().item()
    pairs = [line["loss"] - changes.get("nll", 0.0) * line["chosen_nll"] for line in first]
    assert pairs[0] == pytest.approx(start, rel=1e-4) and first[0]["accuracy"] == pytest.approx(0.5, abs=0.5)
    assert pairs[-1] < start and abs(first[0]["drift_to_initial"]) < 1e-3
    moved = abs(second[0]["drift_to_initial"])
    assert moved > 1e-3
    if changes.get("reference") == "initial":
        assert second[0]["drift_to_reference"] == second[0]["drift_to_initial"]
    else:
        assert abs(second[0]["drift_to_reference"]) < 0.1 * moved
    counts = [stage["pairs"] for stage in result["stages"]]
    assert counts == (
        [result["pairs"] // 2 + result["pairs"] % 2, result["pairs"]]
        if changes.get("cumulative")
        else [result["pairs"] - result["pairs"] // 2, result["pairs"] // 2]
    )


def test_stage_dpo_computes_references_once_per_stage(world, tmp_path, monkeypatch):
    calls = []
    right = reference_logprobs.divided_logprobs
    monkeypatch.setattr(reference_logprobs, "divided_logprobs", lambda *a, **k: calls.append(1) or right(*a, **k))
    cfg = staged(world, tmp_path)
    stage_dpo.main(cfg)
    assert len(calls) == 2 and len(list((tmp_path / "reference").iterdir())) == 2
    before = weights(tmp_path)
    (tmp_path / "stage.json").unlink()
    stage_dpo.main(cfg)
    assert len(calls) == 2 and same(weights(tmp_path), before)
    stage_dpo.main(dataclasses.replace(cfg, length_normalised=True, overwrite=True))
    assert len(calls) == 4


def test_reference_key_covers_all_that_the_logprobs_depend_on(world):
    model, _ = load_model(world.base)
    sample = Sample(torch.arange(5).int().numpy(), torch.ones(5).numpy())
    other = Sample(torch.tensor([0, 1, 2, 3, 5]).int().numpy(), torch.ones(5).numpy())
    lighter = Sample(sample.tokens, torch.tensor([0.0, 1, 1, 1, 1]).numpy())

    def key(pair=(sample, sample), fingerprint="f", normalise=False):
        return reference_logprobs.ReferenceCache(world.root, fingerprint, normalise).key(model, [Pair(*pair)])

    keys = [key(), key((sample, other)), key((other, sample)), key((sample, lighter)), key(fingerprint="g")]
    keys.append(key(normalise=True))
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[-1]


def test_stage_dpo_refuses_pairs_by_line(world, tmp_path):
    rows = world.preferences(3)
    long = dataclasses.replace(rows[0], chosen=LONG.answer[:1500], rejected=LONG.answer[:1400])
    path = world.write("long_pairs.jsonl", [*rows, long])
    with pytest.raises(ValueError, match=r"long_pairs\.jsonl:4: (pair|sample): expected at most \d+ tokens"):
        stage_dpo.main(staged(world, tmp_path / "a", data=(path,)))
    result = stage_dpo.main(staged(world, tmp_path / "b", data=(path,), on_error="skip", slices=1))
    assert result["rejected"] == 1 and result["pairs"] == len(rows)
    with pytest.raises(ValueError, match=r"slices: expected 1 to \d+ \(the pairs\), got 99"):
        stage_dpo.main(staged(world, tmp_path / "c", slices=99))


@pytest.mark.parametrize(
    ("order", "expected"),
    [("easy_first", [[2, 0], [3, 1]]), ("hard_first", [[1, 3], [0, 2]]), ("by_gap", [[3, 2], [1, 0]])],
)
def test_order_slices_goes_by_length_or_gap(order, expected):
    def side(count):
        return Sample(torch.zeros(9).int().numpy(), (torch.arange(9) < count).float().numpy())

    pairs = [Pair(side(n), side(1), margin) for n, margin in ((3, 0.1), (8, 0.2), (2, 0.3), (5, 0.4))]
    assert order_slices(pairs, 2, order, seed=0) == expected
    drawn = order_slices(pairs, 3, "random", seed=1)
    assert sorted(sum(drawn, [])) == [0, 1, 2, 3] and [len(rank_rows) for rank_rows in drawn] == [2, 1, 1]  # noqa: RUF017


# Catches: gaps of the rows that do not reach the order, which was a random one then.
def test_order_by_gap_reads_the_rows(world):
    tokenizer, rows = load_tokenizer(world.base), world.preferences(4)
    gapped = [row.replace(attributes=row.attributes | {"gap": gap}) for row, gap in zip(rows, (1, 4.5, 0.5, 2))]
    pairs = [answer_pair(tokenizer, row, 512) for row in gapped]
    assert [pair.margin for pair in pairs] == [1, 4.5, 0.5, 2] and order_slices(pairs, 2, "by_gap", 0) == [
        [1, 3],
        [0, 2],
    ]
    plain = [answer_pair(tokenizer, row.replace(attributes={}), 512) for row in rows]
    with pytest.raises(ValueError, match="order: expected pairs with a judge's score gap for by_gap"):
        order_slices(plain, 2, "by_gap", 0)


@pytest.fixture(scope="module")
def reward_models(world):
    """Directories of an instruction and of a process reward model, with their results."""
    made = {}
    for kind, rows in (("instruction", world.rankings(20)), ("process", world.processes(30))):
        cfg = reward.Config(
            kind=kind,
            data=(world.write(f"{kind}.jsonl", rows),),
            out=world.root / f"reward_{kind}",
            model=world.base,
            held_out_share=0.3,
            training=Training(**{**QUICK, "lr": 5e-3}, epochs=8),
            quiet=True,
        )
        made[kind] = (cfg, reward.main(cfg))
    return made


def test_instruction_reward_model_learns_to_rank(world, reward_models):
    cfg, result = reward_models["instruction"]
    lines = read_metrics(cfg.out / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx((1 + torch.tensor(0.1).exp()).log().item(), abs=1e-4)
    ranked = [line["accuracy"] for line in lines[-4:]]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and sum(ranked) / len(ranked) > 0.8
    assert 0 <= result["held_out_accuracy"] <= 1
    model, _ = load_model(cfg.out / "model")
    assert isinstance(model, ScoringModel) and model.outputs == 1
    fields = json.loads((cfg.out / "model" / "config.json").read_text())
    assert fields["wizard_std"] > 0 and abs(fields["wizard_mean"]) < 10


def test_process_reward_model_learns_labels(world, reward_models):
    cfg, result = reward_models["process"]
    lines = read_metrics(cfg.out / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] and 0 <= result["held_out_accuracy"] <= 1
    assert result["rows"] + result["held_out_rows"] == 30 and load_model(cfg.out / "model")[0].outputs == 3


def test_reward_recipe_refuses_other_rows_and_too_few(world, tmp_path):
    rows = world.processes(3)
    wrong = world.write("labels.jsonl", rows[:1])
    options = {"model": world.base, "training": Training(**QUICK), "quiet": True}
    with pytest.raises(ValueError, match="rows: expected at least two, one of them to measure on, got 1"):
        reward.main(reward.Config(kind="process", data=(wrong,), out=tmp_path / "a", **options))
    with pytest.raises(ValueError, match=r"labels\.jsonl:1: record: expected a preference row, got a process row"):
        reward.main(reward.Config(kind="instruction", data=(wrong,), out=tmp_path / "b", **options))
    doubled = dataclasses.replace(rows[1], steps=(rows[1].steps[0] + "\nmore", *rows[1].steps[1:]))
    wrong = world.write("steps.jsonl", [*rows, doubled])
    with pytest.raises(ValueError, match=r"steps\.jsonl:4: steps: "):
        reward.main(reward.Config(kind="process", data=(wrong,), out=tmp_path / "c", **options))


def online(world, reward_models, out, **changes):
    """A short run; `changes` by group for options, `{"rollout": {"steps": 1}}`, or by field."""
    groups = {
        "reward": RewardOptions(*(reward_models[kind][0].out / "model" for kind in ("instruction", "process"))),
        "training": OnlineTraining(lr=1e-3, pack_tokens=512, save_every=1),
        "critic": CriticOptions(lr=1e-3),
        "rollout": RolloutOptions(steps=3, prompts_per_step=3, samples_per_prompt=2, max_new_tokens=12),
        "ppo": PPOOptions(epochs=2, minibatches=2, entropy=0.01),
        "ptx": PTXOptions(),
    }
    options = {"data": (world.write("prompts.jsonl", world.single[:7]),), "model": world.base, "quiet": True, **groups}
    for name, change in changes.items():
        options[name] = dataclasses.replace(groups[name], **change) if name in groups else change
    return rleif.Config(out=out, **options)


LOGGED = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "reward",
    "instruction_factor",
    "process_factor",
    "kl_k1",
    "kl_k3",
    "clip_fraction",
    "value_clip_fraction",
    "entropy",
    "length",
    "finished",
    "value",
    "explained_variance",
    "ratio_error",
    "critic_grad_norm",
    "seconds",
    "hand_over_seconds",
    "generate_seconds",
    "score_seconds",
    "train_seconds",
    "tail_idle",
    "importance",
}


def test_rleif_logs_every_factor_and_resumes_bit_equal(world, reward_models, tmp_path, monkeypatch):
    right, fresh = OnlineRun.record, []

    def marked(self, *arguments):
        if self.step == 0:
            fresh.append(max(map(float, self._differences)))
            self._differences = [torch.tensor(2.0**-11)]
        right(self, *arguments)

    monkeypatch.setattr(OnlineRun, "record", marked)
    result = rleif.main(online(world, reward_models, tmp_path / "whole"))
    assert fresh[0] < 1e-4 and result["largest_ratio_error"] == 2.0**-11
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert len(lines) == result["steps"] == 3 and lines[0].keys() >= LOGGED
    assert abs(lines[0]["kl_k1"]) < 1e-5 < abs(lines[-1]["kl_k1"])
    assert lines[0]["entropy"] > 0 and lines[0]["length"] <= 12 and lines[-1]["kl_k3"] >= 0

    def killed(self, *arguments):
        if self.step == 2:
            self.close()
            raise KeyboardInterrupt
        marked(self, *arguments)

    monkeypatch.setattr(OnlineRun, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        rleif.main(online(world, reward_models, tmp_path / "cut"))
    monkeypatch.setattr(OnlineRun, "record", marked)
    assert rleif.main(online(world, reward_models, tmp_path / "cut")) == result
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    again = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [line["reward"] for line in again] == [line["reward"] for line in lines]


def test_rleif_with_ptx_also_learns_from_the_answers_of_the_rows(world, reward_models, tmp_path):
    world.write("some.jsonl", world.single[:7])
    lines = (world.root / "some.jsonl").read_text().splitlines()
    calls = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}]}
    data = tmp_path / "bad.jsonl"
    data.write_text("\r\n".join(["{", *lines, json.dumps(calls)]))
    cfg = online(
        world,
        reward_models,
        tmp_path,
        data=(data,),
        on_error="skip",
        rollout={"steps": 8},
        ptx={"coefficient": 1.0, "rows": 16},
        training={"lr": 3e-3},
    )
    assert rleif.main(cfg)["rejected"] == 2
    losses = [line["ptx_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_rleif_warms_the_critic_up_alone(world, reward_models, tmp_path):
    cfg = online(
        world,
        reward_models,
        tmp_path,
        rollout={"steps": 1},
        critic={"warmup_steps": 1},
        reward={"factors": ("process",)},
    )
    rleif.main(cfg)
    assert same(weights(tmp_path), load_file(world.root / "base" / "model" / "model.safetensors"))


@pytest.mark.parametrize(("advantages", "factors"), [("rloo", ("instruction", "process")), ("grpo", ("process",))])
def test_rleif_learns_without_a_critic(world, reward_models, tmp_path, advantages, factors):
    cfg = online(
        world,
        reward_models,
        tmp_path,
        reward={"factors": factors},
        rollout={"samples_per_prompt": 4},
        ppo={"advantages": advantages, "minibatches": 1, "importance_limit": 0.0},
    )
    rleif.main(cfg)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 3 and not {"value", "critic_grad_norm", "value_loss"} & lines[0].keys()
    assert all(line["grad_norm"] > 0 and line["ratio_error"] < 1e-4 for line in lines)
    # Every token is weighed, by next to one.
    assert lines[0]["importance"] == pytest.approx(1.0, abs=1e-4)
    assert not same(weights(tmp_path), load_file(world.root / "base" / "model" / "model.safetensors"))


def test_rleif_refuses_baselines_that_cannot_be(world, reward_models, tmp_path):
    with pytest.raises(ValueError, match="their standard deviation cancels it"):
        online(world, reward_models, tmp_path, ppo={"advantages": "grpo"})
    with pytest.raises(ValueError, match=r"samples_per_prompt: expected at least 2 with --ppo.advantages rloo, got 1"):
        online(world, reward_models, tmp_path, ppo={"advantages": "rloo"}, rollout={"samples_per_prompt": 1})


def test_rleif_refuses_long_prompts_by_line_and_models_of_another_kind(world, reward_models, tmp_path):
    long = world.write("long_prompts.jsonl", [world.single[0], conversation("apple " * 600, "5")])
    with pytest.raises(ValueError, match=r"long_prompts\.jsonl:2: prompt: expected at most 500 tokens"):
        rleif.main(online(world, reward_models, tmp_path / "a", data=(long,)))
    swapped = {"process_model": reward_models["instruction"][0].out / "model"}
    with pytest.raises(ValueError, match="expected a process reward model, got an instruction reward model"):
        rleif.main(online(world, reward_models, tmp_path / "b", reward=swapped))
    with pytest.raises(ValueError, match="expected a language model, got a reward model with 1 outputs"):
        rleif.main(online(world, reward_models, tmp_path / "c", model=str(swapped["process_model"])))
    with pytest.raises(ValueError, match=r"reward.factors: expected some of instruction, process, preference, "):
        online(world, reward_models, tmp_path / "d", reward={"factors": ("length",)})


def test_accuracy_counts_what_it_writes(world, tmp_path):
    data = tmp_path / "held_out.jsonl"
    data.write_bytes(b"{\r\n" + (world.root / "held_out.jsonl").read_bytes())
    options = {"model": world.base, "data": data, "max_new_tokens": 8, "limit": 7, "quiet": True}
    with pytest.raises(ValueError, match=r"held_out\.jsonl:1: json: "):
        accuracy.main(accuracy.Config(out=tmp_path, **options))
    result = accuracy.main(accuracy.Config(out=tmp_path, on_error="skip", overwrite=True, **options))
    assert result["rejected"] == 1
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert result["total"] == len(lines) == 7 and result["accuracy"] == result["correct"] / 7
    assert [line["prompt"] for line in lines] == [
        row.instruction for row in read_rows(world.root / "held_out.jsonl", kind="conversation")[:7]
    ]
    assert {"accuracy", "sampled_accuracy", "se", "sampled_se"} <= json.loads(
        (tmp_path / "accuracy.json").read_text()
    ).keys()
    assert {line["greedy"] for line in lines} != {line["sampled"] for line in lines}


# Catches: a model part that only takes the dtype of fp32 runs; a GPU run computes in bf16 by default.
def test_every_training_recipe_computes_in_bf16(world, reward_models, tmp_path):
    half = Sharding(dtype="bfloat16", recompute="selective")
    cfg = dataclasses.replace(supervised(world, tmp_path / "sft", steps=8), sharding=half)
    sft.main(cfg)
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert {tensor.dtype for tensor in weights(tmp_path / "sft").values()} == {torch.bfloat16}
    stage_dpo.main(staged(world, tmp_path / "dpo", sharding=half))
    first = read_metrics(tmp_path / "dpo" / "stage_1" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    for kind, (cfg, _) in reward_models.items():
        result = reward.main(dataclasses.replace(cfg, out=tmp_path / kind, sharding=half))
        assert result["steps"] > 0 and load_model(tmp_path / kind / "model")[0].score is not None
    result = rleif.main(online(world, reward_models, tmp_path / "rleif", sharding=half))
    assert result["steps"] == 3 and 0 < result["largest_ratio_error"] < 0.5
