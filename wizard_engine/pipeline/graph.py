"""The graph of a run: its stages with their configurations, what each reads of others, and what is done of it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from wizard_engine.runtime.stage import StageState, path_of

C = TypeVar("C")


@dataclass(frozen=True)
class Node:
    """A stage of a run.

    Attributes:
        where: its directory under the run's, such as slice_1/sft.
        recipe: name of the recipe that runs it.   config: of that recipe.
        table: of a run file with its options.
        is_main_only: it runs on one rank, whatever the number of ranks.
        learns: row files of which at least one must have a row.
        stands_for: what later stages read of this one -> what they read instead where it is left out; None: nothing,
            and they are left out too.
    """

    where: str
    recipe: str
    config: Any
    table: str = ""
    is_main_only: bool = False
    learns: tuple[Path, ...] = ()
    stands_for: Mapping[Path, Path | None] = dataclasses.field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Its directory."""
        return self.config.out


State = Literal["done", "depends", "stale", "partly done", "to run", "running", "left out"]


@dataclass(frozen=True)
class Status:
    """What there is of a stage, and why it is not done, in words.

    stale: of another configuration or other inputs.   depends: done, unless a stage before it, which is still to run,
    writes something else.   running, left out: of a run under way alone.
    """

    state: State
    why: str = ""


def paths_of(value: Any) -> list[Path]:
    """Every path in an option's value, in a configuration, and in texts that name agents by their directories."""
    if dataclasses.is_dataclass(value):
        return [path for field in dataclasses.fields(value) for path in paths_of(getattr(value, field.name))]
    if isinstance(value, Path):
        return [value]
    if isinstance(value, str) and "/" in value and "://" not in value:
        # NAME=DIR and FILE#FIELD of the arena.
        return [path_of(value.partition("=")[2].partition("#")[0] or value)]
    if isinstance(value, tuple | list):
        return [path for item in value for path in paths_of(item)]
    return []


def with_paths(config: C, replaced: Mapping[Path, Path]) -> C:
    """A configuration with other paths in place of some."""
    if dataclasses.is_dataclass(config):
        fields = {field.name: with_paths(getattr(config, field.name), replaced) for field in dataclasses.fields(config)}
        changed = {name: value for name, value in fields.items() if value != getattr(config, name)}
        return dataclasses.replace(config, **changed) if changed else config
    if isinstance(config, Path):
        return replaced.get(config, config)
    if isinstance(config, str) and "/" in config and "://" not in config:
        # NAME=DIR and FILE#FIELD of the arena.
        name, sign, rest = config.rpartition("=")
        path, mark, field = rest.partition("#")
        return f"{name}{sign}{replaced.get(Path(path), path)}{mark}{field}"
    if isinstance(config, tuple):
        return tuple(with_paths(item, replaced) for item in config)
    return config


def parents(node: Node, nodes: Sequence[Node]) -> list[str]:
    """The stages whose files a stage reads."""
    read = [path for path in paths_of(node.config) if path != node.out]
    return [
        other.where
        for other in nodes
        if other.where != node.where and any(path == other.out or other.out in path.parents for path in read)
    ]


def not_made(node: Node, nodes: Sequence[Node], there: Collection[str]) -> list[str]:
    """The stages that a stage reads and that are not there, and those that they read in turn, in the graph's order."""
    by_place = {other.where: other for other in nodes}
    found: set[str] = set()
    waiting = [node]
    while waiting:
        absent = [name for name in parents(waiting.pop(), nodes) if name not in there and name not in found]
        found.update(absent)
        waiting += [by_place[name] for name in absent]
    return [other.where for other in nodes if other.where in found]


def statuses(nodes: Sequence[Node], stage_of: Mapping[str, Any]) -> dict[str, Status]:
    """What there is of every stage.

    Args:
        stage_of: recipe -> function of a configuration that gives its Stage.
    """
    known: dict[str, Status] = {}
    for node in nodes:
        behind = [name for name in parents(node, nodes) if name in known and known[name].state != "done"]
        stale = [name for name in behind if known[name].state == "stale"]
        absent = [path for path in paths_of(node.config) if node.out not in path.parents and not path.exists()]
        is_made = (node.out / "stage.json").exists()
        if stale and is_made:
            known[node.where] = Status("stale", f"reads what {stale[0]} will write anew")
        elif behind and (absent or stale):
            known[node.where] = Status("depends" if is_made else "to run", f"reads what {behind[0]} will write")
        else:
            state: StageState = stage_of[node.recipe](node.config).state()
            is_open = state.kind == "done" and behind
            known[node.where] = (
                Status("depends", f"reads what {behind[0]} will write")
                if is_open
                else Status(_NAMES[state.kind], state.why)
            )
    return known


_NAMES: Mapping[str, State] = {
    "done": "done",
    "other": "stale",
    "begun": "partly done",
    "new": "to run",
    "waits": "to run",
}


def shown_graph(nodes: Sequence[Node], known: Mapping[str, Status]) -> str:
    """A line for each stage: its place, recipe, state, and what it reads."""
    width = max(len(node.where) for node in nodes)
    lines = []
    for node in nodes:
        status = known[node.where]
        reads = ", ".join(parents(node, nodes)) or "the run's own files"
        why = f" ({status.why})" if status.why and status.state != "to run" else ""
        lines.append(f"{node.where:{width}}  {status.state:11} <- {reads}{why}")
    return "\n".join(lines)
