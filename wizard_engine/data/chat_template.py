"""Conversations in the chat template of a model: what transformers makes of them, and what training needs beside."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .marked_text import Guard, MarkedEncoder, broken_texts
from .rows import Message
from .template_renderer import Rendering, TemplateFault, render
from .tokenizer import Tokenizer

ADVICE = "repair it, or choose another with --chat-format"
# Messages that a template is tried on: words that no template takes for something else.
QUESTION, ANSWER, NEXT, BEGUN = "qw1xquestion", "qw1xanswer", "qw1xnext", "qw1xbegun "
CHANGES_CASE = ("lower", "upper", "capitalize", "title", "swapcase")


class Exchange(NamedTuple):
    """A prompt and its answer in tokens.

    tokens: all ids, up to the one that ends the answer's turn.   start: index of the answer's first one.
    spans: span (start, end) of each id from there on, in the characters of the answer.
    """

    tokens: list[int]
    start: int
    spans: list[tuple[int, int]]


class _Rendered(NamedTuple):
    """Messages with broken marks, their rendering, and placeholder -> character."""

    messages: list[dict[str, str]]
    rendering: Rendering
    broken: dict[str, str]


class TemplateCoder:
    """Encodes conversations in the template of a tokenizer's chat format.

    The ids are those of transformers, as long as no message holds the text of a special token. Such a text is encoded
    as text. The template is tried on three messages first: it must render them, and say where an answer begins.

    Args:
        tokenizer: its chat format has a template; the ids that end a turn in it are added to `eos_ids`.
    Attributes:
        written: text -> id of the added tokens that the template wrote.
        turn_end: id behind an answer, None where it is no added token.
    Raises:
        ValueError: the template cannot be used; names the file, and says what to do.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.format = tokenizer, tokenizer.chat_format
        if self.format.fault:
            raise self._fault(self.format.fault)
        self._encoder = MarkedEncoder(tokenizer.backend_json())
        lacking = [token for token in self.format.needs if token not in self._encoder.marks]
        if lacking:
            raise ValueError(
                f"chat_format: expected a tokenizer with {' and '.join(self.format.needs)} for {self.format.name}, got "
                f"one without {lacking[0]}; choose another format"
            )
        self._variables = tokenizer.template_variables()
        self._everyone = self._asked = Guard(())
        # Between the opening of an answer and its text, and from there to the end of its turn.
        self._gap = self._end = ""
        self.written: dict[str, int] = {}
        self.turn_end: int | None = None
        self._try()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation and of the opening of the next answer."""
        rendered = self._render(messages, opens_answer=True)
        return self._encoder.encode(rendered.rendering.text, rendered.broken)[0]

    def begun(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation whose last message is an answer that goes on."""
        *before, last = messages
        rendered = self._render([*before, Message(last.role, last.content + BEGUN)])
        text, behind = self._around(rendered.rendering.text, BEGUN.strip())
        text = text if behind.startswith(BEGUN[-1]) else text.rstrip()
        return self._encoder.encode(text, rendered.broken)[0]

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation and of the opening of the user's next turn."""
        rendered = self._render([*messages, Message("user", NEXT)])
        text, _ = self._around(rendered.rendering.text, NEXT)
        # A space before the text belongs to its first token, which is the model's to choose.
        return self._encoder.encode(text.rstrip(" "), rendered.broken)[0]

    def conversation(self, messages: Sequence[Message], learned: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int32 ids of a conversation, and (n,) fp32 weights: 1 where a generation block is learned.

        Args:
            learned: of each answer.
        Raises:
            ValueError: the template does not mark each answer.
        """
        rendered = self._render(messages)
        blocks = rendered.rendering.spans
        if len(blocks) != len(learned):
            raise self._unmarked(len(learned), len(blocks))
        ids, spans = self._encoder.encode(rendered.rendering.text, rendered.broken)
        starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        weights = np.zeros(len(ids), dtype=np.float32)
        for (start, end), is_learned in zip(blocks, learned):
            weights[(starts < end) & (ends > start)] = float(is_learned)
        weights[:1] = 0
        return np.asarray(ids, dtype=np.int32), weights

    def exchange(self, prompt: Sequence[Message], answer: str) -> Exchange:
        """Ids of a prompt with its answer as a model writes it behind the prompt, and where its characters are."""
        rendered = self._render([*prompt, Message("assistant", answer)])
        *asked, said = rendered.messages
        before = self._rendering(asked, opens_answer=True).text
        shift = len(before) + len(self._gap)
        ids, spans = self._encoder.encode(before + self._gap + said["content"] + self._end, rendered.broken)
        start = next((index for index, (_, end) in enumerate(spans) if end > len(before)), len(ids))
        inside = [(low - shift, high - shift) for low, high in spans[start:]]
        if ids[-1] not in self.tokenizer.eos_ids:
            ids, inside = [*ids, self.tokenizer.eos_id], [*inside, (len(answer), len(answer))]
        return Exchange(ids, start, inside)

    def check_marks(self) -> None:
        """Raise ValueError unless the template marks what an answer is, with the end of its turn."""
        ids, weights = self.conversation([Message("user", QUESTION), Message("assistant", ANSWER)], [True])
        if not set(ids[weights > 0].tolist()) & set(self.tokenizer.eos_ids):
            raise self._fault("expected the end of the turn inside {% generation %}, got it outside")

    def _render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> _Rendered:
        guards = {"assistant": self._everyone}
        texts, broken = broken_texts([(m.content, guards.get(m.role, self._asked)) for m in messages])
        turns = [{"role": message.role, "content": text} for message, text in zip(messages, texts)]
        return _Rendered(turns, self._rendering(turns, opens_answer=opens_answer), broken)

    def _rendering(self, turns: list[dict[str, str]], *, opens_answer: bool) -> Rendering:
        options: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": opens_answer}
        try:
            return render(self.format.template, {**self._variables, "messages": turns, **options})
        except TemplateFault as error:
            raise self._fault(f"expected a template that renders, got {error}") from None
        except ValueError as error:
            raise ValueError(f"messages: refused by the chat template of the model: {error}") from None

    def _try(self) -> None:
        """Render three messages: whether the template can be used, its marks, and what ends a turn."""
        question, answer = Message("user", QUESTION), Message("assistant", ANSWER)
        asked = self._render([question], opens_answer=True).rendering.text
        unopened = self._render([question]).rendering.text
        try:
            talk = self._render([question, answer, Message("user", NEXT)]).rendering.text
        except ValueError:
            # It may take one exchange alone.
            talk = self._render([question, answer]).rendering.text
        header, behind = self._around(self._around(talk, QUESTION)[1], ANSWER)
        opening = self._around(asked, QUESTION)[1]
        self._check_opening(opening, header, has_effect=asked != unopened)
        self._find_marks(asked + talk, unopened)
        end = next((mark for mark in sorted(self.written, key=len)[::-1] if behind.lstrip().startswith(mark)), None)
        self._gap = header.removeprefix(opening) if header.startswith(opening) else ""
        if end is not None:
            self._end = behind[: behind.index(end) + len(end)]
            self.turn_end = self.written[end]
            self.tokenizer.end_answers_with([self.turn_end])

    def _around(self, text: str, word: str) -> tuple[str, str]:
        """What stands before and behind the last occurrence of a word, in whatever case the template has put it."""
        place = text.lower().rfind(word)
        if place < 0:
            raise self._fault("expected the texts of all messages in what it renders, got others")
        return text[:place], text[place + len(word) :]

    def _check_opening(self, opening: str, header: str, *, has_effect: bool) -> None:
        """The template must say where an answer begins: with the flag for it, or always.

        Args:
            opening: behind the question with the flag.   header: between question and answer.
        """
        rest = header[len(opening.rstrip()) :] if header.startswith(opening.rstrip()) else header
        if not has_effect and (not opening.strip() or rest.strip()):
            raise self._fault(
                f"expected the opening of an answer for add_generation_prompt, got {opening!r} behind the question"
            )

    def _find_marks(self, rendered: str, turn: str) -> None:
        """Set which marks the template writes, and which of them are read in no message.

        Special tokens and those of a user's turn are read in none. Others that the template writes, such as those
        around reasoning, may be the model's own words in an answer.
        """
        marks, ends = self._encoder.marks, self.tokenizer.eos_ids
        self.written = {text: mark.id for text, mark in marks.items() if text in rendered}
        ignores_case = any(word in self.format.template for word in CHANGES_CASE)
        everyone = {t for t, mark in marks.items() if mark.is_special or mark.id in ends or (t in turn and t.strip())}
        asked = everyone | {text for text in marks if text in self.format.template and text.strip()}
        self._everyone = Guard(everyone, ignores_case=ignores_case)
        self._asked = Guard(asked, ignores_case=ignores_case)

    def _unmarked(self, expected: int, got: int) -> ValueError:
        return ValueError(
            f"{self.format.source}: chat template: expected {{% generation %}} around each of {expected} answers, got "
            f"{got} such blocks; training needs them: mark the answers in a copy, and name it with --chat-format "
            "FILE.jinja, or train in vicuna or chatml"
        )

    def _fault(self, text: str) -> ValueError:
        return ValueError(f"{self.format.source}: chat template: {text}; {ADVICE}")
