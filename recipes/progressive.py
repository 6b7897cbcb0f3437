"""Progressive learning: the whole system, slice by slice, and its evaluation.

    python recipes/progressive.py --preset demo --out runs/demo
    torchrun --nproc-per-node 2 recipes/progressive.py --preset demo --out runs/demo

Slice 1 goes through the Evol Lab alone, later slices also through AI Align AI; each slice is then trained by supervised
learning, Stage-DPO and RLEIF, starting from the model of the slice before (`continue`), or, in the last slice, from the
base model on the union of all slices' rows (`union`). Every stage is skipped when its inputs and its configuration are
unchanged, so the same command resumes a run that was killed.
"""

import dataclasses
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from recipes import (
    accuracy,
    analyze,
    arena,
    co_teach,
    evol_answer,
    evol_instruct,
    make_world,
    mt_bench,
    reward,
    rleif,
    sample,
    self_teach,
    sft,
    stage_dpo,
)
from wizard_engine import runtime, world
from wizard_engine.evaluation.summary import Timing, write_summary
from wizard_engine.parallel import MeshOptions, Sharding
from wizard_engine.rl.options import CriticOptions, KLOptions, PPOOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import FACTORS
from wizard_engine.runtime.files import write_json
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import AtLeastOne, Checked, Count, NonNegative, Positive, Seed
from wizard_engine.training.options import OnlineTraining, Training

# Target shares of the embedded world's attributes: more of rare topics, Spanish, hard problems and careful sources.
TARGETS = {
    "topic": {
        "market": 0.25,
        "school": 0.20,
        "kitchen": 0.15,
        "sports": 0.12,
        "farm": 0.09,
        "library": 0.08,
        "travel": 0.05,
        "garden": 0.03,
        "general": 0.02,
        "other": 0.01,
    },
    "language": {"en": 0.84, "es": 0.16},
    "source": {"textbook": 0.35, "exam": 0.25, "forum": 0.25, "chat_log": 0.15},
    "difficulty": {"easy": 0.34, "medium": 0.50, "hard": 0.16},
    "toxic": {"false": 1.0, "true": 0.0},
}


@dataclass(frozen=True)
class Sizes(Checked):
    """How much of everything."""

    corpus: Count[int] = 14_000
    """Rows of the embedded world's natural corpus."""
    plain: NonNegative[int] = 30_000
    """Documents of plain text that the base model is trained on."""
    held_out: Count[int] = 1500
    """Held-out problems."""
    sample: Count[int] = 5400
    """Rows drawn from the corpus for all slices together."""
    battles: Count[int] = 800
    """Rows per slice that co-teaching judges."""
    preferences: Count[int] = 1500
    """Rows per slice that the student answers several times for Stage-DPO."""
    questions: Count[int] = 80
    """Two-turn questions."""


@dataclass(frozen=True)
class Agents:
    """The agent of each role: registered program (world:NAME; reference:judge, reference:labeller), model directory,
    endpoint (openai:MODEL@URL), or file of replies (scripted:FILE)."""

    evolver: str = "world:evolver"
    answerer: str = "world:expert"
    rivals: tuple[str, ...] = ("world:expert", "world:careless", "world:rambler")
    judge: str = "world:judge"
    labeller: str = "world:judge"
    optimizer: str = "world:optimizer"
    ranker: str = "world:ranker"


@dataclass(frozen=True)
class Config(Checked):
    """The whole system on the embedded world, or on rows and a base model of your own."""

    out: Path = Path("runs/progressive")
    data: tuple[Path, ...] = ()
    """Natural rows; default: those of the embedded world. Rows of your own need --no-weighted."""
    evaluation: Path | None = None
    """Held-out rows with reference answers; default: the embedded world's."""
    base: str | None = None
    """Model directory to start from; default: one trained briefly on the embedded world's plain text."""
    slices: Count[int] = 3
    progression: Literal["continue", "union"] = "continue"
    evolve: bool = True
    """Evolve instructions and answers; off for an ablation."""
    weighted: bool = True
    """Draw rows to the target shares of the embedded world; --no-weighted draws at natural shares, as rows of your own
    need. For other shares run recipes/sample.py first."""
    cap: AtLeastOne[float] = 2.4
    """Largest sampling weight of a row, in mean weights."""
    factors: tuple[str, ...] = FACTORS
    """Factors of the RLEIF reward."""
    sizes: Sizes = field(default_factory=Sizes)
    agents: Agents = field(default_factory=Agents)
    pretraining: Training = field(default_factory=Training)
    supervised: Training = field(default_factory=Training)
    preference: Training = field(default_factory=Training)
    instruction_reward: Training = field(default_factory=Training)
    process_reward: Training = field(default_factory=Training)
    reinforcement: OnlineTraining = field(default_factory=lambda: OnlineTraining(lr=1e-4))
    rollout: RolloutOptions = field(
        default_factory=lambda: RolloutOptions(steps=24, prompts_per_step=24, samples_per_prompt=8, max_new_tokens=80)
    )
    """Of RLEIF in each slice; the student's other answers are as long at most."""
    critic: CriticOptions = field(default_factory=lambda: CriticOptions(lr=5e-4))
    kl: KLOptions = field(default_factory=lambda: KLOptions(coefficient=0.02))
    ptx: PTXOptions = field(default_factory=lambda: PTXOptions(coefficient=0.5))
    dpo_slices: Count[int] = 2
    beta: Positive[float] = 0.2
    nll: NonNegative[float] = 0.5
    """Weight of the chosen answers' likelihood in Stage-DPO."""
    mesh: MeshOptions = field(default_factory=MeshOptions)
    sharding: Sharding = field(default_factory=Sharding)
    seed: Seed[int] = 0
    threads: Count[int | None] = None
    """CPU threads of torch operations per rank."""
    quiet: bool = False


SMALL_STEPS = Training(pack_tokens=1024, packs_per_step=2, beta2=0.98, weight_decay=0.01, save_every=0)
DEMO = Config(
    out=Path("runs/demo"),
    threads=1,
    mesh=MeshOptions(dp_shard=1),
    pretraining=replace(SMALL_STEPS, lr=4e-3, pack_tokens=512, max_steps=1300),
    supervised=replace(SMALL_STEPS, lr=3e-3, pack_tokens=512, epochs=4, save_every=400),
    preference=replace(SMALL_STEPS, lr=3e-5, epochs=1),
    instruction_reward=replace(SMALL_STEPS, lr=5e-4, epochs=1),
    process_reward=replace(SMALL_STEPS, lr=5e-3, pack_tokens=512, epochs=2),
)
TINY_STEPS = replace(SMALL_STEPS, lr=3e-3, pack_tokens=512, max_steps=6)
TINY = replace(
    DEMO,
    out=Path("runs/tiny"),
    sizes=Sizes(corpus=900, plain=300, held_out=60, sample=240, battles=20, preferences=30, questions=8),
    pretraining=TINY_STEPS,
    supervised=TINY_STEPS,
    preference=replace(TINY_STEPS, lr=2e-5),
    instruction_reward=TINY_STEPS,
    process_reward=TINY_STEPS,
    dpo_slices=1,
    rollout=RolloutOptions(steps=2, prompts_per_step=4, samples_per_prompt=2, max_new_tokens=32),
)
PRESETS = {"demo": DEMO, "tiny": TINY}


class Pipeline:
    """The stages of one run; each method runs one recipe in this process and returns the path of its result."""

    def __init__(self, cfg: Config, rt: runtime.Runtime) -> None:
        self.cfg, self.out, self.rt = cfg, cfg.out, rt
        self.common = {
            "seed": cfg.seed,
            "overwrite": True,
            "quiet": cfg.quiet,
            "mesh": cfg.mesh,
            "sharding": cfg.sharding,
        }
        self.timing = Timing(cfg.out / "timing.json", rt)

    def run(self, where: str, recipe: ModuleType, *, is_main_only: bool = False, **options: Any) -> Path:
        """One recipe into OUT/where, with the options that all share; `is_main_only`: on rank 0 only."""
        out = self.out / where
        fields = {f.name for f in dataclasses.fields(recipe.Config)}
        common = {name: value for name, value in self.common.items() if name in fields}
        if self.rt.is_main and not self.cfg.quiet:
            print(f"== {where}", flush=True)
        with self.timing.of(where, out):
            config = recipe.Config(out=out, **common, **options)
            from_main(self.rt, lambda: recipe.main(config) and None) if is_main_only else recipe.main(config)
        return out

    def prepare(self) -> tuple[list[Path], Path]:
        """Natural rows analysed and sampled into slices; the slices and the base model."""
        cfg = self.cfg
        base = Path(cfg.base) if cfg.base else self._base()
        data = cfg.data or (self.out / "world" / "corpus.jsonl",)
        analysis = self.run("analysis", analyze, data=data, checkpoint=base)
        from_main(self.rt, lambda: write_json(self.out / "targets.json", TARGETS if cfg.weighted else {}))
        try:
            drawn = self.run(
                "sample",
                sample,
                data=(analysis / "rows.jsonl",),
                evaluation=(self.held_out,),
                size=cfg.sizes.sample,
                slices=cfg.slices,
                targets=self.out / "targets.json",
                cap=cfg.cap,
            )
        except ValueError as error:
            if not (cfg.data and cfg.weighted and re.search(r"\b(targets\.|cap: )", str(error))):
                raise
            message = "the target shares belong to the embedded world; pass --no-weighted with rows of your own"
            raise ValueError(f"{error}; {message}") from error
        return [drawn / f"slice_{t}.jsonl" for t in range(1, cfg.slices + 1)], base

    @property
    def held_out(self) -> Path:
        """Held-out rows."""
        return self.cfg.evaluation or self.out / "world" / "held_out.jsonl"

    def make_world(self) -> None:
        """The embedded world's files, wherever something of it is used."""
        s = self.cfg.sizes
        self.run("world", make_world, corpus=s.corpus, plain=s.plain, held_out=s.held_out, questions=s.questions)

    def _base(self) -> Path:
        """A base model trained briefly on the world's plain text."""
        files = self.out / "world"
        self.run(
            "base",
            sft,
            data=(files / "plain.jsonl",),
            kind="text",
            model="demo",
            tokenizer=files / "tokenizer",
            training=self.cfg.pretraining,
        )
        return self.out / "base" / "model"

    def rows(self, t: int, slice_rows: Path, model: Path) -> Path:
        """Training rows of slice t: Evol Lab, from slice 2 on AI Align AI, then duplicates and contamination out."""
        cfg, at = self.cfg, f"slice_{t}"
        sources = [slice_rows]
        if cfg.evolve:
            sources = [self.evol_lab(t, slice_rows)]
            if t > 1:
                taught = self.run(
                    f"{at}/co_teach",
                    co_teach,
                    data=tuple(sources),
                    limit=cfg.sizes.battles,
                    sft_threshold=1.0,
                    chat_turns=2,
                    on_length="keep",
                    agents=co_teach.Agents(str(model), cfg.agents.rivals, (cfg.agents.judge,)),
                )
                sources.insert(0, taught / "sft.jsonl")
        clean = self.run(f"{at}/rows", sample, data=tuple(sources), evaluation=(self.held_out,), slices=1)
        return clean / "slice_1.jsonl"

    def evol_lab(self, t: int, slice_rows: Path) -> Path:
        """Evol-Instruct, its method optimised in slice 1, then Evol-Answer; the rows."""
        agents = self.cfg.agents
        first = self.out / "slice_1" / "evol_instruct" / "method.txt"
        method = {"optimise": evol_instruct.Optimise(steps=4)} if t == 1 else {"method": first}
        evolved = self.run(
            f"slice_{t}/evol_instruct",
            evol_instruct,
            data=(slice_rows,),
            evaluation=(self.held_out,),
            **method,
            agents=evol_instruct.Agents(agents.evolver, agents.answerer, agents.judge, agents.optimizer, agents.ranker),
        )
        answers = self.run(
            f"slice_{t}/evol_answer",
            evol_answer,
            data=(evolved / "rows.jsonl",),
            rounds=1,
            agents=evol_answer.Agents(agents.answerer, agents.judge),
        )
        return answers / "rows.jsonl"

    def learn(self, t: int, rows: tuple[Path, ...], model: Path) -> dict[str, Path]:
        """Supervised learning, Stage-DPO and RLEIF of slice t; the model after each."""
        cfg, at = self.cfg, f"slice_{t}"
        supervised = self.run(f"{at}/sft", sft, data=rows, model=str(model), training=cfg.supervised) / "model"
        self_taught = self.run(
            f"{at}/self_teach",
            self_teach,
            data=rows[-1:],
            limit=cfg.sizes.preferences,
            max_tokens=cfg.rollout.max_new_tokens,
            on_length="keep",
            agents=self_teach.Agents(str(supervised), cfg.agents.judge, labeller=cfg.agents.labeller),
            keep=1.0,
        )
        evolved = self.out / at / "evol_answer"
        pairs = (self.preferences(self_taught / "preferences.jsonl", evolved / "preferences.jsonl"),)
        preferred = self.run(
            f"{at}/stage_dpo",
            stage_dpo,
            data=pairs,
            model=str(supervised),
            slices=cfg.dpo_slices,
            beta=cfg.beta,
            nll=cfg.nll,
            training=cfg.preference,
        )
        rankings = self.out / f"slice_{t if cfg.evolve else 1}" / "evol_instruct" / "rankings.jsonl"
        instruction = self.run(
            f"{at}/instruction_reward",
            reward,
            kind="instruction",
            data=(rankings,),
            model=str(supervised),
            training=cfg.instruction_reward,
        )
        process = self.run(
            f"{at}/process_reward",
            reward,
            kind="process",
            data=(self_taught / "processes.jsonl",),
            model=str(supervised),
            training=cfg.process_reward,
        )
        reinforced = self.run(
            f"{at}/rleif",
            rleif,
            data=rows[-1:],
            model=str(preferred / "model"),
            **self.rleif_options(instruction / "model", process / "model", cfg.factors),
        )
        return {"sft": supervised, "stage_dpo": preferred / "model", "rleif": reinforced / "model"}

    def preferences(self, self_taught: Path, evolved: Path) -> Path:
        """The pairs of self-teaching; those of Evol-Answer where the student's samples never differed by enough."""
        if self_taught.stat().st_size or not evolved.exists():
            return self_taught
        if self.rt.is_main:
            reason = "no two samples of the student differed by enough"
            print(f"{self_taught}: {reason}; Stage-DPO trains on {evolved}", flush=True)
        return evolved

    def rleif_options(self, instruction: Path, process: Path, factors: tuple[str, ...]) -> dict[str, Any]:
        """Options of RLEIF that are the same in every slice; one factor alone needs no baseline within a prompt."""
        cfg = self.cfg
        return {
            "reward": RewardOptions(instruction, process, factors),
            "training": cfg.reinforcement,
            "rollout": cfg.rollout,
            "ppo": PPOOptions(group_baseline="process" in factors),
            "critic": cfg.critic,
            "kl": cfg.kl,
            "ptx": cfg.ptx,
        }

    def measure(self, t: int, name: str, model: Path) -> Path:
        """Greedy and sampled accuracy of one model."""
        return self.run(
            f"slice_{t}/accuracy_{name}",
            accuracy,
            model=str(model),
            data=self.held_out,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
        )


def main(cfg: Config) -> dict:
    """Run everything; returns the summary."""
    began = time.perf_counter()
    rt = runtime.start("auto", threads=cfg.threads)
    world.register()
    pipeline = Pipeline(cfg, rt)
    pipeline.make_world()
    slices, base = pipeline.prepare()
    model, rows = base, []
    stages = []
    answers = pipeline.measure(1, "base", base)
    for t, slice_rows in enumerate(slices, 1):
        stages.append((t, "base", answers))
        rows.append(pipeline.rows(t, slice_rows, model))
        union = cfg.progression == "union" and t == len(slices)
        models = pipeline.learn(t, tuple(rows) if union else tuple(rows[-1:]), base if union else model)
        for name, path in models.items():
            answers = pipeline.measure(t, name, path)
            stages.append((t, name, answers))
        model = models["rleif"]
    last = {name: answers for t, name, answers in stages if t == len(slices)}
    battles = pipeline.run(
        "arena",
        arena,
        is_main_only=True,
        models=tuple(f"{name}={path / 'answers.jsonl'}#sampled" for name, path in last.items()),
        prompts=pipeline.held_out,
        n=cfg.sizes.held_out,
        judge=cfg.agents.judge,
        anchor="base",
    )
    for name, path in (("base", base), ("rleif", model)):
        pipeline.run(
            f"mt_bench_{name}",
            mt_bench,
            is_main_only=True,
            model=str(path),
            judge=cfg.agents.judge,
            questions=pipeline.out / "world" / "questions.jsonl",
            max_new_tokens=cfg.rollout.max_new_tokens,
        )
    seconds = time.perf_counter() - began
    summary = from_main(rt, lambda: write_summary(cfg.out, cfg.seed, seconds, stages, battles, pipeline.timing.seconds))
    if rt.is_main and not cfg.quiet:
        print(f"done: {cfg.out / 'report.html'}, {cfg.out / 'summary.json'}")
    return summary


if __name__ == "__main__":
    launch(main, Config, PRESETS)
