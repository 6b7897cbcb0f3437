"""Texts with marks: special tokens that a template writes are ids, those that stand in a message are text.

A rendered conversation is encoded as transformers does it, as one text whose special tokens are recognised. Before a
template is rendered, the texts of its marks in the messages are broken: the last character of each becomes a
placeholder, a private character that no template knows. Behind the template the placeholders stand where it has put
them, whatever it has trimmed or moved, and the text around each is encoded in pieces that hold no mark.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from .tokenizer_files import library_failures

PLACEHOLDERS = (0x100000, 0x10FFFD)
# A piece inside a text is encoded behind it, so that a tokenizer adds no space in front of the piece.
ANCHOR = "\n"

Encoded = tuple[list[int], list[tuple[int, int]]]
"""Ids of a text, and the span (start, end) of each, in characters."""


class Mark(NamedTuple):
    """An added token: its id, and whether it is a special one."""

    id: int
    is_special: bool


class MarkedEncoder:
    """Encodes texts with marks.

    Args:
        tokenizer_json: of the tokenizer.
    Attributes:
        marks: text -> Mark of every added token.
    """

    def __init__(self, tokenizer_json: str) -> None:
        # Its own, because it is switched between reading marks and reading text.
        self._backend, self._lock = Backend.from_str(tokenizer_json), threading.Lock()
        self._backend.no_truncation()
        self._backend.no_padding()
        entries = self._backend.get_added_tokens_decoder().items()
        self.marks = {entry.content: Mark(index, entry.special) for index, entry in entries}
        self._ids = frozenset(mark.id for mark in self.marks.values())

    def encode(self, text: str, broken: dict[str, str]) -> Encoded:
        """Ids and spans of a text.

        Args:
            broken: placeholder -> the character in its place.
        """
        ids, spans = self._encode(text, reads_marks=True)
        if not any(placeholder in text for placeholder in broken):
            return ids, spans
        out_ids: list[int] = []
        out_spans: list[tuple[int, int]] = []
        for first, last in self._between_marks(ids):
            start = spans[first - 1][1] if first else 0
            end = spans[last][0] if last < len(ids) else len(text)
            mark = text[spans[first - 1][0] : start] if first else ""
            if not any(placeholder in text[start:end] for placeholder in broken):
                out_ids += ids[first:last]
                out_spans += spans[first:last]
            else:
                for at, piece in _pieces(text[start:end], broken):
                    piece_ids, piece_spans = self._behind(ANCHOR if at else mark, piece)
                    out_ids += piece_ids
                    out_spans += [(start + at + low, start + at + high) for low, high in piece_spans]
            # The mark behind it.
            out_ids += ids[last : last + 1]
            out_spans += spans[last : last + 1]
        return out_ids, out_spans

    def _between_marks(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first, last) of the ids before each mark, and behind the last one."""
        first = 0
        for index, token in enumerate(ids):
            if token in self._ids:
                yield first, index
                first = index + 1
        yield first, len(ids)

    def _behind(self, before: str, text: str) -> Encoded:
        """Ids and spans of a text that holds no mark, behind a mark or the anchor."""
        known, _ = self._encode(before, reads_marks=True)
        ids, spans = self._encode(before + text, reads_marks=True)
        if ids[: len(known)] != known:
            return self._encode(text, reads_marks=False)
        size = len(before)
        return ids[len(known) :], [(max(0, low - size), high - size) for low, high in spans[len(known) :]]

    def _encode(self, text: str, *, reads_marks: bool) -> Encoded:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"{text[error.start]!r} at character {error.start}"
            raise ValueError(f"text: expected valid Unicode, got the lone surrogate {surrogate}; clean it") from None
        with self._lock, library_failures("text: expected one that the tokenizer can encode"):
            self._backend.encode_special_tokens = not reads_marks
            encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _pieces(text: str, broken: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(place, text) of the pieces of a text that is divided before each placeholder."""
    cuts = [0, *(index for index, char in enumerate(text) if char in broken and index), len(text)]
    for low, high in pairwise(cuts):
        if low < high:
            yield low, "".join(broken.get(char, char) for char in text[low:high])


class Guard:
    """Finds the texts of marks in a message.

    Args:
        marks: their texts.   ignores_case: in any case, for a template that changes it.
    """

    def __init__(self, marks: Iterable[str], *, ignores_case: bool = False) -> None:
        marks = sorted(filter(None, marks), key=len, reverse=True)
        flags = re.IGNORECASE if ignores_case else 0
        self._any = re.compile("|".join(map(re.escape, marks)) or "(?!)", flags)
        self._each = [(re.compile(f"(?={re.escape(mark)})", flags), len(mark)) for mark in marks]
        self._rests: dict[str, list[str]] = {}
        for mark in marks:
            for cut in range(1, len(mark)):
                self._rests.setdefault(mark[:cut], []).append(mark[cut:])
        self._longest = len(marks[0]) if marks else 0

    def ends(self, text: str) -> set[int]:
        """Places of the last characters of all marks in a text, those that overlap too."""
        if not self._any.search(text):
            return set()
        return {found.start() + size - 1 for pattern, size in self._each for found in pattern.finditer(text)}

    def opens(self, text: str, others: Sequence[str]) -> bool:
        """Whether the end of a text and the beginning of another one would make a mark."""
        for size in range(1, min(self._longest, len(text) + 1)):
            rests = self._rests.get(text[-size:])
            if rests and any(other.lstrip().startswith(rest) for other in others for rest in rests):
                return True
        return False


def broken_texts(texts: Sequence[tuple[str, Guard]]) -> tuple[list[str], dict[str, str]]:
    """The texts with a placeholder for the last character of each mark, and placeholder -> character.

    Raises:
        ValueError: they hold all private characters there are.
    """
    contents = [text for text, _ in texts]
    ends = [guard.ends(text) for text, guard in texts]
    for index, (text, guard) in enumerate(texts):
        stripped = text.rstrip()
        if stripped and guard.opens(stripped, contents[:index] + contents[index + 1 :]):
            ends[index].add(len(stripped) - 1)
    if not any(ends):
        return contents, {}
    used = set().union(*contents)
    free = (char for char in map(chr, range(*PLACEHOLDERS)) if char not in used)
    placeholder: dict[str, str] = {}
    out = []
    for text, places in zip(contents, ends):
        chars = list(text)
        for place in places:
            if chars[place] not in placeholder:
                placeholder[chars[place]] = _next(free)
            chars[place] = placeholder[chars[place]]
        out.append("".join(chars))
    return out, {char: original for original, char in placeholder.items()}


def _next(free: Iterator[str]) -> str:
    char = next(free, None)
    if char is None:
        raise ValueError("messages: expected a private character that they do not use, got all; remove some")
    return char
