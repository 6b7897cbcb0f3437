"""Answers to evaluate: what agents replied, with what did not come as Missing."""

from typing import Literal

from wizard_engine.agents.endpoint import PREFIX
from wizard_engine.agents.missing import Missing
from wizard_engine.agents.protocol import Reply

OnLength = Literal["missing", "keep"]


def on_length_of(spec: str, choice: OnLength | None) -> OnLength:
    """What an answer that reached its limit counts as: the choice, else missing for an endpoint and kept for others.

    The limit belongs to what is measured of a checkpoint. An endpoint was asked for an answer and gave a part of one.
    """
    return choice or ("missing" if spec.startswith(PREFIX) else "keep")


def received(reply: Reply, on_length: OnLength) -> str | Missing:
    """The text of a reply, Missing with its reason for a failed call, and for a cut answer unless it is kept."""
    if reply.error is not None or (reply.is_cut and on_length == "missing"):
        return Missing(reply.reason)
    return reply.text
