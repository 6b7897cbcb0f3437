"""Batched requests to agents, with seeds derived from content and counts of the replies."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from wizard_engine.agents import prompts
from wizard_engine.agents.missing import check_missing
from wizard_engine.agents.protocol import Agent, Reply, Request
from wizard_engine.data.records import Message

T = TypeVar("T")
OnLength = Literal["drop", "keep"]
# Tasks whose reply is a verdict: it may be preceded by an explanation, and has a limit of its own.
VERDICTS = frozenset({"compare", "judge", "rate", "label", "rank", "tag"})
JUDGE_TOKENS = 1024


def derive_seed(*parts: str | int) -> int:
    """A seed of 48 bits, a hash of the parts."""
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:6], "big")


class Calls:
    """The calls of one stage of synthesis.

    Every method sends a whole list as one batch. Entries that failed or could not be read are None and are counted.

    Args:
        max_tokens: longest reply.   judge_max_tokens: longest verdict (VERDICTS), with its explanation.
        on_length: what happens to an answer that reached its limit: "drop" counts it as a failed call, "keep" uses it.
            Other replies that reached it are always failed calls.
    Attributes:
        counts: task -> "asked", "failed" (no reply, or one that was cut), "failed: REASON" for each reason,
            "unreadable" (the reply says nothing usable), "cut" (answers that were kept).
        cut: the answers that were kept although they were cut.
    """

    def __init__(
        self, *, max_tokens: int = 256, judge_max_tokens: int = JUDGE_TOKENS, on_length: OnLength = "drop"
    ) -> None:
        if on_length not in ("drop", "keep"):
            raise ValueError(f"on_length: expected drop or keep, got {on_length!r}; choose one of them")
        self.max_tokens, self.judge_max_tokens, self.on_length = max_tokens, judge_max_tokens, on_length
        self.counts: dict[str, Counter[str]] = {}
        self.cut: set[str] = set()

    def send(self, agent: Agent, requests: Sequence[Request]) -> list[str | None]:
        """Reply texts in order, None for failed calls."""
        if not requests:
            return []
        replies = agent.respond(requests)
        for request, reply in zip(requests, replies, strict=True):
            counts = self.counts.setdefault(request.task, Counter(asked=0, failed=0, unreadable=0))
            counts["asked"] += 1
            if self._is_failed(request, reply):
                counts["failed"] += 1
                counts[f"failed: {reply.reason}"] += 1
            elif reply.is_cut:
                counts["cut"] += 1
                self.cut.add(reply.text.strip())
        return [None if self._is_failed(request, reply) else reply.text for request, reply in zip(requests, replies)]

    def _is_failed(self, request: Request, reply: Reply) -> bool:
        is_kept = self.on_length == "keep" and request.task == "answer"
        return not reply.ok or (reply.is_cut and not is_kept)

    def marks(self, *answers: str | None) -> dict[str, str]:
        """Attributes of a row with these answers: finish="length" where one was cut."""
        return {"finish": "length"} if any(answer and answer.strip() in self.cut for answer in answers) else {}

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
            Request(task, prompts.request_messages(task, **values), seed, temperature, self._limit(task))
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

    def _limit(self, task: str) -> int:
        return self.judge_max_tokens if task in VERDICTS else self.max_tokens

    def statistics(self) -> dict[str, dict[str, int]]:
        """task -> counts, as plain JSON."""
        return {task: dict(counts) for task, counts in sorted(self.counts.items())}


def check_calls(statistics: Mapping[str, Mapping[str, int]], most: float, advice: str = "raise --max-tokens") -> None:
    """Raises ValueError where more than the share `most` of a task's calls gave nothing.

    Failed calls count, and verdicts that could not be read.

    Args:
        statistics: of `Calls.statistics`.   advice: what helps answers that were cut.
    """
    for task, counts in statistics.items():
        reasons = {name[8:]: count for name, count in counts.items() if name.startswith("failed: ")}
        if task in VERDICTS:
            reasons |= {"unreadable": counts["unreadable"]} if counts["unreadable"] else {}
            check_missing(f"replies to {task!r}", reasons, counts["asked"], most, "raise --judge-max-tokens")
        else:
            check_missing(f"replies to {task!r}", reasons, counts["asked"], most, advice)


def as_read(text: str, index: int) -> str | None:
    """Parser of plain text: the text without surrounding blanks, None if nothing remains."""
    return text.strip() or None
