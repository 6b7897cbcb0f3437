"""One tokenizer as SentencePiece model and as tokenizer.json: the same ids, text back, and the published rules."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from wizard_engine.data.chat import encode_conversation, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.sentencepiece_json import tokenizer_json
from wizard_engine.data.tokenizer import load_tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is 12 + 30? ASSISTANT: 42",
    "def f(x):\n\treturn x  # two  spaces",
    "Größe, déjà vu, naïve café",
    "one two three four five six seven eight",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
] * 4
TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  a  b  ",
    "\n",
    "\n\n x\n",
    "\t",
    "12345 + 6 = 12351",
    "</s>",
    "<s>hi</s>USER:",
    "<unk>",
    "▁x",
    "é",
    "e\u0301",
    "😀👩‍👩‍👧",
    "中文 text",
    "\u200b\u00a0",
    "\x00\x1b[31m",
    "USER: hi ASSISTANT:",
    "<0x41>",
    "x" * 300,
    "What is 12 + 30?\nIt's  42.",
    "\u2028",
    "ﬁ ½ Ⅷ",
    "مرحبا بالعالم",
]


def llama_json(model, layout):
    """tokenizer.json of a SentencePiece BPE model in either published layout."""
    converted = tokenizer_json(model)
    if layout == "prepend":
        return converted
    backend = Backend.from_str(converted)
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return backend.to_str()


@pytest.fixture(scope="module", params=["prepend", "metaspace"])
def pair(request, tmp_path_factory):
    """The same tokenizer read from tokenizer.model and from tokenizer.json."""
    folder, file = tmp_path_factory.mktemp("tokenizers"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    (folder / "tokenizer.json").write_text(llama_json(file.getvalue(), request.param))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(folder / "tokenizer.model"), load_tokenizer(folder / "tokenizer.json")


def assert_same(pair, text):
    one, other = pair
    ids = one.encode(text)
    assert other.encode(text) == ids and other.encode_batch([text, "x"])[0] == ids, text
    assert one.decode(ids) == other.decode(ids) == text.replace("▁", " ")
    assert one.offsets(ids) == other.offsets(ids)
    assert one.bos_id not in ids and one.eos_id not in ids


# Catches: special tokens read out of text; a space lost or doubled at the start; bytes of a character told apart.
@pytest.mark.parametrize("text", TEXTS)
def test_both_files_give_the_same_ids_and_the_text_back(pair, text):
    assert_same(pair, text)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_both_files_agree_on_any_text(pair, text):
    assert_same(pair, text)


def test_bos_eos_and_the_prefix_are_those_of_the_published_models(pair):
    for tokenizer in pair:
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.prefixes_space
    assert pair[0].vocab_size == pair[1].vocab_size


MESSAGES = [Message("user", "What is 12 + 30?"), Message("assistant", "It is 42.\nBye </s>"), Message("user", " why ")]


# Catches: another piece behind </s> than ▁USER; a second space before a segment.
def test_chat_ids_are_the_same_and_the_piece_behind_eos_is_a_word_of_its_own(pair):
    prompts = [encode_prompt(tokenizer, MESSAGES) for tokenizer in pair]
    assert prompts[0] == prompts[1]
    whole = [encode_conversation(tokenizer, MESSAGES[:2]).tokens.tolist() for tokenizer in pair]
    assert whole[0] == whole[1] and whole[0] == prompts[0][: len(whole[0])]
    after = prompts[0][len(whole[0]) :]
    assert prompts[0][0] == 1 and whole[0][-1] == 2 and prompts[0].count(2) == 1
    assert after[: len(pair[0].encode("USER:"))] == pair[0].encode("USER:")


def test_the_mistral_tokenizer_reads_like_the_published_one(shared_data, tmp_path):
    """Real files: the piece behind </s> is ▁USER, and a tokenizer.json made of it gives the same ids."""
    file = next((shared_data / "tokenizer").glob("*.model"), None)
    if file is None:
        pytest.skip("no SentencePiece model among the real data")
    one = load_tokenizer(file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert (one.bos_id, one.eos_id, one.vocab_size) == (1, 2, 32_000)
    prompt = encode_prompt(one, MESSAGES)
    assert model.id_to_piece(prompt[prompt.index(2) + 1]) == "▁US"
    (tmp_path / "tokenizer.json").write_text(llama_json(file.read_bytes(), "prepend"))
    other = load_tokenizer(tmp_path / "tokenizer.json")
    for text in [*TEXTS, *CORPUS]:
        assert other.encode(text) == one.encode(text), text
    assert encode_prompt(other, MESSAGES) == prompt


def test_models_of_another_kind_are_refused():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=90,
        model_type="unigram",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(ValueError, match="tokenizer: expected a SentencePiece BPE model without a normalisation"):
        tokenizer_json(file.getvalue())
