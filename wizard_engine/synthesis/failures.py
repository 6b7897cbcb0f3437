"""Classes of failure of an evolving step, and the detectors that find them.

    failure  = class, who found it, what was found
    class    = one of FAILURE_CLASSES; `prompts/diagnose.txt` defines them
    found by = "rules": the paper's, on the response, and those of elimination on the text
             | "program": a detector of this module      | "judge": an agent that does the task "diagnose"

    text_failures(step)      what the texts of parent and child show
    response_failures(step)  what the response to the child shows
    fields(step)             of the judge's prompt

| class | detector by program |
|---|---|
| task changed | no content word, number or name of the parent is left |
| facts lost | a number, or a name, of the parent is gone; rule: the response says "please provide" |
| answer leaked | the child states the parent's answer, or the number that its own response ends with, as a result |
| contradiction | none: a judge alone |
| not answerable | the response asks back; rules: it refuses, has no content, or begins with Sure and ends with "?" |
| not harder | the same content words, or fewer words, numbers and conditions; rule: stagnant responses |
| copied headings | a label such as `Operator:`, or eight words in a row, of the evolving prompt; rule: template words |
| other language | the language attribute differs, and fewer than half of the parent's words are left |

Detectors prefer to miss a failure: what they leave is the judge's. With the operator `breadth`, whose child is another
instruction, no facts are lost and no task is changed; with `complicate`, a number may be replaced by two that make it.

Source of the string rules: Zeng et al. 2024, arXiv:2406.00770; the classes follow its list of issues.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.agents.replies import FAILURE_CLASSES
from wizard_engine.curation.attributes import language, turn_score
from wizard_engine.curation.lexicons import STOP_WORDS
from wizard_engine.curation.words import words
from wizard_engine.data.final_answers import extract_answer
from wizard_engine.data.written_numbers import find_numbers, normalised

from .elimination import EMPTY_WORDS, instruction_fault, response_fault

__all__ = ["FAILURE_CLASSES", "Failure", "Step", "fields", "response_failures", "text_failures"]

COPIED_WORDS = 8  # words in a row that are no chance
SHORT_ANSWER = 6  # words of an answer that is looked for as it is
# The string rules by class.
_RULES = {
    "blank": "not answerable",
    "unchanged": "not harder",
    "template words": "copied headings",
    "stagnant": "not harder",
    "under-qualified": "not answerable",
    "lost information": "facts lost",
    "refused": "not answerable",
    "empty response": "not answerable",
}
_NUMBER_WORDS = {
    code: {word: Fraction(value) for value, word in enumerate(line.split(), start=1)}
    for code, line in {
        "en": "one two three four five six seven eight nine ten eleven twelve",
        "es": "uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
        "fr": "un deux trois quatre cinq six sept huit neuf dix onze douze",
        "de": "ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
    }.items()
}
_LIST_MARK = re.compile(r"(?m)^\s*\(?\d{1,2}[.)]\s")
_SENTENCE = re.compile(r"(?<=[.!?。！？:;])\s+|\n+")
_NAME = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_NOBODY = frozenset(("someone", "somebody", "everyone", "everybody", "anyone", "alguien", "todos", "i", "i'm", "i'll"))
_CONCLUDES = re.compile(
    r"=|\b(?:so|thus|therefore|hence|answer|result|total|altogether|in all|in the end|ends? up|left with|leaving|equals"
    r"|makes|now has|has now|which (?:is|gives|leaves)|así que|por (?:lo )?tanto|respuesta|resultado|en total|al final"
    r"|le quedan|donc|réponse|au total|antwort|ergebnis|insgesamt)\b|答案|结果|所以|一共",
    re.IGNORECASE,
)
_ASKS_BACK = re.compile(
    r"\bplease (?:specify|clarify|tell me|give|share|state)\b"
    r"|\b(?:not enough|insufficient|missing) (?:information|data)\b"
    r"|\b(?:cannot|can not|can['’]t|could not|impossible to) (?:be )?(?:determin|answer|solve|calculat|comput)"
    r"|\bneed (?:more|further) (?:information|details)\b|\bno se puede (?:determinar|responder|calcular)"
    r"|\bfaltan? (?:información|datos)\b",
    re.IGNORECASE,
)
_LABELS = re.compile(
    r"(?m)^\W*(?:operator|method|given instruction|original instruction|rewritten instruction|final(?:ly)? rewritten"
    r"[^\n:]{0,20}|evolved instruction|new instruction|step \d+ ?#?[a-z ]*list)#?\W{0,3}:",
    re.IGNORECASE,
)


class Failure(NamedTuple):
    """A class of failure, who found it ("rules", "program" or "judge"), and what was found."""

    kind: str
    by: str
    detail: str


@dataclass(frozen=True)
class Step:
    """One evolving step: all that a detector may look at.

    Attributes:
        parent, child: the instructions.
        operator: what was asked for.   method: of evolving.
        reference: the answer to the parent, "" where it is unknown.
        response: to the child, "" before there is one.
    """

    parent: str
    child: str
    operator: str = ""
    method: str = ""
    reference: str = ""
    response: str = ""

    @property
    def is_breadth(self) -> bool:
        """Whether the child was to be another instruction."""
        return self.operator == "breadth"


def text_failures(step: Step) -> list[Failure]:
    """The failures that parent and child show, in the order of their classes; by a rule alone where one finds any."""
    rule = instruction_fault(step.parent, step.child)
    return [Failure(_RULES[rule], "rules", rule)] if rule else _found(_TEXT_DETECTORS, step)


def response_failures(step: Step) -> list[Failure]:
    """The failures that the response to the child shows; by a rule alone where one finds any."""
    rule = response_fault(step.response)
    return [Failure(_RULES[rule], "rules", rule)] if rule else _found(_RESPONSE_DETECTORS, step)


def fields(step: Step) -> dict[str, str]:
    """Fields of the prompt "diagnose"."""
    choices = prompts.load_template("evolve").choices["operator"]
    return {
        "instruction": step.parent,
        "evolved": step.child,
        "change": choices.get(step.operator, step.operator),
        "reference": step.reference,
        "response": step.response,
    }


def _found(detectors: dict[str, Callable[[Step], str]], step: Step) -> list[Failure]:
    return [Failure(kind, "program", detail) for kind, detect in detectors.items() if (detail := detect(step))]


# ---- words, numbers and names ---------------------------------------------------------------------------------------


def content_words(text: str) -> Counter[str]:
    """How often each word of a text stands in it, those without content and marks of lists left out."""
    text = _LIST_MARK.sub("\n", text)
    stop = STOP_WORDS.get(language(text), "").split()
    return Counter(word for word in words(text, operators=True) if word not in EMPTY_WORDS and word not in stop)


def numbers(text: str) -> set[Fraction]:
    """The numbers of a text, in digits or in the words from one to twelve; marks of lists are none."""
    plain = normalised(_LIST_MARK.sub("\n", text))
    found = {quantity.value for quantity in find_numbers(plain)}
    of_words = _NUMBER_WORDS.get(language(text), _NUMBER_WORDS["en"])
    return found | {of_words[word] for word in words(plain) if word in of_words}


def names(text: str) -> set[str]:
    """The names in a text: words with a capital inside a sentence, or at its beginning more than once."""
    inside: set[str] = set()
    first: Counter[str] = Counter()
    for sentence in _SENTENCE.split(text):
        found = _NAME.findall(sentence)
        first.update(found[:1])
        inside |= {word for word in found[1:] if word[0].isupper()}
    inside |= {word for word, count in first.items() if count > 1 and word[:1].isupper()}
    lower = {word for word in _NAME.findall(text) if word[0].islower()}
    return {word for word in inside if _is_name(word) and word.lower() not in lower}


def _is_name(word: str) -> bool:
    lower = word.lower()
    return len(word) > 1 and not word.isupper() and lower not in EMPTY_WORDS and lower not in _NOBODY


# ---- detectors ------------------------------------------------------------------------------------------------------


def _task_changed(step: Step) -> str:
    parent = content_words(step.parent).keys()
    if step.is_breadth or len(parent) < 3 or _is_other_language(step):
        return ""
    kept = {word[:5] for word in parent} & {word[:5] for word in content_words(step.child)}
    return "" if kept else "no word of the original with a content is left"


def _facts_lost(step: Step) -> str:
    if step.is_breadth:
        return ""
    here = numbers(step.child)
    gone = numbers(step.parent) - here - {Fraction(1)}
    if step.operator == "complicate":
        new = here - numbers(step.parent)
        gone = {number for number in gone if not _is_made(number, here, new)}
    lost = [_shown(number) for number in sorted(gone)]
    if language(step.parent) != "de":  # where every noun has a capital
        present = set(words(step.child))
        lost += sorted(name for name in names(step.parent) if not present.issuperset(words(name)))
    return f"gone: {', '.join(lost)}" if lost else ""


def _is_made(number: Fraction, here: Iterable[Fraction], new: Iterable[Fraction]) -> bool:
    """Whether two new numbers make a number by addition or subtraction, or a new and any one by multiplication."""
    return any(number == a * b for a in new for b in here) or any(number in (a + b, a - b) for a in new for b in new)


def _shown(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):g}"


def _answer_leaked(step: Step) -> str:
    """Of the parent's answer: a number of it stated as a result, or a short text."""
    answer = step.reference.strip()
    if not answer:
        return ""
    value = extract_answer(answer)
    if value is not None:
        return _stated(value, step)
    said = words(answer)
    if len("".join(said)) < 4:
        return ""
    closing = said if len(said) <= SHORT_ANSWER else words(answer.rstrip().rpartition("\n")[2])
    is_stated = len(closing) > 2 or len(closing) == len(said)
    return f"states {' '.join(closing[:12])!r}" if is_stated and _adds(closing, step) else ""


def _own_answer_leaked(step: Step) -> str:
    value = extract_answer(step.response)
    return "" if value is None else _stated(value, step)


def _stated(value: Fraction, step: Step) -> str:
    """That the child states a number as a result, which the parent does not have."""
    if value in numbers(step.parent):
        return ""
    for sentence in _SENTENCE.split(step.child):
        is_result = abs(value) >= 100 or value.denominator > 1 or _CONCLUDES.search(sentence)
        if is_result and not sentence.rstrip().endswith("?") and value in numbers(sentence):
            return f"states {_shown(value)}"
    return ""


def _adds(phrase: list[str], step: Step) -> bool:
    """Whether the words stand in a row in the child, and not in the parent."""
    return _has(words(step.child), phrase) and not _has(words(step.parent), phrase)


def _has(text: list[str], phrase: list[str]) -> bool:
    return f" {' '.join(phrase)} " in f" {' '.join(text)} "


def _not_answerable(step: Step) -> str:
    match = _ASKS_BACK.search(step.response)
    return f"the response says {prompts.flatten(match[0])!r}" if match else ""


def _not_harder(step: Step) -> str:
    parent, child = content_words(step.parent), content_words(step.child)
    if parent == child:
        return "the same words"
    before, after = (turn_score(_LIST_MARK.sub("\n", text), "") for text in (step.parent, step.child))
    is_less = 10 * child.total() < 9 * parent.total() and after < before
    return "fewer words, numbers and conditions" if is_less and not step.is_breadth else ""


def _copied_headings(step: Step) -> str:
    label = _LABELS.search(step.child)
    if label and not _LABELS.search(step.parent):
        return f"label {prompts.flatten(label[0])!r}"
    copied = _runs(step.child) & _prompt_runs(step.operator, step.method)
    copied -= _runs(step.parent) if copied else set()
    return f"copied {min(copied)!r}" if copied else ""


def _runs(text: str) -> set[str]:
    said = words(text)
    return {" ".join(said[start : start + COPIED_WORDS]) for start in range(len(said) - COPIED_WORDS + 1)}


@lru_cache(64)
def _prompt_runs(operator: str, method: str) -> frozenset[str]:
    """The runs of words of an evolving prompt without its instruction."""
    choices = prompts.load_template("evolve").choices["operator"]
    operator = operator if operator in choices else next(iter(choices))
    return frozenset(_runs(prompts.render("evolve", operator=operator, method=method, instruction="")))


def _other_language(step: Step) -> str:
    return f"{language(step.parent)} became {language(step.child)}" if _is_other_language(step) else ""


def _is_other_language(step: Step) -> bool:
    """By the language attribute; a child with half of its parent's words is in the same one."""
    before, after = language(step.parent), language(step.child)
    if before == after or "und" in (before, after):
        return False
    parent, child = set(words(step.parent)), set(words(step.child))
    return 2 * len(parent & child) < len(parent)


_TEXT_DETECTORS = {
    "task changed": _task_changed,
    "facts lost": _facts_lost,
    "answer leaked": _answer_leaked,
    "not harder": _not_harder,
    "copied headings": _copied_headings,
    "other language": _other_language,
}
_RESPONSE_DETECTORS = {"answer leaked": _own_answer_leaked, "not answerable": _not_answerable}
