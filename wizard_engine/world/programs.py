"""The world's programs by name, and their registration as agents."""

from collections.abc import Callable
from functools import partial

from wizard_engine.agents import registry
from wizard_engine.agents.protocol import Agent

from .agents import Answerer, Evolver, Habits, Optimizer
from .judges import Judge, Ranker

HABITS = {
    "world:expert": Habits(slip=0.03, mistake=0.0, asks=1.0, repairs=0.85),
    "world:careless": Habits(slip=0.2, mistake=0.03, asks=0.4, repairs=0.6),
    "world:terse": Habits(slip=0.05, mistake=0.05, asks=0.3, repairs=0.5, form="terse"),
    "world:rambler": Habits(slip=0.1, mistake=0.05, asks=0.6, repairs=0.6, form="chat"),
}
PROGRAMS: dict[str, Callable[[], Agent]] = {
    **{name: partial(Answerer, name, habits) for name, habits in HABITS.items()},
    "world:evolver": Evolver,
    "world:optimizer": Optimizer,
    "world:judge": Judge,
    "world:ranker": Ranker,
}


def program(name: str) -> Agent:
    """The program of a name such as "world:expert".

    Raises:
        ValueError: no such program.
    """
    if name not in PROGRAMS:
        raise ValueError(f"world program: expected one of {', '.join(PROGRAMS)}, got {name!r}; choose one of them")
    return PROGRAMS[name]()


def register() -> None:
    """Makes the programs known to `agents.make_agent` under their names."""
    for name, factory in PROGRAMS.items():
        registry.register(name, factory)
