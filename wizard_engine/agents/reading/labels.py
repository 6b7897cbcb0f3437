"""Readers of step labels and of instructions' scores; what they share is in `entries`."""

import re

from .asides import without_overall
from .cleaning import Ambiguous, agreed, content_lines, plain, without_emphasis
from .entries import read_entries
from .numbers import FINAL, NOT_BEFORE, NOT_BEHIND, SCALE, SCORE, SCORE_WORD, read_score, with_digits

_LABEL = r"[-+]?1|[-+]?0"
_LABEL_WORD = (
    r"(?:labels?|scores?|verdict|ratings?|judge?ment|value|answer|marks?|grade|assessment|etiqueta|etikett"
    r"|étiquette|etichetta"
    r"|rótulo|bewertung|urteil|标签|標籤|标注|评分|判断|ラベル|判定|레이블|라벨|метка|оценка)"
)
_LABEL_NAMES = rf"(?:final |step )?{_LABEL_WORD}|1/0/-1"
_BEHIND = r"(?![\w%/^*×÷+=]|[.,]\d|\s*[*+/×÷=^]|\s-\s?\d|\s*[–—-]>?\s*\d)"
_JUDGEMENT = r"(?:correct|right|incorrect|wrong|neutral|ok|okay|true|false|good|bad|invalid|valid|irrelevant|helpful)\b"
_START = re.compile(
    rf"(?:(?P<signed>-1)(?=\s[-–—]\s)|(?P<label>{_LABEL}){_BEHIND})(?=\s[-–—]\s(?=.*[^\W\d]{{2}})|\s*$"
    rf"|[.,;:)\]](?=\s|$)(?!\s*[\d+*/=-])|\s+[-–—]\s+(?!\d)|\s*[(\n\[]|\s*(?:->|→|—)"
    rf"|\s+(?:because|since|as|for)\b|\s+{_JUDGEMENT})",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"(?:{_LABEL_WORD})\s*(?:(?<=label)\s(?=[-+\d])|(?:[:=→]|->|is|es|ist|est|为|は|是)\s*)+[\[(\"']*(?P<label>{_LABEL}){_BEHIND}",
    re.IGNORECASE,
)
_MARKED = re.compile(r"\[\[\s*(?:label\s*[:=]\s*)?([^\[\]\n]{1,20}?)\s*\]\]", re.IGNORECASE)
_END = re.compile(
    rf"(?:(?:->|→|=>|⇒)\s*|[.!?;:。！？]\s+|[:：]|—\s*|\s[-–]\s+(?=[-+0])|\s\(|\s\[|\|\s*)(?P<label>{_LABEL})[\])]?[."
    rf"|]?\s*$"
)
_EMPHASISED = re.compile(
    rf"(?:\*\*|`|__)(?:label\s*:\s*)?({_LABEL})(?:\*\*|`|__)\.?(?=\s*$|\s*[-–—:(])", re.MULTILINE | re.IGNORECASE
)

# From one label to another: `-1 -> 1`.
_CHANGED = re.compile(
    rf"(?<![\w.,+*/=^-])(?<![+*/=^] )(?:{_LABEL})[\])]*\s*(?:->|→|=>|⇒|,?\s*(?:now )?(?:corrected|changed|revised) to)"
    rf"\s*[\[(]*(?:{_LABEL})(?![\w.])",
    re.IGNORECASE,
)


def read_labels(text: str, count: int) -> tuple[int, ...] | None:
    """`count` labels (1, 0, -1), one a step in order; None for other numbers of them, or where one is unclear.

    The forms are those of `entries`. A section says its label as

        [[label]] | ("Label" | "Score" | ...) (":" | "is") label | label alone, or alone on a line
        | label (":" | "." | " - " | "(" | "because") reason | reason (". " | ": " | "->" | " (") label
        | **label** at an end

    A digit that goes on as a sum or a number of things ("1 + 2", "1 apple") is no label. Labels at both ends of a
    section must agree.
    """
    if not count:
        return () if not text.strip() else None
    text = without_overall(plain(text), count)
    dashed = re.findall(r"(?m)^\W*(?:\w+ )?\d+ - ([-+]?[01])\b", without_emphasis(text))
    if "1" in dashed and not {"-1", "+1"} & set(dashed):
        return None  # "3 - 1": one, or minus one
    try:
        labels = read_entries(text, count, _label, _label_inside, any_order=False, names=_LABEL_NAMES)
        return _unnumbered(text, count) if labels is None else labels
    except Ambiguous:
        return None


def _label(text: str) -> int | None:
    """The label that a whole text is; Ambiguous for another number."""
    bare = without_emphasis(text).strip(" \t\"'|").removesuffix(".").strip()
    bare = re.sub(rf"^\[\[\s*|\s*\]\]$|^[(\[]\s*|\s*[)\]]$|^{_LABEL_WORD}\s*[:=]\s*", "", bare, flags=re.IGNORECASE)
    if re.fullmatch(r"[-+]?[01](?:[.,]0+)?", bare):
        return int(float(bare.replace(",", ".")))
    if re.fullmatch(r"[-+]?\d+(?:[.,]\d+)?", bare):
        raise Ambiguous
    return None


def _label_inside(content: str) -> int | None:
    """The label of one step's section."""
    if _CHANGED.search(without_emphasis(content)):
        raise Ambiguous
    marks = [_label(mark) for mark in _MARKED.findall(content)]
    if marks:
        return agreed(label for label in marks if label is not None)
    plain_content = without_emphasis(content)
    named = [int(match["label"]) for match in _NAMED.finditer(plain_content)]
    whole = _label(plain_content)
    if named or whole is not None:
        return agreed([*named, *([] if whole is None else [whole])])
    start = _START.match(plain_content.lstrip(" ([\"'-" if plain_content[:2] == "- " else " ([\"'"))
    lines = content_lines(plain_content)
    matched = [int(start["label"] or start["signed"])] if start else []
    matched += [
        label for line in lines[1:] if re.fullmatch(rf"[(\[]?(?:{_LABEL})[)\]]?\.?", line) for label in [_label(line)]
    ]
    matched += [int(label) for label in _EMPHASISED.findall(content)]
    for line in {lines[0], lines[-1]} if lines else ():
        end = _END.search(line)
        matched += [int(end["label"])] if end else []
    return agreed(matched)


def _unnumbered(text: str, count: int) -> tuple[int, ...] | None:
    """Labels of lines that begin with one and go on with its reason, where there are `count` such lines alone."""
    lines = [without_emphasis(line) for line in content_lines(text)]
    starts = [re.match(rf"({_LABEL})(?:\s*[:—–(,]|\s+-\s)\s*(?!\d)\S", line) for line in lines]
    if lines and not all(starts):
        starts = [re.match(rf"({_LABEL})\s+(?=[^\W\d])", line) for line in lines]
        starts = starts if all(starts) and "-1" in [match[1] for match in starts] else [None]
    if count < 2 or not all(starts) or len(starts) != count:
        return None
    labels = tuple(int(match[1]) for match in starts)
    return None if labels == tuple(range(1, count + 1)) else labels


# ---- scores of instructions -----------------------------------------------------------------------------------------

_SCORE_NAMES = (
    rf"(?:final |overall |total |quality |average )?(?:{SCORE_WORD}|quality|overall|total|average)"
    r"(?: \(0-10\)| ?/ ?10)?"
)
_SCORE_START = re.compile(
    rf"[(\[]*(?P<score>{SCORE})[)\]]*(?=\s*$|[.,;:)\]](?=\s|$)(?!\s*\d)|\s*[-–—(\n]|\s*(?:->|→)|\s+(?:because|since"
    rf"|and|as|for)\b)",
    re.IGNORECASE,
)
_SCORE_NAMED = re.compile(
    rf"(?P<name>(?:final|overall|total|average|quality)?\s*(?:{SCORE_WORD}|\bquality|\boverall|\btotal|\baverage))"
    rf"\s*(?:\(?(?:0-10|/\s*10|out of 10)\)?)?(?:\s*(?:(?:[:=→|-]|->|is|of|es|ist|est|为|は|是)\s*)+|\s+)"
    rf"[\[(]*(?P<score>{SCORE})",
    re.IGNORECASE,
)
_SCALED = re.compile(rf"{NOT_BEFORE}\d{{1,2}}(?:[.,]\d{{1,2}})?{SCALE}{NOT_BEHIND}", re.IGNORECASE)
_SCORE_END = re.compile(
    rf"(?:(?:->|→|=>|⇒)\s*|:\s*|\s[-–—]\s+|\s\(|\s\[)(?P<score>{SCORE})[\])]?[.|]?\s*$", re.IGNORECASE
)
_ARROW_END = re.compile(rf"(?:->|→|=>|⇒)\s*(?P<score>{SCORE})[\])]?[.|]?\s*$", re.IGNORECASE)
_CRITERIA = re.compile(r"\b(?:definition|precision|integrity|difficulty|clarity)\b", re.IGNORECASE)


def read_ranking(text: str, count: int) -> tuple[float, ...] | None:
    """Quality scores 0 to 10 of instructions 1 to `count`; None where one is missing, unclear or out of range.

    The forms are those of `entries`; sections may stand in any order. A section says its score as

        [[score]] | ["Overall"] "Score" (":" | "is") score | score alone | score (":" | "." | " - " | "(") reason
        | score "/10" | reason (": " | " - " | "->" | " (") score at the end of its first or last line

    A list from best to worst is read by the names in its lines (`1. Version 3: 9`), never by its places.
    Scores of single criteria are none: a section with several has an overall one, or none. Lines of numbers alone that
    are an order of 1 to `count` could be a ranking by place, and are not read.
    """
    text = without_overall(plain(text), count)
    try:
        scores = read_entries(text, count, _score, _score_inside, any_order=True, names=_SCORE_NAMES)
    except Ambiguous:
        return None
    is_order = scores is not None and count > 1 and sorted(scores) == [float(n) for n in range(1, count + 1)]
    return None if is_order and _is_bare(text, count) else scores


def _is_bare(text: str, count: int) -> bool:
    """Whether the reply is nothing but numbers: `count` lines or pieces of a line, without numbering."""
    return len(re.findall(r"\d+(?:[.,]\d+)?", text)) == count


def _score(text: str) -> float | None:
    bare = with_digits(without_emphasis(text)).strip(" \t\"'|")
    bare = re.sub(rf"^\[\[\s*|\s*\]\]$|^[(\[]\s*|\s*[)\]]$|^{SCORE_WORD}\s*[:=]\s*", "", bare, flags=re.IGNORECASE)
    score = read_score(bare, low=0)
    if score is None and re.fullmatch(r"[-+]?\d+(?:[.,]\d+)?(?:\s*/\s*\d+|\s*%)?", bare):
        raise Ambiguous
    return score


def _score_inside(content: str) -> float | None:
    marks = [_score(mark) for mark in re.findall(r"\[\[\s*([^\[\]\n]{1,20}?)\s*\]\]", content)]
    if marks:
        return agreed(marks)
    content = without_emphasis(content)
    whole = _score(content)
    if whole is not None:
        return whole
    named = [(bool(FINAL.search(match["name"])), _score(match["score"])) for match in _SCORE_NAMED.finditer(content)]
    for chosen in ([score for is_final, score in named if is_final], [score for _, score in named]):
        if chosen:
            return agreed(chosen)
    lines = content_lines(content)
    has_criteria = any(re.search(rf"{_CRITERIA.pattern}\W+(?:is\W+)?\d", line, re.IGNORECASE) for line in lines)
    matched = (
        []
        if has_criteria
        else [_score(match["score"]) for match in _SCORE_START.finditer(content) if not match.start()]
    )
    if not matched and not has_criteria:
        matched = [_score(match[0]) for match in _SCALED.finditer(content)]
    pattern = _ARROW_END if has_criteria else _SCORE_END
    ends = [match for line in dict.fromkeys([*lines[:1], *lines[-1:]]) if (match := pattern.search(line))]
    return agreed([*matched, *(_score(match["score"]) for match in ends)])
