"""What a judge is told besides the texts: criteria for the kind of instruction, and an answer known to be right."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from wizard_engine.curation.attributes import skill
from wizard_engine.data.records import Message

from .prompts import criteria_of, reference_of

_KIND_ATTRIBUTES = ("category", "skill")
_READ = (*_KIND_ATTRIBUTES, "language", "reference")
# Conversations whose kind is remembered: a row is judged many times while it is worked on.
_REMEMBERED = 2048


def aids(attributes: Mapping[str, Any] | None, prompt: Sequence[Message]) -> dict[str, str]:
    """The fields `criteria` and `reference` of a judge's prompt, "" for general criteria and no reference.

    The kind of a row that names no category and no skill is that of the analysis: its last user turn's, else its first
    one's.

    Args:
        prompt: conversation that ends with the user turn that was answered.
    """
    known = attributes or {}
    is_named = any(known.get(name) for name in _KIND_ATTRIBUTES)
    criteria = "" if is_named else _kind_of_conversation(tuple(prompt))
    return {"criteria": criteria or criteria_of(known), "reference": reference_of(known)}


def read_attributes(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those attributes that `aids` reads."""
    return {name: attributes[name] for name in _READ if name in (attributes or {})}


@lru_cache(_REMEMBERED)
def _kind_of_conversation(prompt: tuple[Message, ...]) -> str:
    turns = [message.content for message in prompt if message.role == "user"]
    kinds = (criteria_of({"skill": skill(prompt, turn)}) for turn in dict.fromkeys([*turns[-1:], *turns[:1]]))
    return next(filter(None, kinds), "")
