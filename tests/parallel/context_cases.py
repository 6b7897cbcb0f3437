"""What the tests of tensor, sequence, expert and context parallelism run on every rank, against one plain process."""

import dataclasses
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from sharded_cases import BASE, LOSSES, compare, loss_of, samples, selected_cases

from wizard_engine import runtime
from wizard_engine.data.batch import collate
from wizard_engine.model import ScoringModel, Transformer
from wizard_engine.model.loading import shard_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize, sharded
from wizard_engine.parallel.reductions import gather_along

EVEN = dataclasses.replace(BASE, vocab_size=62, heads=4, kv_heads=2)
EXPERTS = {"experts": 4, "balance_loss": 0.1, "z_loss": 0.01}
MODELS = {
    "dense": EVEN,
    "tied": dataclasses.replace(EVEN, tied=True, layers=2),
    "window": dataclasses.replace(EVEN, window=5, kv_heads=4),
    "mixture": dataclasses.replace(EVEN, **EXPERTS),
    # More experts than a micro-batch may have tokens for: some get none, on some ranks and on all.
    "many experts": dataclasses.replace(EVEN, **EXPERTS | {"experts": 16}, experts_per_token=1, layers=2, tied=True),
}
# With one choice and no losses of its own a router has no gradient, and equal scores stay equal.
MODELS["one expert"] = dataclasses.replace(MODELS["many experts"], balance_loss=0.0, z_loss=0.0)
MIXTURES = ("mixture", "many experts", "one expert")
LAYOUTS = {
    2: {
        "tp 2": MeshOptions(tp=2),
        "ep 2": MeshOptions(ep=2),
        "cp 2": MeshOptions(cp=2),
        "tp 2, ep 2": MeshOptions(tp=2, ep=2),
        "cp 2, ep 2": MeshOptions(cp=2, ep=2),
    },
    4: {
        "tp 2, dp 2": MeshOptions(tp=2),
        "ep 2, dp 2": MeshOptions(ep=2),
        "tp 2, ep 2, dp 2": MeshOptions(tp=2, ep=2),
        "tp 2, ep 4, dp 2": MeshOptions(tp=2, ep=4),
        "cp 2, tp 2": MeshOptions(cp=2, tp=2),
        "cp 2, tp 2, ep 4": MeshOptions(cp=2, tp=2, ep=4),
        "cp 2, dp 2": MeshOptions(cp=2),
        "tp 2, replicas 2": MeshOptions(tp=2, dp_shard=1),
        "ep 2, replicas 2": MeshOptions(ep=2, dp_replicate=2),
    },
}


def cases(world):
    """Name -> (loss, model, layout, sharding, what is frozen)."""
    results = {}
    for layout, kind, model in itertools.product(LAYOUTS[world], LOSSES, ("dense", "mixture")):
        results[f"{layout}, {kind}, {model}"] = (kind, model, layout, Sharding(), "")
    # Four ranks on two cores take long: of the further forms, those of the layouts that mix most.
    some = [name for name in LAYOUTS[world] if world == 2 or name in ("tp 2, ep 2, dp 2", "cp 2, tp 2")]
    for layout, model, again in itertools.product(some, MODELS, ("none", "selective", "full")):
        results[f"{layout}, sft, {model}, {again}"] = ("sft", model, layout, Sharding(recompute=again), "")
    for layout, model, freeze in itertools.product(some, ("tied", "mixture"), ("first", "norms")):
        results[f"{layout}, sft, {model}, frozen {freeze}"] = ("sft", model, layout, Sharding(), freeze)
    for layout, again in itertools.product(some, ("none", "full")):
        name = f"{layout}, sft, one expert gets every token, {again}"
        results[name] = ("sft", "one expert", layout, Sharding(recompute=again), "one expert")
    for layout in some:
        whole = Sharding(accumulate="whole", recompute="full")
        results[f"{layout}, dpo, mixture, whole"] = ("dpo", "mixture", layout, whole, "")
        results[f"{layout}, surprise, dense"] = ("surprise", "dense", layout, Sharding(), "")
        kept = Sharding(offload_activations=True, offload_optimizer=True)
        results[f"{layout}, sft, mixture, kept in host memory"] = ("sft", "mixture", layout, kept, "")
    return {name: case for name, case in results.items() if "ep " not in case[2] or case[1] in MIXTURES}


def is_alike(mesh, mixture):
    """Whether ranks of a row see the same losses and scores, and all of a copy the same norms and routers, bit for
    bit."""
    config = MODELS["mixture" if mixture else "dense"]
    model, scoring = Transformer(config, seed=3), ScoringModel(config, 3)
    scoring.body.initialise(5)
    torch.nn.init.normal_(scoring.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    engines = [sharded(parallelize(m, mesh, Sharding())) for m in (model, scoring)]
    seen = []
    for step in range(2):
        rows = samples(10 * step + mesh.data.index)
        for engine, module, kind in zip(engines, (model, scoring), ("sft", "process")):
            engine.zero_grad()
            loss, router = loss_of(kind, module, rows, step, config)
            (loss + router).backward()
            engine.finish()
            engine.master.add_(engine.gradient(), alpha=-0.05)
            engine.publish()
            seen.append(loss.detach().clone())
        seen.append(scoring(*collate(rows).inputs).detach())
    for engine, module in zip(engines, (model, scoring)):
        with engine.gathered():
            local = {n: p.clone() for n, p in module.named_parameters() if "norm" in n or "router" in n or "score" in n}
        everyone = gather_along(mesh.copy, local)
        if not all(torch.equal(x[name], local[name]) for x in everyone for name in local):
            return False
    everyone = gather_along(mesh.row, seen)
    return all(torch.equal(a, b) for other in everyone for a, b in zip(seen, other, strict=True))


def is_random_model(mesh, mixture):
    """Whether a preset's random weights are those of one process, bit for bit."""
    config = MODELS["mixture" if mixture else "dense"]
    with torch.device("meta"):
        empty = Transformer(config)
    model = shard_model(empty, mesh, Sharding(), empty.random_parameters(7))
    with sharded(model).gathered():
        pairs = zip(model.parameters(), Transformer(config, seed=7).parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def main(out):
    """Run the selected cases of this world size and write their results."""
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    from wizard_engine.parallel import recompute

    recompute.LEAST_BYTES = 1
    results, chosen = {}, selected_cases(out, cases(rt.world_size))
    used = dict.fromkeys(layout for _, _, layout, _, _ in chosen.values())
    meshes = {name: make_mesh(LAYOUTS[rt.world_size][name], rt) for name in used}
    for name, (kind, model, layout, sharding, freeze) in chosen.items():
        try:
            results[name] = compare(kind, MODELS[model], meshes[layout], sharding, freeze)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": repr(error)}
            break
    random, alike = (
        {name: check(mesh, "ep" in name) for name, mesh in meshes.items()} for check in (is_random_model, is_alike)
    )
    Path(out, f"result_{rt.world_size}_{rt.rank}.json").write_text(
        json.dumps({"cases": results, "alike": alike, "random": random})
    )
    runtime.stop()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(sys.argv[1])
