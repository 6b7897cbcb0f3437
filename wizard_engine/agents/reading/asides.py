"""What stands around scores and makes them others than they seem: a condition, another order, an overall line."""

import re

from .cleaning import Ambiguous, content_lines, without_emphasis

_SENTENCE_END = re.compile(r"[.!?;。！？](?=\s)|[。！？]|\n(?!\s*\[)")
# A score behind it is one that was not given.
_CONDITION = (
    r"(?:if|unless|assuming|suppos(?:e|ing)|provided|imagine|ignoring|disregarding|without (?:the|a|any) reference"
    r"|before (?:seeing|reading|checking|looking)|(?:had|were) (?:it|they|there|the|this|that|[AB])\b|hypothetically"
    r"|si|falls|wenn|如果|假如|если)"
)
# At the beginning of its sentence alone: "A does not check if n is 0, so [[6]] [[8]]" states its scores.
_HYPOTHETICAL = re.compile(
    rf"\W*(?:(?:but|and|so|now|then|however|only|even)\b\W*)?(?:{_CONDITION})(?![\w'’])", re.IGNORECASE
)
_CONDITION_BEHIND = re.compile(
    r"[\s,]*(?:would (?:be|have been)|(?:if|unless|were|had|without|ignoring|before)\b)", re.IGNORECASE
)
_SENTENCE_WITH_CONDITION = re.compile(rf"(?:^|(?<=[.!?;]\s))\W*{_CONDITION}\b.*?(?:[.!?](?=\s|$)|$)", re.IGNORECASE)
_JOIN = r"\s*(?:[,;/&>]|\b(?:and|then|y|und|et|и|e|vs\.?|before)\b)\s*"
_B_BEFORE_A = re.compile(
    rf"(?<![A-Za-z0-9])B\)?{_JOIN}(?:\(?(?:answer|assistant|response|respuesta|antwort|réponse|回答|答案)\s*)?A"
    r"(?![A-Za-z0-9'’])(?!\s+(?!respectively\b)\w)",
    re.IGNORECASE,
)
_OVERALL_LINE = re.compile(
    r"\W*(?:overall|in total|totals?|average|mean|altogether|gesamt|insgesamt|en general|in sum|summary|总体|总分)"
    r"(?:\s+(?:label|score|verdict|rating|assessment|quality))?\W*?\s*(?:[:=：]|\s[-–—]\s|\bis\b)(?P<rest>.*)",
    re.IGNORECASE,
)


def is_hypothetical(text: str, start: int, end: int) -> bool:
    """Whether the sentence of a score says that it would be so under a condition."""
    before = list(_SENTENCE_END.finditer(text, 0, start))
    begin = before[-1].end() if before else 0
    return bool(_HYPOTHETICAL.match(text[begin:start]) or _CONDITION_BEHIND.match(text, end))


def without_hypotheses(line: str) -> str:
    """The line without the sentences that begin with a condition."""
    return _SENTENCE_WITH_CONDITION.sub("", line)


def check_order(text: str, start: int, end: int) -> None:
    """Ambiguous where what stands beside two scores without names lists B before A."""
    line = without_emphasis(text[text.rfind("\n", 0, start) + 1 : start])
    if not line.strip():
        # A line that ends with a colon announces them.
        former = without_emphasis(text[:start]).rstrip()
        line = former.rpartition("\n")[2] if former.endswith(":") else ""
    sentence = _SENTENCE_END.split(line)[-1]
    behind = without_emphasis(_SENTENCE_END.split(text[end:].partition("\n")[0])[0])
    if _B_BEFORE_A.search(sentence) or _B_BEFORE_A.search(behind):
        raise Ambiguous


def without_overall(text: str, count: int) -> str:
    """The text without a last line about all of its `count` things together."""
    lines = content_lines(text)
    match = _OVERALL_LINE.fullmatch(lines[-1]) if count > 1 and len(lines) > count else None
    numbers = re.findall(r"(?<!/)-?\d+(?:[.,]\d+)?", match["rest"]) if match else []
    return text.rstrip()[: -len(lines[-1])] if len(numbers) == 1 and text.rstrip().endswith(lines[-1]) else text
