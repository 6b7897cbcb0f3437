"""Bytes, texts and log-probabilities of tokens, of byte-level and SentencePiece tokenizers, in all that is answered."""

import io
import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served_model import Serving, small_model

from wizard_engine.data.tokenizer import SentencePieceTokenizer
from wizard_engine.generation import generate
from wizard_engine.generation.scoring import prompt_logprobs
from wizard_engine.generation.streaming import TextStream
from wizard_engine.model import ModelConfig, Transformer


def sentencepiece_model():
    """A small model whose tokenizer has bytes for what it does not know."""
    out, lines = io.BytesIO(), ["what is two and three? it is five.", "count to ten: one two three four five"]
    options = {"vocab_size": 320, "byte_fallback": True, "model_type": "bpe", "hard_vocab_limit": False}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **options)
    tokenizer = SentencePieceTokenizer(out.getvalue())
    shapes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 48}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_positions=256, init_std=0.25, **shapes)
    return Transformer(config, seed=5).eval(), tokenizer


KINDS = {"byte_level": small_model, "sentencepiece": sentencepiece_model}
MADE = {}


def made(kind):
    return MADE.setdefault(kind, KINDS[kind]())


@pytest.fixture(scope="module", params=KINDS)
def serving(request):
    with Serving(made=made(request.param), most_waiting=64) as server:
        yield server
        server.until(server.is_idle)


class Scripted:
    """Has the engine draw given ids greedily, one sequence at a time."""

    def __init__(self, serving, ids):
        self.engine, self.ids = serving.engine, list(ids)

    def __enter__(self):
        def logits(hidden, rows, rows_R):
            out = torch.zeros(len(rows), self.engine.config.vocab_size)
            out[:, self.ids.pop(0)] = 20.0
            return out

        self.engine._logits = logits

    def __exit__(self, *_):
        del self.engine._logits


def post(serving, path, **fields):
    answer = serving.web.post(path, json={"model": "small", "temperature": 0} | fields)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


ASK = {"messages": [{"role": "user", "content": "Say it"}], "logprobs": True, "top_logprobs": 4}
TEXTS = ["🧙 it is é", "two three", "  中文 five", "é", "🧙\u200d♂️ a", "one\n\n", "\ttab 🧙", "a\u2028b\x85c"]


# Catches: bytes made of the token's text, empty or U+FFFD for a byte of a character; the space before the answer.
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_a_chat_answers_tokens_are_the_answer(serving, text, stream):
    tokenizer = serving.tokenizer
    ids = [*tokenizer.encode(text if tokenizer.prefixes_space else " " + text), tokenizer.eos_id]
    with Scripted(serving, ids):
        answer = post(serving, "/v1/chat/completions", max_tokens=100, stream=stream, **ASK)
    if stream:
        choices = [event["choices"][0] for event in answer]
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    else:
        content, entries = (answer["choices"][0][key] for key in ("message", "logprobs"))
        content, entries = content["content"], entries["content"]
    assert content == text.strip()
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == content.encode()
    assert "".join(entry["token"] for entry in entries) == content
    assert all(entry["bytes"] and len(entry["top_logprobs"]) == 4 for entry in entries)
    single = [i for i in ids if len(tokenizer.token_bytes(i)) == 1 and tokenizer.token_bytes(i) >= b"\x80"]
    assert sum(len(entry["bytes"]) == 1 and entry["bytes"][0] >= 128 for entry in entries) == len(single)


# Catches: `decode` of the new ids alone, which takes the space of the first word for that of a text's beginning.
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [" two three", " 🧙", "two", "\n two ", "é"])
def test_completions_go_on_with_the_space_before_a_word(serving, text, stream):
    tokenizer = serving.tokenizer
    prompt = tokenizer.encode("what is")
    whole = tokenizer.encode("what is" + text)
    if whole[: len(prompt)] != prompt:
        pytest.skip("the tokenizer joins the texts")
    with Scripted(serving, [*whole[len(prompt) :], tokenizer.eos_id]):
        answer = post(serving, "/v1/completions", prompt="what is", max_tokens=60, logprobs=5, stream=stream)
    choices = [event["choices"][0] for event in answer] if stream else answer["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    parts = [choice["logprobs"] for choice in choices]
    tokens, offsets = ([x for part in parts for x in part[key]] for key in ("tokens", "text_offset"))
    assert "".join(tokens) == text and all(text[at:].startswith(token) for at, token in zip(offsets, tokens))
    # One for each token, EOS included, and none of the likeliest is lost.
    assert len(tokens) == len(whole) - len(prompt) + 1
    assert all(len(top) == 5 for part in parts for top in part["top_logprobs"] or ())


# Catches: a likeliest token that replaces another of the same text.
@pytest.mark.parametrize("seed", range(3))
def test_no_likeliest_token_is_lost(serving, seed):
    fields = {"prompt": "two", "temperature": 1.0, "seed": seed, "max_tokens": 30, "logprobs": 20}
    tops = post(serving, "/v1/completions", **fields)["choices"][0]["logprobs"]["top_logprobs"]
    assert {len(top) for top in tops} == {20}


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), strip=st.booleans(), continues=st.booleans())
def test_chunks_and_tokens_add_up_to_the_text(data, kind, strip, continues):
    tokenizer = made(kind)[1]
    text = st.text("ab é🧙\u00a0\n two", max_size=12).map(tokenizer.encode)
    ids = data.draw(st.one_of(text, st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)))
    stops = data.draw(st.lists(st.sampled_from(["a", "o ", "é", "wo", "🧙"]), max_size=2))
    stream = TextStream(tokenizer, stops, strip=strip, continues=continues, keeps_tokens=True)
    chunks, shown = [], []
    for token in ids:
        chunks.append(stream.push(token))
        if stream.stopped:
            break
        shown += stream.shown_tokens()
    chunks.append(stream.end())
    shown += stream.shown_tokens(is_last=True)
    data_bytes = b"".join(map(tokenizer.token_bytes, ids))
    if tokenizer.prefixes_space and not continues:
        data_bytes = data_bytes.removeprefix(b" ")
    whole = data_bytes.decode(errors="replace")
    cut = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
    expected = whole[:cut].rstrip() if strip else whole[:cut]
    expected = expected.lstrip() if strip and not continues else expected
    assert "".join(chunks) == stream.text == expected
    assert [token.index for token in shown] == sorted({token.index for token in shown})
    if "\ufffd" not in whole:
        assert b"".join(token.data for token in shown) == expected.encode()
        assert "".join(token.text for token in shown) == expected
        assert all(expected[token.start :].startswith(token.text) for token in shown)
    elif not strip and not stops:
        assert b"".join(token.data for token in shown) == data_bytes
        assert "".join(token.text for token in shown) == expected


# Catches: log-probabilities of a prompt one place off, of another temperature; a BOS that the client did not send.
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(serving, count, stream):
    tokenizer = serving.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("what is two and three? é 🧙")]
    logprobs, tops = prompt_logprobs(serving.model, ids, top=2)
    rows = []
    for prompt in (ids, "what is two and three? é 🧙"):
        answer = post(serving, "/v1/completions", prompt=prompt, max_tokens=count, echo=True, logprobs=2, stream=stream)
        choices = [event["choices"][0] for event in answer] if stream else answer["choices"]
        parts = [choice["logprobs"] for choice in choices]
        row = {key: [x for part in parts for x in part[key] or ()] for key in parts[0]}
        row["text"] = "".join(choice["text"] for choice in choices)
        rows.append(row)
    by_ids, by_text = rows
    assert by_ids["text"] == by_text["text"] and by_text["text"].startswith("what is two and three? é 🧙")
    assert by_ids["token_logprobs"][0] is None and by_text["token_logprobs"][0] is None
    assert by_ids["token_logprobs"][1 : len(ids)] == pytest.approx(logprobs, abs=1e-4)
    assert by_text["token_logprobs"][1:] == by_ids["token_logprobs"][2:]
    assert len(by_ids["token_logprobs"]) == len(ids) + count or by_ids["tokens"][-1] == ""
    for row in rows:
        assert "".join(row["tokens"]) == row["text"]
        assert all(row["text"][at:].startswith(token) for at, token in zip(row["text_offset"], row["tokens"]))
    # lm-evaluation-harness compares these to tell whether a continuation is the greedy one.
    assert [max(top.values()) for top in by_ids["top_logprobs"][1 : len(ids)]] == pytest.approx(
        [row[0][1] for row in tops], abs=1e-4
    )


def test_scored_logprobs_are_those_that_generation_reports(serving):
    tokenizer = serving.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode("what is")]
    answer = post(serving, "/v1/completions", prompt=prompt, max_tokens=8, logprobs=1)["choices"][0]["logprobs"]
    tokens = generate(serving.model, [prompt], max_new_tokens=8, eos_ids=tokenizer.eos_ids).tokens[0]
    scored, _ = prompt_logprobs(serving.model, prompt + tokens)
    assert answer["token_logprobs"] == pytest.approx(scored[len(prompt) - 1 :], abs=1e-4)
