"""Rules that eliminate evolved instructions by their text or by their response, without a model.

The rules are those of Evol-Instruct (a response that refuses, a response without content, template words copied into
the instruction) and the failure detector of Auto Evol-Instruct, which looks at the response to an evolved instruction.
"""

import re

from wizard_engine.agents.prompts import flatten

REFUSAL_WORDS = 80
TEMPLATE_WORDS = re.compile(
    r"\b(?:given|rewritten|evolved|new)\s+(?:prompt|instruction)s?\b|(?<!\w)#(?=\S)[^#\n]*[^\W\d][^#\n]*#",
    re.IGNORECASE,
)
_STAGNANT = re.compile(r"(?:understood|thank you|that is correct|what|great)\b", re.IGNORECASE)
_UNDER_QUALIFIED = re.compile(r"sure\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")
EMPTY_WORDS = frozenset(
    _WORD.findall(
        """a about all also am an and any are as at be been but by can could did do does for from had has have he her
        him his how i if in into is it its just me more most my no nor not of off on only or other our out over own
        same she should so some such than that the their them then there these they this those to too up us very was
        we were what when where which who whom why will with would you your
        al como con cual de del el ella ellos en era es esa ese eso esta este esto fue ha hay la las le les lo los más
        me mi muy no nos o para pero por que qué se ser si sí sin sobre son su sus también te tu un una uno y ya yo"""
    )
)


def detect_failure(response: str) -> str | None:
    """Reason why a response shows that its instruction was evolved badly, or None.

    "stagnant": begins with Understood, Thank you, That is correct, What or Great, and ends with a question mark;
    "under-qualified": begins with Sure and ends with a question mark; "lost information": says "please provide".

    Source: Zeng et al. 2024, arXiv:2406.00770, the failure detector F(r) on responses.
    """
    text = response.strip()
    is_question = text.endswith("?")
    if is_question and _STAGNANT.match(text):
        return "stagnant"
    if is_question and _UNDER_QUALIFIED.match(text):
        return "under-qualified"
    return "lost information" if "please provide" in flatten(text).lower() else None


def response_fault(response: str) -> str | None:
    """Reason why a response eliminates its instruction, or None: short refusal, no content word, `detect_failure`."""
    words = _WORD.findall(response.lower())
    if "sorry" in words and len(response.split()) < REFUSAL_WORDS:
        return "refused"
    if all(word in EMPTY_WORDS for word in words):
        return "empty response"
    return detect_failure(response)


def instruction_fault(parent: str, evolved: str) -> str | None:
    """Reason why an evolved instruction is invalid, or None: blank, equal to its parent, or with template words."""
    if not evolved.strip():
        return "blank"
    if flatten(evolved).casefold() == flatten(parent).casefold():
        return "unchanged"
    copied = {phrase.casefold() for phrase in TEMPLATE_WORDS.findall(evolved)}
    return "template words" if copied - {phrase.casefold() for phrase in TEMPLATE_WORDS.findall(parent)} else None
