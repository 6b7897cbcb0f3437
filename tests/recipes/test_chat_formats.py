"""Recipes in the chat formats of other models: what is trained, what a checkpoint and an export say, what is asked."""

import io
import json
from dataclasses import replace

import pytest
from chat_templates import FAMILIES, directory

from recipes import chat, export_hf, reward, rleif, sft, stage_dpo
from wizard_engine.data.chat import encode_conversation, encode_prompt, use_chat_format
from wizard_engine.data.chat_format import CHAT_TEMPLATE, CHATML_TEMPLATE
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation import generate
from wizard_engine.model import PRESETS, Transformer, load_model, save_hf
from wizard_engine.rl.options import RewardOptions, RolloutOptions
from wizard_engine.training.options import Training

QUICK = Training(pack_tokens=512, packs_per_step=1, lr=2e-3, max_steps=1)
TURNS = [Message("user", "What is 12?"), Message("assistant", "the answer."), Message("user", "Why?")]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """family -> directory of a model that this project has not trained."""
    root, made = tmp_path_factory.mktemp("foreign"), {}
    for family in ("chatml", "qwen"):
        tokenizer = load_tokenizer(directory(root / f"{family}-tokenizer", family))
        config = replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, max_positions=1024)
        made[family] = save_hf(Transformer(config, seed=1), root / family, tokenizer=tokenizer)
    return made


def fields(path):
    return json.loads((path / "tokenizer_config.json").read_text())


def trained(world, foreign, out, family="chatml", **options):
    rows = [row for row in world.single if len(row.answer) < 150 and len(row.instruction) < 150][:8]
    data = world.write("short.jsonl", rows)
    sft.main(sft.Config((data,), out, model=str(foreign[family]), training=QUICK, quiet=True, **options))
    return out / "model"


# Catches: a model trained in Vicuna whose directory says ChatML, and the other way round.
def test_a_checkpoint_says_in_which_format_it_was_trained(world, foreign, tmp_path):
    vicuna = trained(world, foreign, tmp_path / "vicuna", audit=False)
    assert fields(vicuna)["chat_template"] == CHAT_TEMPLATE
    assert fields(vicuna)["wizard_chat_format"] == "vicuna-v1.1"
    assert load_tokenizer(vicuna).chat_format.is_vicuna
    chatml = trained(world, foreign, tmp_path / "chatml", chat_format="chatml")
    assert fields(chatml)["chat_template"] == CHATML_TEMPLATE and fields(chatml)["wizard_chat_format"] == "chatml"
    own = trained(world, foreign, tmp_path / "own", chat_format="template", audit=False)
    assert fields(own)["chat_template"] == FAMILIES["chatml"][0] and fields(own)["wizard_chat_format"] == "template"
    # What follows goes on in it.
    pairs = [p for p in world.preferences(12) if len(p.chosen + p.rejected + p.instruction) < 400]
    data = world.write("few_pairs.jsonl", pairs)
    for start, name in ((chatml, "chatml"), (foreign["chatml"], "vicuna-v1.1")):
        out = tmp_path / f"dpo {start.parent.name}"
        training = replace(QUICK, pack_tokens=1024)
        stage_dpo.main(stage_dpo.Config((data,), out, str(start), training=training, audit=False, quiet=True))
        assert load_tokenizer(out / "model").chat_format.name == name


@pytest.mark.parametrize("source", ["untrained", "trained"])
def test_an_export_has_the_template_of_the_model(world, foreign, tmp_path, source):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    model, template = foreign["chatml"], FAMILIES["chatml"][0]
    if source == "trained":
        model, template = trained(world, foreign, tmp_path / "sft", chat_format="chatml"), CHATML_TEMPLATE
    out = export_hf.main(export_hf.Config(model, tmp_path / "out", quiet=True))
    assert fields(out)["chat_template"] == template
    assert load_tokenizer(out).chat_format.is_trained is (source == "trained")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": message.role, "content": message.content} for message in TURNS]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(load_tokenizer(out), TURNS)
    whole = theirs.apply_chat_template(turns[:2], return_dict=True, return_assistant_tokens_mask=True)
    sample = encode_conversation(load_tokenizer(out), TURNS[:2])
    assert whole["input_ids"] == sample.tokens.tolist()
    assert whole["assistant_masks"] == sample.weights.tolist()


def test_named_templates_are_exported_as_they_are(foreign, tmp_path):
    named = [{"name": "default", "template": FAMILIES["chatml"][0]}, {"name": "tool_use", "template": "x"}]
    tokenizer = directory(tmp_path / "tokenizer", "chatml", chat_template=named)
    cfg = export_hf.Config(foreign["chatml"], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert fields(export_hf.main(cfg))["chat_template"] == named


def test_training_in_a_template_without_marks_is_refused(world, foreign, tmp_path):
    with pytest.raises(ValueError, match=r"around each of 1 answers, got 0 such blocks; training needs them"):
        trained(world, foreign, tmp_path, family="qwen", chat_format="template")
    with pytest.raises(ValueError, match="expected a model with a template of its own, got none"):
        sft.main(sft.Config((world.root / "corpus.jsonl",), tmp_path / "b", world.base, chat_format="template"))


# A reward model reads prompt and answer as the policy writes them; it needs no marks.
@pytest.mark.parametrize("kind", ["process", "instruction"])
def test_reward_models_read_templates(world, foreign, tmp_path, kind):
    rows = world.processes(24) if kind == "process" else world.rankings(16)
    data = world.write(f"{kind}.jsonl", rows)
    training = replace(QUICK, max_steps=1, pack_tokens=2048)
    cfg = reward.Config(
        kind, (data,), tmp_path, model=str(foreign["qwen"]), chat_format="template", training=training, quiet=True
    )
    assert 0 <= reward.main(cfg)["held_out_accuracy"] <= 1
    assert load_tokenizer(tmp_path / "model").chat_format.template == FAMILIES["qwen"][0]


# The policy answers in its template, which marks no answers; the reward models keep the formats of their own.
@pytest.mark.slow
def test_rleif_samples_in_the_template(world, foreign, tmp_path):
    training = replace(QUICK, max_steps=1, pack_tokens=2048)
    models = {}
    for kind, choice in (("instruction", "auto"), ("process", "template")):
        rows = world.rankings(16) if kind == "instruction" else world.processes(24)
        data = (world.write(f"r_{kind}.jsonl", rows),)
        out = tmp_path / kind
        options = {"model": str(foreign["qwen"]), "chat_format": choice, "training": training, "quiet": True}
        reward.main(reward.Config(kind, data, out, **options))
        models[f"{kind}_model"] = out / "model"
    cfg = rleif.Config(
        data=(world.write("asked.jsonl", world.single[:4]),),
        out=tmp_path / "rleif",
        model=str(foreign["qwen"]),
        chat_format="template",
        reward=RewardOptions(**models),
        rollout=RolloutOptions(steps=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=8),
        quiet=True,
    )
    assert rleif.main(cfg)["steps"] == 1
    written = load_tokenizer(tmp_path / "rleif" / "model").chat_format
    assert written.template == FAMILIES["qwen"][0] and written.is_trained


def test_chat_speaks_the_template(foreign):
    for choice in ("auto", "vicuna"):
        model, tokenizer = load_model(foreign["chatml"])
        use_chat_format(tokenizer, choice)
        prompt = encode_prompt(tokenizer, TURNS[:1])
        out = generate(model, [prompt], max_new_tokens=7, eos_ids=tokenizer.eos_ids)
        streams = io.StringIO(), io.StringIO(), io.StringIO()
        cfg = chat.Config(foreign["chatml"], prompt="What is 12?", max_new_tokens=7, device="cpu", chat_format=choice)
        chat.main(cfg, stdin=streams[0], stdout=streams[1], stderr=streams[2])
        assert streams[1].getvalue() == tokenizer.decode(out.tokens[0]).strip() + "\n"
