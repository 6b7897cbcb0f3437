"""What a stage will ask and what that costs, without a call.

The stage runs on its rows with stand-ins for its agents. A stand-in takes what the ledger holds; to every other request
it gives a whole and readable reply of the length that is usual for the task: the mean of the agent's stored replies, or
a length that follows from the prompt. So the calls that do not depend on what replies say are exact. Those that do
(lessons from lost battles, evolutions that are eliminated) are of a run in which evolutions pass, answers differ, and
judges prefer one or the other at random.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from . import prompts
from .endpoint import PREFIX, EndpointAgent
from .ledger import Ledger, request_key
from .prices import Price
from .protocol import Reply, Request
from .replies import REWRITTEN_HEADING
from .scheduler import Scheduler

T = TypeVar("T")
# Bytes of a token: of ASCII text, and of text in other scripts.
ASCII_BYTES, OTHER_BYTES = 4.0, 2.5
# Tokens of a reply, where the ledger has none: those of verdicts with their explanation, and of short texts.
USUAL_TOKENS = {
    "compare": 8,
    "judge": 250,
    "rate": 200,
    "suggest": 60,
    "analyse": 200,
    "optimise": 250,
    "tag": 25,
    "user": 40,
}
_ANSWER_TOKENS, _ADDED_TOKENS = 150, 25
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge")


def count_tokens(text: str) -> int:
    """About how many tokens a text has, for a vocabulary of the usual size."""
    ascii_bytes = sum(sign < "\x80" for sign in text)
    return round(ascii_bytes / ASCII_BYTES + (len(text.encode()) - ascii_bytes) / OTHER_BYTES)


@dataclass
class Line:
    """Calls of one agent and task: those to make with their tokens, and those that the ledger has."""

    calls: int = 0
    stored: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


@dataclass
class StandIn:
    """Counts the requests to an agent, and answers them without it.

    Attributes:
        answer_tokens: length of answers that the ledger has no example of.
    """

    name: str
    fingerprint: str
    ledger: Ledger | None
    price: Price = field(default_factory=Price)
    concurrency_: int = 0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    answer_tokens: int = _ANSWER_TOKENS
    lines: dict[str, Line] = field(default_factory=dict)
    is_instant: bool = True
    converses: bool = False

    def __post_init__(self) -> None:
        self._usual = self.ledger.averages(self.fingerprint) if self.ledger is not None else {}
        self._asked: set[bytes] = set()

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        line = self.lines.setdefault(request.task, Line())
        key = request_key(self.fingerprint, request)
        is_new = key[:8] not in self._asked
        self._asked.add(key[:8])
        stored = self.ledger.lookup([key]).get(key) if self.ledger is not None else None
        if stored is not None:
            line.stored += is_new
            return stored
        text = stand_in_text(request, self.name, self.answer_tokens)
        # The ledger answers a request that was made before.
        tokens_in, tokens_out, seconds = self._measure(request, text) if is_new else (0, 0, 0.0)
        line.calls += is_new
        line.tokens_in += tokens_in
        line.tokens_out += tokens_out
        line.seconds += seconds
        return Reply(text)

    def _measure(self, request: Request, text: str) -> tuple[int, int, float]:
        tokens_in = sum(count_tokens(message.content) + 4 for message in request.messages)
        _, _, usual_out, seconds = self._usual.get(request.task, (0, 0, 0, 0.0))
        tokens_out = usual_out or USUAL_TOKENS.get(request.task) or count_tokens(text)
        return tokens_in, min(round(tokens_out), request.max_tokens), seconds


def stand_in_text(request: Request, name: str, answer_tokens: int) -> str:
    """A whole and readable reply to a request; different requests and agents get different texts."""
    content = "\0".join(message.content for message in request.messages)
    rng = random.Random(hashlib.sha256(f"{name}\0{request.seed}\0{content}".encode("utf-8", "surrogatepass")).digest())
    if request.task in ("answer", "user"):
        return _words(rng, answer_tokens)
    fields = prompts.parse(request.task, request.messages[0].content)
    if request.task == "evolve":
        return f"{REWRITTEN_HEADING}\n{fields['instruction']} {_words(rng, _ADDED_TOKENS)}"
    if request.task == "rewrite":
        return f"{fields['answer']} {_words(rng, 4)}"
    if request.task == "label":
        return "\n".join("1" for line in fields["answer_steps"].splitlines() if line.strip())
    if request.task == "rank":
        count = len(re.findall(r"(?m)^\d+\. ", fields["instructions"]))
        return "\n".join(f"{number}: {rng.randint(1, 10)}" for number in range(1, count + 1))
    if request.task == "judge":
        first, second = (_score(fields[name]) for name in ("answer_a", "answer_b"))
        return f"[[{first}]] [[{second}]]"
    fixed = {
        "compare": "Not Equal",
        "rate": f"[[{rng.randint(1, 10)}]]",
        "optimise": f"```\n1. {_words(rng, 60)}\n```",
        "tag": "Topic: cooking\nSkill: addition\nDifficulty: easy",
    }
    return fixed.get(request.task) or _words(rng, USUAL_TOKENS.get(request.task, 60))


def _score(answer: str) -> int:
    """Of an answer, the same in both orders."""
    return 1 + hashlib.sha256(answer.encode("utf-8", "surrogatepass")).digest()[0] % 10


def _words(rng: random.Random, tokens: int) -> str:
    text = " ".join(rng.choices(_WORDS, k=max(1, round(tokens * ASCII_BYTES / 6))))
    return text.capitalize() + "."


class StandInCast:
    """The stand-ins of a recipe's agents; takes the place of a Cast.

    Args:
        ledger: of the runs before, if there is one.   prices: by model, for endpoints whose specs give none.
        answer_tokens: usual length of an answer.
    """

    def __init__(self, ledger: Path, prices: dict[str, Price] | None = None, *, answer_tokens: int = _ANSWER_TOKENS):
        self.ledger = Ledger(ledger) if ledger.exists() else None
        self.scheduler, self.prices, self.answer_tokens = Scheduler(quiet=True), prices or {}, answer_tokens
        self._made: dict[str, StandIn] = {}

    def agent(self, spec: str | Path) -> StandIn:
        """The stand-in of a spec.

        Raises:
            ValueError: an endpoint's spec that cannot be used.
        """
        spec = str(spec)
        if spec not in self._made:
            self._made[spec] = self._make(spec)
        return self._made[spec]

    def optional(self, spec: str | None) -> StandIn | None:
        """The stand-in of a spec, None for none."""
        return None if spec is None else self.agent(spec)

    def conduct(self, work: Callable[[], T]) -> T:
        """The result of `work`."""
        return work()

    def _make(self, spec: str) -> StandIn:
        if not spec.startswith(PREFIX):
            return StandIn(spec, spec, None, answer_tokens=self.answer_tokens)
        agent = EndpointAgent.from_spec(spec)
        is_priced = agent.price.tokens_in or agent.price.tokens_out
        return StandIn(
            agent.name,
            agent.fingerprint,
            self.ledger,
            agent.price if is_priced else self.prices.get(agent.model, agent.price),
            agent.concurrency,
            agent.options.requests_per_minute,
            agent.options.tokens_per_minute,
            self.answer_tokens,
        )

    def close(self) -> None:
        """Closes the ledger."""
        if self.ledger is not None:
            self.ledger.close()

    def estimate(self, scale: float = 1.0) -> dict[str, Any]:
        """Calls, tokens, cost and hours by agent and task, and in all, as JSON; each multiplied by `scale`."""
        agents = {agent.name: _agent(agent, scale) for agent in self._made.values() if agent.lines}
        totals = {name: sum(entry[name] for entry in agents.values()) for name in ("calls", "stored", *_TOKENS, "cost")}
        hours = [entry["hours"] for entry in agents.values() if entry["hours"] is not None]
        # Agents work at the same time: the slowest one sets the pace.
        return {"agents": agents, **totals, "hours": max(hours, default=None)}


_TOKENS = ("tokens_in", "tokens_out")


def _agent(agent: StandIn, scale: float) -> dict[str, Any]:
    tasks = {
        task: {name: round(scale * getattr(line, name)) for name in ("calls", "stored", *_TOKENS)}
        for task, line in sorted(agent.lines.items())
    }
    totals = {name: sum(task[name] for task in tasks.values()) for name in ("calls", "stored", *_TOKENS)}
    cost = agent.price.of(totals["tokens_in"], totals["tokens_out"])
    seconds = scale * sum(line.seconds for line in agent.lines.values())
    paces = [seconds / agent.concurrency_ / 3600] if seconds and agent.concurrency_ else []
    paces += [totals["calls"] / agent.requests_per_minute / 60] if agent.requests_per_minute else []
    tokens = totals["tokens_in"] + totals["tokens_out"]
    paces += [tokens / agent.tokens_per_minute / 60] if agent.tokens_per_minute else []
    return {"tasks": tasks, **totals, "cost": cost, "hours": max(paces, default=None)}


def shown_estimate(estimate: dict[str, Any]) -> str:
    """An estimate as a table."""
    lines = [f"{'agent':<28}{'task':<10}{'calls':>10}{'stored':>10}{'tokens in':>14}{'tokens out':>14}"]
    for name, agent in estimate["agents"].items():
        for task, line in agent["tasks"].items():
            counts = f"{line['calls']:>10}{line['stored']:>10}{line['tokens_in']:>14}{line['tokens_out']:>14}"
            lines.append(f"{name[:27]:<28}{task:<10}{counts}")
        hours = "unknown: no call was timed yet" if agent["hours"] is None else f"{agent['hours']:.2f}"
        lines.append(f"{name[:27]:<28}cost {agent['cost']:.2f}, hours {hours}")
    hours = "unknown" if estimate["hours"] is None else f"{estimate['hours']:.2f}"
    lines.append(
        f"in all {estimate['calls']} calls ({estimate['stored']} more are in the ledger), "
        f"{estimate['tokens_in']} tokens in, {estimate['tokens_out']} out, cost {estimate['cost']:.2f}, hours {hours}"
    )
    return "\n".join(lines)
