"""Steps of an answer: one rule for labels, reward models and rewards."""

import re

# A sentence ends at . ! ? (and their wide forms) followed by a blank, or at a wide form alone, where no blank is usual.
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|[。！？]+[”』」）]*")


def split_steps(text: str) -> list[tuple[int, int]]:
    """Character spans `(start, end)` of the steps of an answer, in order, without their surrounding blanks.

    One step a line; where the text is a single line, one step a sentence. Blank lines are no steps. A closing line
    `The answer is N.` is a step. `text[start:end]` is the text of a step.
    """
    lines = _spans(text, [i for i, character in enumerate(text) if character == "\n"])
    if len(lines) != 1:
        return lines
    return _spans(text, [match.end() for match in _SENTENCE_END.finditer(text)])


def step_texts(text: str) -> list[str]:
    """The steps of an answer as strings, in order."""
    return [text[start:end] for start, end in split_steps(text)]


def _spans(text: str, cuts: list[int]) -> list[tuple[int, int]]:
    """Stripped, non-blank spans between the cuts."""
    spans = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        piece = text[start:end]
        if piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            spans.append((first, first + len(piece.strip())))
    return spans
