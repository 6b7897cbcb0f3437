"""The calls of one stage: requests with seeds derived from content, replies that are read, and counts of both."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from wizard_engine.data.records import Message

from . import prompts
from .missing import check_missing
from .protocol import Agent, ConcurrentAgent, Reply, Request
from .replies import missing_line, schema_of
from .scheduler import Scheduler
from .unreadable import FirstReplies

T = TypeVar("T")
AnyAgent = Agent | ConcurrentAgent
OnLength = Literal["drop", "keep"]
# Tasks whose reply is a verdict: it may be preceded by an explanation, and has a limit of its own.
VERDICTS = frozenset({"compare", "diagnose", "judge", "rate", "label", "rank", "tag"})
ANSWERS = frozenset({"answer", "user"})
JUDGE_TOKENS = 2048
REWRITE_TOKENS = 2048
EVOLVE_TOKENS = 1024
# A step's label with its reasons.
LABEL_TOKENS = 96
# Times that a reply is asked for again because it cannot be read.
REPEATS = 2


@dataclass(frozen=True)
class Limits:
    """Longest replies by task, tokens.

    Attributes:
        answer: answers, and turns of a user.   evolve: evolved instructions.
        rewrite: rewritten answers, suggestions, reviews and methods.
        judge: verdicts with their explanation. Those on the steps of an answer have LABEL_TOKENS a step beside it.
    """

    answer: int = 256
    evolve: int = EVOLVE_TOKENS
    rewrite: int = REWRITE_TOKENS
    judge: int = JUDGE_TOKENS

    def of(self, task: str, fields: Mapping[str, str]) -> int:
        """Of one request."""
        if task in ANSWERS:
            return self.answer
        if task == "label":
            steps = len(fields.get("answer_steps", "").splitlines())
            return min(self.judge, LABEL_TOKENS * (steps + 2))
        if task in VERDICTS:
            return self.judge
        return self.evolve if task == "evolve" else self.rewrite


async def together(agent: AnyAgent, asked: Iterator[Awaitable[T]]) -> list[T]:
    """What calls of one agent give, asked at once. Those of a program take no time, and need no task each."""
    if getattr(agent, "is_instant", False):
        return [await call for call in asked]
    return list(await asyncio.gather(*asked))


def derive_seed(*parts: str | int) -> int:
    """A seed of 48 bits, a hash of the parts."""
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:6], "big")


class Calls:
    """The calls of one stage, through a scheduler.

    A reply that is cut at its limit is asked for once more with twice the limit, where the task allows it; one that
    cannot be read at most twice more, with a line that says what was missing. What then is still no reply is None and
    is counted. Where none of an agent's first replies to a task can be read, the stage ends (see unreadable).

    Args:
        limits: longest replies.
        on_length: what happens to an answer that reached its limit: "drop" counts it as a failed call, "keep" uses it.
            Other replies that reached it are always failed calls.
        top_p: of all requests.
    Attributes:
        counts: task -> "asked", "failed" (no reply, or one that was cut), "failed: REASON" for each reason,
            "unreadable" (the reply says nothing usable), "cut" (answers that were kept), "asked longer", "asked again".
        cut: hashes of the answers that were kept although they were cut.
    """

    def __init__(
        self,
        scheduler: Scheduler | None = None,
        *,
        limits: Limits | None = None,
        on_length: OnLength = "drop",
        top_p: float = 1.0,
    ) -> None:
        if on_length not in ("drop", "keep"):
            raise ValueError(f"on_length: expected drop or keep, got {on_length!r}; choose one of them")
        self.scheduler = scheduler or Scheduler(quiet=True)
        self.limits, self.on_length, self.top_p = limits or Limits(), on_length, top_p
        self.counts: dict[str, Counter[str]] = {}
        self.cut: set[int] = set()
        self._first = FirstReplies(self.scheduler.unreadable)

    async def ask(
        self,
        agent: AnyAgent,
        task: str,
        fields: Mapping[str, str],
        seed: int,
        *,
        read: Callable[[str], T | None],
        temperature: float = 0.0,
        row: str = "",
    ) -> T | None:
        """The meaning of a reply to the prompt of a task; None where it failed or cannot be read.

        Args:
            fields: of the prompt.
            read: parser, text -> meaning, or None if it cannot be read.
            row: id of the row that it is asked for.
        """
        options = {"read": read, "temperature": temperature, "row": row}
        return (await self.explained(agent, task, fields, seed, **options))[0]

    async def explained(
        self,
        agent: AnyAgent,
        task: str,
        fields: Mapping[str, str],
        seed: int,
        *,
        read: Callable[[str], T | None],
        temperature: float = 0.0,
        row: str = "",
    ) -> tuple[T | None, Reply]:
        """As `ask`: the meaning or None, and the reply that has it, or that says why there is none."""
        messages = prompts.request_messages(task, **fields)
        limit = self.limits.of(task, fields)
        request = Request(task, messages, seed, temperature, limit, self.top_p, schema_of(task, fields), row)
        request, reply, is_usable = await self._reply(agent, request, longer=True)
        if not is_usable:
            return None, reply
        meaning, repeats = read(reply.text), 0
        while meaning is None and repeats < REPEATS and getattr(agent, "converses", True):
            repeats += 1
            again = await self._again(agent, request, reply, fields)
            if again is None:
                break
            reply, meaning = again, read(again.text)
        self._read(agent, task, reply, meaning is not None)
        return meaning, reply

    def _read(self, agent: AnyAgent, task: str, reply: Reply, is_read: bool) -> None:
        """Count whether a whole reply could be read."""
        self.counts[task]["unreadable"] += not is_read
        if is_read:
            self._first.used(agent, task)
        else:
            self._first.unread(agent, task, reply, _limit_option(task))

    async def _again(self, agent: AnyAgent, request: Request, reply: Reply, fields: Mapping[str, str]) -> Reply | None:
        """The reply to a request whose former reply cannot be read, with a line that says what was missing."""
        self.counts[request.task]["asked again"] += 1
        former = (Message("assistant", reply.text or "(nothing)"), Message("user", missing_line(request.task, fields)))
        again = await self.scheduler.ask(agent, replace(request, messages=(*request.messages[:1], *former)))
        return None if again.reason else again

    async def converse(
        self,
        agent: AnyAgent,
        messages: Sequence[Message],
        seed: int,
        *,
        task: str = "answer",
        temperature: float = 0.0,
        longer: bool = False,
        row: str = "",
    ) -> str | None:
        """The next turn of a conversation ("answer": the assistant's, "user": the user's); None where blank.

        Args:
            longer: ask once more, with twice the limit, for a turn that was cut.
        """
        request = Request(task, tuple(messages), seed, temperature, self.limits.answer, self.top_p, "", row)
        _, reply, is_usable = await self._reply(agent, request, longer=longer)
        if not is_usable:
            return None
        text = reply.text.strip()
        self._read(agent, task, reply, bool(text))
        return text or None

    async def _reply(self, agent: AnyAgent, request: Request, *, longer: bool) -> tuple[Request, Reply, bool]:
        """The request as it was last asked, its reply, and whether that is whole or kept as it is; counts it."""
        if request.task not in self.counts:
            self.counts[request.task] = Counter(asked=0, failed=0, unreadable=0)
        counts = self.counts[request.task]
        counts["asked"] += 1
        reply = await self.scheduler.ask(agent, request)
        is_kept = self.on_length == "keep" and request.task == "answer" and reply.is_cut
        if reply.reason == "length" and longer and not is_kept:
            counts["asked longer"] += 1
            request = replace(request, max_tokens=2 * request.max_tokens)
            reply = await self.scheduler.ask(agent, request)
        if is_kept:
            counts["cut"] += 1
            self.cut.add(_signature(reply.text))
        elif reply.reason:
            counts["failed"] += 1
            counts[f"failed: {reply.reason}"] += 1
            if reply.is_cut:
                self._first.unread(agent, request.task, reply, _limit_option(request.task))
            return request, reply, False
        return request, reply, True

    def marks(self, *answers: str | None) -> dict[str, str]:
        """Attributes of a row with these answers: finish="length" where one was cut."""
        return {"finish": "length"} if any(answer and _signature(answer) in self.cut for answer in answers) else {}

    def repeats(self) -> dict[str, dict[str, int]]:
        """task -> "asked again" and "asked longer", for the tasks that have any."""
        names = ("asked again", "asked longer")
        repeated = {
            task: {name: counts[name] for name in names if counts[name]} for task, counts in sorted(self.counts.items())
        }
        return {task: counts for task, counts in repeated.items() if counts}

    def statistics(self) -> dict[str, dict[str, int]]:
        """task -> counts, as plain JSON: "asked", "failed" and "unreadable", then the others by name.

        Their order does not depend on that of the replies.
        """
        return {task: _ordered(counts) for task, counts in sorted(self.counts.items())}


def _ordered(counts: Counter[str]) -> dict[str, int]:
    first = ("asked", "failed", "unreadable")
    return {name: counts[name] for name in (*first, *sorted(set(counts) - set(first)))}


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
        help_ = advice if task in ANSWERS else f"raise {_limit_option(task)}"
        check_missing(f"replies to {task!r}", reasons, counts["asked"], most, help_)


def _limit_option(task: str) -> str:
    """The option with the limit of a task's replies (see Limits)."""
    if task in VERDICTS:
        return "--judge-max-tokens"
    if task in ANSWERS:
        return "--max-tokens"
    return "--evolve-max-tokens" if task == "evolve" else "--rewrite-max-tokens"


def _signature(answer: str) -> int:
    """A number of 64 bits for an answer, blanks around it aside."""
    return int.from_bytes(hashlib.blake2b(answer.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest())


def as_read(text: str) -> str | None:
    """Parser of plain text: the text without surrounding blanks, None if nothing remains."""
    return text.strip() or None
