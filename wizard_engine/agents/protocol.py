"""The protocol of agents: programs, checkpoints and endpoints that answer, evolve and judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from wizard_engine.data.records import Message


@dataclass(frozen=True)
class Request:
    """One request to an agent: everything its reply may depend on.

    Attributes:
        task: a task of `prompts.TASKS`, or "answer" / "user", which continue a conversation.
        messages: the whole input of a language model. For "answer" the conversation up to a user turn, for "user" up to
        an
            assistant turn, for any other task one user message rendered by `prompts.render`.
        seed: of the sampling; requests that differ only in the seed are independent draws.
        temperature: 0 is greedy.
        max_tokens: longest reply, in tokens of the agent.
    """

    task: str
    messages: tuple[Message, ...]
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 256


@dataclass(frozen=True)
class Reply:
    """Reply to a request. If `error` is not None, the call failed; the text has no meaning and is not stored.

    Attributes:
        error: the reason in a word or two, a colon, and the details: "content_filter: ...", "status 400: ...".
        finish: "stop", or "length" where the reply reached its limit and was cut.
    """

    text: str
    error: str | None = None
    finish: str = "stop"

    @property
    def ok(self) -> bool:
        """True where the call succeeded."""
        return self.error is None

    @property
    def is_cut(self) -> bool:
        """True where the reply ends at its limit and not where its author ended it."""
        return self.error is None and self.finish == "length"

    @property
    def reason(self) -> str:
        """Why there is no whole reply, in a word or two that can be counted: "length", "status 400"; else ""."""
        if self.error is None:
            return "length" if self.is_cut else ""
        reason = self.error.partition(": ")[0].strip()
        return reason if 0 < len(reason) <= 40 else "call failed"


@runtime_checkable
class Agent(Protocol):
    """Answers requests in batches.

    `name` is for display. `fingerprint` changes whenever a reply could change (weights, version, parameters), because
    it is part of the ledger's key. A greedy reply depends on its request alone, never on the rest of the batch.
    """

    name: str
    fingerprint: str

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, one each; a failed call is a Reply with an error, not an exception."""
        ...
