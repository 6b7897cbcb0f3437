"""Ids and rows of the embedding: padded vocabularies, holes, added tokens, and every id that ends an answer."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
import torch

from recipes import chat, export_hf
from wizard_engine.agents.local import LocalAgent
from wizard_engine.data.chat import CHAT_ATOMS, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer
from wizard_engine.generation.offline import generate
from wizard_engine.generation.streaming import Streamer
from wizard_engine.model import PRESETS, Transformer, load_model, save_model
from wizard_engine.model.loading import language_model
from wizard_engine.model.vocabulary import check_vocabulary

TEXT = "Sam has 3 pens. What is two and two? It is four."
WORDS = train_tokenizer([TEXT], vocab_size=400, atoms=CHAT_ATOMS)
SIZE = WORDS.vocab_size


def saved(folder, rows=SIZE):
    """A model whose embedding has so many rows, with the tokenizer of SIZE ids."""
    model = Transformer(replace(PRESETS["tiny"], vocab_size=rows, init_std=0.3), seed=1)
    return model, save_model(model, WORDS, folder / "m")


def edited(path, name, **changes):
    """Change fields of a JSON file of a directory."""
    file = path / name
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(fields | changes))


def add_tokens(path, *entries):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
    edited(path, "tokenizer.json", added_tokens=[*added, *(flags | entry for entry in entries)])


# Catches: all entries counted, where only those count that a text can give.
def test_an_unused_special_token_beyond_the_embedding_is_taken_by_every_recipe(tmp_path):
    _, path = saved(tmp_path)
    add_tokens(path, {"id": SIZE, "content": "[PAD]", "special": True})
    _, tokenizer = load_model(path)
    assert tokenizer.vocab_size == SIZE + 1 and not tokenizer.text_ids[SIZE]
    assert max(tokenizer.encode("a [PAD] b")) < SIZE and tokenizer.decode([SIZE]) == ""
    out = export_hf.main(export_hf.Config(path, tmp_path / "out", quiet=True))
    assert load_tokenizer(out).vocab_size == SIZE + 1
    assert language_model(str(path), None, seed=0, device="cpu")[1].vocab_size == SIZE + 1
    # A preset gets rows for all ids, those of unused tokens too.
    assert language_model("tiny", path, seed=0, device="cpu")[0].config.vocab_size == SIZE + 1


# Catches: a recipe without the check; a message without the id.
def test_a_token_that_a_text_can_give_needs_a_row(tmp_path):
    model, path = saved(tmp_path)
    good = shutil.copytree(path, tmp_path / "good")
    add_tokens(path, {"id": SIZE, "content": "<tool>", "special": False})
    message = (
        rf"tokenizer: expected at most {SIZE} ids, as the model's embedding has rows, got the id {SIZE} \(and 0 more\)"
    )
    for call in (
        lambda: load_model(path),
        lambda: LocalAgent.from_directory(path),
        lambda: language_model(str(path), None, seed=0, device="cpu"),
        lambda: language_model(str(good), path, seed=0, device="cpu"),
        lambda: export_hf.main(export_hf.Config(path, tmp_path / "x", quiet=True)),
        lambda: export_hf.main(export_hf.Config(good, tmp_path / "x", tokenizer=path, quiet=True)),
        lambda: chat.main(chat.Config(path, prompt="hi", device="cpu")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    check_vocabulary(load_tokenizer(path), replace(model.config, vocab_size=SIZE + 1), path)


def test_padding_and_holes_are_not_drawable(tmp_path):
    _, path = saved(tmp_path, rows=SIZE + 30)
    add_tokens(path, {"id": SIZE, "content": "[A]", "special": True})
    tokenizer = load_model(path)[1]
    assert WORDS.drawable(SIZE) is None and WORDS.drawable(SIZE - 1) is None
    mask = tokenizer.drawable(SIZE + 30)
    assert mask.shape == (SIZE + 30,) and mask[: SIZE + 1].all() and not mask[SIZE + 1 :].any()
    # A hole: the library gives added tokens the ids behind the others, so this tokenizer has none.
    plain, path = train_tokenizer([TEXT], vocab_size=400), tmp_path / "plain"
    size = plain.vocab_size
    plain.save(path)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    edited(path, "tokenizer.json", model=model | {"vocab": model["vocab"] | {"zz": size + 9}})
    sparse = load_tokenizer(path)
    assert sparse.vocab_size == size + 10 and sparse.decode([size + 3]) == "" and sparse.decode([size + 9]) == "zz"
    mask = sparse.drawable(size + 30)
    assert mask.nonzero()[0].tolist() == [*range(size), size + 9]
    # An end without an entry may be drawn, and has no text.
    edited(path, "generation_config.json", eos_token_id=[1, size + 20, 10**9])
    ended = load_tokenizer(path)
    assert ended.drawable(size + 30)[size + 20] and ended.decode([size + 20]) == ""
    assert ended.eos_ids == (1, size + 20, 10**9) and ended.vocab_size == size + 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": {"a": 2**32 - 1}}, r"model: vocab: expected ids from 0 to \d+, got 4294967295"),
        ({"vocab": {"a": 2**31}}, r"model: vocab: expected ids from 0 to"),
        ({"vocab": {"a": -1}}, r"model: vocab: expected ids from 0 to"),
        ({"vocab": {"a": []}}, r"model: vocab: expected ids from 0 to"),
        ({"vocab": 3}, r"model: vocab: expected entries, got 3"),
        ({"merges": [["a", "q" * 500]]}, r"expected a tokenizer of the tokenizers library, got"),
        ({"merges": None}, r"expected a tokenizer of the tokenizers library, got"),
    ],
)
def test_broken_models_of_tokenizers_are_refused_by_name(tmp_path, changes, message):
    WORDS.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    edited(tmp_path, "tokenizer.json", model=model | changes)
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer\.json: {message}"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_a_tokenizer_are_its_callers_business(tmp_path):
    WORDS.save(tmp_path)
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edited(tmp_path, "tokenizer.json", padding=padding, truncation=truncation)
    again = load_tokenizer(tmp_path)
    assert again.encode("é" + TEXT) == WORDS.encode("é" + TEXT) and again.fingerprint == WORDS.fingerprint


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [[2]], True, 1.5, -2, 2**31, {"a": 1}, [2, None]])
def test_eos_ids_that_are_none_are_refused_by_field(tmp_path, name, value):
    WORDS.save(tmp_path)
    edited(tmp_path, name, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id: expected an id or a list of ids, got"):
        load_tokenizer(tmp_path)


def test_special_ids_come_from_the_files_that_name_them(tmp_path):
    WORDS.save(tmp_path)
    edited(tmp_path, "config.json", eos_token_id=[5, 1], bos_token_id=7)
    edited(tmp_path, "generation_config.json", eos_token_id=[6, -1], bos_token_id=None)
    # tokenizer_config.json says what closes a turn; the lists say what else ends an answer.
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, (1, 6, 5))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (7, 6, (6, 5, 1))
    edited(tmp_path, "generation_config.json", eos_token_id=None)
    assert load_tokenizer(tmp_path).eos_ids == (5, 1)
    edited(tmp_path, "config.json", eos_token_id=None, bos_token_id=None)
    assert load_tokenizer(tmp_path).eos_ids == (1,)
    edited(tmp_path, "config.json", eos_token_id=SIZE + 5)
    with pytest.raises(ValueError, match=rf"expected the eos_token_id {SIZE + 5} of config\.json beside it"):
        load_tokenizer(tmp_path)


# Catches: only the first id ends an answer; export writes one of them; a run's model forgets the others.
def test_every_listed_eos_ends_an_answer_and_is_written_back(tmp_path):
    model, path = saved(tmp_path)
    prompt = encode_prompt(WORDS, [Message("user", "What is two?")])
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    free = generate(model, [prompt], eos_ids=(), **options).tokens[0]
    end = next(token for token in free[3:] if token not in free[:3])
    edited(path, "generation_config.json", eos_token_id=[1, end])
    loaded, tokenizer = load_model(path)
    assert tokenizer.eos_ids == (1, end)
    drawn = generate(loaded, [prompt], eos_ids=tokenizer.eos_ids, **options)
    assert drawn.tokens[0] == free[: free.index(end) + 1] and drawn.finished == [True]
    streamed = Streamer(loaded, tokenizer.eos_ids).stream(prompt, max_new_tokens=20, temperature=1.0, seed=3)
    assert list(streamed) == drawn.tokens[0]
    out = export_hf.main(export_hf.Config(path, tmp_path / "out", quiet=True))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [1, end]
    again = save_model(loaded, tokenizer, tmp_path / "run")
    assert load_tokenizer(again).eos_ids == (1, end)
    one = save_model(loaded, WORDS, tmp_path / "one")
    assert json.loads((one / "config.json").read_text())["eos_token_id"] == 1


def test_an_added_token_that_ends_an_answer_has_no_text(tmp_path):
    _, path = saved(tmp_path, rows=SIZE + 1)
    add_tokens(path, {"id": SIZE, "content": "<|im_end|>", "special": False})
    assert load_tokenizer(path).decode([SIZE]) == "<|im_end|>"
    edited(path, "config.json", eos_token_id=[1, SIZE])
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([*tokenizer.encode("two"), SIZE]) == "two"


def sentencepiece_model(kind):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "USER: hi ASSISTANT: one two three"] * 4),
        model_writer=file,
        vocab_size=320 if kind == "bpe" else 290,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return file.getvalue()


# Catches: no tokenizer.json beside tokenizer.model; another tokenizer after a save; an edit that is not seen.
def test_a_runs_model_of_a_sentencepiece_tokenizer_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    tokenizer = load_tokenizer(tmp_path)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size), seed=0)
    path = save_model(model, tokenizer, tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    turns = [Message("user", "What is two?")]
    ids = theirs.apply_chat_template([{"role": "user", "content": "What is two?"}], tokenize=True, return_dict=False)
    assert list(ids) == encode_prompt(tokenizer, turns)
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    add_tokens(path, {"id": tokenizer.vocab_size, "content": "[PAD]", "special": True})
    assert load_tokenizer(path).vocab_size == tokenizer.vocab_size + 1


def test_a_unigram_model_is_saved_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("unigram"))
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_a_padded_embedding_samples_and_exports(tmp_path):
    model, path = saved(tmp_path, rows=-(-SIZE // 64) * 64)
    out = export_hf.main(export_hf.Config(path, tmp_path / "out", quiet=True))
    again, tokenizer = load_model(out)
    assert again.config.vocab_size % 64 == 0 and tokenizer.vocab_size == SIZE
    assert torch.equal(again.embedding.weight, model.embedding.weight)
