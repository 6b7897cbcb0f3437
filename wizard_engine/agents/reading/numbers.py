"""Scores in replies: their form, and what is written around them.

    score    = digits [("." | ",") digits] [scale]      within the range of the task
    scale    = "/10" | "out of 10" | "points" | the same in another language

A range ("7-8"), another scale ("85/100", "80 %") and a number below or above the range are no scores.
"""

import re
from fractions import Fraction

DIGITS = r"\d{1,3}(?:[.,]\d{1,3})?"
SCALE = (
    r"(?:\s*/\s*10(?:[.,]0+)?(?![\d/])(?!\.\d)|\s*(?:out of|von|sur|sobre|de|su|из|over|van)\s*(?:10|ten)(?!\d)"
    r"|\s*(?:points?|pts?\.?|punkte?n?|puntos?|pontos?|punti|分|点|점|балл(?:ов|а)?)(?![^\W\d_]))"
)
_SCORE = re.compile(rf"\+?({DIGITS})(?P<scale>{SCALE})*", re.IGNORECASE)
# What must not follow or precede a score: another digit, a range, another scale, a unit.
NOT_BEHIND = (
    r"(?![\d%°])(?![.,]\d)(?!\s*(?:[-–—~/:]|to\b|bis\b|a\b(?=\s*\d))\s*\d)(?!\s*(?:/|out of|per ?cent|×|\*\s*\d))"
)
NOT_BEFORE = r"(?<![A-Za-z0-9_.,/])(?<!\d[-–~/:])(?<!\d\s[-–~/:])(?<!\d\s[-–~/:]\s)(?<!-)(?<![$€£#])"
SCORE = rf"{NOT_BEFORE}(?:\+?{DIGITS}){SCALE}*{NOT_BEHIND}"
FINAL = re.compile(
    r"\b(?:final|overall|total|totals|verdict|conclusion|average|mean|in sum|summary|sum|therefore|thus|altogether"
    r"|gesamt\w*"
    r"|insgesamt|endg\w+|globale?|general|totale?|moyenne|итог\w*|общ\w+|finale?s?)\b|总分|总体|综合|最终|总评|総合|最終|합계|총점|최종|종합",
    re.IGNORECASE,
)
SCORE_WORD = (
    r"(?:scores?|ratings?|rated?|grades?|marks?|points|bewertung|punktzahl|punkte|note|puntuación|puntaje|calificación"
    r"|nota|pontuação|avaliação|valutazione|punteggio|voto|évaluation|评分|得分|分数|打分|評価|評点|スコア|点数|점수|평점|평가"
    r"|оценка|балл|баллы|rating)"
)


_WRITTEN = dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], range(2, 11)))
_WRITTEN_NUMBER = re.compile(rf"\b(?:{'|'.join(_WRITTEN)})\b(?!-)", re.IGNORECASE)
# A best score that is not ten.
OTHER_SCALE = re.compile(r"满分\s*(?:为|是)?\s*(?!10(?!\d))\d+|(?<!\d)(?!10(?!\d))\d+\s*(?:点満点|점 만점)")


def with_digits(text: str) -> str:
    """The text with the numbers from two to ten in digits."""
    return _WRITTEN_NUMBER.sub(lambda match: str(_WRITTEN[match[0].lower()]), text)


def read_score(text: str, low: int = 1, high: int = 10) -> float | None:
    """The score that a whole text is, or None."""
    match = _SCORE.fullmatch(text.strip(" \t*_`'\"").removesuffix(".").strip())
    value = None if match is None else Fraction(match[1].replace(",", "."))
    return float(value) if value is not None and low <= value <= high else None
