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

from recipes import progressive
from wizard_engine import runtime, world
from wizard_engine.pipeline.plan import Made, Plan
from wizard_engine.pipeline.run_file import DATA_STAGES, Base, Measure, Rows, read_run_file
from wizard_engine.rl.rewards import FACTORS
from wizard_engine.runtime.files import read_object, write_json
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Seed

COUNTED = ("accuracy", "se", "sampled_accuracy", "sampled_se", "total")
UNMEASURED = Measure(accuracy=False, arena=False, mt_bench=False, in_training=False)


@dataclass(frozen=True)
class Config(Checked):
    """Ablations against a finished demo."""

    demo: Path = Path("runs/demo")
    """Run directory of a finished demo."""
    out: Path = Path("runs/ablations")
    run: Path = Path(__file__).parent / "runs" / "demo.toml"
    """Run file that made the demo."""
    seed: Seed[int] = 0
    quiet: bool = False


class Ablations:
    """Variants of a finished demo, each measured on its held-out problems."""

    def __init__(self, cfg: Config, rt: runtime.Runtime) -> None:
        if not (cfg.demo / "summary.json").is_file():
            raise ValueError(f"demo: expected a finished run with summary.json in {cfg.demo}; run make demo first")
        self.cfg, self.rt, self.demo = cfg, rt, cfg.demo
        run = read_run_file(cfg.run)
        world_files = self.demo / "world"
        self.base = cfg.demo / "base" / "model"
        self.run = replace(
            run,
            seed=cfg.seed,
            quiet=cfg.quiet,
            rows=Rows(data=(world_files / "corpus.jsonl",), held_out=(world_files / "held_out.jsonl",)),
            base=Base(self.base, size="demo"),
            measure=UNMEASURED,
        )
        self.slices = run.slices
        self.tables: list[dict[str, Any]] = []

    def plan(self, name: str, **changes: Any) -> Plan:
        """An empty graph of the demo's run in a directory of its own."""
        run = replace(self.run, out=self.cfg.out / name, **changes)
        return Plan(run, progressive.RECIPES, size="demo", has_answers=False)

    def measured(self, plan: Plan, model: Path, name: str = "accuracy") -> dict[str, Any]:
        """Run a graph, and then its model's accuracies: a line of a table."""
        out = plan.add("accuracy", name, "accuracy", {"model": str(model), "data": plan.held_out[0]})
        from_main(self.rt, lambda: progressive.write_targets(plan.run))
        progressive.driver_of(plan.run, self.rt, plan.nodes).run_all()
        counted = read_object(out / "accuracy.json")
        return {key: counted[key] for key in COUNTED}

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """One table, printed as it is done."""
        self.tables.append({"name": name, "rows": rows})
        if self.rt.is_main:
            for row in rows:
                accuracies = f"{100 * row['accuracy']:5.1f} % greedy {100 * row['sampled_accuracy']:5.1f} % sampled"
                print(f"{name:<32} {row['setting']:<40} {accuracies}", flush=True)

    def chain(self, name: str, stages: tuple[str, ...], **changes: Any) -> dict[str, Any]:
        """Rows as the variant makes them, and supervised learning slice by slice."""
        plan = self.plan(name, stages=(*stages, "sft"), **changes).build()
        return self.measured(plan, plan.measured[-1][3])

    def data(self) -> None:
        """Slices, evolving and weighting, by supervised learning alone."""
        rows = [self.demo / f"slice_{t}" / "rows" / "slice_1.jsonl" for t in range(1, self.slices + 1)]
        chain, model = self.plan("slices"), self.base
        for t, path in enumerate(rows, 1):
            model = chain.add("sft", f"slice_{t}/sft", "sft", {"data": (path,), "model": str(model)}, t=t) / "model"
        full = self.measured(chain, model)
        at_once = self.plan("at_once")
        model = at_once.add("sft", "sft", "sft", {"data": tuple(rows), "model": str(self.base)}) / "model"
        one = self.measured(at_once, model)
        self.compare("slices", f"{self.slices} slices, one after the other", full, "the same rows in one training", one)
        plain = self.chain("not_evolved", ())
        self.compare("Evol Lab and co-teaching", "evolved", full, "natural rows as drawn", plain)
        self.compare("sampling", "weighted", full, "natural", self.chain("natural", DATA_STAGES, targets={}))

    def compare(self, name: str, first: str, full: dict[str, Any], second: str, variant: dict[str, Any]) -> None:
        """A table of two lines."""
        self.add(name, [{"setting": first, **full}, {"setting": second, **variant}])

    def rewards(self) -> None:
        """RLEIF of the last slice with both factors and with each alone."""
        at = self.demo / f"slice_{self.slices}"
        before = read_object(at / "accuracy_stage_dpo" / "accuracy.json")
        rows = [{"setting": "before RLEIF", **{key: before[key] for key in COUNTED}}]
        for factors in (FACTORS, *((name,) for name in FACTORS)):
            table = self.run.options["rleif"] | {"reward": {"factors": list(factors)}}
            plan = self.plan("reward_" + "_".join(factors), options={**self.run.options, "rleif": table})
            made = Made(
                at / "stage_dpo" / "model",
                rows=at / "rows" / "slice_1.jsonl",
                instruction=at / "instruction_reward" / "model",
                process=at / "process_reward" / "model",
            )
            model = plan.rleif("rleif", made, t=self.slices, repeat=1)
            rows.append({"setting": " x ".join(factors), **self.measured(plan, model)})
        self.add("RLEIF reward", rows)


def main(cfg: Config) -> dict:
    """Run every ablation; returns what ablations.json holds."""
    rt = runtime.start("auto", threads=read_run_file(cfg.run).threads)
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
