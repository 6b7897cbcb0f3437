"""Exported directories: transformers loads them, logits and the chat template's ids are ours."""

import json
from dataclasses import replace

import pytest
import torch

from recipes import export_hf
from wizard_engine import world
from wizard_engine.data.chat import CHAT_ATOMS, encode_conversation, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer
from wizard_engine.model import PRESETS, ScoringModel, Transformer, load_hf, load_model, save_model


@pytest.fixture(scope="module")
def tokenizer():
    rows = world.natural_corpus(50, 0)
    return train_tokenizer([m.content for r in rows for m in r.messages], vocab_size=512, atoms=CHAT_ATOMS)


def saved(tokenizer, path, preset):
    config = replace(PRESETS[preset], vocab_size=tokenizer.vocab_size, init_std=0.2)
    model = Transformer(config, seed=1)
    save_model(model, tokenizer, path)
    return model


@pytest.mark.parametrize("preset", ["tiny-mistral", "tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_is_exported(tokenizer, tmp_path, preset, dtype):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    transformers.utils.logging.disable_progress_bar()
    saved(tokenizer, tmp_path / "m", preset)
    out = export_hf.main(export_hf.Config(tmp_path / "m", tmp_path / "out", dtype=dtype, max_shard_gb=3e-5, quiet=True))
    assert len(list(out.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.arange(1, 30)
    positions, cu_seqlens = torch.arange(29), torch.tensor([0, 29]).int()
    ours = load_hf(out)
    logits = ours.logits(ours(tokens, positions, cu_seqlens, 29))
    torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


CONVERSATIONS = [
    [Message("user", "Sam has 3 pens.")],
    [Message("user", "Hi"), Message("assistant", "Hello. 4"), Message("user", "What is 2 + 2?")],
    [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "Why")],
]


# Catches: a space or a newline between </s> and USER:; a space behind the last ASSISTANT:; another system prompt.
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_chat_template_gives_our_ids(tokenizer, tmp_path, messages):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    pytest.importorskip("jinja2", reason="jinja2 is absent")
    saved(tokenizer, tmp_path / "m", "tiny")
    out = export_hf.main(export_hf.Config(tmp_path / "m", tmp_path / "out", quiet=True))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert ids == encode_prompt(tokenizer, messages)
    whole = [*messages, Message("assistant", "It is 4.")]
    turns.append({"role": "assistant", "content": "It is 4."})
    ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert ids == encode_conversation(tokenizer, whole).tokens.tolist()


def test_what_cannot_be_exported_is_refused(tokenizer, tmp_path):
    model = saved(tokenizer, tmp_path / "m", "tiny")
    cfg = export_hf.Config(tmp_path / "m", tmp_path / "out", quiet=True)
    export_hf.main(cfg)
    with pytest.raises(ValueError, match=r"out: expected no such directory, got one; choose another --out"):
        export_hf.main(cfg)
    export_hf.main(replace(cfg, overwrite=True, dtype="float16"))
    assert {p.dtype for p in load_hf(tmp_path / "out", dtype=torch.float16).parameters()} == {torch.float16}
    save_model(ScoringModel(model.config, 1), tokenizer, tmp_path / "reward")
    with pytest.raises(ValueError, match="expected a language model, got a reward model"):
        export_hf.main(export_hf.Config(tmp_path / "reward", tmp_path / "other"))
    with pytest.raises(ValueError, match="max_shard_gb: expected above 0, got"):
        export_hf.Config(tmp_path / "m", tmp_path / "x", max_shard_gb=0)
    larger = train_tokenizer([chr(0x4E00 + n) for n in range(900)], vocab_size=900)
    assert larger.vocab_size > model.config.vocab_size
    larger.save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer: expected at most \d+ ids"):
        export_hf.main(export_hf.Config(tmp_path / "m", tmp_path / "x", tokenizer=tmp_path / "tokenizer.json"))
    assert not (tmp_path / "other").exists() and not (tmp_path / "x").exists()
    assert load_model(tmp_path / "out")[1].fingerprint == tokenizer.fingerprint


def test_a_sentencepiece_model_is_exported_with_its_tokenizer_json(shared_data, tmp_path):
    """The real Mistral tokenizer: transformers reads the export, and its ids of whole chats are ours."""
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    pytest.importorskip("jinja2", reason="jinja2 is absent")
    file = next((shared_data / "tokenizer").glob("*.model"), None)
    if file is None:
        pytest.skip("no SentencePiece model among the real data")
    tokenizer = load_tokenizer(file)
    config = replace(PRESETS["tiny-mistral"], vocab_size=tokenizer.vocab_size)
    save_model(Transformer(config, seed=0), tokenizer, tmp_path / "m")
    out = export_hf.main(export_hf.Config(tmp_path / "m", tmp_path / "out", quiet=True))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for messages in CONVERSATIONS:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, messages) == encode_prompt(load_tokenizer(out), messages)
