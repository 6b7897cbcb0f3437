"""From a run file to the graph of its stages.

Every slice goes through the run's stages in their order. What a stage learns from follows from what stood before it:
evolved rows, lessons of co-teaching, the slice's own cleaned rows, self-taught pairs, labelled answers, reward models.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from wizard_engine.rl.rewards import FACTORS, MODELS
from wizard_engine.runtime.files import read_object
from wizard_engine.runtime.option_tables import with_table
from wizard_engine.runtime.ranges import checked_later

from .graph import Node
from .learning import LEARNING
from .run_file import IN_SLICES, SHARED, USE, RunFile

# Of the run's target shares, beside its stages.
TARGETS = "targets.json"
# Stage that draws the rows to measure on.
HELD_OUT = "held_out"
WORLD_AGENTS = {
    "evolver": "world:evolver",
    "answerer": "world:expert",
    "judge": "world:judge",
    "labeller": "world:judge",
    "optimizer": "world:optimizer",
    "ranker": "world:ranker",
    "suggester": "world:judge",
    "user": "world:evolver",
}
WORLD_RIVALS = ("world:expert", "world:careless", "world:rambler")


@dataclass
class Made:
    """What the stages of the run have made so far.

    model: to start the next learning stage from.   sources: row files of the slice, the better ones first.
    rows: the slice's cleaned rows, None before.   all_rows: those of all slices.
    pairs: what the slice's Stage-DPO learned from, and its held-out pairs; None before.   rest: by what it is.
    """

    model: Path
    sources: list[Path] = field(default_factory=list)
    rows: Path | None = None
    all_rows: list[Path] = field(default_factory=list)
    rankings: Path | None = None
    answers: Path | None = None
    battles: Path | None = None
    self_taught: Path | None = None
    lessons: Path | None = None
    instruction: Path | None = None
    process: Path | None = None
    preference: Path | None = None
    pairs: tuple[Path, tuple[Path, ...]] | None = None
    learned: dict[str, Path] = field(default_factory=dict)


class Plan:
    """The graph of a run.

    Args:
        recipes: name -> module with the recipe's `Config`.
        size: row of the table of learning rates, one of `run_file.SIZES`.
        has_answers: whether the held-out rows have answers that can be checked.
    Attributes:
        nodes: the stages in the order in which they run.
        measured: (slice, name of the stage, directory of its accuracy, its model) of everything that is measured.
    Raises:
        ValueError: a role that a stage needs and nobody has, or a stage without what it learns from; names all of them.
    """

    def __init__(self, run: RunFile, recipes: Mapping[str, ModuleType], *, size: str, has_answers: bool) -> None:
        self.run, self.out, self.recipes, self.size = run, run.out, recipes, size
        self.has_answers = has_answers if run.measure.accuracy is None else run.measure.accuracy
        self.drawn = run.out / "sample"
        self.nodes: list[Node] = []
        self.measured: list[tuple[int, str, Path | None, Path]] = []
        self.missing: list[str] = []
        self.file = run.path.name if run.path else "run"

    # ---- one stage --------------------------------------------------------------------------------------------------

    def add(
        self,
        stage: str,
        where: str,
        recipe: str,
        wiring: Mapping[str, Any],
        *,
        t: int | None = None,
        repeat: int = 1,
        **of_node: Any,
    ) -> Path:
        """Add a stage, and return its directory, or the one that its table names instead ("use").

        Its options are, the later ones first: its tables, those of all stages, the learning rates for the model's size,
        what the graph says (`wiring`), and the recipe's defaults.
        """
        config_of = self.recipes[recipe].Config
        fields = {f.name for f in dataclasses.fields(config_of)}
        common = {
            "seed": self.run.seed,
            "quiet": self.run.quiet,
            "on_error": self.run.rows.on_error,
            "unknown_fields": self.run.rows.unknown_fields,
            "prices": self.run.prices,
        }
        if self.run.rows.reference_answers and recipe != "mt_bench":
            common["references"] = "answers"
        out = self.out / where
        values = {name: value for name, value in common.items() if name in fields} | {"out": out, **wiring}
        with checked_later():
            config = config_of(**values)
        if (learned := LEARNING[self.size].get(stage)) is not None:
            config = with_table(config, learned, stage)
        given = [name for name in SHARED if name in self.run.options and name in fields]
        shared = [(self.file, {name: self.run.options[name]}) for name in given]
        used = None
        for place, table in [*shared, *self.run.table(stage, t, repeat)]:
            options = {key: value for key, value in table.items() if key not in (USE, IN_SLICES)}
            if "out" in options:
                raise ValueError(
                    f"{place}.out: expected no such option: the run's stages have directories of their own"
                )
            config = with_table(config, options, place)
            used = table.get(USE, used)
        if used is not None:
            name = f"reward_{config.kind}" if recipe == "reward" else recipe
            return self._used(Path(str(used)), name, where)
        self.nodes.append(Node(where, recipe, config, table=stage, **of_node))
        return out

    def _used(self, path: Path, name: str, where: str) -> Path:
        """A finished directory that stands for a stage of that name."""
        made = read_object(path / "stage.json")
        if made is None or made.get("stage") != name:
            got = "without stage.json" if made is None else f"of {made.get('stage')}"
            raise ValueError(f"{self.file}: {where}.use: expected the directory of a finished {name}, got {path} {got}")
        return path

    def role(self, name: str, stage: str) -> str:
        """Who has a role; noted as missing where nobody has."""
        agents = self.run.agents
        spec = getattr(agents, name) or agents.teacher or (WORLD_AGENTS[name] if self.run.world else None)
        if spec in ("", None, "none"):
            self.missing.append(f"agents.{name} (for {stage})")
            return ""
        return self._spec(spec)

    def optional_role(self, name: str) -> str | None:
        """Who has a role that may stay empty."""
        agents = self.run.agents
        spec = getattr(agents, name) or agents.teacher or (WORLD_AGENTS.get(name) if self.run.world else None)
        return None if spec in ("", None, "none") else self._spec(spec)

    def _spec(self, spec: str) -> str:
        """An agent as recipes take it: served:NAME is the endpoint that the driver starts."""
        if not spec.startswith("served:"):
            return spec
        name = spec.removeprefix("served:")
        if name not in self.run.served:
            raise ValueError(f"{self.file}: agents: expected a table [served.{name}] for {spec!r}, got none")
        return f"openai:{name}@http://127.0.0.1:{self.run.served[name].port}/v1"

    def need(self, path: Path | None, stage: str, of: str) -> Path:
        """What a stage needs of another; noted as missing where the run has none."""
        if path is None:
            self.missing.append(f"{of} (for {stage})")
        return path or Path("missing")

    # ---- the run ----------------------------------------------------------------------------------------------------

    def build(self) -> "Plan":
        """The graph of the whole run."""
        run = self.run
        if run.world and not (run.rows.data and run.rows.held_out and run.base.model):
            self._world()
        slices, base = self.prepare()
        made = Made(base)
        answers = self.measure(1, "base", base)
        for t in range(1, run.slices + 1):
            union = run.progression == "union" and t == run.slices
            made.learned = {}
            start = base if union else made.model
            self.measured.append((t, "base", answers, start))
            made.sources, made.rows = [slices[t - 1]], None
            made.answers = made.battles = made.pairs = None
            self._slice(t, made, start, union)
            if made.learned:
                answers = self.measured[-1][2]
        self._compare(made, base)
        if self.missing:
            raise ValueError(
                f"{self.file}: expected, for the stages that are asked for: {'; '.join(dict.fromkeys(self.missing))}; "
                "name an agent or a teacher for all of them, or leave the stage out of `stages`"
            )
        return self

    def _world(self) -> None:
        self.add("world", "world", "make_world", {})

    @property
    def held_out(self) -> tuple[Path, ...]:
        """Held-out rows to measure on."""
        if self.run.rows.held_out_limit:
            return (self.out / HELD_OUT / "rows.jsonl",)
        if self.run.rows.held_out:
            return self.run.rows.held_out
        if self.run.world:
            return (self.out / "world" / "held_out.jsonl",)
        return (self.drawn / "held_out.jsonl",) if self.run.rows.hold_out else ()

    @property
    def apart(self) -> tuple[Path, ...]:
        """Rows that training rows do not repeat: all held-out rows."""
        return self.run.rows.held_out or self.held_out

    @property
    def questions(self) -> Path | None:
        """Two-turn questions."""
        return self.run.rows.questions or (self.out / "world" / "questions.jsonl" if self.run.world else None)

    def prepare(self) -> tuple[list[Path], Path]:
        """Natural rows analysed and sampled into slices; the slices and the base model."""
        run = self.run
        base = run.base.model or self._base()
        data = run.rows.data or ((self.out / "world" / "corpus.jsonl",) if run.world else ())
        if not data:
            self.missing.append("rows.data (for everything)")
        analysis = self.add("analysis", "analysis", "analyze", {"data": data, "checkpoint": base})
        self._limit_held_out()
        wiring = {"data": (analysis / "rows.jsonl",), "slices": run.slices}
        files = self.apart if run.rows.held_out or run.world else ()
        wiring |= {"evaluation": files} if files else {"hold_out": run.rows.hold_out} if run.rows.hold_out else {}
        wiring |= {"targets": self.out / TARGETS} if run.targets else {}
        self.drawn = self.add("sample", "sample", "sample", wiring)
        if self.drawn != self.out / "sample":
            # Nobody reads the analysis of rows that are drawn already.
            self.nodes = [node for node in self.nodes if node.where != "analysis"]
        return [self.drawn / f"slice_{t}.jsonl" for t in range(1, run.slices + 1)], base

    def _limit_held_out(self) -> None:
        """Some of the held-out rows, where the run does not measure on all of them."""
        rows = self.run.rows
        if rows.held_out_limit and not rows.held_out:
            self.missing.append("rows.held-out (for rows.held-out-limit)")
        elif rows.held_out_limit:
            self.add(HELD_OUT, HELD_OUT, "mix", {"data": rows.held_out, "limit": rows.held_out_limit})

    def _base(self) -> Path:
        """A base model trained briefly on the world's plain text."""
        if not self.run.world:
            self.missing.append("base.model (for everything)")
            return Path("missing")
        files = self.out / "world"
        wiring = {"data": (files / "plain.jsonl",), "kind": "text", "model": "demo", "tokenizer": files / "tokenizer"}
        return self.add("pretraining", "base", "sft", wiring) / "model"

    def _slice(self, t: int, made: Made, start: Path, union: bool) -> None:
        """The stages of one slice."""
        counts: dict[str, int] = {}
        made.model = start
        for stage in self.run.stages:
            if not self._runs_in(stage, t):
                continue
            counts[stage] = counts.get(stage, 0) + 1
            repeat = counts[stage]
            where = f"slice_{t}/{stage}" + (f"_{repeat}" if repeat > 1 else "")
            if stage in ("sft", "self_teach", "rleif") and made.rows is None:
                self.clean(t, made)
            model = getattr(self, stage)(where, made, t=t, repeat=repeat, union=union)
            if model is not None:
                made.model = model
                name = where.partition("/")[2]
                made.learned[name] = model
                self.measured.append((t, name, self.measure(t, name, model), model))

    def _runs_in(self, stage: str, t: int) -> bool:
        """Whether a stage runs in a slice; co-teaching, unless its table says otherwise, once the model has learned."""
        named = [table[IN_SLICES] for _, table in self.run.table(stage, t) if IN_SLICES in table]
        if not named:
            return stage != "co_teach" or t > 1
        chosen = named[-1]
        if not isinstance(chosen, list) or not all(isinstance(n, int) and 1 <= n <= self.run.slices for n in chosen):
            slices = f"1 to {self.run.slices}"
            raise ValueError(f"{self.file}: {stage}.in-slices: expected a list of slices, {slices}, got {chosen!r}")
        return t in chosen

    # ---- rows -------------------------------------------------------------------------------------------------------

    def evol_instruct(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        """Evol-Instruct; where an earlier slice improved the method, with that method."""
        first = next((node for node in self.nodes if node.recipe == "evol_instruct"), None)
        agents = {
            "evolver": self.role("evolver", "evol_instruct"),
            "answerer": self.role("answerer", "evol_instruct"),
            "judge": self.role("judge", "evol_instruct"),
            "ranker": self.optional_role("ranker"),
        }
        module = self.recipes["evol_instruct"]
        wiring: dict[str, Any] = {"data": (made.sources[0],), "evaluation": self.apart}
        optimizer = self.optional_role("optimizer")
        wiring["agents"] = module.Agents(**agents, optimizer=optimizer or agents["evolver"])
        if first is not None and first.config.optimise.steps:
            wiring["method"] = first.out / "method.txt"
        out = self.add("evol_instruct", where, "evol_instruct", wiring, t=t, repeat=repeat)
        is_searched = any(node.out == out and node.config.optimise.steps for node in self.nodes)
        if is_searched and not optimizer:
            self.missing.append("agents.optimizer (for evol_instruct.optimise)")
        made.sources[0] = out / "rows.jsonl"
        made.rankings = out / "rankings.jsonl" if agents["ranker"] else made.rankings

    def evol_answer(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        agents = self.recipes["evol_answer"].Agents(
            self.role("answerer", "evol_answer"), self.role("judge", "evol_answer")
        )
        wiring = {"data": (made.sources[0],), "agents": agents}
        out = self.add("evol_answer", where, "evol_answer", wiring, t=t, repeat=repeat)
        made.sources[0], made.answers = out / "rows.jsonl", out / "preferences.jsonl"

    def co_teach(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        rivals = self.run.agents.rivals or (WORLD_RIVALS if self.run.world else ())
        if not rivals:
            self.missing.append("agents.rivals (for co_teach)")
        agents = self.recipes["co_teach"].Agents(
            str(made.model),
            tuple(map(self._spec, rivals)),
            (self.role("judge", "co_teach"),),
            suggester=self.optional_role("suggester"),
            rewriter=self._spec(self.run.agents.rewriter) if self.run.agents.rewriter else None,
            user=self.optional_role("user"),
        )
        wiring = {"data": (made.sources[-1],), "agents": agents}
        out = self.add("co_teach", where, "co_teach", wiring, t=t, repeat=repeat)
        made.sources.insert(0, out / "sft.jsonl")
        made.battles = out / "preferences.jsonl"

    def clean(self, t: int, made: Made) -> None:
        """The slice's rows: what the Evol Lab and the teachers made of them, without duplicates and contamination."""
        sources = list(made.sources)
        if made.self_taught is not None and self.run.mix.self_taught:
            sources.insert(0, self._share(t, made.self_taught, self.run.mix.self_taught))
        wiring: dict[str, Any] = {"data": tuple(sources), "slices": 1}
        if self.apart:
            wiring["evaluation"] = self.apart
        where = f"slice_{t}/rows"
        made.rows = self.add("slice_rows", where, "sample", wiring, t=t, learns=tuple(sources)) / "slice_1.jsonl"
        made.all_rows.append(made.rows)

    def _share(self, t: int, path: Path, share: float) -> Path:
        """A share of a file's rows."""
        if share == 1:
            return path
        wiring = {"data": (path,), "shares": (share,)}
        return self.add("pairs", f"slice_{t}/self_taught", "mix", wiring, t=t) / "rows.jsonl"

    # ---- learning ---------------------------------------------------------------------------------------------------

    def _learned(self, where: str, made: Made) -> dict[str, Any]:
        """For a stage that gives a model: without it the one before is used."""
        return {"stands_for": {self.out / where / "model": made.model}}

    def _held(self, recipe: str, rows: tuple[Path, ...]) -> dict[str, Any]:
        """Held-out measures of a training stage."""
        fields = {f.name for f in dataclasses.fields(self.recipes[recipe].Config)}
        if not (rows and self.run.measure.in_training and "eval_every" in fields):
            return {}
        return {"held_out": rows, "eval_every": self.run.measure.every}

    def sft(self, where: str, made: Made, *, t: int, repeat: int, union: bool) -> Path:
        data = tuple(made.all_rows) if union else (made.rows,)
        wiring = {"data": data, "model": str(made.model), **self._held("sft", self.held_out)}
        node = {"learns": data, **self._learned(where, made)}
        return self.add("sft", where, "sft", wiring, t=t, repeat=repeat, **node) / "model"

    def self_teach(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        agents = self.recipes["self_teach"].Agents(
            str(made.model), self.role("judge", "self_teach"), labeller=self.optional_role("labeller")
        )
        wiring = {"data": (made.rows,), "agents": agents}
        out = self.add("self_teach", where, "self_teach", wiring, t=t, repeat=repeat, learns=(made.rows,))
        made.self_taught, made.lessons = out / "sft.jsonl", out

    def _pairs(self, where: str, made: Made, *, t: int, repeat: int) -> tuple[Path, tuple[Path, ...]]:
        """What a stage learns from that compares answers, and held-out pairs."""
        mix, rows = self.run.mix, self.run.rows
        offered = [(path, mix.given_pairs) for path in rows.pairs]
        if made.lessons is not None:
            offered.append((made.lessons / "preferences.jsonl", mix.self_teach))
        offered += [(made.answers, mix.evol_answer), (made.battles, mix.battles)]
        chosen = [(path, share) for path, share in offered if path is not None and share]
        fallback = made.answers if mix.fallback else None
        if not chosen and fallback is None:
            self.missing.append(
                f"preference rows (for {where}): rows.pairs, or self_teach, evol_answer or co_teach before it"
            )
        wiring: dict[str, Any] = {"data": tuple(path for path, _ in chosen), "fallback": fallback}
        wiring |= {"shares": tuple(share for _, share in chosen)} if any(share < 1 for _, share in chosen) else {}
        wiring |= {} if rows.held_out_pairs else {"hold_out": rows.hold_out_pairs}
        name = where.replace("stage_dpo", "pairs").replace("preference_reward", "preference_pairs")
        out = self.add("pairs", name, "mix", wiring, t=t, repeat=repeat)
        held = rows.held_out_pairs or ((out / "held_out.jsonl",) if rows.hold_out_pairs else ())
        return out / "rows.jsonl", held

    def stage_dpo(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> Path:
        pairs, held_out = self._pairs(where, made, t=t, repeat=repeat)
        made.pairs = pairs, held_out
        wiring = {"data": (pairs,), "model": str(made.model), **self._held("stage_dpo", held_out)}
        node = {"learns": (pairs,), **self._learned(where, made)}
        return self.add("stage_dpo", where, "stage_dpo", wiring, t=t, repeat=repeat, **node) / "model"

    def instruction_reward(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        rankings = self.need(made.rankings, where, "rankings of evol_instruct with agents.ranker")
        made.instruction = self._reward(where, made, "instruction", rankings, t=t, repeat=repeat)

    def process_reward(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        lessons = made.lessons if self.optional_role("labeller") else None
        labels = self.need(lessons, where, "answers of self_teach with agents.labeller") / "processes.jsonl"
        made.process = self._reward(where, made, "process", labels, t=t, repeat=repeat)

    def preference_reward(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> None:
        """A reward model of answers, from the pairs of the slice's Stage-DPO where it stands before, else its own."""
        pairs, held_out = made.pairs or self._pairs(where, made, t=t, repeat=repeat)
        held = self._held("reward", held_out)
        made.preference = self._reward(where, made, "preference", pairs, t=t, repeat=repeat, **held)

    def _reward(self, where: str, made: Made, kind: str, rows: Path, *, t: int, repeat: int, **more: Any) -> Path:
        stage = f"{kind}_reward"
        # All reward models start from the last supervised model.
        supervised = [path for name, path in made.learned.items() if name.startswith("sft")]
        wiring = {"kind": kind, "data": (rows,), "model": str(supervised[-1] if supervised else made.model), **more}
        node = {"learns": (rows,), "stands_for": {self.out / where / "model": None}}
        return self.add(stage, where, "reward", wiring, t=t, repeat=repeat, **node) / "model"

    def rleif(self, where: str, made: Made, *, t: int, repeat: int, **_: Any) -> Path:
        options = self.recipes["rleif"]
        factors = self._factors(t, repeat)
        models = {
            f"{name}_model": self.need(getattr(made, name), where, f"{name}_reward before it")
            for name in MODELS
            if name in factors
        }
        reward = options.RewardOptions(**models, **({"factors": factors} if factors != FACTORS else {}))
        wiring = {
            "data": (made.rows,),
            "model": str(made.model),
            "reward": reward,
            **self._held("rleif", self.held_out),
        }
        # The answers to a prompt differ in every factor but that of the instruction.
        wiring |= {"ppo": options.PPOOptions(group_baseline=any(name != "instruction" for name in factors))}
        node = {"learns": (made.rows,), **self._learned(where, made)}
        return self.add("rleif", where, "rleif", wiring, t=t, repeat=repeat, **node) / "model"

    def _factors(self, t: int, repeat: int) -> tuple[str, ...]:
        """The factors of the reward that the tables ask for."""
        chosen = FACTORS
        for _, table in self.run.table("rleif", t, repeat):
            chosen = tuple(table.get("reward", {}).get("factors", chosen))
        return chosen

    # ---- what it bought ---------------------------------------------------------------------------------------------

    def measure(self, t: int, name: str, model: Path) -> Path | None:
        """The directory of a model's accuracy; None where the held-out rows have no answers to check."""
        if not (self.has_answers and self.held_out):
            return None
        wiring = {"model": str(model), "data": self.held_out[0]}
        return self.add("accuracy", f"slice_{t}/accuracy_{name}", "accuracy", wiring, t=t)

    def _compare(self, made: Made, base: Path) -> None:
        """Blind comparison of the last slice's models, and questions to the first and the last model."""
        measure = self.run.measure
        last = [(name, answers, model) for t, name, answers, model in self.measured if t == self.run.slices]
        has_games = self.optional_role("judge") is not None if measure.arena is None else measure.arena
        if has_games and self.held_out and len(last) > 1:
            specs = [
                f"{name}={model if answers is None else answers / 'answers.jsonl#sampled'}"
                for name, answers, model in last
            ]
            wiring = {
                "models": tuple(specs),
                "prompts": self.held_out[0],
                "n": measure.rows,
                "judge": (self.role("judge", "arena, or arena = false in [measure]"),),
                "anchor": last[0][0],
            }
            self.add("arena", "arena", "arena", wiring, is_main_only=True)
        if measure.mt_bench and self.questions is not None:
            for name, model in {"base": base, last[-1][0]: last[-1][2]}.items():
                judge = self.role("judge", "mt_bench, or mt-bench = false in [measure]")
                wiring = {"model": str(model), "judge": judge, "questions": self.questions}
                wiring |= {"references": self.run.rows.references} if self.run.rows.references else {}
                self.add("mt_bench", f"mt_bench_{name}", "mt_bench", wiring, is_main_only=True)
