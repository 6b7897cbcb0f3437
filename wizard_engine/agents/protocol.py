"""Who answers, evolves and judges: one protocol for programs, checkpoints and endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from wizard_engine.data.records import Message


@dataclass(frozen=True)
class Request:
    """One question to an agent; everything its reply may depend on.

    Attributes:
        task: what is wanted: a task of `prompts.TASKS`, or "answer" / "user", which continue a conversation.
        messages: all that a language model sees. For "answer" the conversation up to a user turn, for "user" up to an
            assistant turn, for any other task one user message rendered by `prompts.render`.
        seed: of the reply's randomness; requests that differ in the seed alone are independent draws.
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
    """What came back. Where `error` is not None the call failed: the text means nothing and is never stored."""

    text: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        """True where the call succeeded."""
        return self.error is None


@runtime_checkable
class Agent(Protocol):
    """Answers requests in batches.

    `name` is for people; `fingerprint` changes whenever a reply could change (weights, version, parameters), because
    it is part of the ledger's key. A greedy reply depends on its own request alone, never on the rest of the batch.
    """

    name: str
    fingerprint: str

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, one each; a failed call is a Reply with an error, not an exception."""
        ...
