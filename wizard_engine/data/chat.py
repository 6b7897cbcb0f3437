"""Conversations as token ids, in the chat format of the tokenizer: Vicuna v1.1, or a model's own template.

Vicuna v1.1 is built segment by segment from roles, never by searching rendered text:

    <s>SYSTEM USER: u1 ASSISTANT: a1</s>USER: u2 ASSISTANT: a2</s>

The ids are those of the segments `SYSTEM`, ` USER:`, ` u1`, ` ASSISTANT:`, ` a1`, then EOS, then `USER:`, ` u2`, ...
each encoded separately. So the ids of a prompt are a prefix of those of the conversation, and no text inside a message
is read as a boundary. The loss covers the ids of every answer and the EOS that closes it. Templates: chat_template.py.

Source: FastChat's template vicuna_v1.1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .chat_format import SYSTEM, ChatFormatChoice, chosen_format
from .chat_template import Exchange, TemplateCoder
from .rows import Conversation, Message, Preference
from .tokenizer import Tokenizer

USER, NEXT_USER, ASSISTANT = " USER:", "USER:", " ASSISTANT:"
# The fixed segments: as atoms of `train_tokenizer` each is one token.
CHAT_ATOMS = (SYSTEM, USER, NEXT_USER, ASSISTANT)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class Sample:
    """A training sequence.

    tokens: (n,) int32, BOS first.
    weights: (n,) float32; weights[i] is the loss weight of tokens[i] as a target, so weights[0] is 0.
    cut: tokens that were cut off its end.
    """

    tokens: np.ndarray
    weights: np.ndarray
    cut: int = 0


class Rejection(NamedTuple):
    """A row that gives no sample: its index among the rows, and the reason."""

    index: int
    reason: str


def use_chat_format(
    tokenizer: Tokenizer,
    choice: ChatFormatChoice = "auto",
    *,
    training: bool = False,
    needs_marks: bool = False,
    vocab_size: int | None = None,
) -> Tokenizer:
    """The tokenizer, set to the format of an option `--chat-format`; a template is tried before anything depends on it.

    Args:
        choice: see `chat_format.chosen_format`.   training: for a model that is going to be trained in the format.
        needs_marks: the loss covers answers, so that a template must say which its tokens are.
        vocab_size: rows of the model's embedding, which all tokens of the template must have.
    Raises:
        ValueError: no such format, or a template that cannot be used; says what to do.
    """
    tokenizer.chat_format = chosen_format(choice, tokenizer.chat_format, training=training)
    coder = _coder(tokenizer)
    if coder is not None:
        beyond = [text for text, index in coder.written.items() if vocab_size is not None and index >= vocab_size]
        if beyond:
            raise ValueError(
                f"{coder.format.source}: chat template: expected tokens among the {vocab_size} of the model's "
                f"embedding, got {beyond[0]}; choose the model's own template"
            )
        if needs_marks:
            coder.check_marks()
    return tokenizer


def _coder(tokenizer: Tokenizer) -> TemplateCoder | None:
    """What encodes in the template of the tokenizer's format; None for Vicuna."""
    if tokenizer.chat_format.is_vicuna:
        return None
    if tokenizer.template_coder is None or tokenizer.template_coder.format is not tokenizer.chat_format:
        tokenizer.template_coder = TemplateCoder(tokenizer)
    return tokenizer.template_coder


def _segment(tokenizer: Tokenizer, text: str) -> str:
    """The text to encode for a segment that follows other ids (the rule is in tokenizer.py)."""
    return text.removeprefix(" ") if tokenizer.prefixes_space else text


def _check(messages: Sequence[Message], last: str) -> None:
    """Raise ValueError unless roles alternate from "user" to `last` after an optional system message."""
    first = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if message.role != expected:
            raise ValueError(f"messages[{index}].role: expected {expected}, got {message.role!r}; roles must alternate")
    _check_last(messages, last)


def _check_last(messages: Sequence[Message], last: str) -> None:
    """Raise ValueError unless the last role is `last`, and no answer is blank where it is "assistant"."""
    for index, message in enumerate(messages):
        if message.role == last == "assistant" and not message.content.strip():
            raise ValueError(
                f"messages[{index}].content: expected an answer, got a blank one; there is nothing to learn"
            )
    turns = [message for message in messages if message.role != "system"]
    if not turns or messages[-1].role != last:
        got = messages[-1].role if turns else "no turns"
        raise ValueError(f"messages: expected the last role {last}, got {got}")


def _parts(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """(text, is an answer) of each segment, in order; an EOS follows each answer, BOS comes before all."""
    has_system = messages[0].role == "system"
    parts = [(messages[0].content if has_system else SYSTEM, False)]
    user = USER
    for message in messages[1:] if has_system else messages:
        if message.role == "user":
            parts += [(user, False), (" " + message.content, False), (ASSISTANT, False)]
            user = NEXT_USER
        else:
            parts.append((" " + message.content, True))
    return parts


def _sample(tokenizer: Tokenizer, parts: Iterable[tuple[str, bool]], encode: Encode, learned: Sequence[bool]) -> Sample:
    """Sample of the segments; `learned[k]` says whether the k-th answer is trained."""
    tokens, weights, answers = [tokenizer.bos_id], [0.0], 0
    for text, is_answer in parts:
        ids = encode(_segment(tokenizer, text))
        tokens += ids
        weight = float(is_answer and learned[answers])
        weights += [weight] * len(ids)
        if is_answer:
            answers += 1
            tokens.append(tokenizer.eos_id)
            weights.append(weight)
    return Sample(np.asarray(tokens, dtype=np.int32), np.asarray(weights, dtype=np.float32))


def _fitting(sample: Sample, max_length: int | None, truncate: bool = False) -> Sample:
    if max_length is None or len(sample.tokens) <= max_length:
        return sample
    if not truncate:
        raise ValueError(
            f"sample: expected at most {max_length} tokens, got {len(sample.tokens)}; raise max_length or omit it"
        )
    return _cut(sample, max_length)


def _cut(sample: Sample, max_length: int) -> Sample:
    """The sample's first tokens up to the last trained one within `max_length`; an answer that is cut has no EOS."""
    trained = np.flatnonzero(sample.weights[:max_length])
    if not len(trained):
        raise ValueError(
            f"sample: expected a trained token among the first {max_length}, got a longer prompt "
            f"({len(sample.tokens)} tokens in all); there is nothing to learn"
        )
    length = int(trained[-1]) + 1
    return Sample(sample.tokens[:length], sample.weights[:length], len(sample.tokens) - length)


def _conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    weights: Sequence[int],
    encode: Encode,
    max_length: int | None,
    truncate: bool,
) -> Sample:
    coder = _coder(tokenizer)
    (_check if coder is None else _check_last)(messages, "assistant")
    learned = [bool(weight) for weight in weights] or [True] * sum(m.role == "assistant" for m in messages)
    if not any(learned):
        raise ValueError("messages: expected an answer with weight 1, got 0 for all; there is nothing to learn")
    if coder is not None:
        return _fitting(Sample(*coder.conversation(messages, learned)), max_length, truncate)
    return _fitting(_sample(tokenizer, _parts(messages), encode, learned), max_length, truncate)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    weights: Sequence[int] = (),
    max_length: int | None = None,
    truncate: bool = False,
) -> Sample:
    """Sample of a conversation: every answer and its closing EOS trained, everything else not.

    In a template the trained tokens are those of its generation blocks, one for each answer.

    Args:
        messages: an optional system message (it replaces SYSTEM), then user and assistant in turns, assistant last. A
            template has rules of its own.
        weights: 0 or 1 for each answer, 0 trains neither it nor its EOS; () trains all.
        max_length: most tokens, BOS and EOS included; None for any number.
        truncate: cut the end off a longer sample. An answer that is cut is trained up to there, without an EOS.
    Raises:
        ValueError: roles do not alternate, an answer is blank, the sample does not fit, nothing is left to train, or a
            template refuses the messages or does not mark answers.
    """
    return _conversation(tokenizer, messages, weights, tokenizer.encode, max_length, truncate)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to the opening of the next answer: in Vicuna ` ASSISTANT:`, a prefix of the conversation with any answer.

    Args:
        messages: as for `encode_conversation`, but a user message last; an earlier answer may be blank.
    Raises:
        ValueError: roles do not alternate, or the last message is not the user's; or a template refuses them.
    """
    coder = _coder(tokenizer)
    if coder is not None:
        _check_last(messages, "user")
        return coder.prompt(messages)
    _check(messages, "user")
    parts = _parts(messages)
    return _sample(tokenizer, parts, tokenizer.encode, [False] * len(parts)).tokens.tolist()


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that follow a prompt in Vicuna: those of the answer and the closing EOS.

    In a template they depend on what stands before: see `encode_exchange` and `encode_begun`.
    """
    assert tokenizer.chat_format.is_vicuna
    return [*tokenizer.encode(_segment(tokenizer, " " + text)), tokenizer.eos_id]


def encode_exchange(tokenizer: Tokenizer, prompt: Sequence[Message], answer: str) -> Exchange:
    """A prompt with its answer in tokens, up to the one that ends the answer, and where the answer's characters are.

    Raises:
        ValueError: as for `encode_prompt`.
    """
    coder = _coder(tokenizer)
    if coder is not None:
        _check_last(prompt, "user")
        return coder.exchange(prompt, answer)
    before, after = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, answer)
    shift = max(0, tokenizer.decode(after).find(answer))
    spans = [(start - shift, end - shift) for start, end in tokenizer.offsets(after)]
    return Exchange([*before, *after], len(before), spans)


def encode_begun(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation whose last message is an answer that goes on: nothing closes it.

    Raises:
        ValueError: as for `encode_prompt`.
    """
    coder = _coder(tokenizer)
    if coder is not None:
        if not messages or messages[-1].role != "assistant":
            raise ValueError(
                f"messages: expected the last role assistant, got {messages[-1].role if messages else 'none'}"
            )
        return coder.begun(messages)
    return [*encode_prompt(tokenizer, messages[:-1]), *encode_answer(tokenizer, messages[-1].content)[:-1]]


def encode_opening(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation that ends with an answer, and of the opening of the user's next turn.

    Raises:
        ValueError: as for `encode_prompt`.
    """
    coder = _coder(tokenizer)
    if coder is not None:
        return coder.opening(messages)
    before = encode_prompt(tokenizer, messages[:-1])
    return [*before, *encode_answer(tokenizer, messages[-1].content), *tokenizer.encode(NEXT_USER)]


def encode_preference(tokenizer: Tokenizer, row: Preference, *, max_length: int | None = None) -> tuple[Sample, Sample]:
    """Samples of the chosen and of the rejected answer; only that last answer is trained, not earlier turns.

    A ranking of instructions (empty prompt) gives each instruction as a prompt closed by EOS, which alone has weight:
    the last position is where an instruction is scored.

    Raises:
        ValueError: roles do not alternate, an answer is blank, both are the same, or one does not fit.
    """
    if row.chosen == row.rejected:
        raise ValueError("chosen, rejected: expected different texts, got the same; there is nothing to learn")
    chosen, rejected = (
        _fitting(_continued(tokenizer, row.prompt, text), max_length) for text in (row.chosen, row.rejected)
    )
    return chosen, rejected


def _continued(tokenizer: Tokenizer, prompt: Sequence[Message], text: str) -> Sample:
    messages = (*prompt, Message("assistant", text))
    if prompt and not tokenizer.chat_format.is_vicuna:
        earlier = [0] * sum(message.role == "assistant" for message in prompt)
        return _conversation(tokenizer, messages, [*earlier, 1], tokenizer.encode, None, False)
    if prompt:
        _check(messages, "assistant")
        before, after = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, text)
    else:
        before, after = encode_prompt(tokenizer, (Message("user", text),)), [tokenizer.eos_id]
    weights = np.repeat(np.float32([0, 1]), (len(before), len(after)))
    return Sample(np.asarray([*before, *after], dtype=np.int32), weights)


def encode_text(tokenizer: Tokenizer, text: str, *, max_length: int | None = None, truncate: bool = False) -> Sample:
    """Sample of plain text for pre-training: BOS, text, EOS; everything but BOS is trained. `truncate`: as above.

    Raises:
        ValueError: the text is empty or does not fit.
    """
    if not text:
        raise ValueError("text: expected at least one character, got none; there is nothing to learn")
    tokens = np.asarray([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32)
    weights = np.ones(len(tokens), dtype=np.float32)
    weights[0] = 0
    return _fitting(Sample(tokens, weights), max_length, truncate)


def encode_conversations(
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    max_length: int | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    truncate: bool = False,
) -> tuple[list[Sample], list[Rejection]]:
    """`encode_conversation` of many rows, each different text tokenised once and all in one call.

    Args:
        rows: conversations.   max_length, truncate: as there.
        on_error: "raise" at the first row that gives no sample, or "skip" it.
    Returns:
        samples: in the order of the rows, without the skipped ones.   rejected: index and reason of each skipped row.
    Raises:
        ValueError: a row gives no sample and on_error is "raise"; names its index and id.
    """
    cached = _cache(tokenizer, rows) if tokenizer.chat_format.is_vicuna else tokenizer.encode
    samples, rejected = [], []
    for index, row in enumerate(rows):
        try:
            samples.append(_conversation(tokenizer, row.messages, row.weights, cached, max_length, truncate))
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"row {index} (id {row.id}): {error}") from error
            rejected.append(Rejection(index, str(error)))
    return samples, rejected


def _cache(tokenizer: Tokenizer, rows: Sequence[Conversation]) -> Encode:
    """`tokenizer.encode`, with the ids of every segment of the rows already known."""
    texts = {_segment(tokenizer, text) for row in rows if row.messages for text, _ in _parts(row.messages)}
    valid = sorted(text for text in texts if _is_unicode(text))
    known = dict(zip(valid, tokenizer.encode_batch(valid)))
    return lambda text: known[text] if text in known else tokenizer.encode(text)


def _is_unicode(text: str) -> bool:
    """False for a text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
