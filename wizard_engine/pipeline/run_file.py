"""The run file: rows, base model, agents and options of a whole run, as TOML.

Tables with a name of `GROUPS` describe the run. A table with a stage's name ([sft], [rleif.rollout]) holds options of
that stage's recipe, by their names on its command line, for all slices; [slice_2.sft] holds those of one slice.
${NAME} in a text is the environment variable of that name, but in [launch], whose texts are for the shell.
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wizard_engine.data.text_files import read_text
from wizard_engine.runtime.option_tables import nearest, option_fields, with_table
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Seed, Share

# Stages of a slice in their usual order.
DATA_STAGES = ("evol_instruct", "evol_answer", "co_teach")
REWARD_STAGES = ("instruction_reward", "process_reward", "preference_reward")
LEARNING_STAGES = ("sft", "self_teach", "stage_dpo", *REWARD_STAGES, "rleif")
SLICE_STAGES = (*DATA_STAGES, *LEARNING_STAGES)
# Those that a run has unless its file names some: RLEIF's own factors need no preference model.
DEFAULT_STAGES = tuple(name for name in SLICE_STAGES if name != "preference_reward")
# Tables of options: the stages above, those before and behind the slices, and those between them.
STAGES = (
    *("world", "pretraining", "analysis", "held_out", "sample"),
    *SLICE_STAGES,
    *("slice_rows", "pairs", "accuracy", "arena", "mt_bench"),
)
# Tables of options that every stage with such a group takes.
SHARED = ("mesh", "sharding")
# An environment variable in a text.
VARIABLE = re.compile(r"\$\{(\w+)\}")
# What the driver itself reads of a stage's table.
USE, IN_SLICES = "use", "in-slices"
SIZES = ("demo", "135M", "1B", "7B", "70B", "8x22B")


@dataclass(frozen=True)
class Rows(Checked):
    """The run's rows."""

    data: tuple[Path, ...] = ()
    """Natural rows, in any format of docs/data.md."""
    held_out: tuple[Path, ...] = ()
    """Held-out rows, which no training row repeats."""
    held_out_limit: Count[int | None] = None
    """Rows of these files that are measured on at most, drawn at random; default: all. Training rows repeat none of
    the others either."""
    hold_out: NonNegative[int] = 0
    """Rows to keep apart as held-out rows, where there is no file of them."""
    pairs: tuple[Path, ...] = ()
    """Preference rows of your own for Stage-DPO and the preference reward model, used in every slice."""
    held_out_pairs: tuple[Path, ...] = ()
    """Held-out preference rows."""
    hold_out_pairs: NonNegative[int] = 0
    """Preference rows to keep apart in every slice, where there is no file of them."""
    reference_answers: bool = False
    """The rows' own answers are right: agents that judge and label go by them (--references answers)."""
    questions: Path | None = None
    """Two-turn questions in the form of MT-Bench; none: no such evaluation."""
    references: Path | None = None
    """Reference answers of the questions."""
    on_error: Literal["raise", "skip"] = "raise"
    """What every stage does with a row that it cannot read or learn from: stop, or count it."""
    unknown_fields: Literal["refuse", "count"] = "refuse"


@dataclass(frozen=True)
class Base(Checked):
    """The model to start from."""

    model: Path | None = None
    """Model directory."""
    size: Literal["demo", "135M", "1B", "7B", "70B", "8x22B"] | None = None
    """Row of the table of learning rates; default: by the number of its parameters."""


@dataclass(frozen=True)
class Agents(Checked):
    """Who does what: a model directory, an endpoint (openai:MODEL@URL), reference:NAME, scripted:FILE, served:NAME.

    An empty role is the teacher's; "none" leaves an optional one to nobody.
    """

    teacher: str = ""
    """Takes every role but rivals that is not named here."""
    evolver: str = ""
    answerer: str = ""
    """Answers evolved instructions, and rewrites answers."""
    judge: str = ""
    labeller: str = ""
    """Labels the steps of answers for the process reward model."""
    optimizer: str = ""
    """Improves the evolving method."""
    ranker: str = ""
    """Ranks instructions for the instruction reward model."""
    rivals: tuple[str, ...] = ()
    """Models that co-teaching compares ours with."""
    suggester: str = ""
    rewriter: str = ""
    """Rewrites lessons after a suggestion; default: the rival that won."""
    user: str = ""
    """Writes the next user turns of simulated chats."""


@dataclass(frozen=True)
class Mix(Checked):
    """Shares of the rows that earlier stages made, 0 to 1, in what later stages learn from."""

    self_taught: Share[float] = 1.0
    """Of the last slice's self-taught supervised rows, in the rows of a slice."""
    given_pairs: Share[float] = 1.0
    """Of rows.pairs, in Stage-DPO and the preference reward model; so are the next three."""
    self_teach: Share[float] = 1.0
    evol_answer: Share[float] = 1.0
    battles: Share[float] = 1.0
    """Winners and losers of co-teaching's battles."""
    fallback: Literal["evol_answer"] | None = None
    """Pairs that Stage-DPO learns from where the others give none."""


@dataclass(frozen=True)
class Measure(Checked):
    """What is measured of the model of every learning stage."""

    accuracy: bool | None = None
    """Exact answers to the held-out rows; default: where nine in ten have an answer that can be checked."""
    arena: bool | None = None
    """Blind comparison of the last slice's models on the held-out rows, by the judge; default: where there is one."""
    mt_bench: bool = True
    """Rated questions, where rows.questions has some."""
    in_training: bool = True
    """Held-out measures of the training stages themselves."""
    every: NonNegative[int] = 0
    """Steps between such measures; 0: before the first and after the last."""
    rows: Count[int] = 200
    """Held-out rows at most for the measures in training, the arena and RLEIF."""


@dataclass(frozen=True)
class Launch(Checked):
    """How stages are started where each has processes of its own."""

    separate_processes: bool = False
    """Start every stage by a torchrun of its own; otherwise all stages share the processes of the driver."""
    nodes: Count[int] = 1
    processes: Count[int] = 1
    """Processes on each node: as many as GPUs."""
    address: str = ""
    """HOST:PORT of the first node, where there are several."""
    prefix: str = ""
    """Words in front of torchrun, such as srun with its options."""
    gpu: str = "H100"
    """Kind of GPU that hours are estimated for."""
    account: str = ""
    partition: str = ""
    time: str = "24:00:00"


@dataclass(frozen=True)
class Served(Checked):
    """A model that the driver serves while a stage asks it: its agents name it served:NAME."""

    model: Path
    port: Count[int] = 8000
    words: tuple[str, ...] = ()
    """Further words of recipes/serve.py's command line."""


GROUPS = {"rows": Rows, "base": Base, "agents": Agents, "mix": Mix, "measure": Measure, "launch": Launch}


@dataclass(frozen=True)
class RunFile(Checked):
    """A run.

    Attributes:
        targets: attribute -> value -> share of the rows that are drawn; without any the rows are drawn as they are.
        options: stage -> its table.   slice_options: slice -> stage -> its table.   served: name -> served model.
        path: the file, None for a run that was made in Python.
    """

    out: Path
    """Run directory."""
    seed: Seed[int] = 0
    slices: Count[int] = 3
    """Slices of the rows, which are learned one after the other."""
    progression: Literal["continue", "union"] = "continue"
    """Start a slice from the model of the slice before, or the last slice from the base on all rows."""
    stages: tuple[str, ...] = DEFAULT_STAGES
    """Stages of a slice in their order; one may stand twice."""
    on_empty: Literal["end", "skip"] = "end"
    """What to do where a stage has no rows to learn from: end the run, or leave the stage out."""
    world: bool = False
    """The embedded world: its rows, base model, programs and questions stand for all that is not named."""
    prices: Path | None = None
    """Prices of endpoints, see --prices of the recipes."""
    threads: Count[int | None] = None
    """CPU threads of torch operations per rank."""
    quiet: bool = False
    rows: Rows = field(default_factory=Rows)
    base: Base = field(default_factory=Base)
    agents: Agents = field(default_factory=Agents)
    mix: Mix = field(default_factory=Mix)
    measure: Measure = field(default_factory=Measure)
    launch: Launch = field(default_factory=Launch)
    served: Mapping[str, Served] = field(default_factory=dict)
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    slice_options: Mapping[int, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.stages:
            if name not in SLICE_STAGES:
                raise ValueError(f"stages: expected stages of a slice, got {name!r}{nearest(name, SLICE_STAGES)}")
        learned = [place for place, name in enumerate(self.stages) if name in LEARNING_STAGES]
        late = [name for name in self.stages[learned[0] if learned else 0 :] if learned and name in DATA_STAGES]
        if late:
            raise ValueError(f"stages: expected {late[0]} before {self.stages[learned[0]]}, got it behind; move it")
        beyond = [number for number in self.slice_options if number > self.slices]
        if beyond:
            raise ValueError(
                f"slice_{beyond[0]}: expected one of {self.slices} slices; raise slices or remove the table"
            )

    def table(self, stage: str, t: int | None = None, repeat: int = 1) -> list[tuple[str, Mapping[str, Any]]]:
        """The tables of a stage with their places, the more special ones last.

        Args:
            t: slice; None for a stage that belongs to none.
            repeat: which of several times that the stage stands in `stages`; [sft_2] is of the second one.
        """
        names = [stage] if repeat == 1 else [stage, f"{stage}_{repeat}"]
        file = self.path.name if self.path else "run"
        tables = [(f"{file}: {name}", self.options[name]) for name in names if name in self.options]
        inner = self.slice_options.get(t, {}) if t is not None else {}
        return tables + [(f"{file}: slice_{t}.{name}", inner[name]) for name in names if name in inner]


def read_run_file(path: Path) -> RunFile:
    """The run of a file.

    Raises:
        ValueError: not TOML, an unknown name (the nearest is named), a value that does not fit, or an environment
            variable that is not set; names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a run file, got none; `python -m wizard_engine new-run DIR` writes one")
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from None
    told = {
        name: table if name == "launch" else with_variables(table, path.name, name) for name, table in content.items()
    }
    return run_of(told, path)


def with_variables(value: Any, file: str, *keys: str) -> Any:
    """A value of a TOML file, with environment variables in the place of their names in its texts.

    Args:
        keys: the value's place in the file, for errors.
    Raises:
        ValueError: a variable that is not set, or empty; names it and the place.
    """
    if isinstance(value, Mapping):
        return {key: with_variables(item, file, *keys, key) for key, item in value.items()}
    if isinstance(value, list):
        return [with_variables(item, file, *keys) for item in value]
    if not isinstance(value, str):
        return value
    for name in dict.fromkeys(VARIABLE.findall(value)):
        if not os.environ.get(name):
            raise ValueError(
                f"{file}: {'.'.join(keys)}: expected the environment variable {name}, got none; export {name}=... first"
            )
    return VARIABLE.sub(lambda found: os.environ[found[1]], value)


def run_of(content: Mapping[str, Any], path: Path) -> RunFile:
    """The run of a file's content; errors as for `read_run_file`."""
    file = path.name
    special = ("options", "slice-options", "path", "targets", "served", *GROUPS)
    names = [name for name in option_fields(RunFile) if name not in special]
    top: dict[str, Any] = {"out": str(Path("runs") / path.stem)}
    groups, options, slices = {}, {}, {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in GROUPS and isinstance(value, Mapping):
            groups[name] = with_table(GROUPS[name](), value, f"{file}: {name}")
        elif name == "served" and isinstance(value, Mapping):
            groups[name] = {model: _served(table, f"{file}: served.{model}") for model, table in value.items()}
        elif name == "targets" and isinstance(value, Mapping):
            groups[name] = {key: _table(shares, f"{file}: targets.{key}") for key, shares in value.items()}
        elif isinstance(value, Mapping) and re.fullmatch(r"slice_[1-9]\d*", name):
            slices[int(name[6:])] = {
                _stage(inner, f"{file}: {name}.{inner}"): _table(table, f"{file}: {name}.{inner}")
                for inner, table in value.items()
            }
        elif isinstance(value, Mapping):
            options[_stage(name, f"{file}: {key}")] = value
            top |= {"world": True} if name == "world" else {}
        elif key.replace("_", "-") in names:
            top[key] = value
        else:
            known = [*names, *GROUPS, *STAGES, *SHARED, "targets", "served", "slice_1"]
            raise ValueError(f"{file}: {key}: expected a known name, got an unknown one{nearest(key, known)}")
    run = with_table(RunFile(Path(top["out"]), path=path), top, file)
    try:
        return dataclasses.replace(run, **groups, options=options, slice_options=slices)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _stage(name: str, where: str) -> str:
    """A stage's name, with the number of its repetition."""
    name = name.replace("-", "_")
    base = re.sub(r"_[2-9]$", "", name)
    known = (*STAGES, *SHARED)
    if base not in known:
        choices = [*known, *GROUPS, "targets", "served"]
        raise ValueError(f"{where}: expected a stage or a group, got an unknown one{nearest(name, choices)}")
    return name


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a table of options, got {value!r}")
    return value


def _served(value: Any, where: str) -> Served:
    table = dict(_table(value, where))
    if "model" not in table:
        raise ValueError(f"{where}.model: expected a model directory, got none")
    return with_table(Served(Path(str(table.pop("model")))), table, where)
