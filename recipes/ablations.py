"""Ablations of the demo: what slices, evolving, weighted sampling and each reward factor are worth.

    make demo && make ablations
    torchrun --nproc-per-node 2 recipes/ablations.py --demo runs/demo --out runs/ablations

Data ablations train by supervision alone, from the demo's base model, with as many optimizer steps as the demo's own
chain of slices; reward ablations repeat the last slice's RLEIF. Results are in OUT/ablations.json, and are added to the
demo's report.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes import accuracy, progressive, rleif, sft
from wizard_engine import runtime, world
from wizard_engine.rl.rewards import FACTORS
from wizard_engine.runtime.files import read_object, write_json
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Seed


@dataclass(frozen=True)
class Config(Checked):
    """Ablations against a finished demo."""

    demo: Path = Path("runs/demo")
    """Run directory of a finished demo."""
    out: Path = Path("runs/ablations")
    preset: str = "demo"
    """Preset of recipes/progressive.py that made the demo."""
    seed: Seed[int] = 0
    quiet: bool = False


class Ablations:
    """Variants of a finished demo, each measured on its held-out problems."""

    def __init__(self, cfg: Config, rt: runtime.Runtime) -> None:
        if not (cfg.demo / "summary.json").is_file():
            raise ValueError(f"demo: expected a finished run with summary.json in {cfg.demo}; run make demo first")
        self.cfg, self.rt, self.demo = cfg, rt, cfg.demo
        self.plan = replace(progressive.PRESETS[cfg.preset], out=cfg.out, seed=cfg.seed, quiet=cfg.quiet)
        self.base = cfg.demo / "base" / "model"
        self.slices = self.plan.slices
        self.tables: list[dict[str, Any]] = []

    def pipeline(self, name: str, **changes: Any) -> progressive.Pipeline:
        """The demo's pipeline in a directory of its own, on the demo's world and base model."""
        plan = replace(self.plan, out=self.cfg.out / name, base=str(self.base), evaluation=self.held_out, **changes)
        return progressive.Pipeline(replace(plan, data=(self.demo / "world" / "corpus.jsonl",)), self.rt)

    @property
    def held_out(self) -> Path:
        """The demo's held-out problems."""
        return self.demo / "world" / "held_out.jsonl"

    def measure(self, pipeline: progressive.Pipeline, model: Path, name: str) -> dict[str, Any]:
        """A line of a table: the accuracies of one model."""
        out = pipeline.run(
            name, accuracy, model=model, data=self.held_out, max_new_tokens=self.plan.rollout.max_new_tokens
        )
        counted = read_object(out / "accuracy.json")
        return {key: counted[key] for key in ("accuracy", "se", "sampled_accuracy", "sampled_se", "total")}

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """One table, printed as it is done."""
        self.tables.append({"name": name, "rows": rows})
        if self.rt.is_main:
            for row in rows:
                accuracies = f"{100 * row['accuracy']:5.1f} % greedy {100 * row['sampled_accuracy']:5.1f} % sampled"
                print(f"{name:<32} {row['setting']:<40} {accuracies}", flush=True)

    def chain(self, name: str, slices: list[Path] | None = None, **changes: Any) -> dict[str, Any]:
        """Supervised learning slice by slice; the rows are made by the variant unless given."""
        pipeline = self.pipeline(name, **changes)
        sources = slices or pipeline.prepare()[0]
        model = self.base
        for t, source in enumerate(sources, 1):
            rows = source if slices else pipeline.rows(t, source, model)
            model = (
                pipeline.run(f"slice_{t}/sft", sft, data=(rows,), model=str(model), training=self.plan.supervised)
                / "model"
            )
        return self.measure(pipeline, model, "accuracy")

    def data(self) -> None:
        """Slices, evolving and weighting, by supervised learning alone."""
        made = [self.demo / f"slice_{t}" / "rows" / "slice_1.jsonl" for t in range(1, self.slices + 1)]
        full = self.chain("slices", made)
        at_once = self.pipeline("at_once")
        model = at_once.run("sft", sft, data=tuple(made), model=str(self.base), training=self.plan.supervised) / "model"
        one = self.measure(at_once, model, "accuracy")
        self.compare("slices", f"{self.slices} slices, one after the other", full, "the same rows in one training", one)
        plain = self.chain("not_evolved", evolve=False)
        self.compare("Evol Lab and co-teaching", "evolved", full, "natural rows as drawn", plain)
        self.compare("sampling", "weighted", full, "natural", self.chain("natural", weighted=False))

    def compare(self, name: str, first: str, full: dict[str, Any], second: str, variant: dict[str, Any]) -> None:
        """A table of two lines."""
        self.add(name, [{"setting": first, **full}, {"setting": second, **variant}])

    def rewards(self) -> None:
        """RLEIF of the last slice with both factors and with each alone."""
        at, rows = self.demo / f"slice_{self.slices}", []
        lines = read_object(at / "accuracy_stage_dpo" / "accuracy.json")
        kept = ("accuracy", "se", "sampled_accuracy", "sampled_se", "total")
        rows.append({"setting": "before RLEIF", **{key: lines[key] for key in kept}})
        for factors in (FACTORS, *((name,) for name in FACTORS)):
            pipeline = self.pipeline("reward_" + "_".join(factors))
            models = at / "instruction_reward" / "model", at / "process_reward" / "model"
            options = pipeline.rleif_options(*models, factors)
            model = (
                pipeline.run(
                    "rleif",
                    rleif,
                    data=(at / "rows" / "slice_1.jsonl",),
                    model=str(at / "stage_dpo" / "model"),
                    **options,
                )
                / "model"
            )
            rows.append({"setting": " x ".join(factors), **self.measure(pipeline, model, "accuracy")})
        self.add("RLEIF reward", rows)


def main(cfg: Config) -> dict:
    """Run every ablation; returns what ablations.json holds."""
    rt = runtime.start("auto", threads=progressive.PRESETS[cfg.preset].threads)
    world.register()
    ablations = Ablations(cfg, rt)
    ablations.data()
    ablations.rewards()
    result = {"seed": cfg.seed, "demo": str(cfg.demo), "tables": ablations.tables}
    from_main(rt, lambda: write_json(cfg.out / "ablations.json", result))
    if rt.is_main and not cfg.quiet:
        print(f"done: {cfg.out / 'ablations.json'}")
    return json.loads(json.dumps(result))


if __name__ == "__main__":
    launch(main, Config)
