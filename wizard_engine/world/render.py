"""Text of a problem: every statement and question in one of three phrasings per language."""

import random

from . import vocabulary as words
from .problems import Problem, Statement

# A phrasing index for all sentences, a generator that draws one per sentence, or None for the first.
Phrasing = int | random.Random | None


def render(problem: Problem, phrasing: Phrasing = None) -> str:
    """The problem's sentences, joined by spaces; `parse` gives the problem back.

    Args:
        phrasing: 0, 1 or 2 for every sentence, or a random.Random that chooses one for each sentence.
    """
    fields = _fields(problem)
    sentences = [_statement(problem, statement, fields, _pick(phrasing)) for statement in problem.statements]
    sentences.append(_question(problem, fields, _pick(phrasing)))
    return " ".join(sentences)


def render_follow_up(problem: Problem, index: int, phrasing: Phrasing = None) -> str:
    """A second turn after another problem: `Suppose instead that ...`, naming statement `index` of this problem.

    `problem` is the changed problem. A scale statement has no such form, and neither has a repeated kind: see
    `parse.follow_up_indices`.
    """
    statement = problem.statements[index]
    fields = _fields(problem) | {"P": words_of_person(problem)[1]}
    sentence = _statement(problem, statement, fields, words.SUPPOSE_PHRASING[statement.kind])
    question = _question(problem, _fields(problem), _pick(phrasing))
    return f"{words.SUPPOSE[problem.language]}{sentence} {question}"


def words_of_person(problem: Problem) -> tuple[str, str]:
    """The main person's name at the start of a sentence and inside one."""
    if problem.person == words.SOMEONE:
        return words.PERSON[problem.language]
    return problem.person, problem.person


def noun_of(problem: Problem) -> str:
    """The plural noun in the problem's language."""
    if problem.language == "en":
        return problem.noun
    return words.TOPICS[problem.topic].nouns[problem.noun][0]


def _pick(phrasing: Phrasing) -> int:
    if isinstance(phrasing, random.Random):
        return int(phrasing.random() * words.PHRASINGS)
    return phrasing or 0


def _fields(problem: Problem) -> dict[str, str]:
    topic = words.TOPICS[problem.topic]
    side = words.LANGUAGES.index(problem.language)
    start, inside = words_of_person(problem)
    fields = {
        "P": start,
        "p": inside,
        "O": problem.other or "",
        "n": noun_of(problem),
        "box": topic.container[side],
        "gain": topic.gain[side],
        "lose": topic.lose[side],
    }
    if side == 0:
        pronoun = "this person" if problem.person == words.SOMEONE else "he" if words.NAMES[problem.person] else "she"
        return fields | {"he": pronoun, "He": pronoun.capitalize(), "some": "some"}
    masculine = topic.nouns[problem.noun][1]
    return fields | {
        "Gain": fields["gain"].capitalize(),
        "Lose": fields["lose"].capitalize(),
        "some": "algunos" if masculine else "algunas",
        "many": "cuántos" if masculine else "cuántas",
        "Many": "Cuántos" if masculine else "Cuántas",
    }


def _statement(problem: Problem, statement: Statement, fields: dict[str, str], phrasing: int) -> str:
    kind, amount = statement
    number = fields["some"] if amount.count is None else str(amount.count)
    if amount.each is not None:
        boxes = words.QUANTITY_BOXES[problem.language].format(
            k=number, box=fields["box"], each=amount.each, n=fields["n"]
        )
        template = words.STATEMENTS[problem.language][kind + "_boxes" if kind in ("gain", "lose") else kind][phrasing]
        return template.format(q=boxes, **fields)
    template = words.STATEMENTS[problem.language][kind][phrasing]
    with_noun = f"{number} {fields['n']}" if kind in ("start", "other") else number
    return template.format(q=with_noun, k=number, **fields)


def _question(problem: Problem, fields: dict[str, str], phrasing: int) -> str:
    if problem.question == "other":
        return words.QUESTIONS[problem.language]["has"][phrasing].format(**(fields | {"p": problem.other}))
    return words.QUESTIONS[problem.language][problem.question][phrasing].format(**fields)
