"""Agents by name: registered programs, checkpoint directories, endpoints."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path

from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.runtime.process import Runtime

from .endpoint import PREFIX, EndpointAgent
from .ledger import Ledger, LedgeredAgent
from .local import LocalAgent
from .protocol import Agent
from .split import SplitAgent

_FACTORIES: dict[str, Callable[[], Agent]] = {}


def register(name: str, factory: Callable[[], Agent]) -> None:
    """Makes an agent available under a name such as `world:judge`; a later registration replaces an earlier one."""
    _FACTORIES[name] = factory


def registered() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make_agent(
    spec: str | Path,
    ledger: Ledger | None = None,
    *,
    device: str = "cpu",
    batch_size: int = 256,
    runtime: Runtime | None = None,
    quiet: bool = False,
    chat_format: ChatFormatChoice = "auto",
) -> Agent:
    """The agent of a specification, as recipes accept it.

    Args:
        spec: a registered name, a directory with a saved model (see model.save_model), or an endpoint:
            `openai:MODEL`, `openai:MODEL@URL`, `openai:MODEL@URL#concurrency=16,budget=1000000` (see endpoint.Options).
        ledger: if given, every call goes through it.
        device: of a checkpoint; with a runtime, that of the runtime.
        batch_size: calls of one transaction; for a checkpoint also conversations generated together.
        runtime: with several ranks, the requests are sharded over the ranks and every rank gets all replies.
        quiet: no progress bar (see LedgeredAgent).
        chat_format: of a directory's model, see `chat_format.chosen_format`.
    Raises:
        ValueError: neither a registered name nor a directory with a model, or an endpoint that cannot be asked.
    """
    device = str(runtime.device) if runtime else device
    agent = _make(str(spec), device, batch_size, runtime.world_size if runtime else 1, chat_format)
    # Calls that cost money are stored in smaller batches, so that a stop loses few of them.
    batch_size = min(batch_size, getattr(agent, "batch_size", batch_size)) if _is_endpoint(spec) else batch_size
    if ledger is not None:
        agent = LedgeredAgent(agent, ledger, batch_size=batch_size, quiet=quiet)
    if runtime is not None and runtime.world_size > 1:
        agent = SplitAgent(agent, runtime.rank, runtime.world_size)
    return agent


class Cast:
    """The agents of one recipe by their specs, each made once, all with one ledger.

    Args:
        ledger: SQLite file of every call; created if it does not exist.
        runtime: with several ranks, requests are sharded over the ranks.
        batch_size, quiet, chat_format: as for make_agent.
    """

    def __init__(
        self,
        ledger: Path,
        runtime: Runtime,
        *,
        batch_size: int = 256,
        quiet: bool = False,
        chat_format: ChatFormatChoice = "auto",
    ) -> None:
        self.ledger, self.runtime, self.batch_size, self.quiet = Ledger(ledger), runtime, batch_size, quiet
        self.chat_format = chat_format
        self._made: dict[str, Agent] = {}

    def agent(self, spec: str) -> Agent:
        """The agent of a spec.

        Raises:
            ValueError: as for make_agent.
        """
        if spec not in self._made:
            self._made[spec] = make_agent(
                spec,
                self.ledger,
                batch_size=self.batch_size,
                runtime=self.runtime,
                quiet=self.quiet,
                chat_format=self.chat_format,
            )
        return self._made[spec]

    def close(self) -> None:
        """Closes the ledger, and says on stderr what the agents' replies held and nobody used.

        The agents of this cast accept no further requests.
        """
        for agent in self._made.values():
            while hasattr(agent, "agent"):
                agent = agent.agent
            for line in getattr(agent, "notes", list)():
                print(line, file=sys.stderr, flush=True)
        self._made.clear()
        self.ledger.close()

    def optional(self, spec: str | None) -> Agent | None:
        """The agent of a spec, None for none."""
        return None if spec is None else self.agent(spec)


def _is_endpoint(spec: str | Path) -> bool:
    return str(spec).startswith(PREFIX)


def _make(spec: str, device: str, batch_size: int, ranks: int, chat_format: ChatFormatChoice) -> Agent:
    if spec in _FACTORIES:
        return _FACTORIES[spec]()
    if _is_endpoint(spec):
        return EndpointAgent.from_spec(spec, ranks=ranks)
    if (Path(spec) / "config.json").is_file():
        return LocalAgent.from_directory(spec, device=device, batch_size=batch_size, chat_format=chat_format)
    near = difflib.get_close_matches(spec, registered(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(registered()) or 'none'}"
    kinds = "a registered name, openai:MODEL@URL, or a directory holding a saved model"
    raise ValueError(f"agent: expected {kinds}, got {spec!r}; {hint}")
