"""Attributes of training rows by documented heuristics: what each row is about, for counting and for weighted sampling.

| attribute | value |
|---|---|
| topic | a name of lexicons.TOPICS, or the top words of a tf-idf cluster (topics.py), or "other" |
| language | ISO 639-1 code, "und" where there is no word to judge by |
| skill | the task type: translation, code, math-additive, writing, extraction, ... |
| source | the row's own, else the file it came from |
| difficulty | easy, medium or hard, from `difficulty_score` |
| perplexity | number, from a callable |
| length | words, and characters for CJK, over all turns but the system's |
| turns | user turns |
| toxic | whether a word of a small list occurs |
| cluster | id of the near-duplicate cluster of the user turns |

analysis.py keeps values that a row already has. Lexicons cover English, Spanish and Chinese. In other languages the
topic is that of a cluster and the skill is "other".
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from wizard_engine.data.rows import Conversation, Message, Preference, Row

from . import lexicons

ATTRIBUTES = (
    "topic",
    "language",
    "skill",
    "source",
    "difficulty",
    "perplexity",
    "length",
    "turns",
    "toxic",
    "cluster",
)
EASY_BELOW, HARD_FROM = 2.5, 3.5
LANGUAGES = re.compile(
    r"en|es|fr|de|it|pt|nl|sv|da|no|fi|pl|cs|sk|hu|ro|el|bg|ru|uk|sr|hr|tr|ar|fa|he|hi|bn|ta|th|vi|id"
)
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("ko", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_UNIT = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_EQUATION = re.compile(r"[\d)]\s*=\s*-?[$€]?\d")
_SENTENCE = re.compile(r"[.!?。！？]+(?:\s|$|(?<=[。！？]))")
_OPERATOR = re.compile(r"(?<=[\d)%])\s*([-+*/×÷x])\s*[$€]?(?=[\d(])")


def alternatives(text: str) -> re.Pattern[str]:
    """Compiled pattern of a lexicon entry: one alternative a line, any case."""
    return re.compile("|".join(line.strip() for line in text.strip().splitlines()), re.IGNORECASE)


_SKILLS = {name: alternatives(text) for name, text in lexicons.SKILLS.items() if text}
_MATH = {name: alternatives(text) for name, text in lexicons.MATH_CUES.items()}
_CONSTRAINTS, _NUMBERS = alternatives(lexicons.CONSTRAINTS), alternatives(lexicons.NUMBERS)
_CLAUSES, _TOXIC = alternatives(lexicons.CLAUSES), alternatives(lexicons.TOXIC)
_STOP_WORDS = {code: frozenset(words.split()) for code, words in lexicons.STOP_WORDS.items()}
_QUANTITY, _SUM = alternatives(lexicons.QUANTITY), alternatives(lexicons.CALCULATION)


class View(NamedTuple):
    """The texts of a row of any kind that the heuristics read."""

    messages: tuple[Message, ...]
    first: str  # first user turn
    user: str  # all user turns, a line each
    answer: str  # all assistant turns, a line each
    turns: int


def view(row: Row) -> View:
    """The texts of a row; a preference counts with its chosen answer, a ranking row with its chosen instruction."""
    messages = row.messages if isinstance(row, Conversation) else tuple(row.prompt)
    if isinstance(row, Preference) and not messages:
        messages = (Message("user", row.chosen),)
    elif not isinstance(row, Conversation):
        messages = (*messages, Message("assistant", row.answer))
    user = [message.content for message in messages if message.role == "user"]
    answer = [message.content for message in messages if message.role == "assistant"]
    return View(messages, user[0] if user else "", "\n".join(user), "\n".join(answer), len(user))


# ---- language -------------------------------------------------------------------------------------------------------


@cache
def _identify():
    """py3langid's ranking function, or None where the package is absent."""
    try:
        from py3langid import rank
    except ImportError:
        return None
    return rank


def language_method() -> str:
    """A sentence on how languages are recognised in this installation."""
    if _identify() is None:
        return (
            "language: py3langid is not installed, so Latin-script rows are told apart by counts of stop words "
            f"({', '.join(_STOP_WORDS)}) only; pip install py3langid for more languages"
        )
    return "language: py3langid, with CJK recognised by script and short rows confirmed by stop words"


def language(text: str, answer: str = "") -> str:
    """ISO 639-1 code of the language of `text`; `answer` helps where the text is short. "und" when undecidable.

    CJK is recognised by script: kana means Japanese, Hangul Korean, Han alone Chinese, wherever such characters are at
    least an eighth of the letters. A text of two or more stop words of one language, and twice as many as of any other,
    is of that language when it is shorter than 100 letters; else py3langid decides among 32 languages (LANGUAGES).
    """
    text = text[:300]
    letters = sum(character.isalpha() for character in text)
    if letters < 3:
        return language(answer, "") if answer else "und"
    counts = {code: len(pattern.findall(text)) for code, pattern in _SCRIPTS} if not text.isascii() else {}
    if 8 * sum(counts.values()) >= letters:
        return "ja" if 5 * counts["ja"] >= sum(counts.values()) else max(counts, key=counts.__getitem__)
    by_words = _stop_word_language(text)
    identify = _identify()
    if by_words is not None and (letters < 100 or identify is None):
        return by_words
    if identify is None:
        return _stop_word_language(f"{text}\n{answer[:300]}", least=1, factor=1.01) or "und"
    if letters < 60:
        text = f"{text}\n{answer[:300]}"
        by_words = _stop_word_language(text)
        if by_words is not None:
            return by_words
    return next((code for code, _ in identify(text) if LANGUAGES.fullmatch(code)), "und")


def _stop_word_language(text: str, least: int = 2, factor: float = 2) -> str | None:
    """The language with at least `least` stop words in the text and `factor` times as many as any other, else None."""
    words = Counter(_WORD.findall(text.lower()))
    counts = sorted(
        ((sum(words[w] for w in stop & words.keys()), code) for code, stop in _STOP_WORDS.items()), reverse=True
    )
    (best, code), (second, _) = counts[0], counts[1]
    return code if best >= least and best >= factor * second else None


# ---- topic ----------------------------------------------------------------------------------------------------------


def _keyword_tables() -> tuple[dict[str, tuple[str, ...]], re.Pattern[str], dict[str, tuple[str, ...]]]:
    latin: dict[str, list[str]] = {}
    cjk: dict[str, list[str]] = {}
    for topic, text in lexicons.TOPICS.items():
        for word in text.split():
            (cjk if _CJK.search(word) else latin).setdefault(word, []).append(topic)
    longest_first = sorted(cjk, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return {w: tuple(t) for w, t in latin.items()}, pattern, {w: tuple(t) for w, t in cjk.items()}


_LATIN_KEYWORDS, _CJK_PATTERN, _CJK_KEYWORDS = _keyword_tables()


@cache
def _topics_of_word(word: str) -> tuple[str, ...]:
    """Topics of a lower-case word, tried as it is and without a plural ending."""
    for stem in (
        word,
        word.removesuffix("s"),
        word.removesuffix("es"),
        word[:-3] + "y" if word.endswith("ies") else "",
    ):
        if stem in _LATIN_KEYWORDS:
            return _LATIN_KEYWORDS[stem]
    return ()


def topic_scores(text: str) -> Counter[str]:
    """Keyword hits per topic; a keyword counts at most three times."""
    scores: Counter[str] = Counter()
    words = Counter(word for word in _WORD.findall(text.lower()) if _topics_of_word(word))
    for word, count in words.items():
        for topic in _topics_of_word(word):
            scores[topic] += min(count, 3)
    if not text.isascii():
        for word, count in Counter(_CJK_PATTERN.findall(text)).items():
            for topic in _CJK_KEYWORDS[word]:
                scores[topic] += min(count, 3)
    return scores


def lexicon_topic(user: str, answer: str = "") -> str | None:
    """Topic with the most keyword hits, those in the user turns counted twice; None where there is no hit there.

    The first 1,500 characters of the user turns and 500 of the answer are read; equal scores go to the topic that
    stands first in the lexicon.
    """
    scores = topic_scores(user[:1500])
    if not scores:
        return None
    for topic, hits in topic_scores(answer[:500]).items():
        if topic in scores:
            scores[topic] += hits / 2
    return max(lexicons.TOPICS, key=lambda topic: scores.get(topic, 0))


# ---- skill ----------------------------------------------------------------------------------------------------------


def is_math(question: str) -> bool:
    """Whether a question holds a number and names a calculation, or holds two and asks for a quantity or joins them."""
    numbers = len(_NUMBERS.findall(question))
    if numbers >= 2 and (_QUANTITY.search(question) or _OPERATOR.search(question)):
        return True
    return numbers >= 1 and _SUM.search(question) is not None


def math_kind(question: str) -> str | None:
    """additive, multiplicative, comparison, division or mixed for a question about quantities, else None.

    The kind is the one family of cue words that the question uses beside additive ones; two are "mixed".
    """
    if not is_math(question):
        return None
    kinds = [name for name, pattern in _MATH.items() if name != "additive" and pattern.search(question)]
    if len(kinds) > 1:
        return "mixed"
    return kinds[0] if kinds else "additive"


def is_tool_call(text: str) -> bool:
    """Whether an assistant turn is a function call written as JSON."""
    return text.lstrip().startswith("{") and '"name"' in text and '"arguments"' in text


def skill(messages: Sequence[Message], question: str) -> str:
    """Task type of a row from its first user turn; "tool-use" where an assistant turn calls a function."""
    if any(message.role == "assistant" and is_tool_call(message.content) for message in messages):
        return "tool-use"
    question = question[:1500]
    for name in lexicons.SKILLS:
        if name == "math":
            kind = math_kind(question)
            if kind is not None:
                return f"math-{kind}"
        elif _SKILLS[name].search(question):
            return name
    return "other"


# ---- difficulty, length, toxic --------------------------------------------------------------------------------------


def answer_steps(answer: str) -> int:
    """Steps of an answer: its equations where it has any, else its lines, else its sentences."""
    equations = len(_EQUATION.findall(answer))
    if equations:
        return equations
    lines = sum(bool(line.strip()) for line in answer.splitlines())
    return lines if lines > 1 else max(1, len(_SENTENCE.findall(answer)))


def difficulty_score(messages: Sequence[Message]) -> float:
    """Score of the hardest turn (`turn_score`) + log2(turns)/4, from 0 up."""
    turns = [place for place, message in enumerate(messages) if message.role == "user"]
    answers = [m.content if m.role == "assistant" else "" for m in (*messages[1:], Message("user", ""))]
    hardest = max((turn_score(messages[place].content, answers[place]) for place in turns), default=0.0)
    return hardest + math.log2(max(1, len(turns))) / 4


def turn_score(user: str, answer: str) -> float:
    """log2(1 + numbers)/2 + log2(1 + clauses)/2 + constraints/2 + log2(1 + steps)/2 of one turn and its answer.

    numbers: different numbers in the user's text; clauses: punctuation marks and conjunctions there; constraints:
    phrases such as "at least" or "without" (four at most count); steps: `answer_steps`, 16 at most.
    """
    user = user[:4000]
    numbers = len(set(_NUMBERS.findall(user)))
    clauses = len(_CLAUSES.findall(user))
    constraints = min(4, len(_CONSTRAINTS.findall(user)))
    steps = min(16, answer_steps(answer)) if answer else 0
    logs = math.log2(1 + numbers) + math.log2(1 + clauses) + math.log2(1 + steps)
    return logs / 2 + constraints / 2


def difficulty(score: float) -> str:
    """easy below 2.5, hard from 3.5, medium between."""
    return "easy" if score < EASY_BELOW else "hard" if score >= HARD_FROM else "medium"


def length(text: str) -> int:
    """Words of a text; in CJK scripts every character is a word."""
    return len(_UNIT.findall(text))


def is_toxic(text: str) -> bool:
    """Whether a word or phrase of the small list lexicons.TOXIC occurs; it does not see toxicity without such words."""
    return _TOXIC.search(text) is not None
