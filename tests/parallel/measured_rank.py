"""Worker of the tests of the planner: memory and traffic of a real rank, in a step of the engine on the CPU."""

import json
import sys
from pathlib import Path

import torch

from kernels import use_backend
from wizard_engine import runtime
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize
from wizard_engine.planning.simulate import Record, by_axis, language_step, peak_bytes


def main(out, problems):
    """Run every problem (name, model, mesh, recompute, tokens, micro-batches) and write what it took."""
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    results = {}
    for name, config, options, recompute, tokens, micro_batches in problems:
        mesh = make_mesh(MeshOptions(**options), rt)
        torch.manual_seed(0)
        model = parallelize(Transformer(ModelConfig(**config), seed=0), mesh, Sharding(recompute=recompute))
        optimizer = AdamW(model)
        with Record() as record, use_backend("triton"):
            language_step(model, tokens, micro_batches)
        optimizer.step(1e-3)
        traffic = {f"{kind} {axis}": size for (kind, axis), size in by_axis(record.collectives, mesh).items()}
        results[name] = {"traffic": traffic, "peak": peak_bytes(model, optimizer, tokens, micro_batches)}
    (out / f"measured_{rt.world_size}_{rt.rank}.json").write_text(json.dumps(results))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
