"""Agents by name: programs that were registered, and directories that hold a checkpoint."""

import difflib
from collections.abc import Callable
from pathlib import Path

from wizard_engine.agents.ledger import Ledger, LedgeredAgent
from wizard_engine.agents.protocol import Agent

_FACTORIES: dict[str, Callable[[], Agent]] = {}


def register(name: str, factory: Callable[[], Agent]) -> None:
    """Makes an agent available under a name such as `world:judge`; a later registration replaces an earlier one."""
    _FACTORIES[name] = factory


def registered() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make_agent(spec: str | Path, ledger: Ledger | None = None, *, device: str = "cpu", batch_size: int = 256) -> Agent:
    """The agent that a recipe's option names.

    Args:
        spec: a registered name, or a directory with a saved model (see model.save_model).
        ledger: where given, every call goes through it.
        device: where a checkpoint runs.
        batch_size: calls of one transaction; for a checkpoint also conversations decoded together.
    Raises:
        ValueError: neither a registered name nor a directory with a model.
    """
    agent = _make(str(spec), device, batch_size)
    return agent if ledger is None else LedgeredAgent(agent, ledger, batch_size=batch_size)


def _make(spec: str, device: str, batch_size: int) -> Agent:
    if spec in _FACTORIES:
        return _FACTORIES[spec]()
    if (Path(spec) / "config.json").is_file():
        from wizard_engine.agents.local import LocalAgent  # a program needs no torch

        return LocalAgent.from_directory(spec, device=device, batch_size=batch_size)
    near = difflib.get_close_matches(spec, registered(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(registered()) or 'none'}"
    raise ValueError(f"agent: expected a registered name or a directory holding a saved model, got {spec!r}; {hint}")
