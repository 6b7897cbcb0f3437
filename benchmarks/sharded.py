"""A sharded training step against torch's `fully_shard`: time and peak memory, on CPU ranks over gloo.

    python -m benchmarks.sharded --ranks 2 --preset small --tokens 1024 --repeats 15

Both run in the same processes on the same model, batches and numbers (fp32; blocks, embedding, and the norm with the
head are units), forward, backward, norm, clip and AdamW, and take turns. Peaks are those that torch's MemTracker sees
in one step of each: parameters, gradients, moments, gathered buffers and activations. Ratios are peer / this engine.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard

from benchmarks.__main__ import environment
from wizard_engine import runtime
from wizard_engine.loss import sft_loss
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize, sharded

LR, CLIP = 1e-4, 1.0
HYPERPARAMETERS = {"betas": (0.9, 0.95), "weight_decay": 0.1}


class Batch:
    """A packed row of random tokens in documents of 128, its successors as targets; others on every rank."""

    def __init__(self, tokens: int, vocab_size: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        drawn = torch.randint(vocab_size, (tokens + 1,), generator=generator)
        self.tokens, self.targets, self.weights = drawn[:-1], drawn[1:], torch.ones(tokens)
        self.positions = torch.arange(tokens) % 128
        self.marks = torch.arange(0, tokens + 1, 128, dtype=torch.int32)

    def loss(self, model: nn.Module, num_tokens: float) -> Tensor:
        """This rank's share."""
        hidden = model(self.tokens, self.positions, self.marks, 128)
        return sft_loss(hidden, model.head_weight, self.targets, self.weights, num_tokens=num_tokens).loss


class Ours:
    """This engine."""

    def __init__(self, config, mesh, batch: Batch) -> None:
        self.model = parallelize(Transformer(config, seed=0), mesh, Sharding(dtype="float32"))
        self.optimizer, self.batch = AdamW(self.model, **HYPERPARAMETERS), batch
        self.num_tokens = float(len(batch.tokens) * mesh.world_size)

    def step(self) -> float:
        """Its gradient norm."""
        self.optimizer.zero_grad()
        self.batch.loss(self.model, self.num_tokens).backward()
        self.optimizer.sharded.finish()
        norm = self.optimizer.clip(CLIP)
        self.optimizer.step(LR)
        return float(norm)

    def buffers(self) -> list[Tensor]:
        """What it holds between steps."""
        engine = sharded(self.model)
        units = (*engine.units, *engine.resident)
        places = {id(unit.gather_buffer): unit.gather_buffer.data for unit in units}
        return [engine.master, self.optimizer.exp_avg, self.optimizer.exp_avg_sq, *places.values()]


class Theirs:
    """torch's fully_shard."""

    def __init__(self, config, mesh, batch: Batch) -> None:
        self.model, self.batch = Transformer(config, seed=0), batch
        # It averages over the ranks; gloo has no other factor.
        self.num_tokens = float(len(batch.tokens))
        for block in self.model.blocks:
            fully_shard(block)
        if self.model.head is not None:
            fully_shard(self.model.embedding)
            # The head is used outside the forward, by the loss.
            fully_shard([self.model.norm, self.model.head], reshard_after_forward=False)
        fully_shard(self.model, reshard_after_forward=False)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, fused=True, **HYPERPARAMETERS)

    def step(self) -> float:
        """Its gradient norm."""
        self.optimizer.zero_grad()
        hidden = self.model(self.batch.tokens, self.batch.positions, self.batch.marks, 128)
        weight = self.model.head_weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        loss = sft_loss(hidden, weight, self.batch.targets, self.batch.weights, num_tokens=self.num_tokens).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).full_tensor()
        self.optimizer.step()
        return float(norm)


def quantiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def peak_memory(variant, external: list[Tensor]) -> float:
    """Peak MiB of a step, what is held between steps included."""
    tracker = MemTracker()
    tracker.track_external(variant.model, *external)
    if isinstance(variant, Theirs):
        tracker.track_external(variant.optimizer)
    with tracker:
        variant.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 2**20


def work(rank: int, options: argparse.Namespace, out: str) -> None:
    """One rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    rt = runtime.start("cpu")
    mesh, config = make_mesh(MeshOptions(), rt), PRESETS[options.preset]
    batch = Batch(options.tokens, config.vocab_size, rank)
    variants = {"this engine": Ours(config, mesh, batch), "fully_shard": Theirs(config, mesh, batch)}
    first = {name: variant.step() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.repeats):
        order = list(variants) if turn % 2 else list(variants)[::-1]
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            variants[name].step()
            seconds[name].append(time.perf_counter() - began)
    last = {name: variant.step() for name, variant in variants.items()}
    memory = {
        "this engine": peak_memory(variants["this engine"], variants["this engine"].buffers()),
        "fully_shard": peak_memory(variants["fully_shard"], []),
    }
    if rank == 0:
        Path(out).write_text(json.dumps({"first": first, "last": last, "seconds": seconds, "memory": memory}))
    dist.barrier()
    runtime.stop()


def measure(options: argparse.Namespace, out: Path) -> dict:
    """The result that rank 0 of a run wrote."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    mp.start_processes(work, args=(options, str(out)), nprocs=options.ranks, start_method="spawn")
    return json.loads(out.read_text())


def main() -> None:
    """Measure and print a line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a rank and step, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="append a line with everything measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder, "result.json"))
    about = environment()
    print(f"{about['hardware']}, {options.ranks} ranks of one thread, torch {about['torch']}, commit {about['commit']}")
    ours, theirs = result["seconds"]["this engine"], result["seconds"]["fully_shard"]
    for name in result["seconds"]:
        low, median, high = (1e3 * x for x in quantiles(result["seconds"][name]))
        print(
            f"{name:12} {options.preset}, {options.tokens} tokens a rank: {median:.0f} ms [{low:.0f}, {high:.0f}], "
            f"peak {result['memory'][name]:.1f} MiB, "
            f"gradient norm {result['first'][name]:.6f}, {result['last'][name]:.6f}"
        )
    low, median, high = quantiles([b / a for a, b in zip(ours, theirs)])
    print(f"fully_shard / this engine: {median:.2f}x [{low:.2f}, {high:.2f}]")
    if options.json is not None:
        about |= {"ranks": options.ranks, "preset": options.preset, "tokens": options.tokens}
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"benchmark": "sharded", **about, **result}) + "\n")


if __name__ == "__main__":
    main()
