"""What a run will take, before it starts: calls, tokens, cost and hours of agents, steps and GPU-hours of training.

Its data stages run on some of its rows with stand-ins for the agents (see agents/estimate.py), and their numbers are
scaled up; so calls that do not depend on what replies say are exact up to that scaling. Training takes the rows that
come out of it. GPU-hours are the planner's predictions, for models that it has presets of; they are no measurements.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wizard_engine.agents.estimate import StandInCast, count_tokens
from wizard_engine.agents.prices import read_prices
from wizard_engine.data.records import Conversation, Process, Row, read_files, read_rows, write_rows
from wizard_engine.planning.planner import Options, Plan, Planner
from wizard_engine.planning.rates import Rates
from wizard_engine.synthesis.inputs import read_stage_rows

from .graph import Node, paths_of, with_paths
from .run_file import RunFile

# Rows of a slice that go through the stand-ins.
SAMPLED_ROWS = 100
# Sizes of the table of learning rates that the planner has a preset of.
PLANNED = {"7B": "7b", "70B": "70b", "8x22B": "8x22b"}
# Forward passes of RLEIF beside the policy's training, as a multiple of it: reference, two rewards, critic's training.
ONLINE_WORK = 1 + 1 / 3 + 2 / 3 + 1
# Bytes of a weight that a decoding step reads.
WEIGHT_BYTES = 2


@dataclass
class Forecast:
    """What a stage will take; None where it does not take such a thing or it is not known.

    Attributes:
        rows: that it reads.   calls, tokens_in, tokens_out, cost, hours: of endpoints.
        local_calls: of models and programs of this machine.
        steps, tokens: of training.   gpu_hours: predicted.
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


Work = Callable[[Any, StandInCast, Sequence[Row], int], object]


class Forecaster:
    """Goes through the graph of a run with stand-ins.

    Args:
        works: recipe -> what it does with (options, agents, rows, number of rejected ones).
        cleaning: recipe -> what it does with its options alone: sample and mix.
        search: the method search of Evol-Instruct, whose calls do not grow with the rows.
    """

    def __init__(
        self,
        run: RunFile,
        size: str,
        works: Mapping[str, Work],
        cleaning: Mapping[str, Callable[[Any], object]],
        search: Callable[[Any, StandInCast, Sequence[Row]], object],
    ) -> None:
        self.run, self.size, self.works, self.cleaning, self.search = run, size, works, cleaning, search
        self.prices = {} if run.prices is None else read_prices(run.prices)
        self.plan = self._plan()
        self.scale = 1.0

    def _plan(self) -> Plan | None:
        """The best layout of the run's GPUs for its model, by the planner."""
        launch, name = self.run.launch, PLANNED.get(self.size)
        if name is None:
            return None
        plans = Planner(Options(name, launch.nodes * launch.processes, gpu=launch.gpu), Rates()).best()
        return plans[0] if plans else None

    def forecast(self, nodes: Sequence[Node]) -> list[Forecast]:
        """A forecast for each stage, in their order."""
        with tempfile.TemporaryDirectory(prefix="wizard-forecast-") as folder:
            self.folder = Path(folder)
            self._first_rows(nodes)
            return [self._of(node) for node in nodes]

    def _moved(self, config: Any) -> Any:
        """A configuration that reads and writes in the folder instead of the run's directory."""
        inside = [path for path in paths_of(config) if path == self.run.out or self.run.out in path.parents]
        return with_paths(config, {path: self.folder / path.relative_to(self.run.out) for path in inside})

    def _first_rows(self, nodes: Sequence[Node]) -> None:
        """Some rows of the run in the place of each slice's."""
        sampling = next((node.config for node in nodes if node.where == "sample"), None)
        if sampling is None or not self.run.rows.data:
            return
        rows, _ = read_files(self.run.rows.data, on_error="skip", unknown_fields="count")
        wanted = min(sampling.size or len(rows), len(rows) - min(self.run.rows.hold_out, len(rows) // 2))
        each = max(1, wanted // self.run.slices)
        count = min(SAMPLED_ROWS, each)
        self.scale = each / count
        for t in range(self.run.slices):
            places = [(t + self.run.slices * i) * len(rows) // (count * self.run.slices) for i in range(count)]
            write_rows(self.folder / "sample" / f"slice_{t + 1}.jsonl", [rows[place] for place in places])

    def _of(self, node: Node) -> Forecast:
        config, made = self._moved(node.config), Forecast(node.where)
        if node.recipe in self.works:
            self._ask(node, config, made)
        elif node.recipe in self.cleaning and node.where != "sample":
            self._clean(config, made)
        elif node.recipe == "rleif":
            self._reinforce(config, made)
        elif hasattr(config, "training"):
            self._train(config, made)
        elif node.recipe in ("arena", "mt_bench"):
            self._judge(node, config, made)
        return made

    def _rows(self, config: Any) -> list[Row]:
        """The rows that a stage reads, of those that there are."""
        rows: list[Row] = []
        for path in config.data:
            if path.exists():
                rows += read_rows(path, on_error="skip", unknown_fields="count", allow_empty=True)
        return rows

    def _ask(self, node: Node, config: Any, made: Forecast) -> None:
        """A stage that asks agents, with stand-ins."""
        if not self._rows(config):
            return
        limit = None if config.limit is None else max(1, round(config.limit / self.scale))
        changes: dict[str, Any] = {"limit": limit, "on_error": "skip", "unknown_fields": "count", "quiet": True}
        changes |= {"evaluation": ()} if hasattr(config, "evaluation") else {}
        config = dataclasses.replace(config, **changes, max_missing=1.0)
        searching = getattr(config, "optimise", None)
        estimates = []
        if searching is not None and searching.steps:
            cast = self._cast(node)
            try:
                self.search(config, cast, read_stage_rows(config)[0])
                estimates.append(cast.estimate())
            finally:
                cast.close()
            config = dataclasses.replace(config, optimise=dataclasses.replace(searching, steps=0))
        # The method that the first slice improves is not there yet.
        if getattr(config, "method", None) is not None and not config.method.exists():
            config = dataclasses.replace(config, method=None)
        cast = self._cast(node)
        try:
            rows, rejected = read_stage_rows(config)
            self.works[node.recipe](config, cast, rows, rejected)
            estimates.append(cast.estimate(self.scale))
        finally:
            cast.close()
        made.rows = round(len(rows) * self.scale)
        agents = [agent for estimate in estimates for agent in estimate["agents"].values()]
        paid = [agent for agent in agents if agent["is_endpoint"]]
        made.calls, made.tokens_in, made.tokens_out = (
            sum(agent[name] for agent in paid) for name in ("calls", "tokens_in", "tokens_out")
        )
        made.local_calls = sum(agent["calls"] for agent in agents) - made.calls
        made.cost = _sum([estimate["cost"] for estimate in estimates])
        made.hours = _sum([estimate["hours"] for estimate in estimates])

    def _cast(self, node: Node) -> StandInCast:
        return StandInCast(node.config.ledger or node.out / "ledger.sqlite", self.prices)

    def _clean(self, config: Any, made: Forecast) -> None:
        if hasattr(config, "evaluation"):
            config = dataclasses.replace(config, evaluation=tuple(path for path in config.evaluation if path.exists()))
        present = tuple(path for path in config.data if path.exists())
        if not present:
            return
        shares = getattr(config, "shares", ())
        changes: dict[str, Any] = {"data": present, "on_error": "skip", "unknown_fields": "count", "quiet": True}
        if shares:
            changes["shares"] = tuple(share for path, share in zip(config.data, shares, strict=True) if path.exists())
        config = dataclasses.replace(config, **changes)
        made.rows = round(len(self._rows(config)) * self.scale)
        self.cleaning["mix" if hasattr(config, "shares") else "sample"](config)

    def _train(self, config: Any, made: Forecast) -> None:
        rows = self._rows(config)
        if not rows:
            return
        made.rows = round(len(rows) * self.scale)
        tokens = self.scale * sum(map(row_tokens, rows)) * config.training.epochs
        a_step = config.training.pack_tokens * config.training.packs_per_step
        made.steps = min(max(1, round(tokens / a_step)), config.training.max_steps or 1 << 62)
        made.tokens = round(min(tokens, made.steps * a_step))
        self._hours(made, made.tokens)

    def _reinforce(self, config: Any, made: Forecast) -> None:
        rows, rollout = self._rows(config), config.rollout
        if not rows:
            return
        prompts = [row_tokens(row) - count_tokens(row.answer) for row in rows if isinstance(row, Conversation)]
        prompt = sum(prompts) / len(rows)
        answers = rollout.steps * rollout.prompts_per_step * rollout.samples_per_prompt
        made.rows, made.steps = round(len(rows) * self.scale), rollout.steps
        made.tokens = round(answers * (prompt + rollout.max_new_tokens))
        self._hours(made, made.tokens * ONLINE_WORK)
        if made.gpu_hours is not None and self.plan is not None:
            planner = Planner(Options(PLANNED[self.size], 1, gpu=self.run.launch.gpu), Rates())
            gpus = self.run.launch.nodes * self.run.launch.processes
            weights = sum(parameter.numel() for parameter in planner.model.parameters())
            rate = planner.gpu.bandwidth * planner.rates.memory
            # Every decoding step of a group of `tp` GPUs reads all weights once.
            seconds = rollout.steps * rollout.max_new_tokens * weights * WEIGHT_BYTES / rollout.tp / rate
            made.gpu_hours += seconds * gpus / 3600

    def _hours(self, made: Forecast, tokens: float) -> None:
        if self.plan is not None:
            made.gpu_hours = tokens / self.plan.tokens_per_second / 3600

    def _judge(self, node: Node, config: Any, made: Forecast) -> None:
        """Games and ratings of the evaluation."""
        if node.recipe == "mt_bench":
            made.rows = min(config.n, _lines(config.questions))
            made.calls = 2 * made.rows * config.repeats
        else:
            pairs = len(config.models) * (len(config.models) - 1) // 2
            known = _lines(config.prompts)
            made.rows = min(config.n, known) if known else config.n
            made.calls = 2 * pairs * made.rows * len(config.judge)


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
