"""Every collective that the engine uses, and a training step, in a process group of one rank: NCCL on a GPU.

    python -m benchmarks.one_rank                    on the GPU, or with gloo where there is none

What one rank sends comes back to it, so each result is known. An axis of one rank has no group in a run; here it has
the world's, so that the engine's own functions reach the backend.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.check_cases import Case, Row
from benchmarks.command_line import Parser
from wizard_engine import runtime
from wizard_engine.parallel import MeshOptions, Sharding, collectives, make_mesh, parallelize
from wizard_engine.parallel.expert_parallel import dispatched_mlp
from wizard_engine.parallel.mesh import Axis
from wizard_engine.runtime.object_collectives import from_main

ROWS, WIDTH = 5, 8


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A process group of this rank alone, started as a run under torchrun starts its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in (*place, "TORCHELASTIC_USE_AGENT_STORE")}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ.update(place)
    try:
        runtime.start(device.type, timeout_seconds=30.0)
        yield
    finally:
        runtime.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def world() -> Axis:
    """An axis of one rank behind the world's group."""
    return Axis(1, 0, (0,), dist.group.WORLD, dist.group.WORLD)


def _random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _same(out: Tensor, expected: Tensor) -> list[Row]:
    right = out.shape == expected.shape and torch.equal(out.detach().cpu(), expected.cpu())
    return [{"status": "right"} if right else {"status": "wrong", "note": f"{out.flatten()[:4].tolist()} came back"}]


def _close(out: Tensor, expected: Tensor) -> list[Row]:
    error, limit = float((out - expected).abs().max()), 1e-4 * float(expected.abs().max())
    return [{"status": "right" if error <= limit else "wrong", "note": f"error {error:.2e}, limit {limit:.2e}"}]


def _async(function: Callable, device: torch.device, dtype: torch.dtype) -> list[Row]:
    x = _random(device, ROWS, WIDTH, dtype=dtype)
    out, work = function(x, world(), async_op=True)
    work.wait()
    return _same(out, x)


def _reduced(device: torch.device, dtype: torch.dtype, op: dist.ReduceOp.RedOpType) -> list[Row]:
    x = _random(device, ROWS, dtype=torch.float32).mul(100).to(dtype)
    out = x.clone()
    dist.all_reduce(out, op)
    return _same(out, x)


def _exchanged(device: torch.device, rows: int) -> list[Row]:
    x = _random(device, rows, WIDTH)
    return _same(collectives.all_to_all_rows(x, [rows], [rows], world()), x)


def _counts(device: torch.device) -> list[Row]:
    counts = torch.arange(4, dtype=torch.int32, device=device).view(1, 4)
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts, group=world().group)
    return _same(out, counts)


def _gradients(device: torch.device) -> list[Row]:
    """Each collective with a gradient: one rank's is that of the identity, and of a plain product."""
    axis, verdicts = world(), []
    x, weight = (_random(device, n, WIDTH).requires_grad_() for n in (ROWS, 3))
    for function in (collectives.AllGather, collectives.ReduceScatter, collectives.AllGatherReplicated):
        (dx,) = torch.autograd.grad(function.apply(x, axis).square().sum(), x)
        verdicts += [row | {"what": function.__name__} for row in _same(dx, 2 * x.detach())]
    out = collectives.AllGatherLinear.apply(x, weight, axis)
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    ones = torch.ones_like(out)
    for what, got, expected in (("dx", dx, ones @ weight.detach()), ("dweight", dweight, ones.T @ x.detach())):
        verdicts += [row | {"what": f"GatheredLinear {what}"} for row in _close(got, expected)]
    return verdicts


def _experts(device: torch.device) -> list[Row]:
    """Experts sharded over an axis of one rank against unsharded ones."""
    from kernels.grouped_matmul import expert_mlp
    from kernels.moe_route import moe_route

    x, router = _random(device, 37, 16), _random(device, 4, 16)
    gate_up, down = _random(device, 4, 64, 16), _random(device, 4, 16, 32)
    routing = moe_route(x, router, experts_per_token=2)
    return _close(dispatched_mlp(x, gate_up, down, routing, world()), expert_mlp(x, gate_up, down, routing))


def _objects(device: torch.device) -> list[Row]:
    value = {"name": "rank", "numbers": [1, 2.5, None]}
    gathered: list = [None]
    dist.all_gather_object(gathered, value)
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    received = from_main(runtime.Runtime(0, 1, 0, device), lambda: value)
    right = gathered == [value] and objects == [value] and received == value
    return [{"status": "right" if right else "wrong", "note": "" if right else f"{gathered} {objects}"}]


def _broadcast(device: torch.device) -> list[Row]:
    x = _random(device, ROWS)
    out = x.clone()
    dist.broadcast(out, src=0)
    dist.barrier()
    return _same(out, x)


def _step(device: torch.device, options: MeshOptions) -> list[Row]:
    """A training step under a mesh of the run's options: its loss and norm are finite, and the weights move."""
    from benchmarks.tiny_steps import batch, config
    from wizard_engine.loss import sft_loss
    from wizard_engine.model import Routes, Transformer
    from wizard_engine.optim import AdamW

    mesh = make_mesh(options, runtime.Runtime(0, 1, 0, device))
    model = Transformer(config(experts=4), seed=0).to(device)
    parallelize(model, mesh, Sharding(recompute="full"))
    optimizer, packed, routes = AdamW(model, weight_decay=0.1), batch(0).to(device), Routes()
    before = optimizer.sharded.master.clone()
    hidden = model(*packed.inputs, routes)
    loss = sft_loss(hidden, model.head_weight, packed.targets, packed.weights, num_tokens=50.0, shard=model.shard).loss
    (loss + routes.loss(model.config, 50.0)).backward()
    optimizer.sharded.finish()
    norm = float(optimizer.clip(1.0))
    optimizer.step(1e-3)
    moved = not torch.equal(before, optimizer.sharded.master)
    value = float(loss.detach())
    right = moved and 0 < norm < float("inf") and 0 < value < float("inf")
    return [{"status": "right" if right else "wrong", "note": f"loss {value:.4f}, norm {norm:.4f}, {mesh.shape}"}]


def cases(device: torch.device) -> list[Case]:
    """Name of each, and what gives its rows."""
    half, ops = torch.bfloat16, dist.ReduceOp
    return [
        ("backend", lambda: [{"backend": dist.get_backend(), "nccl": _nccl_version(device)}]),
        ("all_gather_into_tensor async", lambda: _async(collectives.all_gather_rows, device, half)),
        ("reduce_scatter_tensor async", lambda: _async(collectives.reduce_scatter_rows, device, half)),
        ("reduce_scatter_tensor fp32", lambda: _async(collectives.reduce_scatter_rows, device, torch.float32)),
        ("all_to_all_single rows", lambda: _exchanged(device, ROWS)),
        ("all_to_all_single no rows", lambda: _exchanged(device, 0)),
        ("all_to_all_single counts", lambda: _counts(device)),
        ("all_reduce SUM fp64", lambda: _reduced(device, torch.float64, ops.SUM)),
        ("all_reduce SUM int64", lambda: _reduced(device, torch.int64, ops.SUM)),
        ("all_reduce MAX int64", lambda: _reduced(device, torch.int64, ops.MAX)),
        ("broadcast, barrier", lambda: _broadcast(device)),
        ("objects", lambda: _objects(device)),
        ("collectives with a gradient", lambda: _gradients(device)),
        ("experts exchanged", lambda: _experts(device)),
        ("training step", lambda: _step(device, MeshOptions())),
        ("training step dp_replicate 1 dp_shard 1 cp 1 tp 1 ep 1", lambda: _step(device, MeshOptions(1, 1, 1, 1, 1))),
    ]


def _nccl_version(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else ""


def main(args: list[str] | None = None) -> int:
    """Run and print every case; returns the exit status: 1 where one is wrong."""
    reader = Parser("python -m benchmarks.one_rank", __doc__)
    reader.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    options = reader.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        reader.error("--device: expected a machine with a GPU for cuda, got none; use --device cpu")
    chosen = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device, wrong = torch.device(chosen, *([0] if chosen == "cuda" else [])), 0
    with joined(device):
        for name, run in cases(device):
            for row in run():
                wrong += row.get("status") == "wrong"
                print(json.dumps({"case": name} | row), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
