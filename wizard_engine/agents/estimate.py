"""What a stage will ask and what that costs, without a call.

The stage runs on its rows with stand-ins for its agents. A stand-in takes what the ledger holds; to every other request
it gives a whole and readable reply of the length that is usual for the task: the mean of the agent's stored replies, or
a length that follows from the prompt. So the calls that do not depend on what replies say are exact. Those that do
(lessons from lost battles, evolutions that are eliminated) are of a run in which evolutions pass, answers differ, and
judges prefer one or the other at random. How many more calls verdicts may bring is said beside them. Tokens of prompts
are counted by their bytes; where the ledger has replies to the same task, what the agent counted for their prompts sets
the scale.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from wizard_engine.runtime.stage import SCRIPTED

from . import prompts
from .endpoint import PREFIX, EndpointAgent
from .ledger import Ledger, request_key
from .prices import Price
from .protocol import Reply, Request
from .registry import make_agent, registered
from .replies import REWRITTEN_HEADING
from .scheduler import Scheduler
from .seen import Seen

T = TypeVar("T")
# Bytes of a token: of ASCII text, and of text in other scripts.
ASCII_BYTES, OTHER_BYTES = 4.0, 2.5
# Tokens of a reply, where the ledger has none: those of verdicts with their explanation, and of short texts.
USUAL_TOKENS = {
    "compare": 8,
    "diagnose": 60,
    "judge": 250,
    "rate": 200,
    "suggest": 60,
    "analyse": 200,
    "optimise": 250,
    "tag": 25,
    "user": 40,
}
_ANSWER_TOKENS = 150
# Replies that extend a field of their prompt, and what they add to it.
EXTENDED = {"evolve": "instruction", "rewrite": "answer"}
DEFAULT_LENGTHS = USUAL_TOKENS | {"answer": _ANSWER_TOKENS, "evolve": 25, "rewrite": 25, "optimise": 60}
# Stored replies of a task whose length is measured.
SAMPLED_REPLIES = 300
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge")


def count_tokens(text: str) -> int:
    """About how many tokens a text has, for a vocabulary of the usual size."""
    ascii_bytes = sum(sign < "\x80" for sign in text)
    return round(ascii_bytes / ASCII_BYTES + (len(text.encode()) - ascii_bytes) / OTHER_BYTES)


@dataclass
class Open:
    """Things whose number verdicts decide: how many are counted, how many there can be, and the most calls of one."""

    what: str
    taken: int
    most: int
    calls: int

    @property
    def more(self) -> int:
        """Calls that may come on top."""
        return (self.most - self.taken) * self.calls


class CountingScheduler(Scheduler):
    """A scheduler of stand-ins, which remembers what the calls depend on."""

    def __init__(self) -> None:
        super().__init__(quiet=True, unreadable=0)
        self.open: list[Open] = []

    def at_most(self, what: str, *, taken: int, most: int, calls: int) -> None:
        """Remember it."""
        self.open.append(Open(what, taken, most, calls))


@dataclass
class Line:
    """Calls of one agent and task: those to make with their tokens, and those that the ledger has.

    known_in, counted_in: tokens of stored prompts, as the agent counted them and by their bytes.
    """

    calls: int = 0
    stored: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    known_in: int = 0
    counted_in: int = 0


@dataclass
class StandIn:
    """Counts the requests to an agent, and answers them without it.

    Attributes:
        answer_tokens: length of answers that the ledger has no example of.
        spec: of a model of this machine, else None.
        converses: whether the agent is asked again where a stored reply cannot be read.
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
    spec: str | None = None

    def __post_init__(self) -> None:
        self._usual = self.ledger.averages(self.fingerprint) if self.ledger is not None else {}
        self._lengths = DEFAULT_LENGTHS | {"answer": self.answer_tokens}
        self._lengths |= {task: length for task in self._usual if (length := self._stored_length(task)) is not None}
        self._asked = Seen()

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        line = self.lines.setdefault(request.task, Line())
        key = request_key(self.fingerprint, request)
        is_new = self._asked.is_new(key)
        stored = self.ledger.lookup([key]).get(key) if self.ledger is not None else None
        if stored is not None:
            line.stored += is_new
            if is_new and stored.tokens_in:
                line.known_in += stored.tokens_in
                line.counted_in += _prompt_tokens(request)
            return stored
        text = stand_in_text(request, self.name, self._lengths)
        # The ledger answers a request that was made before.
        tokens_in, tokens_out, seconds = self._measure(request, text) if is_new else (0, 0, 0.0)
        line.calls += is_new
        line.tokens_in += tokens_in
        line.tokens_out += tokens_out
        line.seconds += seconds
        return Reply(text)

    def _stored_length(self, task: str) -> int | None:
        """Mean length of stored replies to a task, tokens by their bytes; of those that extend a text what they add."""
        lengths = []
        for call in islice(self.ledger.calls(agent=self.name, task=task), SAMPLED_REPLIES):
            if call.fingerprint == self.fingerprint and len(call.request.messages) >= 1:
                extended = EXTENDED.get(task)
                base = prompts.parse(task, call.request.messages[0].content)[extended] if extended else ""
                lengths.append(count_tokens(call.text) - count_tokens(base))
        return max(1, round(sum(lengths) / len(lengths))) if lengths else None

    def _measure(self, request: Request, text: str) -> tuple[int, int, float]:
        _, _, usual_out, seconds = self._usual.get(request.task, (0, 0, 0, 0.0))
        tokens_out = usual_out or USUAL_TOKENS.get(request.task) or count_tokens(text)
        return _prompt_tokens(request), min(round(tokens_out), request.max_tokens), seconds

    def close(self) -> None:
        """Remove the temporary file; no further requests are counted."""
        self._asked.close()

    def scale_in(self, line: Line) -> float:
        """Tokens of prompts as the agent counts them, for each one counted by bytes."""
        known = [line] if line.counted_in else list(self.lines.values())
        counted = sum(other.counted_in for other in known)
        return sum(other.known_in for other in known) / counted if counted else 1.0


def _prompt_tokens(request: Request) -> int:
    return sum(count_tokens(message.content) + 4 for message in request.messages)


def stand_in_text(request: Request, name: str, lengths: Mapping[str, int]) -> str:
    """A whole and readable reply to a request; different requests and agents get different texts.

    Args:
        lengths: of replies by task, and for those that extend a text of what they add, tokens.
    """
    content = "\0".join(message.content for message in request.messages)
    rng = random.Random(hashlib.sha256(f"{name}\0{request.seed}\0{content}".encode("utf-8", "surrogatepass")).digest())
    if request.task in ("answer", "user"):
        return _words(rng, lengths[request.task])
    fields = prompts.parse(request.task, request.messages[0].content)
    if request.task == "evolve":
        return f"{REWRITTEN_HEADING}\n{fields['instruction']} {_words(rng, lengths['evolve'])}"
    if request.task == "rewrite":
        return f"{fields['answer']} {_words(rng, lengths['rewrite'])}"
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
        "diagnose": '{"assessment": "It asks one step more.", "failures": []}',
        "rate": f"[[{rng.randint(1, 10)}]]",
        "optimise": f"```\n1. {_words(rng, lengths['optimise'])}\n```",
        "tag": "Topic: cooking\nSkill: addition\nDifficulty: easy",
    }
    return fixed.get(request.task) or _words(rng, lengths.get(request.task, 60))


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
        self.scheduler, self.prices = CountingScheduler(), prices or {}
        self.answer_tokens = answer_tokens
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
        if spec.startswith(PREFIX):
            return self._endpoint(EndpointAgent.from_spec(spec))
        if spec in registered() or spec.startswith(SCRIPTED):
            program = make_agent(spec)
            converses = getattr(program, "converses", True)
            return self._stand_in(program.name, program.fingerprint, converses=converses)
        # The weights of a model are not read: its calls are found by its name.
        name = "/".join(Path(spec).parts[-3:])
        call = next(self.ledger.calls(agent=name), None) if self.ledger is not None else None
        return self._stand_in(name, call.fingerprint if call else spec, spec=spec)

    def _endpoint(self, agent: EndpointAgent) -> StandIn:
        options = agent.options
        is_priced = options.price_in or options.price_out
        return self._stand_in(
            agent.name,
            agent.fingerprint,
            price=options.price if is_priced else self.prices.get(agent.model, Price()),
            concurrency_=options.concurrency,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
        )

    def _stand_in(self, name: str, fingerprint: str, **settings: Any) -> StandIn:
        return StandIn(name, fingerprint, self.ledger, answer_tokens=self.answer_tokens, **settings)

    def close(self) -> None:
        """Closes the ledger and removes temporary files."""
        for agent in self._made.values():
            agent.close()
        if self.ledger is not None:
            self.ledger.close()

    def estimate(self, scale: float = 1.0) -> dict[str, Any]:
        """Calls, tokens, cost and hours by agent and task, and in all, as JSON; each multiplied by `scale`.

        Cost is None where no price is known, hours where neither a limit of the endpoint nor a timed call is.
        "most_calls" is "calls" where these are exact; "depends" says what verdicts will decide.
        """
        asked = {spec: agent for spec, agent in self._made.items() if agent.lines}
        names = Counter(agent.name for agent in asked.values())
        agents = {agent.name if names[agent.name] == 1 else spec: _agent(agent, scale) for spec, agent in asked.items()}
        totals = {name: sum(entry[name] for entry in agents.values()) for name in _COUNTS}
        known = {
            name: [entry[name] for entry in agents.values() if entry[name] is not None] for name in ("cost", "hours")
        }
        # Agents work at the same time: the slowest one sets the pace.
        hours = max(known["hours"], default=None)
        totals |= {"cost": sum(known["cost"]) if known["cost"] else None, "hours": hours}
        depends = [vars(item) | {"more": item.more} for item in self.scheduler.open if item.more]
        most_calls = totals["calls"] + round(scale * sum(item["more"] for item in depends))
        return {"agents": agents, **totals, "most_calls": most_calls, "depends": depends}


_COUNTS = ("calls", "stored", "tokens_in", "tokens_out")


def _agent(agent: StandIn, scale: float) -> dict[str, Any]:
    tasks = {task: _task(agent, line, scale) for task, line in sorted(agent.lines.items())}
    totals = {name: sum(task[name] for task in tasks.values()) for name in _COUNTS}
    is_priced = agent.price.tokens_in or agent.price.tokens_out
    cost = agent.price.of(totals["tokens_in"], totals["tokens_out"]) if is_priced else None
    seconds = scale * sum(line.seconds for line in agent.lines.values())
    paces = [seconds / agent.concurrency_ / 3600] if seconds and agent.concurrency_ else []
    paces += [totals["calls"] / agent.requests_per_minute / 60] if agent.requests_per_minute else []
    tokens = totals["tokens_in"] + totals["tokens_out"]
    paces += [tokens / agent.tokens_per_minute / 60] if agent.tokens_per_minute else []
    hours = max(paces, default=None)
    kind = {"is_endpoint": agent.concurrency_ > 0, "spec": agent.spec}
    return {"tasks": tasks, **totals, "cost": cost, "hours": hours, **kind}


def _task(agent: StandIn, line: Line, scale: float) -> dict[str, int]:
    tokens_in = scale * line.tokens_in * agent.scale_in(line)
    counts = {name: round(scale * getattr(line, name)) for name in ("calls", "stored", "tokens_out")}
    return {name: round(tokens_in) if name == "tokens_in" else counts[name] for name in _COUNTS}


def shown_estimate(estimate: dict[str, Any]) -> str:
    """An estimate as a table: a line for each agent and task, one for each agent, one for all.

    Columns of cost and hours stand where an agent has them.
    """
    shown = [name for name in ("cost", "hours") if estimate[name] is not None]
    width = max([len("in all"), *map(len, estimate["agents"])])
    titles = ("calls", "stored", "tokens in", "tokens out", *shown)
    lines = [f"{'agent':<{width}}  {'task':<10}" + "".join(f"{title:>14}" for title in titles)]
    for name, agent in estimate["agents"].items():
        for task, counts in agent["tasks"].items():
            lines.append(f"{name:<{width}}  {task:<10}" + _cells(counts, []))
        if len(agent["tasks"]) > 1 or shown:
            lines.append(f"{name:<{width}}  {'in all':<10}" + _cells(agent, shown))
    lines.append(f"{'in all':<{width}}  {'':<10}" + _cells(estimate, shown))
    lines.append('"calls" are to be made; "stored" ones are in the ledger and cost nothing.')
    for item in estimate["depends"]:
        lines.append(
            f"at most {estimate['most_calls']:,} calls: verdicts that are not there yet decide how many "
            f"{item['what']} there are; {item['taken']:,} of at most {item['most']:,} are counted, each has up to "
            f"{item['calls']} calls"
        )
    if estimate["hours"] is None:
        lines.append("hours are known once some calls were timed (give --limit 20 first), or with requests_per_minute")
    return "\n".join(lines)


def _cells(line: dict[str, Any], shown: Sequence[str]) -> str:
    numbers = "".join(f"{line[name]:>14,}" for name in _COUNTS)
    return numbers + "".join(f"{'' if line[name] is None else f'{line[name]:.3g}':>14}" for name in shown)
