"""What a checkpoint costs the training beside it: steps without one, steps under one, and the copy alone.

    python -m benchmarks.saving --ranks 2 --repeats 6

Every rank trains its part of a model (fp32, AdamW) and saves again and again. `held up` is what `Saver.save` takes of
the training loop (the former save is over by then), `copy` a plain copy of the same bytes, `beside` the mean step while
the thread writes and checks, `alone` the mean step while it does not.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.__main__ import environment
from benchmarks.sharded import Batch, Ours, quantiles
from wizard_engine import checkpoint, runtime
from wizard_engine.model import PRESETS
from wizard_engine.parallel import MeshOptions, make_mesh
from wizard_engine.training.train_state import checkpoint_shards


def work(rank: int, options: argparse.Namespace, out: str) -> None:
    """One rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    config = replace(PRESETS["small"], width=options.width, layers=options.layers, ffn_width=3 * options.width)
    variant = Ours(config, make_mesh(MeshOptions(), rt), Batch(options.tokens, config.vocab_size, rank))
    saver = checkpoint.Saver(Path(out), rt)
    variant.step()
    seconds_of: dict[str, list[float]] = {"alone": [], "beside": [], "held up": [], "copy": [], "writing": []}
    for turn in range(options.repeats + 1):
        weights, moments = checkpoint_shards(variant.model, variant.optimizer)
        values = [shard.values for shard in (*weights.values(), *moments.values())]
        hosts = [torch.empty_like(value) for value in values]
        for _ in range(2):
            dist.barrier()
            began = time.perf_counter()
            for host, value in zip(hosts, values):
                host.copy_(value)
            copied = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        saver.save(turn, {"model": weights, "model_optimizer": moments}, {})
        held, began, beside = saver.stall_seconds, time.perf_counter(), []
        while True:
            at = time.perf_counter()
            variant.step()
            beside.append(time.perf_counter() - at)
            more = torch.tensor(float(saver.is_writing))
            dist.all_reduce(more)
            if not more:
                break
        written = time.perf_counter() - began
        saver.wait()
        undisturbed = []
        for _ in range(len(beside)):
            at = time.perf_counter()
            variant.step()
            undisturbed.append(time.perf_counter() - at)
        if turn:
            seconds_of["alone"].append(sum(undisturbed) / len(undisturbed))
            seconds_of["beside"].append(sum(beside) / len(beside))
            seconds_of["held up"].append(held)
            seconds_of["copy"].append(copied)
            seconds_of["writing"].append(written)
    if rank == 0:
        size = sum(value.nbytes for value in values)
        Path(out, "result.json").write_text(json.dumps({"seconds": seconds_of, "bytes": size, "steps": len(beside)}))
    dist.barrier()
    runtime.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a rank and step, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    out = tempfile.mkdtemp()
    try:
        mp.start_processes(work, args=(options, out), nprocs=options.ranks, start_method="spawn")
        result = json.loads(Path(out, "result.json").read_text())
    finally:
        shutil.rmtree(out)
    about = environment()
    print(f"{about['hardware']}, {options.ranks} ranks of one thread, torch {about['torch']}, commit {about['commit']}")
    print(f"{result['bytes'] / 2**20:.0f} MiB a rank, {result['steps']} steps beside the last save")
    for name, seconds in result["seconds"].items():
        low, median, high = (1e3 * x for x in quantiles(seconds))
        print(f"{name:8} {median:7.1f} ms [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main()
