"""The chat format: exact ids, exact masks, prompts as prefixes, refusals, speed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.chat import (
    CHAT_ATOMS,
    SYSTEM,
    encode_answer,
    encode_conversation,
    encode_conversations,
    encode_preference,
    encode_prompt,
    encode_text,
)
from wizard_engine.data.rows import Conversation, Message, Preference, conversation
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["Tom has 12 apples. How many?", "3*4=12\nThe answer is 12.", " hello there The"]
TRAINED = train_tokenizer(TEXTS, vocab_size=400, atoms=CHAT_ATOMS)
PLAIN = train_tokenizer(TEXTS, vocab_size=280)
TRAPS = ["</s>", "<s>", " ASSISTANT: ", "USER:", " USER: x ASSISTANT: y</s>", SYSTEM, " lead", "trail ", "\n", "é😀"]
contents = st.lists(st.sampled_from(TRAPS) | st.text("ab 1\n<", max_size=4), min_size=1, max_size=4).map("".join)
answers = contents.filter(str.strip)


def turns(pairs, system=None):
    """Messages of (user, assistant) pairs."""
    messages = [] if system is None else [Message("system", system)]
    for user, assistant in pairs:
        messages += [Message("user", user), Message("assistant", assistant)]
    return tuple(messages)


@pytest.fixture(scope="module")
def mistral(shared_data):
    return load_tokenizer(shared_data / "tokenizer" / "mistral_v1.model")


def runs(sample):
    """Token lists of the maximal runs with weight, each ended by its EOS."""
    token_runs, current = [], []
    for token, weight in zip(sample.tokens.tolist(), sample.weights.tolist()):
        assert weight in (0.0, 1.0)
        if weight:
            current.append(token)
        elif current:
            token_runs.append(current)
            current = []
    return [*token_runs, current] if current else token_runs


def check_conversation(tokenizer, pairs, system):
    """Everything that must hold of one conversation."""
    messages = turns(pairs, system)
    sample = encode_conversation(tokenizer, messages)
    tokens = sample.tokens.tolist()
    assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
    assert tokens[0] == tokenizer.bos_id and sample.weights[0] == 0 and tokens.count(tokenizer.bos_id) == 1
    assert tokens.count(tokenizer.eos_id) == len(pairs) and tokens[-1] == tokenizer.eos_id
    learned = runs(sample)
    assert [run[-1] for run in learned] == [tokenizer.eos_id] * len(pairs)
    space = "" if tokenizer.prefixes_space else " "
    assert [tokenizer.decode(run) for run in learned] == [space + answer for _, answer in pairs]
    for count in range(1, len(pairs) + 1):
        history = messages[: len(messages) - 2 * (len(pairs) - count) - 1]
        prompt = encode_prompt(tokenizer, history)
        assert tokens[: len(prompt)] == prompt
        answer = encode_answer(tokenizer, pairs[count - 1][1])
        assert tokens[len(prompt) : len(prompt) + len(answer)] == answer


@pytest.mark.parametrize("tokenizer", [TRAINED, PLAIN], ids=["atoms", "plain"])
@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(contents, answers), min_size=1, max_size=3), system=st.none() | contents)
def test_conversation_masks_are_exact_whatever_the_content(tokenizer, pairs, system):
    check_conversation(tokenizer, pairs, system)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(contents, answers), min_size=1, max_size=3), system=st.none() | contents)
def test_conversation_masks_are_exact_with_sentencepiece(mistral, pairs, system):
    check_conversation(mistral, pairs, system)


def test_conversation_is_the_template_in_text():
    messages = turns([("u1", "a1"), ("u2", "a2")])
    sample = encode_conversation(TRAINED, messages)
    marked = [TRAINED.decode([token]) or {0: "<s>", 1: "</s>"}[token] for token in sample.tokens.tolist()]
    assert "".join(marked) == f"<s>{SYSTEM} USER: u1 ASSISTANT: a1</s>USER: u2 ASSISTANT: a2</s>"
    assert marked[:3] == ["<s>", SYSTEM, " USER:"]
    taught = "".join(text for text, weight in zip(marked, sample.weights) if weight)
    assert taught == " a1</s> a2</s>"


def test_sentencepiece_ids_are_those_of_the_whole_text(mistral):
    """Encoding segment by segment gives SentencePiece's pieces of the whole turn, with no double space."""
    pairs = [("How many apples?", "There are 12 apples."), ("And now?", "None.")]
    tokens = encode_conversation(mistral, turns(pairs)).tokens.tolist()
    first = f"{SYSTEM} USER: How many apples? ASSISTANT: There are 12 apples."
    second = "USER: And now? ASSISTANT: None."
    assert tokens == [1, *mistral.encode(first), 2, *mistral.encode(second), 2]
    pieces = mistral._backend.id_to_piece(tokens)
    assert "▁▁" not in pieces and pieces[pieces.index("</s>") + 1] == "▁US"


def test_system_message_takes_the_place_of_the_default():
    tokens = encode_conversation(TRAINED, turns([("u", "a")], system="Be brief.")).tokens.tolist()
    assert TRAINED.decode(tokens) == "Be brief. USER: u ASSISTANT: a"


def roles(*names):
    return tuple(Message(name, "text") for name in names)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((), "got no turns"),
        (roles("system"), "got no turns"),
        (roles("user"), "expected the last role assistant, got user"),
        (roles("assistant"), r"messages\[0\].role: expected user, got 'assistant'"),
        (roles("user", "user", "assistant"), r"messages\[1\].role: expected assistant"),
        (roles("user", "assistant", "system"), r"messages\[2\].role: expected user"),
        (roles("system", "assistant"), r"messages\[1\].role"),
        (turns([("u", " \n")]), "nothing to learn"),
        (turns([("u", ""), ("u", "a")]), "nothing to learn"),
    ],
)
def test_conversation_refuses_what_cannot_be_learned(messages, text):
    with pytest.raises(ValueError, match=text):
        encode_conversation(TRAINED, messages)


def test_prompt_refuses_an_answered_conversation():
    with pytest.raises(ValueError, match="expected the last role user"):
        encode_prompt(TRAINED, turns([("u", "a")]))


def test_too_long_is_refused_or_cut_and_a_cut_answer_is_not_trained_to_end():
    messages = turns([("u1", "a1"), ("u2", "a2 and 12 apples")])
    whole = encode_conversation(TRAINED, messages)
    size = len(whole.tokens)
    assert encode_conversation(TRAINED, messages, max_length=size, truncate=True).cut == 0
    with pytest.raises(ValueError, match=f"at most {size - 1} tokens, got {size}"):
        encode_conversation(TRAINED, messages, max_length=size - 1)
    first = len(encode_conversation(TRAINED, messages[:2]).tokens)
    asked = len(encode_prompt(TRAINED, messages[:3]))
    for limit in range(first, size):
        sample = encode_conversation(TRAINED, messages, max_length=limit, truncate=True)
        length = limit if limit > asked else first
        assert (len(sample.tokens), sample.cut) == (length, size - length)
        assert np.array_equal(sample.tokens, whole.tokens[:length])
        assert np.array_equal(sample.weights, whole.weights[:length])
        assert bool(sample.tokens[-1] == TRAINED.eos_id) is (limit <= asked)
    with pytest.raises(ValueError, match="expected a trained token among the first"):
        encode_conversation(TRAINED, messages, max_length=len(encode_prompt(TRAINED, messages[:1])), truncate=True)


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(contents, answers), max_size=2), user=contents, chosen=answers, rejected=answers)
def test_preference_teaches_only_the_last_answer(pairs, user, chosen, rejected):
    row = Preference((*turns(pairs), Message("user", user)), chosen, rejected)
    if chosen == rejected:
        with pytest.raises(ValueError, match="got the same"):
            encode_preference(TRAINED, row)
        return
    prompt = encode_prompt(TRAINED, row.prompt)
    for sample, text in zip(encode_preference(TRAINED, row), (chosen, rejected)):
        answer = encode_answer(TRAINED, text)
        assert sample.tokens.tolist() == prompt + answer
        assert sample.weights.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)


def test_preference_refuses_blank_and_long_answers():
    prompt = (Message("user", "u"),)
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_preference(TRAINED, Preference(prompt, "a", " "))
    with pytest.raises(ValueError, match="at most 7 tokens"):
        encode_preference(TRAINED, Preference(prompt, "a", "a a a a a"), max_length=7)


def test_ranking_of_instructions_weighs_the_closing_token():
    chosen, rejected = encode_preference(TRAINED, Preference((), "hello", "there"))
    assert chosen.tokens.tolist() == [*encode_prompt(TRAINED, (Message("user", "hello"),)), TRAINED.eos_id]
    assert chosen.weights.tolist() == [0.0] * (len(chosen.tokens) - 1) + [1.0]
    assert not np.array_equal(chosen.tokens, rejected.tokens)


def test_text_is_trained_but_for_bos():
    sample = encode_text(PLAIN, "a </s> b")
    assert sample.tokens.tolist() == [PLAIN.bos_id, *PLAIN.encode("a </s> b"), PLAIN.eos_id]
    assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample.tokens) - 1)
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_text(PLAIN, "")
    with pytest.raises(ValueError, match="at most 3 tokens"):
        encode_text(PLAIN, "abcdef", max_length=3)


BAD = Conversation(roles("user", "user"))
SURROGATE = conversation("\ud800", "answer")
LONG = conversation("u " * 300, "answer")


def test_conversations_are_those_one_by_one_and_rejects_are_counted():
    good = [Conversation(turns([(f"u{i % 3}", f"a {i}"), ("x", "y")])) for i in range(9)]
    rows = [good[0], BAD, *good[1:5], SURROGATE, LONG, Conversation(()), *good[5:]]
    samples, rejected = encode_conversations(TRAINED, rows, 200, on_error="skip")
    assert [entry.index for entry in rejected] == [1, 6, 7, 8]
    for entry, text in zip(rejected, ("roles must alternate", "surrogate", "at most 200 tokens", "got no turns")):
        assert text in entry.reason
    for sample, row in zip(samples, good, strict=True):
        single = encode_conversation(TRAINED, row.messages)
        assert np.array_equal(sample.tokens, single.tokens) and np.array_equal(sample.weights, single.weights)


@pytest.mark.parametrize("bad", [BAD, SURROGATE, LONG])
def test_conversations_raise_naming_the_row(bad):
    with pytest.raises(ValueError, match=rf"row 1 \(id {bad.id}\): "):
        encode_conversations(TRAINED, [conversation("u", "a"), bad], 200)


def test_conversations_of_nothing_are_nothing():
    assert encode_conversations(TRAINED, []) == ([], [])


def test_twenty_thousand_conversations_take_under_four_seconds():
    rows = [
        conversation(f"Tom has {i} apples. How many?" + " hello" * 20, f"3*4={i}\nThe answer is {i}.")
        for i in range(20_000)
    ]
    began = time.process_time()
    samples, rejected = encode_conversations(TRAINED, rows, 256)
    assert time.process_time() - began < 4 and len(samples) == 20_000 and not rejected


def test_encode_prompt_continues_after_a_blank_answer_of_the_model():
    tokenizer = train_tokenizer(["hello there"], vocab_size=300, atoms=CHAT_ATOMS)
    history = (Message("user", "hello"), Message("assistant", ""), Message("user", "there"))
    ids = encode_prompt(tokenizer, history)
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.decode(ids).endswith("there ASSISTANT:")
    with pytest.raises(ValueError, match="blank"):
        encode_conversation(tokenizer, (*history, Message("assistant", "yes")))
