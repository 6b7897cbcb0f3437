"""Tokens one at a time: those of `generate`, from a cache kept between turns; text that is never taken back."""

import random
from dataclasses import replace

import pytest

from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import generate
from wizard_engine.generation.streaming import Streamer, TextStream, stream_text
from wizard_engine.model import PRESETS, Transformer

PROMPTS = ([5, 9, 2, 7], [1], [5, 9, 2, 7, 3, 3, 8, 1, 4, 4, 250, 17])


@pytest.fixture(params=["tiny", "tiny-mistral", "tiny-llama", "tiny-mixtral"])
def model(request):
    config = replace(PRESETS[request.param], window=5 if request.param == "tiny-mistral" else None, init_std=0.2)
    return Transformer(config, seed=3).eval()


SETTINGS = ({}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5})


# Catches: a window off by one; another uniform number for a step.
@pytest.mark.parametrize("how", SETTINGS)
def test_ids_are_those_of_generate(model, how):
    streamer = Streamer(model, eos_ids=(-1,))
    for prompt in PROMPTS:
        expected = generate(model, [prompt], max_new_tokens=30, eos_ids=(-1,), **how).tokens[0]
        assert list(streamer.stream(prompt, max_new_tokens=30, **how)) == expected


# Catches: keys of a former turn that are taken for the new one's; the last token of a prompt not read again.
def test_the_next_turn_is_read_from_the_page_where_it_differs(model):
    streamer, long = Streamer(model, eos_ids=(-1,)), [i % 250 for i in range(3, 60)]
    first = list(streamer.stream(long, max_new_tokens=6))
    assert streamer.reused == 0
    for turn, reused in (
        (long + first + [11, 12], 48),
        (long + first + [11, 13, 14], 64),
        (long[:40] + [1, 2], 32),
        (long[:33], 32),
        (long[:32], 16),
        ([9, *long], 0),
    ):
        expected = generate(model, [turn], max_new_tokens=6, eos_ids=(-1,)).tokens[0]
        assert list(streamer.stream(turn, max_new_tokens=6)) == expected
        assert streamer.reused == reused


def test_eos_ends_the_answer_and_so_does_leaving(model):
    streamer = Streamer(model, eos_ids=(-1,))
    whole = list(streamer.stream(PROMPTS[0], max_new_tokens=8))
    stopping = Streamer(model, eos_ids=(whole[2],))
    assert list(stopping.stream(PROMPTS[0], max_new_tokens=8)) == whole[: whole.index(whole[2]) + 1]
    half = streamer.stream(PROMPTS[0], max_new_tokens=8)
    assert [next(half), next(half)] == whole[:2]
    half.close()
    assert list(streamer.stream(PROMPTS[0], max_new_tokens=8)) == whole


@pytest.mark.parametrize(("prompt", "new"), [([], 3), ([1] * 510, 3), ([1], 0), ([1], 512)])
def test_a_prompt_without_room_is_refused(prompt, new):
    streamer = Streamer(Transformer(PRESETS["tiny"], seed=0), eos_ids=(-1,))
    with pytest.raises(ValueError, match=r"prompt: expected 1 to|max_new_tokens: expected >= 1"):
        next(streamer.stream(prompt, max_new_tokens=new))


# Catches: half a character shown; white space at an end shown; a piece shown twice.
@pytest.mark.parametrize(
    "text", ["", "plain", "  two  words \n\n", "né 😀 \u200d ok", "a\ufffdb\ufffd", "\ufffd", " \n ", "x  \ufffd  y\n"]
)
def test_streamed_pieces_are_the_decoded_text(text):
    tokenizer = train_tokenizer(["two words plain"], vocab_size=300)
    for ids in (tokenizer.encode(text), tokenizer.encode(text)[:-1]):
        chunks = list(stream_text(tokenizer, iter(ids)))
        assert "".join(chunks) == tokenizer.decode(ids).strip() and all(chunks)
        whole = tokenizer.decode(ids).lstrip()
        shown = ""
        for chunk in chunks:
            shown += chunk
            assert whole.startswith(shown)


def test_a_piece_comes_as_soon_as_it_is_sure():
    tokenizer = train_tokenizer(["two words plain"], vocab_size=300)
    ids = tokenizer.encode("é\n\nx")
    assert len(ids) == 5
    assert [list(stream_text(tokenizer, iter(ids[:n]))) for n in range(2, 6)] == [["é"], ["é"], ["é"], ["é", "\n\nx"]]


# Catches: a stop string cut across ids and shown in part; text behind it; one that begins inside another.
@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two. three. four", ["three"], "one two. "),
        ("one two. three. four", ["four", " two"], "one"),
        ("aaab", ["aab"], "a"),
        ("no such", ["nope", ""], "no such"),
        ("x é\u20acé y", ["\u20acé"], "x é"),
        ("stop at once", ["stop"], ""),
        ("ends with sto", ["stop"], "ends with sto"),
        ("  a b  c", ["  c"], "  a b"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stop, shown, strip):
    tokenizer = train_tokenizer(["two words plain"], vocab_size=300)
    stream = TextStream(tokenizer, stop, strip=strip)
    ids, chunks = tokenizer.encode(text), []
    for token in ids:
        chunks.append(stream.push(token))
        assert shown.startswith("".join(chunks)) or strip
        if stream.stopped:
            break
    chunks.append(stream.end())
    assert "".join(chunks) == stream.text == (shown.strip() if strip else shown)
    assert stream.stopped == any(s and s in text for s in stop)
    assert not stream.stopped or stream.push(ids[0]) == ""


# Catches: a window that moves in the middle of a character, or decodes its first id as the beginning of a text.
@pytest.mark.parametrize("seed", range(4))
def test_long_texts_are_decoded_window_by_window(seed):
    tokenizer = train_tokenizer(["two words plain é 😀"], vocab_size=300)
    draw = random.Random(seed)
    text = "".join(draw.choice(["two", " ", "é", "😀", "\n", "words ", "\ufffd", "中"]) for _ in range(300))
    stream, ids = TextStream(tokenizer, strip=False), tokenizer.encode(text)
    assert "".join([*map(stream.push, ids), stream.end()]) == tokenizer.decode(ids) == text
