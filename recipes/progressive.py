"""Progressive learning: the whole system on your rows, base model and teachers, slice by slice, from one run file.

    python recipes/progressive.py recipes/runs/demo.toml --out runs/demo
    torchrun --nproc-per-node 2 recipes/progressive.py my/run.toml
    python recipes/progressive.py my/run.toml --dry-run

`python -m wizard_engine new-run DIR` writes a commented run file. Slice 1 goes through the Evol Lab alone, later slices
also through AI Align AI; each slice is then trained by supervised learning, Stage-DPO and RLEIF, starting from the
model of the slice before (`continue`), or, in the last slice, from the base model on the union of all slices' rows
(`union`). Every stage is skipped when its inputs and its configuration are unchanged, so the same command resumes a run
that was killed.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes import (
    accuracy,
    analyze,
    arena,
    co_teach,
    evol_answer,
    evol_instruct,
    make_world,
    mix,
    mt_bench,
    reward,
    rleif,
    sample,
    self_teach,
    sft,
    stage_dpo,
)
from wizard_engine import runtime, world
from wizard_engine.evaluation.summary import write_summary
from wizard_engine.pipeline.about import about
from wizard_engine.pipeline.commands import shown_commands, slurm_script
from wizard_engine.pipeline.disk import GIB, disk_bytes
from wizard_engine.pipeline.driver import Driver
from wizard_engine.pipeline.forecast import Forecaster, Works, shown_forecast
from wizard_engine.pipeline.graph import Node, shown_graph
from wizard_engine.pipeline.overview import overview
from wizard_engine.pipeline.plan import TARGETS, Plan
from wizard_engine.pipeline.preflight import (
    check_disk,
    check_files,
    check_ranks,
    check_run,
    has_answers,
    size_of_base,
)
from wizard_engine.pipeline.run_file import RunFile, read_run_file
from wizard_engine.runtime.files import write_json, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Seed
from wizard_engine.runtime.stage import Stage, identity
from wizard_engine.training.options import RUN_LENGTH

RECIPES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(make_world, analyze, sample, mix, evol_instruct, evol_answer, co_teach, self_teach),
        *(sft, stage_dpo, reward, rleif, accuracy, arena, mt_bench),
    )
}


def stage_of(recipe: str, config: Any) -> Stage:
    """The stage that a recipe's configuration describes."""
    if recipe == "arena":
        return arena.open_arena(config, arena.read_models(config.models))
    if recipe == "mt_bench":
        return mt_bench.open_bench(config)
    name = f"reward_{config.kind}" if recipe == "reward" else recipe
    options, inputs = identity(config)
    how = {"overwrite": config.overwrite, "extendable": RUN_LENGTH if recipe in ("sft", "reward") else ()}
    return Stage(config.out, name, options, inputs, quiet=True, measured=identity(config, measured=True), **how)


STAGE_OF: dict[str, Callable[[Any], Stage]] = {name: partial(stage_of, name) for name in RECIPES}


@dataclass(frozen=True)
class Config(Checked):
    """A run of the whole system."""

    run: Path
    """Run file; recipes/runs has some, and `python -m wizard_engine new-run DIR` writes one. As the first word it needs
    no option in front; under torchrun it must stand so, because torchrun has an option of that name."""
    out: Path | None = None
    """Run directory; default: the file's."""
    seed: Seed[int | None] = None
    """Default: the file's."""
    only: tuple[str, ...] = ()
    """Run these stages alone, such as slice_1/sft."""
    redo_stale: bool = False
    """Make stages anew whose options or inputs have changed; what they had made is moved to OUT/former."""
    dry_run: bool = False
    """Run nothing: check the run, and print its stages with what is done of them and what the others take."""
    print_commands: bool = False
    """Run nothing: print a command line for each stage."""
    slurm: Path | None = None
    """Run nothing: write a Slurm script of all stages to this file."""
    quiet: bool = False


def plan_of(run: RunFile) -> Plan:
    """The graph of a run's stages."""
    check_files(run)
    return Plan(run, RECIPES, size=size_of_base(run), has_answers=has_answers(run)).build()


def read(cfg: Config) -> RunFile:
    """The run of the file, with what the command line says."""
    run = read_run_file(cfg.run)
    given = {name: getattr(cfg, name) for name in ("out", "seed") if getattr(cfg, name) is not None}
    return replace(run, **given, quiet=cfg.quiet or run.quiet)


def main(cfg: Config) -> dict:
    """Run everything; returns the summary."""
    began = time.perf_counter()
    world.register()
    run = read(cfg)
    plan = plan_of(run)
    if cfg.print_commands:
        print(shown_commands(run, plan.nodes))
        return {}
    if cfg.slurm is not None:
        write_text(cfg.slurm, slurm_script(run, plan.nodes))
        print(f"done: {cfg.slurm}")
        return {}
    rt = runtime.start("auto", threads=run.threads)
    driver = driver_of(run, rt, plan.nodes)
    if cfg.dry_run:
        from_main(rt, lambda: look(run, plan, driver))
        return {}
    processes = run.launch.nodes * run.launch.processes
    check_ranks(plan.nodes, processes if run.launch.separate_processes else rt.world_size)
    from_main(rt, lambda: check_run(run, plan.nodes))
    from_main(rt, lambda: write_targets(run))
    if not run.world and not cfg.only:
        driver.began = partial(report, run, plan, driver, began)
    driver.run_all(cfg.only, redo_stale=cfg.redo_stale)
    if cfg.only:
        return {}
    summary = from_main(rt, partial(report, run, plan, driver, began))
    if rt.is_main and not run.quiet:
        print(f"done: {run.out / 'report.html'}, {run.out / 'summary.json'}")
    return summary


def report(run: RunFile, plan: Plan, driver: Driver, began: float) -> dict[str, Any]:
    """Write the summary and the report of what there is, on rank 0; returns the summary.

    Args:
        began: `time.perf_counter()` at the start of this process.
    """
    measured = [(t, name, answers) for t, name, answers, _ in plan.measured if answers is not None]
    return write_summary(
        run.out,
        run.seed,
        time.perf_counter() - began,
        measured,
        run.out / "arena",
        driver.timing.seconds,
        slices=run.slices,
        about=None if run.world else about(run, plan, driver),
    )


def look(run: RunFile, plan: Plan, driver: Driver) -> None:
    """Print a run's stages, check it, and print what it has and takes."""
    print(shown_graph(plan.nodes, driver.statuses()), flush=True)
    if run.launch.separate_processes:
        check_ranks(plan.nodes, run.launch.nodes * run.launch.processes)
    check_run(run, plan.nodes)
    forecaster = forecaster_of(run, plan)
    print("\n" + dry_run(run, plan, forecaster), flush=True)
    check_disk(run, forecaster.disk)
    if not run.world:
        print(f"\nnothing is missing; start it with: python recipes/progressive.py {run.path}", flush=True)


def dry_run(run: RunFile, plan: Plan, forecaster: Forecaster) -> str:
    """What a run has, and what its stages take."""
    forecast = shown_forecast(forecaster.forecast(plan.nodes))
    disk = f"models and checkpoints: about {disk_bytes(forecaster.disk) / GIB:.1f} GiB of disk"
    return "\n\n".join(filter(None, [overview(run, plan), forecast, "\n".join([disk, *forecaster.notes])]))


def forecaster_of(run: RunFile, plan: Plan) -> Forecaster:
    """What says what the stages take."""
    works = Works(
        synthesis={
            "evol_instruct": evol_instruct.evolve,
            "evol_answer": evol_answer.rewrite,
            "co_teach": co_teach.teach,
            "self_teach": self_teach.teach,
        },
        cleaning={"sample": sample.sample, "mix": mix.mix},
        judging={
            "arena": lambda cfg, cast: arena.play(cfg, cast, arena.read_models(cfg.models), arena.read_prompts(cfg)),
            "mt_bench": lambda cfg, cast: mt_bench.ask(cfg, cast, mt_bench.read(cfg)),
        },
        search=evol_instruct.choose_method,
    )
    return Forecaster(run, plan.size, works)


def write_targets(run: RunFile) -> None:
    """The target shares, where sampling reads them."""
    if run.targets:
        write_json(run.out / TARGETS, run.targets)


def driver_of(run: RunFile, rt: runtime.Runtime, nodes: list[Node]) -> Driver:
    """The driver of a graph of these recipes."""
    return Driver(run, rt, nodes, {name: module.main for name, module in RECIPES.items()}, STAGE_OF)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--run")
    launch(main, Config)
