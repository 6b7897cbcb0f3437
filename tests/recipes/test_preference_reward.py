"""The preference reward model: what it learns of pairs of answers, what it refuses, and its factor in RLEIF."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from recipes import reward, rleif
from wizard_engine.data.proportions import wilson_interval
from wizard_engine.data.records import Message, Preference, conversation
from wizard_engine.data.samples import MARGIN_PER_POINT
from wizard_engine.model import ScoringModel, load_model
from wizard_engine.rl.options import CriticOptions, PPOOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import PreferenceReward
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.training.options import OnlineTraining, Training

QUICK = {"pack_tokens": 384, "packs_per_step": 2, "lr": 5e-3}


def planted(world, count, first=0):
    """Pairs of equal length that differ in the last token: a chosen answer ends with 7, a rejected one with 9.

    Every second prompt has an earlier turn.
    """
    pairs = []
    for n, row in enumerate([row for row in world.single if len(row.instruction) < 200][first : first + count]):
        before = (Message("user", "How many?"), Message("assistant", "5")) if n % 2 else ()
        prompt = (*before, Message("user", row.instruction))
        pairs.append(Preference(prompt, f"{row.answer[:40]} 7", f"{row.answer[:40]} 9"))
    return pairs


def swapped(pairs):
    return [pair.replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


def config(world, out, data, **changes):
    training = Training(**{**QUICK, **changes.pop("training", {})})
    options = {"kind": "preference", "data": (data,), "model": world.base, "training": training, "quiet": True}
    return reward.Config(out=out, **{**options, **changes})


@pytest.fixture(scope="module")
def trained(world):
    """A preference model of planted pairs, and its result; beside it held-out pairs."""
    data = world.write("planted.jsonl", planted(world, 40))
    held = world.write("kept_pairs.jsonl", planted(world, 16, 40))
    cfg = config(world, world.root / "preference", data, held_out=(held,), held_out_share=0.3, training={"epochs": 8})
    return cfg, reward.main(cfg), held


# Catches: scores at another token than the answer's last, sides that are exchanged, pairs that it learned from.
def test_it_learns_what_makes_an_answer_better(trained):
    cfg, result, _ = trained
    assert result["pairs"] == 28 and result["held_out_rows"] == 12 and result["held_out"]["rows"] == 16
    assert result["held_out"]["before"]["accuracy"] == [0.5, 0.0]
    assert result["held_out"]["after"]["accuracy"][0] > 0.85 and result["held_out_accuracy"] > 0.8
    right = round(12 * result["held_out_accuracy"])
    assert result["held_out_ci95"] == pytest.approx(wilson_interval(right, 12))
    assert result["held_out_length_accuracy"] == 0.5, "both answers have as many tokens"
    fields = json.loads((cfg.out / "model" / "config.json").read_text())
    assert fields["wizard_reward"] == "preference" and "wizard_mean" not in fields
    assert isinstance(load_model(cfg.out / "model")[0], ScoringModel)


def test_swapped_labels_teach_the_opposite(world, trained, tmp_path):
    data = world.write("swapped.jsonl", swapped(planted(world, 40)))
    result = reward.main(config(world, tmp_path, data, held_out=(trained[2],), training={"epochs": 8}))
    assert result["held_out"]["after"]["accuracy"][0] < 0.15


# Catches: a margin that is added instead of taken off, or that is not read; a gap that counts as score units.
def test_margins_of_the_rows_raise_the_first_loss(world, tmp_path):
    told = [{"margin": 0.5}, {"gap": 4.0}, {"margin": 0.2, "gap": 9.0}, {}]
    margins = [0.5, 4 * MARGIN_PER_POINT, 0.2, 0.0]
    for n, (attributes, margin) in enumerate(zip(told, margins)):
        rows = [pair.replace(attributes=attributes) for pair in planted(world, 2)]
        data = world.write(f"margin_{n}.jsonl", rows)
        reward.main(config(world, tmp_path / f"{n}", data, training={"max_steps": 1}))
        first = read_metrics(tmp_path / f"{n}" / "metrics.jsonl")[0]["loss"]
        assert first == pytest.approx(math.log1p(math.exp(margin)), abs=1e-5), "the head starts at zero"


PAIR = Preference((Message("user", "How many?"),), "five", "six")
LONG = "one apple " * 300
REFUSED = {
    "no prompt": (PAIR.replace(prompt=()), r"prompt: expected the turns that .* are for --kind instruction"),
    "a blank answer": (PAIR.replace(rejected="  "), r"rejected: expected an answer, got a blank one"),
    "an answer that is too long": (PAIR.replace(chosen=LONG), r"answer: expected fewer than 385 tokens, got \d+"),
    "a prompt that is too long": (
        PAIR.replace(prompt=(Message("user", LONG),)),
        r"answer: expected fewer than 385 tokens, got \d+",
    ),
    "a pair that is too long": (
        PAIR.replace(chosen="7 " * 100, rejected="9 " * 101),
        r"pair: expected at most 384 tokens of both together \(training.pack_tokens\), got \d+",
    ),
    "a negative margin": (PAIR.replace(attributes={"margin": -0.5}), r"margin: expected a finite .* 0, got -0.5"),
    "a margin in words": (PAIR.replace(attributes={"margin": "much"}), r"margin: expected a finite .* got 'much'"),
    "a tie": (PAIR.replace(attributes={"gap": 0}), r"gap: expected a number above 0, got 0, which is a tie"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_no_pair_of_answers_are_named_or_counted(world, tmp_path, case):
    row, message = REFUSED[case]
    data = world.write("refused.jsonl", [*planted(world, 3), row])
    with pytest.raises(ValueError, match=rf"refused\.jsonl:4: {message}"):
        reward.main(config(world, tmp_path, data))
    options = {"on_error": "skip", "training": {"max_steps": 1}, "overwrite": True}
    result = reward.main(config(world, tmp_path, data, **options))
    assert (result["pairs"], result["held_out_rows"], result["rejected"]) == (2, 1, 1)


def test_files_without_pairs_are_refused(world, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: file: expected at least one record, got none"):
        reward.main(config(world, tmp_path / "a", empty))
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps(PAIR.to_json() | {"rejected": PAIR.chosen}) + "\n")
    with pytest.raises(ValueError, match=r"same\.jsonl:1: rejected: expected a text other than chosen"):
        reward.main(config(world, tmp_path / "b", same))
    with pytest.raises(ValueError, match=r"single\.jsonl:1: record: expected a preference row, got a conversation row"):
        reward.main(config(world, tmp_path / "c", world.write("single.jsonl", world.single[:3])))
    with pytest.raises(ValueError, match="rows: expected at least two, one of them to measure on, got 1"):
        reward.main(config(world, tmp_path / "d", world.write("one.jsonl", planted(world, 1))))
    answers = world.write("answers.jsonl", planted(world, 2))
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: prompt: expected none, .* are for --kind preference"):
        reward.main(config(world, tmp_path / "e", answers, kind="instruction"))


# Catches: an answer that is read in other tokens, or scored at another one, than in training.
def test_the_factor_is_what_the_model_learned(world, trained, tmp_path):
    cfg, result, held = trained
    model, tokenizer = load_model(cfg.out / "model")
    factor = PreferenceReward(model, tokenizer)
    pairs = planted(world, 16, 40)
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    kind = reward.Preference()
    items, _ = kind.read(config(world, tmp_path, held), tokenizer, 385, (held,), "rejects.jsonl")
    batch = kind.batch(items)
    with torch.no_grad():
        scores = model(*batch.inputs)[batch.cu_seqlens[1:].long() - 1, 0].tolist()
    assert scores == pytest.approx(factor.raw(prompts * 2, chosen + rejected).tolist(), abs=1e-4)
    for answers, own, is_better in ((chosen, rejected, True), (rejected, chosen, False)):
        values = factor(prompts, answers, own)
        assert sum((value > 0.5) == is_better for value in values) / 16 == result["held_out"]["after"]["accuracy"][0]


def online(world, out, model, **changes):
    """A short run of RLEIF with the factor preference."""
    groups = {
        "reward": RewardOptions(preference_model=model, factors=("preference",)),
        "training": OnlineTraining(lr=1e-3, pack_tokens=512, save_every=1),
        "critic": CriticOptions(lr=1e-3),
        "rollout": RolloutOptions(steps=2, prompts_per_step=3, samples_per_prompt=2, max_new_tokens=12),
        "ppo": PPOOptions(),
        "ptx": PTXOptions(),
    }
    options = {"data": (world.write("asked.jsonl", world.single[:7]),), "model": world.base, "quiet": True, **groups}
    for name, change in changes.items():
        options[name] = dataclasses.replace(groups[name], **change) if name in groups else change
    return rleif.Config(out=out, **options)


@pytest.mark.parametrize("advantages", ["critic", "grpo"])
def test_rleif_learns_from_the_factor_and_measures_it(world, trained, tmp_path, monkeypatch, advantages):
    right = rleif.score_answers

    def finished(prompts, answers, _, **models):
        # The tiny policy ends hardly any of its answers.
        return right(prompts, answers, [True] * len(answers), **models)

    monkeypatch.setattr(rleif, "score_answers", finished)
    held = world.write("kept_rows.jsonl", world.single[20:24])
    ppo = {"advantages": advantages}
    cfg = online(world, tmp_path, trained[0].out / "model", held_out=(held,), ppo=ppo)
    result = rleif.main(cfg)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 2 and all(0 < line["reward"] <= line["preference_factor"] < 1 for line in lines)
    assert not {"instruction_factor", "process_factor"} & lines[0].keys()
    assert {"reward", "preference_factor", "length", "finished"} <= result["held_out"]["before"].keys()
    start, made = (load_file(path / "model.safetensors") for path in (world.root / "base/model", tmp_path / "model"))
    assert any(not torch.equal(start[name], made[name]) for name in start)


# Catches: a factor that is multiplied without being asked for, or own answers of other rows.
def test_a_model_without_its_factor_is_measured_and_own_answers_are_the_prompts(world, trained, tmp_path, monkeypatch):
    seen, right = [], PreferenceReward.__call__

    def scored(self, prompts, answers, own):
        seen.extend(zip(prompts, own))
        return right(self, prompts, answers, own)

    monkeypatch.setattr(PreferenceReward, "__call__", scored)
    held = world.write("kept_rows.jsonl", world.single[20:24])
    model = trained[0].out / "model"
    both = {"held_out": (held,), "rollout": {"steps": 1}, "on_error": "skip"}
    rleif.main(online(world, tmp_path / "with", model, reward={"factors": ("checked",)}, **both))
    checked = {"factors": ("checked",), "preference_model": None}
    rleif.main(online(world, tmp_path / "without", model, reward=checked, **both))
    told, plain = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("with", "without"))
    assert "preference_factor" in told and "preference_factor" not in plain and told["reward"] == plain["reward"]
    answers = {tuple(row.messages[:-1]): row.answer for row in (*world.single[:7], *world.single[20:24])}
    assert len(seen) == 6 + 2 * 4 and all(answers[prompt] == own for prompt, own in seen)
    made = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without")]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_rleif_refuses_models_of_another_kind_and_rows_that_it_cannot_compare(world, trained, tmp_path):
    model = trained[0].out / "model"
    with pytest.raises(ValueError, match="expected an instruction reward model, got a preference reward model"):
        reward_options = {"instruction_model": model, "factors": ("instruction",)}
        rleif.main(online(world, tmp_path / "a", model, reward=reward_options))
    with pytest.raises(ValueError, match="base/model: expected a preference reward model, got a language model"):
        rleif.main(online(world, tmp_path / "b", world.root / "base" / "model"))
    with pytest.raises(ValueError, match=r"reward.preference_model: expected .*; give --reward.preference-model"):
        RewardOptions(factors=("preference",))
    data = world.write("long_own.jsonl", [*world.single[:3], conversation("How many?", LONG)])
    with pytest.raises(ValueError, match=r"long_own\.jsonl:4: answer: expected fewer than 512 tokens with its prompt"):
        rleif.main(online(world, tmp_path / "c", model, data=(data,)))
    result = rleif.main(online(world, tmp_path / "d", model, data=(data,), on_error="skip"))
    assert result["rejected"] == 1
