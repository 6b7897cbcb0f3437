"""The inverse of render.py: a problem read back from its text, or None for text that no template produces.

Every template, with each topic's verbs and pronouns filled in and names, nouns and numbers left open, is a key of one
table, so a sentence costs one look-up.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from . import vocabulary as words
from .problems import Problem, Quantity, Statement

_NAME, _NOUN, _NUMBER = "@", "~", "#"
_CHATTER = "chatter"
_TOPIC_FIELDS = {"gain", "lose", "Gain", "Lose"}


@dataclass
class _Entry:
    """Meaning of a sentence with open names, nouns and numbers, and their positions among its open words."""

    kind: str
    language: str
    roles: str = ""  # one letter per name: p main person, O second person
    names: tuple[int, ...] = ()
    nouns: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    topics: set[str] | None = None
    pronoun: str | None = None
    masculine: bool | None = None  # gender of the noun that the words agree with
    is_vague: bool = False
    is_suppose: bool = False


class _Sentence(NamedTuple):
    """A sentence read: its entry, people ("someone" for the unnamed), nouns as spelled, numbers (None: "some")."""

    entry: _Entry
    people: list[str]
    nouns: list[str]
    numbers: list[int | None]


@lru_cache(maxsize=1 << 15)
def parse(text: str) -> Problem | None:
    """The problem that `text` states, or None if the text is not one of the world's problems.

    Greetings, pleas and rude words of the corpus are skipped. A problem with a missing number or an impossible result
    is returned too; its `defect` says what is wrong.
    """
    sentences = _sentences(text)
    if not sentences or any(sentence.entry.is_suppose for sentence in sentences):
        return None
    return _assemble(sentences)


@lru_cache(maxsize=1 << 12)
def is_readable(text: str) -> bool:
    """Whether templates of the world produce every sentence of a text, and one of them says or asks something."""
    return bool(_sentences(text))


def parse_turns(turns: Sequence[str]) -> Problem | None:
    """The problem that the last of a conversation's user turns asks, following `Suppose instead that ...` turns."""
    problem = None
    for turn in turns:
        problem = parse(turn) or (parse_follow_up(problem, turn) if problem is not None else None)
    return problem


def parse_follow_up(problem: Problem, text: str) -> Problem | None:
    """`problem` with the change that a follow-up `text` names, or None if the text does not fit the problem."""
    sentences = _sentences(text)
    if not sentences or len(sentences) != 2 or not sentences[0].entry.is_suppose:
        return None
    change, question = sentences
    for index in follow_up_indices(problem):
        kind = problem.statements[index].kind
        if kind == change.entry.kind or (kind == "other" and change.entry.kind == "start"):
            statement = Statement(kind, Quantity(*change.numbers))
            changed = problem.changed(
                statements=problem.statements[:index] + (statement,) + problem.statements[index + 1 :]
            )
            asked = _asked(question, problem.person, problem.other)
            if _agrees(changed, change, kind) and _agrees(changed, question, asked) and asked == problem.question:
                return changed
    return None


def follow_up_indices(problem: Problem) -> list[int]:
    """The statements that a follow-up can replace: of a kind that occurs once and has a `Suppose` form."""
    kinds = [statement.kind for statement in problem.statements]
    return [i for i, kind in enumerate(kinds) if kind in words.SUPPOSE_PHRASING and kinds.count(kind) == 1]


def _placeholders() -> dict[str, str]:
    table = dict.fromkeys(words.NAMES, _NAME)
    for language in words.LANGUAGES:
        table |= dict.fromkeys(words.PERSON[language], _NAME)
    for topic in words.TOPICS.values():
        for english, (spanish, _) in topic.nouns.items():
            table |= {english: _NOUN, spanish: _NOUN}
    return table


_PLACEHOLDERS = _placeholders()
_OPEN = re.compile(r"([0-9]{1,6}|\b(?:" + "|".join(sorted(_PLACEHOLDERS, key=len, reverse=True)) + r")\b)")
_SENTENCE = re.compile(r" ?([^ .?][^.?]*[.?])")
_PEOPLE = {name: name for name in words.NAMES}
_PRONOUN = {words.SOMEONE: "x", **{name: "m" if gender else "f" for name, gender in words.NAMES.items()}}
_NOUN_OF = {
    **{(noun, "en"): noun for noun in words.NOUN_TOPIC},
    **{(spanish, "es"): noun for topic in words.TOPICS.values() for noun, (spanish, _) in topic.nouns.items()},
}
_MASCULINE = {noun: gender for topic in words.TOPICS.values() for noun, (_, gender) in topic.nouns.items()}


def _sentences(text: str) -> list[_Sentence] | None:
    """The sentences of a text without chatter; None if any sentence is unknown."""
    if _NAME in text or _NOUN in text or _NUMBER in text:
        return None
    parts = _OPEN.split(text)
    tokens = parts[1::2]
    parts[1::2] = [_PLACEHOLDERS.get(token, _NUMBER) for token in tokens]
    pattern = "".join(parts).strip()
    # Without an end behind them, each word would be read to the end of the text.
    if pattern and pattern[-1] not in ".?":
        return None
    sentences = _SENTENCE.findall(pattern)
    if " ".join(sentences) != pattern:
        return None
    parsed, first = [], 0
    for sentence in sentences:
        entry = _TABLE.get(sentence)
        if entry is None:
            return None
        if entry.kind != _CHATTER:
            parsed.append(_sentence(entry, tokens, first))
        first += len(entry.names) + len(entry.nouns) + len(entry.numbers)
    return parsed


def _sentence(entry: _Entry, tokens: list[str], first: int) -> _Sentence:
    people = [_PEOPLE.get(tokens[first + i], words.SOMEONE) for i in entry.names]
    numbers: list[int | None] = [int(tokens[first + i]) for i in entry.numbers]
    if entry.is_vague:
        numbers.insert(0, None)
    return _Sentence(entry, people, [tokens[first + i] for i in entry.nouns], numbers)


def _assemble(sentences: list[_Sentence]) -> Problem | None:
    *told, asked = sentences
    language, person, other = asked.entry.language, None, None
    statements = []
    for entry, people, _, numbers in told:
        kind = entry.kind
        if kind in words.QUESTIONS["en"]:
            return None
        if kind == "start" and person is None:
            person = people[0]
        elif kind == "start":
            kind, other = "other", people[0]
        elif "O" in entry.roles:
            other = people[entry.roles.index("O")]
        statements.append(Statement(kind, Quantity(*numbers)))
    noun = next((_NOUN_OF.get((noun, language)) for sentence in sentences for noun in sentence.nouns), None)
    question = _asked(asked, person, other)
    if noun is None or person is None or question is None:
        return None
    problem = Problem(language, noun, person, other, tuple(statements), question)
    kinds = [statement.kind for statement in statements] + [question]
    if not all(_agrees(problem, sentence, kind) for sentence, kind in zip(sentences, kinds)):
        return None
    return problem if problem.is_well_formed() else None


def _asked(sentence: _Sentence, person: str | None, other: str | None) -> str | None:
    """The question that a sentence asks about two people, or None for a statement."""
    if sentence.entry.kind not in words.QUESTIONS["en"] or sentence.entry.is_suppose:
        return None
    return "other" if sentence.entry.kind == "has" and sentence.people == [other] else sentence.entry.kind


def _agrees(problem: Problem, sentence: _Sentence, kind: str) -> bool:
    """Whether language, topic, nouns, pronoun and people of a sentence that says `kind` fit the problem."""
    entry = sentence.entry
    if entry.language != problem.language or (entry.topics is not None and problem.topic not in entry.topics):
        return False
    if entry.masculine is not None and entry.masculine != _MASCULINE[problem.noun]:
        return False
    if entry.pronoun is not None and entry.pronoun != _PRONOUN[problem.person]:
        return False
    if any(_NOUN_OF.get((noun, problem.language)) != problem.noun for noun in sentence.nouns):
        return False
    roles = "O" if kind == "other" else entry.roles
    return sentence.people == [problem.person if role == "p" else problem.other for role in roles]


def _openings(language: str, topic_name: str) -> Iterator[tuple[dict[str, str], str | None, bool | None]]:
    """Template fields of a topic with names, nouns and numbers open, with the pronoun and gender that they imply."""
    topic, side = words.TOPICS[topic_name], words.LANGUAGES.index(language)
    fields = {"P": _NAME, "p": _NAME, "O": _NAME, "n": _NOUN, "box": topic.container[side]}
    fields |= {"gain": topic.gain[side], "lose": topic.lose[side], "each": _NUMBER}
    if language == "en":
        for pronoun, gender in (("he", "m"), ("she", "f"), ("this person", "x")):
            yield fields | {"he": pronoun, "He": pronoun.capitalize(), "some": "some"}, gender, None
        return
    fields |= {"Gain": fields["gain"].capitalize(), "Lose": fields["lose"].capitalize()}
    for masculine in (True, False):
        ending = "os" if masculine else "as"
        many = "cuánt" + ending
        yield fields | {"some": "algun" + ending, "many": many, "Many": many.capitalize()}, None, masculine


def _variants(language: str, kind: str, template: str, fields: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """The texts of a template with open slots, and whether the number is the vague one."""
    if "{q}" not in template:
        yield template.format(k=_NUMBER, **fields), False
        return
    for number, is_vague in ((_NUMBER, False), (fields["some"], True)):
        boxes = words.QUANTITY_BOXES[language].format(k=number, **fields)
        if not kind.endswith("_boxes"):
            plain = f"{number} {_NOUN}" if kind in ("start", "other") else number
            yield template.format(q=plain, k=number, **fields), is_vague
        if kind not in ("gain", "lose"):
            yield template.format(q=boxes, k=number, **fields), is_vague


def _entries(language: str, topic: str) -> Iterator[tuple[str, _Entry]]:
    """Every sentence about a topic with its meaning; `Suppose` forms included."""
    for fields, pronoun, masculine in _openings(language, topic):
        for kind, templates in (words.STATEMENTS[language] | words.QUESTIONS[language]).items():
            meaning = "start" if kind == "other" else kind.removesuffix("_boxes")
            for phrasing, template in enumerate(templates):
                names = set(re.findall(r"\{(\w+)\}", template))
                roles = "".join(re.findall(r"\{([PpO])\}", template)).replace("P", "p")
                for text, is_vague in _variants(language, kind, template, fields):
                    entry = _Entry(
                        meaning,
                        language,
                        roles,
                        *_positions(text),
                        topics={topic} if names & _TOPIC_FIELDS or fields["box"] in text else None,
                        pronoun=pronoun if names & {"he", "He"} else None,
                        masculine=masculine if is_vague or names & {"many", "Many"} else None,
                        is_vague=is_vague,
                    )
                    yield text, entry
                    if words.SUPPOSE_PHRASING.get(meaning) == phrasing and kind != "other":
                        yield words.SUPPOSE[language] + text, replace(entry, is_suppose=True)


def _positions(text: str) -> Iterator[tuple[int, ...]]:
    """Where names, nouns and numbers stand among the open words of a sentence."""
    opened = [character for character in text if character in (_NAME, _NOUN, _NUMBER)]
    for kind in (_NAME, _NOUN, _NUMBER):
        yield tuple(i for i, character in enumerate(opened) if character == kind)


def _build() -> dict[str, _Entry]:
    table: dict[str, _Entry] = {}
    for language in words.LANGUAGES:
        for sentence in (*words.POLITE[language], *words.RUDE[language]):
            table[sentence] = _Entry(_CHATTER, language)
        for topic in words.TOPICS:
            for text, entry in _entries(language, topic):
                known = table.setdefault(text, entry)
                if known.topics is not None and entry.topics is not None:
                    known.topics |= entry.topics
    return table


_TABLE = _build()
