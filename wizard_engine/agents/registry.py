"""Agents by name: registered programs, checkpoint directories, endpoints."""

import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.stage import SCRIPTED

from .endpoint import PREFIX, EndpointAgent
from .endpoint_options import endpoint_name, parse_spec
from .ledger import Ledger
from .local import LocalAgent
from .missing import MAX_MISSING, TooManyMissing
from .prices import Price
from .protocol import Agent, ConcurrentAgent
from .ranks import RankedAgent, Ranks
from .reference import AGENTS
from .scheduler import Scheduler
from .scripted import ScriptedAgent
from .unreadable import FIRST_REQUESTS

T = TypeVar("T")

_FACTORIES: dict[str, Callable[[], Agent]] = dict(AGENTS)


def register(name: str, factory: Callable[[], Agent]) -> None:
    """Makes an agent available under a name such as `world:judge`; a later registration replaces an earlier one."""
    _FACTORIES[name] = factory


def registered() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make_agent(
    spec: str | Path, *, device: str = "cpu", batch_size: int = 256, chat_format: ChatFormatChoice = "auto"
) -> Agent | ConcurrentAgent:
    """The agent of a specification, as recipes accept it.

    Args:
        spec: a registered name, a directory with a saved model (see model.save_model), a file of replies,
            `scripted:FILE` (see scripted), or an endpoint: `openai:MODEL`, `openai:MODEL@URL`,
            `openai:MODEL@URL#concurrency=16,budget=1000000` (see endpoint.Options).
        device: of a checkpoint.
        batch_size: conversations that a checkpoint generates together.
        chat_format: of a checkpoint, see `chat_format.chosen_format`.
    Raises:
        ValueError: neither a registered name nor a directory with a model, or an endpoint that cannot be asked.
    """
    spec = str(spec)
    if spec in _FACTORIES:
        return _FACTORIES[spec]()
    if spec.startswith(PREFIX):
        agent = EndpointAgent.from_spec(spec)
        agent.set_price()
        return agent
    if spec.startswith(SCRIPTED):
        return ScriptedAgent(spec.removeprefix(SCRIPTED))
    if (Path(spec) / "config.json").is_file():
        return LocalAgent.from_directory(spec, device=device, batch_size=batch_size, chat_format=chat_format)
    near = difflib.get_close_matches(spec, (*registered(), SCRIPTED), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(registered()) or 'none'}"
    kinds = "a registered name, scripted:FILE, openai:MODEL@URL, or a directory holding a saved model"
    raise ValueError(f"agent: expected {kinds}, got {spec!r}; {hint}")


def name_of(spec: str | Path) -> str:
    """The name under which the agent of a specification stands in ledgers; nothing is loaded or asked.

    Raises:
        ValueError: an endpoint's specification that cannot be read.
    """
    spec = str(spec)
    if spec in _FACTORIES:
        return spec
    if spec.startswith(PREFIX):
        model, url, _ = parse_spec(spec)
        return endpoint_name(model, url)
    place = SCRIPTED if spec.startswith(SCRIPTED) else ""
    return place + "/".join(Path(spec.removeprefix(SCRIPTED)).parts[-3:])


class Cast:
    """The agents of one recipe by their specs, each made once, and the scheduler that asks them through one ledger.

    With several ranks, rank 0 runs the recipe's calls (`conduct`), and the others answer for it with their own copies
    of the models and programs.

    Args:
        ledger: SQLite file of every call; created if it does not exist.
        batch_size: conversations generated together.   quiet: no progress bar.
        prices: by model, for endpoints whose specs give none (see prices.read_prices).
        chat_format: of models of this machine, see `chat_format.chosen_format`.
        max_missing: largest share of missing replies; with 1 no stage ends because of unreadable ones.
    """

    def __init__(
        self,
        ledger: Path,
        runtime: Runtime,
        *,
        batch_size: int = 256,
        quiet: bool = False,
        prices: Mapping[str, Price] | None = None,
        chat_format: ChatFormatChoice = "auto",
        max_missing: float = MAX_MISSING,
    ) -> None:
        self.runtime, self.batch_size, self.prices = runtime, batch_size, prices or {}
        self.chat_format = chat_format
        self.ledger: Ledger | None = None
        # Where rank 0 cannot open it, no rank waits for it.
        from_main(runtime, lambda: self._open(ledger))
        # A batch of several ranks has as many requests for each as a batch of one.
        size, unreadable = batch_size * runtime.world_size, FIRST_REQUESTS if max_missing < 1 else 0
        self.scheduler = Scheduler(self.ledger, batch_size=size, quiet=quiet, unreadable=unreadable)
        self.ranks = Ranks(runtime, self._local)
        self._made: dict[str, Agent | ConcurrentAgent] = {}
        self._locals: dict[str, Agent] = {}

    def _open(self, path: Path) -> None:
        self.ledger = Ledger(path)

    def agent(self, spec: str | Path) -> Agent | ConcurrentAgent:
        """The agent of a spec, on rank 0.

        Raises:
            ValueError: as for make_agent.
        """
        spec = str(spec)
        if spec not in self._made:
            self._made[spec] = self._make(spec)
        return self._made[spec]

    def optional(self, spec: str | None) -> Agent | ConcurrentAgent | None:
        """The agent of a spec, None for none."""
        return None if spec is None else self.agent(spec)

    def conduct(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by rank 0, on every rank. Rank 0's ValueError is raised on all of them."""

        def with_example() -> T:
            try:
                return work()
            except TooManyMissing as error:
                reason = max(error.reasons, key=error.reasons.__getitem__)
                example = self.scheduler.examples.get(reason, "")
                # "timeout" alone does not say after what; a status alone is all there is to say.
                raise ValueError(f"{error}; one of them: {example}" if example not in ("", reason) else error) from None

        return self.ranks.conduct(with_example)

    def _make(self, spec: str) -> Agent | ConcurrentAgent:
        if not spec.startswith(PREFIX):
            agent = self._local(spec)
            return agent if self.runtime.world_size == 1 else RankedAgent(self.ranks, spec, agent)
        agent = EndpointAgent.from_spec(spec)
        agent.set_price(self.prices.get(agent.model))
        if self.ledger is not None:
            agent.resume(*self.ledger.spent(agent.fingerprint))
        return agent

    def _local(self, spec: str) -> Agent:
        if spec not in self._locals:
            how = {"device": str(self.runtime.device), "batch_size": self.batch_size, "chat_format": self.chat_format}
            self._locals[spec] = make_agent(spec, **how)
        return self._locals[spec]

    def close(self) -> None:
        """Closes the ledger, and says on stderr what the agents' replies held and nobody used.

        The agents of this cast accept no further requests.
        """
        for agent in self._made.values():
            for line in getattr(agent, "notes", list)():
                print(line, file=sys.stderr, flush=True)
        self._made.clear()
        self._locals.clear()
        if self.ledger is not None:
            self.ledger.close()
