"""Batched requests to agents, with seeds derived from content and counts of the replies."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent, Request
from wizard_engine.data.records import Message

T = TypeVar("T")


def derive_seed(*parts: str | int) -> int:
    """A seed of 48 bits, a hash of the parts."""
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:6], "big")


class Calls:
    """The calls of one stage of synthesis.

    Every method sends a whole list as one batch. Entries that failed or could not be read are None and are counted.

    Attributes:
        counts: task -> "asked", "failed" (the call returned an error), "unreadable" (the reply says nothing usable).
    """

    def __init__(self, *, max_tokens: int = 256) -> None:
        self.max_tokens = max_tokens
        self.counts: dict[str, Counter[str]] = {}

    def send(self, agent: Agent, requests: Sequence[Request]) -> list[str | None]:
        """Reply texts in order, None for failed calls."""
        if not requests:
            return []
        replies = agent.respond(requests)
        for request, reply in zip(requests, replies, strict=True):
            counts = self.counts.setdefault(request.task, Counter(asked=0, failed=0, unreadable=0))
            counts["asked"] += 1
            counts["failed"] += not reply.ok
        return [reply.text if reply.ok else None for reply in replies]

    def ask(
        self,
        agent: Agent,
        task: str,
        fields: Sequence[Mapping[str, str]],
        seeds: Sequence[int] | int,
        *,
        read: Callable[[str, int], T | None],
        temperature: float = 0.0,
    ) -> list[T | None]:
        """Parsed replies to prompts of a task.

        Args:
            fields: one set of prompt fields a request.
            seeds: one a request, or one for all.
            read: parser, (reply text, index) -> meaning, or None if it cannot be read.
        """
        seeds = [seeds] * len(fields) if isinstance(seeds, int) else seeds
        requests = [
            Request(task, prompts.request_messages(task, **values), seed, temperature, self.max_tokens)
            for values, seed in zip(fields, seeds, strict=True)
        ]
        read_replies = []
        for index, text in enumerate(self.send(agent, requests)):
            meaning = None if text is None else read(text, index)
            self.counts[task]["unreadable"] += text is not None and meaning is None
            read_replies.append(meaning)
        return read_replies

    def converse(
        self,
        agent: Agent,
        conversations: Sequence[Sequence[Message]],
        seeds: Sequence[int] | int,
        *,
        task: str = "answer",
        temperature: float = 0.0,
    ) -> list[str | None]:
        """The next turn of each conversation ("answer": the assistant's, "user": the user's); None where blank."""
        seeds = [seeds] * len(conversations) if isinstance(seeds, int) else seeds
        requests = [
            Request(task, tuple(messages), seed, temperature, self.max_tokens)
            for messages, seed in zip(conversations, seeds, strict=True)
        ]
        texts = [None if text is None else text.strip() for text in self.send(agent, requests)]
        if requests:
            self.counts[task]["unreadable"] += sum(text == "" for text in texts)
        return [text or None for text in texts]

    def statistics(self) -> dict[str, dict[str, int]]:
        """task -> counts, as plain JSON."""
        return {task: dict(counts) for task, counts in sorted(self.counts.items())}


def as_read(text: str, index: int) -> str | None:
    """Parser of plain text: the text without surrounding blanks, None if nothing remains."""
    return text.strip() or None
