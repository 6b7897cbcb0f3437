"""What the parity tests run on every rank: losses, models and layouts, each against one plain process."""

import dataclasses
import functools
import itertools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from late_link import LateLink

from wizard_engine import runtime
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample
from wizard_engine.loss import dpo_loss, policy_loss, process_loss, ranking_loss, sft_loss, value_loss
from wizard_engine.model import ModelConfig, Routes, ScoringModel, Transformer
from wizard_engine.parallel import MeshOptions, Sharding, lockstep, make_mesh, parallelize, recompute, sharded

BASE = ModelConfig(
    vocab_size=61, width=24, layers=3, heads=3, kv_heads=1, head_width=8, ffn_width=20, init_std=0.3, tied=False
)
MODELS = {
    "dense": BASE,
    "tied": dataclasses.replace(BASE, tied=True, layers=2, kv_heads=3),
    "mixture": dataclasses.replace(BASE, experts=4, balance_loss=0.1, z_loss=0.01),
    "tied mixture": dataclasses.replace(BASE, experts=3, layers=2, tied=True),
}
LAYOUTS = {
    1: {"single device": MeshOptions()},
    2: {"dp 2": MeshOptions(), "replicas 2": MeshOptions(dp_shard=1)},
    4: {"dp 4": MeshOptions(), "hsdp 2 x 2": MeshOptions(dp_replicate=2), "replicas 4": MeshOptions(dp_shard=1)},
}
LOSSES = ("sft", "dpo", "reward", "process", "ppo")
# Micro-batches of a step over all ranks: more than ranks, and not a multiple of them.
MICRO_BATCHES, STEPS, LR = 5, 2, 0.05


def samples(seed, count=4):
    """Sequences of uneven lengths with uneven weights; some supervise nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(2, 17, count):
        weights = (rng.random(length) < rng.random()).astype(np.float32)
        rows.append(Sample(rng.integers(0, BASE.vocab_size, length).astype(np.int32), weights))
    return rows


def loss_of(kind, model, rows, seed, config):
    """A micro-batch's share of a loss, and of the router's losses; denominators are constants of the step."""
    batch, routes = collate(rows), Routes()
    generator = torch.Generator().manual_seed(seed)
    hidden = model(*batch.inputs, routes)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights, wide = batch.weights.to(dtype), {"generator": generator, "dtype": dtype}
    shard = getattr(model, "shard", None)
    if kind == "sft":
        loss = sft_loss(hidden, model.head_weight, batch.targets, weights, num_tokens=57.0, shard=shard).loss
    elif kind == "dpo":
        reference = -10 * torch.rand(len(rows), **wide)
        loss = dpo_loss(
            hidden,
            model.head_weight,
            batch.targets,
            weights,
            batch.cu_seqlens,
            reference,
            beta=0.3,
            num_pairs=10,
            nll=0.2,
            num_chosen_tokens=31.0,
            shard=shard,
        )[0]
    elif kind == "reward":
        better, worse = hidden[batch.cu_seqlens[1:].long() - 1, 0].chunk(2)
        loss = ranking_loss(better, worse, torch.rand(len(better), **wide), num_pairs=10)
    elif kind in ("process", "surprise"):
        labels = torch.randint(-1, 2, (len(rows),), generator=generator)
        loss = process_loss(hidden[batch.cu_seqlens[1:].long() - 1], labels, num_steps=20)
    else:
        old = -4 * torch.rand(len(batch.tokens), **wide)
        advantages = torch.randn(len(batch.tokens), **wide)
        targets = torch.where(weights > 0, batch.targets, -1)
        loss = policy_loss(
            hidden,
            model.head_weight,
            targets,
            old,
            advantages,
            clip=0.2,
            num_tokens=57.0,
            reference=old - 1,
            kl=0.1,
            entropy=0.05,
            shard=shard,
        )[0]
    return loss, routes.loss(config, 200.0)


def value_share(model, rows, seed, config):
    """The critic's share of the same."""
    batch, routes = collate(rows), Routes()
    values = model(*batch.inputs, routes)[:, 0]
    generator = torch.Generator().manual_seed(seed)
    old, returns = (torch.randn(len(values), generator=generator, dtype=values.dtype) for _ in range(2))
    loss, _ = value_loss(values, old, returns, clip=0.2, num_tokens=57.0)
    return loss, routes.loss(config, 200.0)


def built(kind, config, freeze=""):
    """The models of a loss, in float64: a critic beside the policy of PPO."""
    models = []
    if kind in ("sft", "dpo", "ppo"):
        models.append(Transformer(config, seed=3))
    if kind in ("reward", "process", "ppo", "surprise"):
        scoring = ScoringModel(config, 3 if kind in ("process", "surprise") else 1, surprise=kind == "surprise")
        scoring.body.initialise(5)
        last = list(scoring.score.modules())[-1]
        torch.nn.init.normal_(last.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        models.append(scoring)
    for model in models:
        model.double()
        if freeze == "one expert":
            # Equal scores go to the first expert: it gets every token, the others none.
            for name, parameter in model.named_parameters():
                if "router" in name:
                    torch.nn.init.zeros_(parameter)
        for name, parameter in model.named_parameters():
            if freeze == "first" and ("embedding" in name or "blocks.0." in name):
                parameter.requires_grad_(False)
            if freeze == "norms" and "norm" in name:
                parameter.requires_grad_(False)
            if freeze == "body" and name.startswith("body."):
                parameter.requires_grad_(False)
    return models


def shares(kind, models, rows, seed, config):
    """(model, loss) in the order in which a recipe goes through them."""
    if kind == "ppo":
        yield loss_of(kind, models[0], rows, seed, config)
        yield value_share(models[1], rows, seed, config)
    else:
        yield loss_of(kind, models[0], rows, seed, config)


def plain_steps(kind, models, config):
    """Loss, norms and gradients of each step of SGD in one process."""
    out = []
    for step in range(STEPS):
        for model in models:
            model.zero_grad()
        loss_sum = 0.0
        for number in range(MICRO_BATCHES):
            for loss, router in shares(kind, models, samples(10 * step + number), number, config):
                (loss + router).backward()
                loss_sum += float(loss.detach()) + float(torch.as_tensor(router).detach())
        grads = [{n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None} for m in models]
        norms = [float(torch.cat([g.flatten() for g in step_grads.values()]).norm()) for step_grads in grads]
        out.append((loss_sum, norms, grads))
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= LR * parameter.grad
    return out


@functools.cache
def one_process(kind, config, freeze):
    """What one process finds in each step, and its parameters after the last."""
    models = built(kind, config, freeze)
    return plain_steps(kind, models, config), [[p.detach().clone() for p in m.parameters()] for m in models]


@contextmanager
def late_copies(really):
    """Treat host memory as memory apart, which copies reach as late as they may."""
    module = sys.modules["wizard_engine.parallel.parallelize"]
    inner = module.Sharded
    if really:
        module.Sharded = lambda *args, **options: inner(*args, **options, link=LateLink())
    yield
    module.Sharded = inner


def compare(kind, config, mesh, sharding, freeze=""):
    """Largest relative errors of loss, norm and gradients of a sharded model against one process."""
    expected, finals = one_process(kind, config, freeze)
    models = built(kind, config, freeze)
    with late_copies(sharding.offload_optimizer):
        engines = [sharded(parallelize(model, mesh, sharding)) for model in models]
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weights": 0.0}
    for step, (loss_sum, norms, grads) in enumerate(expected):
        for engine in engines:
            engine.zero_grad()
        local_loss = 0.0
        mine = list(range(MICRO_BATCHES))[mesh.data.index :: mesh.data.size]
        for number in lockstep(mine, *models, backward=True):
            for loss, router in shares(kind, models, samples(10 * step + number), number, config):
                (loss + router).backward()
                local_loss += float(loss.detach()) * mesh.is_row_leader + float(torch.as_tensor(router).detach())
        for engine in engines:
            engine.finish()
        summed = torch.tensor(local_loss, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(summed)
        worst["loss"] = max(worst["loss"], abs(float(summed) - loss_sum) / abs(loss_sum))
        for engine, norm, own_grads in zip(engines, norms, grads):
            worst["norm"] = max(worst["norm"], abs(float(engine.norm()) - norm) / norm)
            for name, start, values in engine.shards(engine.gradient()):
                grad = own_grads.get(name, torch.zeros(engine.shapes[name], dtype=torch.float64))
                scale = max(float(grad.abs().max()), 1e-3)
                grad = engine.shard_specs[name].of(grad)
                error = float((grad.flatten()[start : start + len(values)] - values).abs().max()) / scale
                worst["gradient"] = max(worst["gradient"], error)
            engine.master.add_(engine.gradient(), alpha=-LR)
            engine.publish()
    for model in models:
        assert not sharding.offload_activations or model._offload.moved_bytes > 10_000
    for model, final in zip(models, finals):
        with sharded(model).gathered():
            for a, b in zip(model.parameters(), final, strict=True):
                error = float((a.detach() - b).abs().max())
                worst["weights"] = max(worst["weights"], error if a.isfinite().all() else float("inf"))
    return worst


def cases(world):
    """Name -> (loss, model, layout, sharding, what is frozen)."""
    results = {}
    for layout, kind, model in itertools.product(LAYOUTS[world], LOSSES, ("dense", "mixture")):
        results[f"{layout}, {kind}, {model}"] = (kind, model, layout, Sharding(), "")
    sharded_names = [name for name in LAYOUTS[world] if not name.startswith("replicas")]
    for layout, model, again in itertools.product(sharded_names, MODELS, ("none", "selective", "full")):
        for accumulate in ("sharded", "whole"):
            sharding = Sharding(recompute=again, accumulate=accumulate)
            results[f"{layout}, sft, {model}, {again}, {accumulate}"] = ("sft", model, layout, sharding, "")
    for layout, freeze, model in itertools.product(LAYOUTS[world], ("first", "norms"), MODELS):
        results[f"{layout}, sft, {model}, frozen {freeze}"] = ("sft", model, layout, Sharding(recompute="full"), freeze)
    for layout in LAYOUTS[world]:
        results[f"{layout}, process, dense, frozen body"] = ("process", "dense", layout, Sharding(), "body")
        results[f"{layout}, ppo, tied mixture, full"] = ("ppo", "tied mixture", layout, Sharding(recompute="full"), "")
        for again in ("none", "selective", "full"):
            kept = Sharding(offload_activations=True, offload_optimizer=True, recompute=again)
            results[f"{layout}, sft, mixture, kept in host memory, {again}"] = ("sft", "mixture", layout, kept, "")
    return results


def bits_of(mesh, sharding, dtype):
    """Whether fp32 gradients equal, bit for bit, an all-reduce of those that each rank computes alone."""
    equal = {}
    for name, config in MODELS.items():
        whole = sharding.accumulate == "whole"
        seeds = list(range(2 if whole else 1))
        model = Transformer(config, seed=3)
        engine = sharded(parallelize(model, mesh, sharding))
        engine.zero_grad()
        for number in lockstep(seeds, model, backward=True):
            sum(loss_of("sft", model, samples(100 * mesh.rank + number), number, config)).backward()
        engine.finish()
        unsharded = Transformer(config, seed=3).to(dtype)
        wide = {}
        for number in seeds:
            unsharded.zero_grad()
            sum(loss_of("sft", unsharded, samples(100 * mesh.rank + number), number, config)).backward()
            for key, parameter in unsharded.named_parameters():
                wide[key] = parameter.grad.float() + wide.get(key, 0.0)
        equal[name] = True
        for flat in engine.training:
            buffer = torch.zeros(flat.layout.size)
            for slot in flat.layout.slots:
                buffer[slot.start : slot.stop] = wide[slot.name].flatten()
            dist.all_reduce(buffer)
            shard = buffer.view(flat.layout.num_shards, -1)[flat.axis.index]
            equal[name] &= bool(torch.equal(shard, flat.gradient))
    return equal


def selected_cases(out, cases):
    """The cases whose names `many_ranks.results_by_rank` wrote: those that this pytest run selects."""
    names = json.loads(Path(out, "cases.json").read_text())
    return {name: case for name, case in cases.items() if name in names}


def main(out):
    """Run the selected cases of this world size and write their results."""
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    # These tensors are small: all of them are kept in host memory where any is.
    recompute.LEAST_BYTES = 1
    results = {}
    meshes = {name: make_mesh(options, rt) for name, options in LAYOUTS[rt.world_size].items()}
    for name, (kind, model, layout, sharding, freeze) in selected_cases(out, cases(rt.world_size)).items():
        try:
            results[name] = compare(kind, MODELS[model], meshes[layout], sharding, freeze)
        except Exception as error:
            import traceback

            traceback.print_exc()
            results[name] = {"error": repr(error)}
            break
    mesh = next(iter(meshes.values()))
    bits = (
        {
            f"{dtype}, {accumulate}": bits_of(mesh, Sharding(dtype=dtype, accumulate=accumulate), getattr(torch, dtype))
            for dtype in ("float32", "bfloat16")
            for accumulate in ("sharded", "whole")
        }
        if rt.world_size > 1
        else {}
    )
    Path(out, f"result_{rt.world_size}_{rt.rank}.json").write_text(json.dumps({"cases": results, "bits": bits}))
    runtime.stop()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(sys.argv[1])
