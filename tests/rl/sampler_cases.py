"""Run by test_sampler.py on several ranks: resharding of trainer weights into samplers, and their samples.

torchrun --nproc-per-node N sampler_cases.py OUT
"""

import functools
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from wizard_engine import runtime
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.offline import continued
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize, sharded
from wizard_engine.rl.sampler import Sampler

LAYOUTS = {
    2: [{}, {"tp": 2}, {"cp": 2}, {"dp_shard": 1}],
    4: [{}, {"tp": 2}, {"tp": 2, "dp_shard": 1}, {"tp": 2, "cp": 2}],
}
PROMPTS = [[1, 5, 9], [2], [1, 5, 9, 7, 7], [3] * 20]


def trained(name, experts):
    config = replace(PRESETS[name], init_std=0.3)
    return Transformer(replace(config, experts=experts) if experts else config, seed=6)


def sampled(engine):
    samplings = [Sampling(6, 1.0, seed=3, row=row) for row in range(len(PROMPTS) * 2)]
    answers = continued(engine, [p for p in PROMPTS for _ in range(2)], samplings)
    experts = None if answers.experts is None else [x.tolist() for x in answers.experts]
    return [answers.tokens, experts]


def experts_of(name):
    return 4 if name == "tiny-mixtral" else 0


@functools.cache
def sampled_whole(name, dtype, change):
    """Samples of the model whole, of weights times `change`: the same for all layouts."""
    whole = trained(name, experts_of(name))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(change)
    whole.to(getattr(torch, dtype))
    return sampled(Engine(whole, cache_tokens=1600, max_sequences=8, record_routes=True))


def case(rt, name, layout, tp, dtype):
    """Samples of the model whole and of its sampler, before and after an update, and the bytes that moved."""
    experts = experts_of(name)
    ep = layout.get("tp", 1) if experts else 1
    mesh = make_mesh(MeshOptions(**layout, ep=ep), rt)
    policy = parallelize(trained(name, experts), mesh, Sharding(dtype=dtype))
    sampler = Sampler(policy, rt, cache_tokens=1600, max_sequences=8, tp=tp)
    results = []
    for change in (1.0, 1.25):
        engine = sharded(policy)
        engine.master.mul_(change)
        engine.publish()
        sampler.sync_weights()
        results.append([sampled(sampler.engine), sampled_whole(name, dtype, change), sampler.weights_checksum])
        weights_checksum = sampler.weights_checksum
        sampler.release()
        sampler.check(weights_checksum)
        engine.master.mul_(1.5)
        engine.publish()
        try:
            sampler.check(weights_checksum)
        except ValueError as error:
            results[-1].append(str(error))
        engine.master.div_(1.5)
        engine.publish()
    moved = 0 if sampler.weight_sync is None else sampler.weight_sync.moved_bytes
    absent = sampler.weight_sync is None or bool(next(sampler.model.parameters()).isnan().any())
    return {
        "name": name,
        "layout": layout,
        "tp": tp,
        "dtype": dtype,
        "results": results,
        "moved": moved,
        "absent": absent,
    }


def damaged(rt):
    """The error of a sampler whose weights are not the trainer's."""
    policy = parallelize(trained("tiny", 0), make_mesh(MeshOptions(), rt))
    sampler = Sampler(policy, rt, cache_tokens=160)
    run = sampler.weight_sync.run

    def wrong():
        run()
        if rt.rank == 1:
            sampler.model.norm.weight.data[3] += 1e-6

    sampler.weight_sync.run = wrong
    try:
        sampler.sync_weights()
    except ValueError as error:
        return str(error)
    return "nothing"


def main(out):
    rt = runtime.start("cpu", threads=1)
    results = []
    for layout, name in itertools.product(LAYOUTS[rt.world_size], ("tiny", "tiny-llama", "tiny-mixtral")):
        for tp in (1, 2):
            divides = MeshOptions(**layout).dp_shard != 1 or layout.get("tp", 1) > 1
            if tp == 2 and not divides:
                continue
            results.append(case(rt, name, layout, tp, "float32"))
    results.append(case(rt, "tiny-llama", {}, 1, "bfloat16"))
    errors = [damaged(rt)]
    try:
        Sampler(parallelize(trained("tiny", 0), make_mesh(MeshOptions(), rt)), rt, cache_tokens=160, tp=3)
    except ValueError as error:
        errors.append(str(error))
    Path(f"{out}.{rt.rank}").write_text(json.dumps([results, errors]))
    runtime.stop()


main(sys.argv[1])
