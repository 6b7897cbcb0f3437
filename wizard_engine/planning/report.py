"""The command `python -m wizard_engine plan`: the best layouts as a table or as JSON, the first of them simulated."""

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from kernels import use_backend
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, parallelize

from . import simulate as sim
from .estimate import estimate
from .planner import GIB, META, Options, Plan, Planner
from .rates import rates_of


def simulated(planner: Planner, plan: Plan) -> dict[str, Any]:
    """Peak and traffic of a plan's step as the engine has them on a simulated rank, and whether ranks' collectives fit.

    The rank runs all layers; the collectives of every rank of its groups are compared on a model of two.
    """
    mesh, gpus = plan.layout.mesh, planner.options.gpus
    options = MeshOptions(mesh.replicate, mesh.dp_shard, mesh.tp, mesh.ep, mesh.cp)
    sharding = Sharding(dtype="bfloat16", recompute=plan.layout.recompute)
    tokens, k = planner.row_tokens(plan.layout), min(plan.layout.micro_batches, 2)

    def empty(config: ModelConfig) -> Transformer:
        with META:
            return Transformer(config)

    with sim.simulated_rank(options, 0, gpus) as local_mesh:
        model = parallelize(empty(planner.config), local_mesh, sharding)
        with sim.Record() as moved, use_backend("triton"):
            sim.language_step(model, tokens, k)
        peak = sim.peak_bytes(model, AdamW(model), tokens, k)
        bound = estimate(planner.model, local_mesh, sharding, tokens=tokens, micro_batches=k)
        measured = sim.by_ranks(sim.by_axis(moved.collectives, local_mesh), local_mesh)
        as_planned = measured == sim.by_ranks(bound.traffic, local_mesh)
        axes = local_mesh.replicate, local_mesh.copy, local_mesh.row, local_mesh.ep
        looked_at = sorted({rank for axis in axes for rank in axis.ranks})
    small = replace(planner.config, layers=2)
    records = {
        rank: sim.record(lambda: empty(small), options, rank, gpus, sharding, tokens=tokens) for rank in looked_at
    }
    return {
        "peak": peak,
        "bound": bound.peak,
        "traffic_as_planned": as_planned,
        "micro_batches": k,
        "ranks_compared": len(records),
        "collectives": sim.first_difference(records) or "fit",
    }


def run(options: Options) -> dict[str, Any]:
    """The plans as a JSON-like object.

    Raises:
        ValueError: nothing fits; says why, and on how many GPUs it would.
    """
    planner = Planner(options, rates_of(options.rates))
    plans = planner.best()
    if not plans:
        raise ValueError(planner.refusal())
    shown = plans[: options.best]
    return {
        "preset": options.preset,
        "gpus": options.gpus,
        "gpu": options.gpu,
        "sequence": options.sequence,
        "room_gib": planner.room / GIB,
        "rates": asdict(planner.rates),
        "measured": options.rates is not None,
        "layouts_that_fit": len(plans),
        "plans": [asdict(plan) | {"words": plan.layout.flags} for plan in shown],
        "simulated": simulated(planner, shown[0]) if options.simulate else None,
    }


def table(summary: dict[str, Any]) -> str:
    """The same for the eye."""
    first = summary["plans"][0]
    lines = [
        f"{summary['preset']} on {summary['gpus']} {summary['gpu']}, documents of {summary['sequence']} tokens: "
        f"{summary['layouts_that_fit']} meshes fit; the best of each",
        "",
        f"{'tokens/s/GPU':>12}  {'MFU':>5}  {'step s':>7}  {'GiB':>6}  {'waits':>5}  {'most of it':<20}  layout",
    ]
    for plan in summary["plans"]:
        lines.append(
            f"{plan['tokens_per_second']:12,.0f}  {plan['mfu']:5.1%}  {plan['step']:7.2f}  {plan['peak'] / GIB:6.1f}  "
            f"{plan['waits']:5.1%}  {plan['bottleneck']:<20}  {plan['words']}"
        )
    lines += ["", f"The first one: {first['words']}, {first['layout']['micro_batches']} micro-batches a step", ""]
    lines.append(f"  memory of a GPU, GiB (of {summary['room_gib']:.1f} that there are)")
    lines += [f"    {size / GIB:9.2f}  {name}" for name, size in first["memory"].items() if size]
    lines += ["", "  bytes moved in a step, GiB of whole buffers"]
    lines += [f"    {size / GIB:9.2f}  {name}" for name, size in sorted(first["traffic"].items())]
    lines += ["", "  seconds of a step"]
    ordered = sorted(first["seconds"].items(), key=lambda item: -item[1])
    lines += [f"    {seconds:9.3f}  {seconds / first['step']:5.1%}  {name}" for name, seconds in ordered]
    lines += [f"    {seconds:9.3f}         {name}, beside the computation" for name, seconds in first["hidden"].items()]
    sim = summary["simulated"]
    if sim is not None:
        lines += [
            "",
            f"  simulated, {sim['micro_batches']} micro-batches: peak {sim['peak'] / GIB:.2f} GiB (bound "
            f"{sim['bound'] / GIB:.2f}), bytes moved {'as' if sim['traffic_as_planned'] else 'NOT as'} planned, "
            f"collectives of {sim['ranks_compared']} ranks: {sim['collectives']}",
        ]
    kind = "measured" if summary["measured"] else "assumed, not measured"
    rates = ", ".join(f"{name} {value:g}" for name, value in summary["rates"].items())
    return "\n".join([*lines, "", f"  rates ({kind}): {rates}"])


def main(options: Options) -> int:
    """Print the plans; 1 where nothing fits."""
    try:
        summary = run(options)
    except ValueError as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, default=str, indent=1) if options.json else table(summary))
    return 0
