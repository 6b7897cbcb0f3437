"""The protocol of agents: programs, checkpoints and endpoints that answer, evolve and judge."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from wizard_engine.data.records import Message


@dataclass(frozen=True)
class Request:
    """One request to an agent: everything its reply may depend on.

    Attributes:
        task: a task of `prompts.TASKS`, or "answer" / "user", which continue a conversation.
        messages: the whole input of a language model. For "answer" the conversation up to a user turn, for "user" up to
            an assistant turn, for any other task one user message rendered by `prompts.render`, and after a reply that
            could not be read that reply and what was missing in it.
        seed: of the sampling; requests that differ only in the seed are independent draws.
        temperature: 0 is greedy.   top_p: share of the probability that tokens are drawn from.
        max_tokens: longest reply, in tokens of the agent.
        schema: JSON schema of the reply as JSON text, for endpoints that can hold a model to it; "" for free text.
        row: id of the row that it is asked for. The reply does not depend on it.
    """

    task: str
    messages: tuple[Message, ...]
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float = 1.0
    schema: str = ""
    row: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reply:
    """Reply to a request. If `error` is not None, the call failed; the text has no meaning and is not stored.

    Attributes:
        error: the reason in a word or two, a colon, and the details: "content_filter: ...", "status 400: ...".
        finish: "stop", or "length" where the reply reached its limit and was cut.
        reasoning: what the endpoint gives apart from the answer.
        tokens_in, tokens_out: of prompt and reply, all tries counted; 0 where the agent does not say.
        seconds: of the call, its retries included.
    """

    text: str
    error: str | None = None
    finish: str = "stop"
    reasoning: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

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


@runtime_checkable
class ConcurrentAgent(Protocol):
    """Answers single requests, many of them at once, each as soon as it can; used within one event loop.

    Attributes:
        concurrency: calls that run at once.
        ended: why the agent makes no more calls, "" while it does.
    """

    name: str
    fingerprint: str
    concurrency: int
    ended: str

    async def reply(self, request: Request) -> Reply:
        """The reply to a request; a failed call is a Reply with an error, not an exception."""
        ...

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        ...


def is_concurrent(agent: Agent | ConcurrentAgent) -> bool:
    """Whether an agent answers single requests, many at once."""
    return hasattr(agent, "aclose")
