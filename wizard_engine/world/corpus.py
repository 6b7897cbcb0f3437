"""Data of the world: a skewed, mixed natural corpus, held-out problems, plain text and two-turn questions."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from wizard_engine.data.records import Conversation, Message

from . import vocabulary as words
from .parse import follow_up_indices
from .problems import FACTORS, LARGEST, LARGEST_OPERAND, Equation, Problem, Quantity, calculate, random_problem
from .render import noun_of, render, render_follow_up
from .solve import rambling, solve


class Source(NamedTuple):
    """Where rows come from: the share of the corpus, and the shares of the styles of answers in it."""

    share: float
    styles: dict[str, float]
    polite: float
    rude: float


# Overall: 35 % good, 25 % terse, 12 % careless, 8 % wrong, 15 % rambling, 2 % refusal, 3 % vague instructions.
SOURCES = {
    "textbook": Source(
        0.25,
        {"good": 0.78, "terse": 0.12, "careless": 0.03, "wrong": 0.01, "rambling": 0.04, "refusal": 0.0, "vague": 0.02},
        0.0,
        0.0,
    ),
    "exam": Source(
        0.15,
        {"good": 0.45, "terse": 0.37, "careless": 0.08, "wrong": 0.06, "rambling": 0.02, "refusal": 0.0, "vague": 0.02},
        0.0,
        0.0,
    ),
    "forum": Source(
        0.30,
        {"good": 0.2, "terse": 0.2, "careless": 0.24, "wrong": 0.16, "rambling": 0.15, "refusal": 0.01, "vague": 0.04},
        0.15,
        0.02,
    ),
    "chat_log": Source(
        0.30,
        {
            "good": 0.092,
            "terse": 0.348,
            "careless": 0.095,
            "wrong": 0.068,
            "rambling": 0.307,
            "refusal": 0.057,
            "vague": 0.033,
        },
        0.2,
        0.08,
    ),
}
OPERATIONS = {1: 0.50, 2: 0.32, 3: 0.14, 4: 0.04}
HELD_OUT_OPERATIONS = {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.2}
TOPIC_SHARES = {
    "market": 0.40,
    "school": 0.25,
    "kitchen": 0.11,
    "sports": 0.08,
    "farm": 0.05,
    "library": 0.04,
    "travel": 0.025,
    "garden": 0.015,
    "general": 0.03,
}
SPANISH, HELD_OUT_SPANISH = 0.10, 0.20
EXACT_COPIES, NEAR_COPIES = 0.04, 0.06
TWO_TURNS = 0.08
TOPIC_KNOWN, LANGUAGE_KNOWN = 0.70, 0.50
ARITHMETIC = 0.5


@dataclass(frozen=True)
class Question:
    """A two-turn question: category is a topic, references[i] a right answer to turns[i]."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str]


def natural_corpus(n: int, seed: int) -> list[Conversation]:
    """`n` conversations, mixed and skewed as real instruction data are.

    Attributes: "source" always, "topic" and "language" where the source knows them, and "world", the hidden truth
    (style, operations, topic, language, skill, keys of the turns, copy: None | "exact" | "near"), for tests and plots.
    """
    rng = random.Random(f"natural:{seed}")
    rows: list[tuple[Conversation, Problem]] = []
    for _ in range(n):
        chance = rng.random()
        if not rows or chance >= EXACT_COPIES + NEAR_COPIES:
            rows.append(_natural_row(rng))
            continue
        row, problem = rng.choice(rows)
        messages = row.messages
        if chance >= EXACT_COPIES:
            problem, messages = _near(problem, messages, rng)
        rows.append((_copy(row, messages, problem), problem))
    return [row for row, _ in rows]


def held_out(n: int, seed: int) -> list[Conversation]:
    """`n` evaluation rows: unique held-out problems, topics in turn, good answers, one turn each.

    Attributes: topic, language, skill, operations, and "world" as in the corpus.
    """
    rng = random.Random(f"held-out:{seed}")
    seen: set[str] = set()
    rows = []
    while len(rows) < n:
        topic = words.TOPIC_NAMES[len(rows) % len(words.TOPIC_NAMES)]
        language = "es" if rng.random() < HELD_OUT_SPANISH else "en"
        operations = draw(HELD_OUT_OPERATIONS, rng)
        problem = _unseen(rng, seen, operations, language, topic)
        truth = _truth(problem, "good", [problem])
        known = {name: truth[name] for name in ("topic", "language", "skill", "operations")}
        rows.append(Conversation(_turn(render(problem, rng), solve(problem)), {**known, "world": truth}))
    return rows


def plain_text(n: int, seed: int) -> list[str]:
    """`n` documents for pre-training: half lines of arithmetic, half problems with a solution; no chat format."""
    rng = random.Random(f"plain:{seed}")
    return [_arithmetic(rng) if rng.random() < ARITHMETIC else _story(rng) for _ in range(n)]


def mt_questions(n: int = 80, seed: int = 0) -> list[Question]:
    """`n` two-turn questions over the eight topics in turn, both turns from the held-out space."""
    rng = random.Random(f"mt:{seed}")
    seen: set[str] = set()
    questions = []
    while len(questions) < n:
        category = words.TOPIC_NAMES[len(questions) % len(words.TOPIC_NAMES)]
        language = "es" if rng.random() < HELD_OUT_SPANISH else "en"
        first = _unseen(rng, seen, draw({1: 0.3, 2: 0.4, 3: 0.3}, rng), language, category)
        changed = follow_up(first, rng, held_out=True)
        if changed is None:
            continue
        second, text = changed
        turns = (render(first, rng), text)
        questions.append(Question(f"mt-{len(questions):03d}", category, turns, (solve(first), solve(second))))
    return questions


def draw(shares: dict, rng: random.Random) -> object:
    """A key of `shares`, with probability proportional to its value."""
    return rng.choices(list(shares), cum_weights=list(accumulate(shares.values())))[0]


def follow_up(problem: Problem, rng: random.Random, *, held_out: bool) -> tuple[Problem, str] | None:
    """A sound problem with one operand changed, on the given side of the held-out boundary, and the turn that asks it.

    None if a few tries find no such change.
    """
    indices = follow_up_indices(problem)
    for _ in range(12 if held_out else 4):
        if not indices:
            return None
        index = rng.choice(indices)
        changed = problem.changed(
            statements=tuple(
                _other_amount(statement, rng) if i == index else statement
                for i, statement in enumerate(problem.statements)
            )
        )
        if changed != problem and not changed.defect and changed.is_held_out == held_out:
            return changed, render_follow_up(changed, index, rng)
    return None


def make_vague(problem: Problem, rng: random.Random) -> Problem:
    """The problem with one of its numbers replaced by "some"."""
    indices = [i for i, (kind, _) in enumerate(problem.statements) if kind in ("start", "gain", "lose", "other")]
    index = rng.choice(indices)
    statements = list(problem.statements)
    statements[index] = statements[index]._replace(amount=Quantity(None, statements[index].amount.each))
    return problem.changed(statements=tuple(statements))


def _other_amount(statement, rng: random.Random):
    kind, amount = statement
    if kind in ("share", "times", "scale"):
        return statement._replace(amount=Quantity(rng.choice(FACTORS)))
    if amount.each is not None:
        return statement._replace(amount=Quantity(rng.choice(FACTORS), amount.each))
    return statement._replace(amount=Quantity(rng.randint(2, LARGEST_OPERAND)))


def _turn(instruction: str, answer: str) -> tuple[Message, Message]:
    return Message("user", instruction), Message("assistant", answer)


def _truth(problem: Problem, style: str, problems: Sequence[Problem], copy: str | None = None) -> dict:
    return {
        "style": style,
        "operations": problem.operations,
        "topic": problem.topic,
        "language": problem.language,
        "skill": problem.skill,
        "keys": [each.key for each in problems],
        "copy": copy,
    }


def _natural_problem(rng: random.Random) -> Problem:
    topic = draw(TOPIC_SHARES, rng)
    return random_problem(
        rng,
        operations=draw(OPERATIONS, rng),
        language="es" if rng.random() < SPANISH else "en",
        topic=topic,
        person=words.SOMEONE if topic == words.GENERAL and rng.random() < 0.7 else None,
    )


def _natural_row(rng: random.Random) -> tuple[Conversation, Problem]:
    name = draw({source: values.share for source, values in SOURCES.items()}, rng)
    source = SOURCES[name]
    style = draw(source.styles, rng)
    problem = _natural_problem(rng)
    is_vague = style == "vague"
    if is_vague:
        guessed, problem = problem, make_vague(problem, rng)
        answer = solve(problem) if rng.random() < 0.5 else solve(guessed, "terse", rng)
    else:
        answer = _natural_answer(problem, style, name, rng)
    messages = _turn(_addressed(problem, source, rng), answer)
    problems = [problem]
    if not is_vague and rng.random() < TWO_TURNS / (1 - 0.03):
        changed = follow_up(problem, rng, held_out=False)
        if changed is not None:
            messages += _turn(changed[1], _natural_answer(changed[0], style, name, rng))
            problems.append(changed[0])
    attributes = {"source": name}
    if rng.random() < TOPIC_KNOWN:
        attributes["topic"] = problem.topic
    if rng.random() < LANGUAGE_KNOWN:
        attributes["language"] = problem.language
    return Conversation(messages, {**attributes, "world": _truth(problem, style, problems)}), problem


def _natural_answer(problem: Problem, style: str, source: str, rng: random.Random) -> str:
    if style == "rambling":
        return rambling(problem, problem.equations(), rng, is_rude=source == "chat_log" and rng.random() < 0.1)
    return solve(problem, style, rng)


def _addressed(problem: Problem, source: Source, rng: random.Random) -> str:
    """The problem's text with the greetings or rude words of a source."""
    text = render(problem, rng)
    chance = rng.random()
    if chance < source.rude:
        return f"{text} {rng.choice(words.RUDE[problem.language])}"
    if chance < source.rude + source.polite:
        return f"{rng.choice(words.POLITE[problem.language])} {text}"
    return text


def _copy(row: Conversation, messages: Sequence[Message], problem: Problem) -> Conversation:
    truth = {**row.attributes["world"], "copy": "exact" if row.messages == messages else "near"}
    truth["keys"] = [problem.noun + key[key.index("|") :] for key in truth["keys"]]
    return Conversation(tuple(messages), {**row.attributes, "world": truth})


def _near(problem: Problem, messages: Sequence[Message], rng: random.Random) -> tuple[Problem, tuple[Message, ...]]:
    """A copy with another name or another noun of the topic in all turns; the numbers stay."""
    changed = problem
    spellings = {noun: noun_of(problem.changed(noun=noun)) for noun in words.TOPICS[problem.topic].nouns}
    genders = {noun: is_masculine for noun, (_, is_masculine) in words.TOPICS[problem.topic].nouns.items()}
    nouns = [noun for noun in spellings if noun != problem.noun]
    if problem.language == "es":
        nouns = [noun for noun in nouns if genders[noun] == genders[problem.noun]]
    names = [name for name in words.NAMES if name not in (problem.person, problem.other)]
    names = [name for name in names if words.NAMES[name] == words.NAMES.get(problem.person)]
    if nouns and (not names or rng.random() < 0.5):
        changed = problem.changed(noun=rng.choice(nouns))
        old, new = noun_of(problem), noun_of(changed)
    elif names:
        changed = problem.changed(person=rng.choice(names))
        old, new = problem.person, changed.person
    else:
        return problem, tuple(messages)
    word = re.compile(rf"\b{old}\b")
    return changed, tuple(Message(role, word.sub(new, content)) for role, content in messages)


def _unseen(rng: random.Random, seen: set[str], operations: int, language: str, topic: str) -> Problem:
    """A held-out problem whose key is not in `seen`, which gets it."""
    for _ in range(10_000):
        problem = random_problem(rng, operations=operations, language=language, topic=topic, held_out=True)
        if problem.key not in seen:
            seen.add(problem.key)
            return problem
    raise ValueError(f"held-out problems of {topic}: expected more, got {len(seen)} in all; ask for fewer rows")


def _arithmetic(rng: random.Random) -> str:
    return " ".join(f"{_fact(rng)}." for _ in range(rng.randint(3, 8)))


def _fact(rng: random.Random) -> Equation:
    """A line of arithmetic within the range of the problems."""
    operation = rng.choice("++--*/")
    if operation in "*/":
        factor, other = rng.choice(FACTORS), rng.randint(2, LARGEST_OPERAND)
        if operation == "/":
            return Equation(factor * other, "/", factor, other)
        left, right = rng.sample((factor, other), 2)
        return Equation(left, "*", right, factor * other)
    left, right = rng.randint(1, LARGEST), rng.randint(1, LARGEST_OPERAND)
    if operation == "+" and left + right > LARGEST:
        left = rng.randint(1, LARGEST - right)
    if operation == "-" and left < right:
        left, right = right, left
    return Equation(left, operation, right, calculate(operation, left, right))


def _story(rng: random.Random) -> str:
    name = draw({source: values.share for source, values in SOURCES.items()}, rng)
    style = draw(SOURCES[name].styles, rng)
    problem = _natural_problem(rng)
    if style in ("vague", "refusal"):
        style = "good"
    return f"{render(problem, rng)}\n{_natural_answer(problem, style, name, rng)}"
