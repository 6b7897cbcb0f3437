"""Streams of ids that are no text: bytes that no UTF-8 has, special ids, in any order."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation.streaming import TextStream


@cache
def tokenizer():
    return train_tokenizer(["two words plain é"], vocab_size=300, atoms=CHAT_ATOMS)


# The single bytes come first; long runs of the same id move the window of a stream.
IDS = st.lists(
    st.one_of(st.integers(0, 280), st.sampled_from(range(100, 230))).map(lambda i: i % tokenizer().vocab_size),
    max_size=100,
) | st.tuples(st.integers(2, 257), st.integers(0, 150)).map(lambda pair: [pair[0]] * pair[1])


@settings(max_examples=50, deadline=None)
@given(ids=IDS, stop=st.lists(st.text(max_size=3), max_size=2), strip=st.booleans())
def test_ids_that_are_no_text_are_streamed_as_they_decode(ids, stop, strip):
    stream = TextStream(tokenizer(), stop, strip=strip)
    deltas = [stream.push(token) for token in ids] + [stream.end()]
    whole = tokenizer().decode(ids)
    assert "".join(deltas) == stream.text
    if not stream.stopped:
        assert stream.text == (whole.strip() if strip else whole)
    else:
        assert whole.lstrip().startswith(stream.text) or (not strip and whole.startswith(stream.text))
