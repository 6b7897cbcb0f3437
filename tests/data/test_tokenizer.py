"""Tokenizers: exact text back, spans, special tokens as plain text, training, files."""

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from wizard_engine.data import pretokenizer
from wizard_engine.data.tokenizer import JsonTokenizer, load_tokenizer, train_tokenizer

CORPUS = [
    "Tom has 12 apples. He buys 3 boxes with 4 apples each.",
    "3*4=12\n12+12=24\nThe answer is 24.",
    "Ana tiene 5 peras. ¿Cuántas peras tiene Ana? Tom's end",
]
SPECIAL_TEXT = "a </s> b<s>c <unk> ASSISTANT: </s>"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40) | st.sampled_from(
    ["", " ", "  a", "a ", SPECIAL_TEXT, "\n\n", "日本 😀", "\x00", "é", "</s>", "<0x0A>"]
)


def llama_like():
    """A small tokenizer.json in SentencePiece's manner: ▁ for spaces, bytes as a fallback."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "</",
        "s",
        ">",
        "<",
        "c",
    ]
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [("▁", "a")][:0], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return JsonTokenizer(backend)


TRAINED = train_tokenizer(CORPUS, vocab_size=600, atoms=(" ASSISTANT:", "¿Cuántas"))
MERGED = train_tokenizer(CORPUS * 3, vocab_size=275)
LLAMA = llama_like()
SMALL = pytest.mark.parametrize("tokenizer", [TRAINED, MERGED, LLAMA], ids=["words", "merges", "llama"])


@pytest.fixture(scope="module")
def mistral(shared_data):
    return load_tokenizer(shared_data / "tokenizer" / "mistral_v1.model")


def check_text(tokenizer, text):
    """Everything that must hold for one text."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    framed = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(framed) == text
    spans = tokenizer.offsets(framed)
    assert len(spans) == len(framed) and spans[0] == (0, 0) and spans[-1] == (len(text), len(text))
    first = next(i for i, piece in enumerate(framed) if tokenizer._table[piece] or i == len(framed) - 1)
    for position, (start, end) in enumerate(spans):
        assert (end > start) == bool(tokenizer._table[framed[position]]) or position == first
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans))


FRAGMENTS = [
    "'s",
    "'t",
    "'re",
    "'",
    "_",
    "  ",
    "\t",
    "\x1f",
    "\x0b",
    "\r\n",
    "Tom",
    " ASSISTANT:",
    "ASSISTANT",
    "12",
    "...",
    "</s>",
]


@pytest.mark.parametrize("tokenizer", [TRAINED, MERGED], ids=["words", "merges"])
@settings(max_examples=50, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(max_codepoint=127), max_size=6), max_size=8)
)
def test_trained_tokenizer_s_cache_gives_the_library_s_ids(tokenizer, fragments):
    text = "".join(fragments)
    assert tokenizer._units is not None
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids


@SMALL
@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_tokenizer_gives_the_text_back_with_spans(tokenizer, text):
    check_text(tokenizer, text)


@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_sentencepiece_gives_the_text_back_with_spans(mistral, text):
    check_text(mistral, text)


def test_sentencepiece_ids_are_the_library_s(mistral):
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id, mistral.prefixes_space) == (32000, 1, 2, True)
    pieces = [mistral._backend.id_to_piece(i) for i in mistral.encode("12 apples")]
    assert pieces == ["▁", "1", "2", "▁ap", "ples"]
    assert [mistral._backend.id_to_piece(i) for i in mistral.encode("</s>")] == ["▁</", "s", ">"]


def test_offsets_span_the_text_of_each_token(mistral):
    text = "12 ñandú\n😀"
    for tokenizer in (mistral, TRAINED):
        ids = tokenizer.encode(text)
        fragments = [text[start:end] for start, end in tokenizer.offsets(ids)]
        assert "1" in fragments and "2" in fragments
        for index, fragment in zip(ids, fragments):
            whole = tokenizer._table[index]
            if whole.decode("utf-8", "ignore").encode() == whole:
                assert whole.decode().lstrip() == fragment.lstrip()
        assert fragments[-1] == "😀" and fragments.count("😀") in (1, 4)


def test_decode_of_broken_bytes_is_a_replacement_sign_with_spans_inside():
    ids = [index for index in TRAINED.encode("é")][:1] + TRAINED.encode("a") + TRAINED.encode("é")[1:]
    assert TRAINED.decode(ids) == "\ufffda\ufffd"
    assert all(0 <= start <= end <= 3 for start, end in TRAINED.offsets(ids))


@SMALL
def test_decode_refuses_ids_that_are_not_there(tokenizer):
    for index in (-1, len(tokenizer._table)):
        with pytest.raises(ValueError, match="token id: expected 0 to"):
            tokenizer.decode([index])


@SMALL
def test_encode_names_the_lone_surrogate(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match=r"surrogate '\\ud800' at character 2"):
            encode("ab\ud800")


def test_sentencepiece_names_the_lone_surrogate(mistral):
    for encode in (mistral.encode, lambda text: mistral.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match=r"surrogate '\\ud800' at character 2"):
            encode("ab\ud800")


def tokens_of(tokenizer, text):
    return [tokenizer.decode([index]) for index in tokenizer.encode(text)]


def test_trained_tokenizer_has_a_token_per_word_digit_newline_and_atom():
    assert tokens_of(TRAINED, "Tom has 12 apples.\n3*4=12 ASSISTANT: He") == [
        "Tom",
        " has",
        " ",
        "1",
        "2",
        " apples",
        ".",
        "\n",
        "3",
        "*",
        "4",
        "=",
        "1",
        "2",
        " ASSISTANT:",
        " He",
    ]
    assert tokens_of(TRAINED, "¿Cuántas peras") == ["¿Cuántas", " peras"]
    assert TRAINED.vocab_size < 330 and MERGED.vocab_size == 275
    for text in CORPUS:
        assert len(TRAINED.encode(text)) <= len(pretokenizer.splitter().pre_tokenize_str(text))


def test_trained_tokenizer_is_the_same_for_the_same_corpus():
    again = train_tokenizer(iter(CORPUS), vocab_size=600, atoms=(" ASSISTANT:", "¿Cuántas"))
    assert again.fingerprint == TRAINED.fingerprint
    assert train_tokenizer(CORPUS * 3, vocab_size=275).fingerprint == MERGED.fingerprint
    assert len({TRAINED.fingerprint, MERGED.fingerprint, LLAMA.fingerprint}) == 3


def test_train_on_nothing_still_encodes_everything():
    empty = train_tokenizer([], vocab_size=258)
    assert empty.vocab_size == 258 and empty.decode(empty.encode(SPECIAL_TEXT)) == SPECIAL_TEXT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vocab_size": 258, "atoms": ("x y",)}, "vocab_size: expected at least 259"),
        ({"vocab_size": 400, "atoms": ("",)}, "atoms"),
        ({"vocab_size": 400, "atoms": ("</s>",)}, "atoms"),
        ({"vocab_size": 400, "atoms": ("xy", "xy")}, "atoms"),
        ({"vocab_size": 400, "atoms": ("é",)}, "byte alphabet"),
    ],
)
def test_train_refuses_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        train_tokenizer(CORPUS, **options)


@SMALL
def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(SPECIAL_TEXT + CORPUS[0]) == tokenizer.encode(SPECIAL_TEXT + CORPUS[0])
        assert (again.bos_id, again.eos_id, again.vocab_size) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )


def test_saved_sentencepiece_loads_the_same(mistral, tmp_path):
    mistral.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == mistral.fingerprint
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_saved_tokenizer_is_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    TRAINED.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = CORPUS[0] + " ASSISTANT: " + CORPUS[1]
    assert other(text, add_special_tokens=False)["input_ids"] == TRAINED.encode(text)
    assert (other.bos_token_id, other.eos_token_id) == (TRAINED.bos_id, TRAINED.eos_id)


def word_piece():
    backend = Backend(models.WordPiece({"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return backend.to_str()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.json", "{", "expected JSON"),
        ("tokenizer.json", "[]", "expected a JSON object, got list"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}', "model: expected an object with merges, vocab"),
        ("tokenizer.json", word_piece(), "another kind"),
        ("tokenizer.model", "not a model", "expected a SentencePiece model"),
        ("tokenizer.txt", "", "expected a tokenizer named"),
    ],
)
def test_load_names_the_file_that_is_no_tokenizer(tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=text) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_load_names_what_is_absent(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="got nothing there"):
        load_tokenizer(tmp_path / "x.json")
    LLAMA.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(ValueError, match="expected a eos_token"):
        load_tokenizer(tmp_path)
    # Half of a surrogate pair, which JSON can name and UTF-8 cannot write.
    config.write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(ValueError, match="eos_token: expected a text"):
        load_tokenizer(tmp_path)


def test_training_is_quick():
    began = time.process_time()
    train_tokenizer([" ".join(f"word{i % 300}" for i in range(j, j + 40)) for j in range(5000)], vocab_size=800)
    assert time.process_time() - began < 8
