"""What a run will take, before it starts: calls, tokens, cost and hours of agents, steps, GPU-hours and disk.

Its stages that ask agents run on some of its rows with stand-ins for them (see agents/estimate.py), and their numbers
are scaled up; so calls that do not depend on what replies say are exact up to that scaling. Training takes the rows
that come out of it. GPU-hours are the planner's predictions, for models that it has presets of; they are no
measurements. They are of training, of answers of the run's own models, and of their perplexity.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wizard_engine.agents.estimate import DEFAULT_LENGTHS, StandInCast, count_tokens
from wizard_engine.agents.prices import read_prices
from wizard_engine.data.records import Conversation, Process, Row, read_files, read_rows, write_rows
from wizard_engine.planning.generation import Answers, Generation
from wizard_engine.planning.planner import Options, Plan, Planner
from wizard_engine.planning.rates import Rates
from wizard_engine.rl.rewards import MODELS
from wizard_engine.runtime.files import write_json_lines
from wizard_engine.synthesis.inputs import read_stage_rows

from .disk import GIB, PLANNED, Disk, disk_of_run, is_frozen
from .graph import Node, paths_of, with_paths
from .run_file import RunFile

# Rows of a slice that go through the stand-ins.
SAMPLED_ROWS = 100
# Natural rows whose length is measured.
MEASURED_ROWS = 1000
# Recipes that ask a model of this machine load its weights in fp32; the sampler of RLEIF has them in bf16.
LOCAL_BYTES = 4
# A forward pass, as a share of a training step.
FORWARD = 1 / 3


@dataclass
class Forecast:
    """What a stage will take; None where it does not take such a thing or it is not known.

    Attributes:
        rows: that it reads.   calls, tokens_in, tokens_out, cost, hours: of endpoints.
        local_calls: of models and programs of this machine.
        steps, tokens: of training.   gpu_hours: predicted, of training and of the run's own models.
        disk_gib: of models and checkpoints.
    """

    where: str
    rows: int | None = None
    calls: int | None = None
    local_calls: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost: float | None = None
    hours: float | None = None
    steps: int | None = None
    tokens: int | None = None
    gpu_hours: float | None = None
    disk_gib: float | None = None


@dataclass(frozen=True)
class Works:
    """What recipes do, without their start and end.

    synthesis: recipe -> work with (options, agents, rows, number of rejected ones).
    cleaning: recipe -> work with its options alone: sample and mix.
    judging: recipe -> work with (options, agents): arena and mt_bench.
    search: the method search of Evol-Instruct, whose calls do not grow with the rows.
    """

    synthesis: Mapping[str, "Work"]
    cleaning: Mapping[str, Callable[[Any], object]]
    judging: Mapping[str, Callable[[Any, StandInCast], object]]
    search: Callable[[Any, StandInCast, Sequence[Row]], object]


Work = Callable[[Any, StandInCast, Sequence[Row], int], object]


class Forecaster:
    """Goes through the graph of a run with stand-ins.

    Args:
        size: row of the table of learning rates.
    """

    def __init__(self, run: RunFile, size: str, works: Works) -> None:
        self.run, self.size, self.works = run, size, works
        self.prices = {} if run.prices is None else read_prices(run.prices)
        self.gpus = run.launch.nodes * run.launch.processes
        self.planner = None
        if size in PLANNED:
            self.planner = Planner(Options(PLANNED[size], self.gpus, gpu=run.launch.gpu), Rates())
        self.plan: Plan | None = next(iter(self.planner.best()), None) if self.planner is not None else None
        # Of a stage's directory: rows for each one that stands there.
        self.scales: dict[Path, float] = {}
        # Natural rows, and their mean length in tokens.
        self.rows, self.row_tokens = 0, 0.0
        self.disk: dict[str, Disk] = {}
        self.notes: list[str] = []

    def forecast(self, nodes: Sequence[Node]) -> list[Forecast]:
        """A forecast for each stage, in their order; `disk` says then what they write, and `notes` what cannot be."""
        with tempfile.TemporaryDirectory(prefix="wizard-forecast-") as folder:
            self.folder = Path(folder)
            self._first_rows(nodes)
            made = [self._of(node) for node in nodes]
        self.disk = disk_of_run(self.run, nodes, self.size, {one.where: one.steps for one in made})
        for one in made:
            if (disk := self.disk.get(one.where)) is not None and disk.stays:
                one.disk_gib = disk.stays / GIB
        return made

    def _moved(self, config: Any) -> Any:
        """A configuration that reads and writes in the folder instead of the run's directory."""
        inside = [path for path in paths_of(config) if path == self.run.out or self.run.out in path.parents]
        return with_paths(config, {path: self.folder / path.relative_to(self.run.out) for path in inside})

    def _first_rows(self, nodes: Sequence[Node]) -> None:
        """Some rows of the run in the place of each slice's, and of those that are kept apart."""
        sampling = next((node.config for node in nodes if node.where == "sample"), None)
        if sampling is None or not self.run.rows.data:
            return
        rows, _ = read_files(self.run.rows.data, on_error="skip", unknown_fields="count")
        if not rows:
            return
        some = rows[:: max(1, len(rows) // MEASURED_ROWS)]
        self.rows, self.row_tokens = len(rows), sum(map(row_tokens, some)) / len(some)
        apart = min(self.run.rows.hold_out, len(rows) // 2) if not self.run.rows.held_out else 0
        drawn = rows[: len(rows) - apart]
        wanted = min(sampling.size or len(drawn), len(drawn))
        each = max(1, wanted // self.run.slices)
        count = min(SAMPLED_ROWS, each)
        out = self.folder / "sample"
        self.scales[out] = each / count
        for t in range(self.run.slices):
            places = [(t + self.run.slices * i) * len(drawn) // (count * self.run.slices) for i in range(count)]
            write_rows(out / f"slice_{t + 1}.jsonl", [drawn[place] for place in places])
        if apart:
            write_rows(out / "held_out.jsonl", rows[-apart:])

    def _of(self, node: Node) -> Forecast:
        config, made = self._moved(node.config), Forecast(node.where)
        if node.recipe in self.works.synthesis:
            self._ask(node, config, made)
        elif node.recipe in self.works.cleaning and node.where != "sample":
            self._clean(config, made)
        elif node.recipe == "analyze":
            self._analyse(config, made)
        elif node.recipe == "rleif":
            self._reinforce(config, made)
        elif hasattr(config, "training"):
            self._train(config, made)
        elif node.recipe == "accuracy":
            self._answer(config, made)
        elif node.recipe in self.works.judging:
            self._judge(node, config, made)
        return made

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _scale(self, path: Path) -> float:
        """Rows of the run for each one of a file; files of the run's own are whole."""
        return self.scales.get(path.parent, 1.0)

    def _read(self, paths: Sequence[Path]) -> list[tuple[Row, float]]:
        """The rows of files, of those that there are, each with how many rows of the run it stands for."""
        rows: list[tuple[Row, float]] = []
        for path in paths:
            if path.exists():
                read = read_rows(path, on_error="skip", unknown_fields="count", allow_empty=True)
                rows += [(row, self._scale(path)) for row in read]
        return rows

    def _clean(self, config: Any, made: Forecast) -> None:
        if hasattr(config, "evaluation"):
            config = dataclasses.replace(config, evaluation=tuple(path for path in config.evaluation if path.exists()))
        present = tuple(path for path in config.data if path.exists())
        rows = self._read(present)
        if not rows:
            return
        shares = getattr(config, "shares", ())
        changes: dict[str, Any] = {"data": present, "on_error": "skip", "unknown_fields": "count", "quiet": True}
        if shares:
            changes["shares"] = tuple(share for path, share in zip(config.data, shares, strict=True) if path.exists())
        config = dataclasses.replace(config, **changes)
        made.rows = round(sum(scale for _, scale in rows))
        self.scales[config.out] = made.rows / len(rows) if made.rows else 1.0
        self.works.cleaning["mix" if hasattr(config, "shares") else "sample"](config)

    # ---- agents -----------------------------------------------------------------------------------------------------

    def _ask(self, node: Node, config: Any, made: Forecast) -> None:
        """A stage that asks agents, with stand-ins."""
        read = self._read(config.data)
        if not read:
            return
        scale = sum(one for _, one in read) / len(read)
        if not any(path.parent in self.scales for path in config.data):
            # Rows that were drawn before are whole.
            wanted = min(len(read), config.limit or len(read))
            config = dataclasses.replace(config, limit=wanted)
            scale = max(1.0, wanted / SAMPLED_ROWS)
        self.scales[config.out] = scale
        limit = None if config.limit is None else max(1, round(config.limit / scale))
        changes: dict[str, Any] = {"limit": limit, "on_error": "skip", "unknown_fields": "count", "quiet": True}
        changes |= {"evaluation": ()} if hasattr(config, "evaluation") else {}
        config = dataclasses.replace(config, **changes, max_missing=1.0)
        searching = getattr(config, "optimise", None)
        estimates = []
        if searching is not None and searching.steps:
            with_search = config
            estimates.append(self._asked(node, lambda cast: self.works.search(with_search, cast, _rows(with_search))))
            config = dataclasses.replace(config, optimise=dataclasses.replace(searching, steps=0))
        # The method that the first slice improves is not there yet.
        if getattr(config, "method", None) is not None and not config.method.exists():
            config = dataclasses.replace(config, method=None)
        rows, rejected = read_stage_rows(config)
        work = self.works.synthesis[node.recipe]
        estimates.append(self._asked(node, lambda cast: work(config, cast, rows, rejected), scale))
        made.rows = round(len(rows) * scale)
        self._count(made, estimates, node, config)

    def _judge(self, node: Node, config: Any, made: Forecast) -> None:
        """Games and ratings of the evaluation."""
        read = config.prompts if node.recipe == "arena" else config.questions
        known = _lines(read)
        if not known:
            return
        made.rows = min(config.n, known)
        count = min(made.rows, SAMPLED_ROWS)
        config = dataclasses.replace(config, n=count, on_error="skip", max_missing=1.0, quiet=True)
        config.out.mkdir(parents=True, exist_ok=True)
        work = self.works.judging[node.recipe]
        self._count(made, [self._asked(node, lambda cast: work(config, cast), made.rows / count)], node, config)

    def _asked(self, node: Node, work: Callable[[StandInCast], object], scale: float = 1.0) -> dict[str, Any]:
        """What some work asks of stand-ins, as `StandInCast.estimate` gives it."""
        cast = StandInCast(node.config.ledger or node.out / "ledger.sqlite", self.prices)
        try:
            work(cast)
            return cast.estimate(scale)
        finally:
            cast.close()

    def _count(self, made: Forecast, estimates: Sequence[dict[str, Any]], node: Node, config: Any) -> None:
        """Calls, tokens, cost and hours of endpoints, and GPU-hours of the run's models."""
        agents = [agent for estimate in estimates for agent in estimate["agents"].values()]
        paid = [agent for agent in agents if agent["is_endpoint"]]
        made.calls, made.tokens_in, made.tokens_out = (
            sum(agent[name] for agent in paid) for name in ("calls", "tokens_in", "tokens_out")
        )
        made.local_calls = sum(agent["calls"] for agent in agents) - made.calls
        made.cost = _sum([estimate["cost"] for estimate in estimates])
        made.hours = _sum([estimate["hours"] for estimate in estimates])
        # Other models of this machine may be of any size.
        own = [
            agent for agent in agents if agent["spec"] is not None and self._is_own(agent["spec"]) and agent["calls"]
        ]
        for agent in own:
            count = agent["calls"]
            answers = Answers(count, agent["tokens_in"] / count, agent["tokens_out"] / count, config.batch_size)
            self._add_generation(made, answers, gpus=1 if node.is_main_only else self.gpus)

    def _is_own(self, spec: str) -> bool:
        """Whether an agent is the run's base model or one that it trains."""
        path = Path(spec)
        return path == self.run.base.model or self.folder in path.parents

    # ---- GPU-hours --------------------------------------------------------------------------------------------------

    def _analyse(self, config: Any, made: Forecast) -> None:
        """Perplexity of the rows: a forward pass."""
        if config.checkpoint is not None and self.rows:
            made.rows = min(self.rows, config.limit or self.rows)
            self._add_training(made, FORWARD * made.rows * self.row_tokens)
            self._note_size(made)

    def _answer(self, config: Any, made: Forecast) -> None:
        """Two answers to each held-out row, greedy and sampled; stand-ins of them for the arena."""
        rows = [row for row, _ in self._read([config.data])][: config.limit]
        if not rows:
            return
        made.rows = len(rows)
        usual = DEFAULT_LENGTHS["answer"]
        self._add_generation(made, _answers(rows, 2 * len(rows), min(usual, config.max_new_tokens), config.batch_size))
        texts = [f"{config.out} {number}" for number in range(len(rows))]
        lines = [
            {"prompt": row.instruction, "greedy": text, "sampled": text} for row, text in zip(rows, texts, strict=True)
        ]
        config.out.mkdir(parents=True, exist_ok=True)
        write_json_lines(config.out / "answers.jsonl", lines)

    def _train(self, config: Any, made: Forecast) -> None:
        rows = self._read(config.data)
        if not rows:
            return
        made.rows = round(sum(scale for _, scale in rows))
        tokens = sum(scale * row_tokens(row) for row, scale in rows) * config.training.epochs
        a_step = config.training.pack_tokens * config.training.packs_per_step
        # Stage-DPO has a run for each of its slices.
        most = (config.training.max_steps or 1 << 62) * getattr(config, "slices", 1)
        made.steps = min(max(1, round(tokens / a_step)), most)
        made.tokens = round(min(tokens, made.steps * a_step))
        self._add_training(made, made.tokens * (FORWARD if is_frozen(config) else 1))

    def _reinforce(self, config: Any, made: Forecast) -> None:
        rows, rollout = self._read(config.data), config.rollout
        if not rows:
            return
        each = rollout.prompts_per_step * rollout.samples_per_prompt
        one = _answers([row for row, _ in rows], each, rollout.max_new_tokens, rollout.batch_size)
        made.rows, made.steps = round(sum(scale for _, scale in rows)), rollout.steps
        made.tokens = round(rollout.steps * each * (one.prompt + one.answer))
        self._add_training(made, made.tokens * online_work(config))
        if self.planner is not None:
            sampler = Generation(self.planner, self.gpus, rollout.tp)
            measured = dataclasses.replace(one, count=len(self._read(config.held_out)))
            times = 2 + (rollout.steps - 1) // config.eval_every if config.eval_every else 2
            seconds = rollout.steps * sampler.gpu_seconds(one) + times * sampler.gpu_seconds(measured)
            made.gpu_hours = (made.gpu_hours or 0.0) + seconds / 3600
            if sampler.group < sampler.smallest:
                what = f"{sampler.group} {self.run.launch.gpu} (rollout.tp) do not hold the sampler's weights"
                self.notes.append(f"{made.where}: {what}; {sampler.smallest} do")

    def _add_training(self, made: Forecast, tokens: float) -> None:
        """GPU-hours of so many trained tokens."""
        if self.plan is not None:
            made.gpu_hours = (made.gpu_hours or 0.0) + tokens / self.plan.tokens_per_second / 3600

    def _add_generation(self, made: Forecast, answers: Answers, *, gpus: int | None = None) -> None:
        """GPU-hours of answers of a model that every rank loads whole; `gpus`: that generate, default all."""
        if self.planner is None:
            return
        generation = Generation(self.planner, gpus or self.gpus, value_bytes=LOCAL_BYTES)
        made.gpu_hours = (made.gpu_hours or 0.0) + generation.gpu_seconds(answers) / 3600
        self._note_size(made)

    def _note_size(self, made: Forecast) -> None:
        """Say where a rank cannot hold the model that it loads whole."""
        if self.planner is None or any(note.startswith(f"{made.where}:") for note in self.notes):
            return
        whole = Generation(self.planner, 1, value_bytes=LOCAL_BYTES)
        if whole.smallest > 1:
            gpu = self.run.launch.gpu
            what = f"every rank loads the whole model, {whole.weight_bytes / GIB:.0f} GiB, which no {gpu} holds"
            self.notes.append(f"{made.where}: {what}")


def online_work(config: Any) -> float:
    """Work on a token of a rollout beside its generation, as a multiple of training the policy on it."""
    rewards = [name for name in MODELS if getattr(config.reward, f"{name}_model") is not None]
    # The reference and the reward models read it; a critic gives its values and is trained.
    return 1 + FORWARD * (1 + len(rewards)) + (1 + FORWARD) * (config.ppo.advantages == "critic")


def _answers(rows: Sequence[Row], count: int, answer: float, at_once: int) -> Answers:
    """Answers to rows' prompts."""
    prompts = [row_tokens(row) - count_tokens(row.answer) for row in rows if isinstance(row, Conversation)]
    return Answers(count, sum(prompts) / max(1, len(prompts)), answer, at_once)


def _rows(config: Any) -> Sequence[Row]:
    return read_stage_rows(config)[0]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _lines(path: Path | None) -> int:
    if path is None or not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def row_tokens(row: Row) -> int:
    """About how many tokens a row has, both answers of a pair with their prompt."""
    if isinstance(row, Conversation):
        return sum(count_tokens(message.content) for message in row.messages)
    prompt = sum(count_tokens(message.content) for message in row.prompt)
    if isinstance(row, Process):
        return prompt + count_tokens(row.answer)
    return 2 * prompt + count_tokens(row.chosen) + count_tokens(row.rejected)


COLUMNS = {
    "rows": "rows",
    "calls": "calls",
    "local calls": "local_calls",
    "tokens in": "tokens_in",
    "tokens out": "tokens_out",
    "cost": "cost",
    "hours": "hours",
    "steps": "steps",
    "tokens trained": "tokens",
    "GPU-hours": "gpu_hours",
    "GiB of disk": "disk_gib",
}


def shown_forecast(forecasts: Sequence[Forecast]) -> str:
    """A table: a line for each stage that takes something, and one for all."""
    known = [made for made in forecasts if any(getattr(made, name) for name in COLUMNS.values())]
    columns = {title: name for title, name in COLUMNS.items() if any(getattr(made, name) for made in known)}
    if not known:
        return "nothing is known yet of what the stages take: the first ones make their rows"
    width = max(len("in all"), *(len(made.where) for made in known))
    total = Forecast("in all")
    for name in columns.values():
        if name != "rows":
            setattr(total, name, _sum([getattr(made, name) for made in known]))
    lines = [f"{'':{width}}" + "".join(f"{title:>15}" for title in columns)]
    for made in [*known, total]:
        lines.append(
            f"{made.where:{width}}" + "".join(f"{_shown(getattr(made, name)):>15}" for name in columns.values())
        )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
