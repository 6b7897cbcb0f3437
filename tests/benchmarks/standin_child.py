"""What a process that stands in for a GPU sees, as one JSON object; test_standin.py runs it once for all tests."""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import triton
import triton.language as tl

from benchmarks import every_operation, launch_steps, tiny_steps
from benchmarks.launches import predict
from benchmarks.standin import Log, stand_in
from benchmarks.standin.tensors import caller
from kernels import _rms_norm
from kernels.launch import launch
from kernels.rms_norm import rms_norm
from wizard_engine.model import PRESETS
from wizard_engine.parallel.fsdp import Sharded
from wizard_engine.training.run import Run

CUDA = torch.device("cuda", 0)
SMALL = replace(PRESETS["7b"], layers=2, width=512, ffn_width=1024, heads=4, kv_heads=2, vocab_size=2048)


@triton.jit
def specialised_kernel(x, count, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), count)


@triton.jit(do_not_specialize=["count"])
def plain_kernel(x, count, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), count)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def message(call) -> str:
    """Name and text of the error that a call raises; an empty text where it raises none."""
    try:
        call()
    except (ValueError, TypeError, KeyError, RuntimeError, triton.CompilationError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tensors() -> dict:
    """Devices, addresses and autograd of tensors that are not there, beside real ones."""
    x, host = empty(64, 128).requires_grad_(), torch.arange(5)
    y = rms_norm(x, empty(128))
    (2 * y).sum().backward()
    view = x[3:, 16:]
    return {
        "devices": [str(t.device) for t in (x, y, x.grad, host, host.to(CUDA), host.to(CUDA).cpu())],
        "is_cuda": [t.is_cuda for t in (x, y, x.grad, host)],
        "host": host[host > 2].tolist(),
        "offset": view.data_ptr() - x.data_ptr(),
        "aligned": x.data_ptr() % 512,
        "apart": x.data_ptr() != y.data_ptr(),
        "moved": host.to(CUDA).tolist(),
        "pinned": host.pin_memory().is_pinned(),
    }


def waits(log: Log) -> dict:
    """Which calls make the host wait."""
    x, large, small = empty(300, 300, dtype=torch.float32), torch.zeros(100_000), torch.zeros(10)
    calls = {
        "item": lambda: float(x.sum()),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
        "cpu": x.cpu,
        "tolist": lambda: x.tolist(),
        "tensor": lambda: torch.tensor([1, 2], device="cuda"),
        "blocking": lambda: small.to(CUDA),
        "synchronize": lambda: torch.cuda.synchronize(),
        "pageable": lambda: large.to(CUDA, non_blocking=True),
        "pinned": lambda: large.pin_memory().to(CUDA, non_blocking=True),
        "kernel": lambda: rms_norm(x, empty(300).float()),
        "staged": lambda: small.to(CUDA, non_blocking=True),
        "sum": x.sum,
        "view": lambda: x.t()[3:].view(-1, 3),
        "where": lambda: torch.where(x > 0, x, 1.0),
        "slots": lambda: x[torch.arange(3, device=CUDA)],
    }
    results = {}
    for name, call in calls.items():
        log.events.clear()
        message(call)
        results[name] = [sum(e.kind == "sync" for e in log.events), sum(e.launches for e in log.events)]
    return results


def refusals() -> dict:
    """Launches that a real driver, or Triton, refuses."""
    x, weight = empty(64, 128), empty(128)

    def swapped(kernel, grid, *arguments, **options):
        order = list(arguments)
        order[2], order[6] = order[6], order[2]
        launch(kernel, grid, *order, **options)

    def swapped_arguments() -> None:
        with mock.patch.object(_rms_norm, "launch", swapped):
            rms_norm(x, weight)

    return {
        "swapped": message(swapped_arguments),
        "host tensor": message(lambda: plain_kernel[(1,)](torch.zeros(16), 3, BLOCK=16)),
        "grid": message(lambda: plain_kernel[(1, 70000)](x, 3, BLOCK=16)),
        "threads": message(lambda: plain_kernel[(1,)](x, 3, BLOCK=16, num_warps=64)),
        "option": message(lambda: plain_kernel[(1,)](x, 3, BLOCK=16, blocks=3)),
        "missing": message(lambda: plain_kernel[(1,)](x, BLOCK=16)),
        "descriptor": message(descriptor),
        "right": message(lambda: plain_kernel[(7, 65535)](x, 3, BLOCK=16)),
    }


@triton.jit
def descriptor_kernel(tile, out, BLOCK: tl.constexpr):
    values = tile.load([0, 0])
    tl.store(out + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], values)


def descriptor() -> None:
    """A descriptor of rows that do not start at a multiple of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = empty(64, 64)
    good = TensorDescriptor(x, [64, 64], [64, 1], [16, 16])
    descriptor_kernel[(1,)](good, empty(16, 16), BLOCK=16)
    good.base = x.view(-1)[1:]
    descriptor_kernel[(1,)](good, empty(16, 16), BLOCK=16)


def variants(log: Log) -> dict:
    """How often kernels are compiled for run-time numbers that differ."""
    x = empty(16, dtype=torch.int64)
    log.variants.clear()
    for kernel in (specialised_kernel, plain_kernel):
        for count in (33, 35, 64):
            kernel[(1,)](x, count, BLOCK=16)
    return {name: len(keys) for name, keys in log.variants.items()}


def operations(log: Log) -> dict:
    """Every public operation of the kernels and the loss of every recipe: what refused them, what they launched."""
    results = {}
    for operation in every_operation.OPERATIONS:
        for dtype in (torch.bfloat16, torch.float32):
            log.events.clear()
            error = message(lambda op=operation, d=dtype: op.run(CUDA, d))
            results[f"{operation.name} {dtype}"] = [error, sum(e.kind == "triton" for e in log.events)]
    for step in tiny_steps.STEPS:
        model = step.build(CUDA)
        getattr(model, "body", model).to(torch.bfloat16)
        log.events.clear()
        error = message(lambda s=step, m=model: tiny_steps.figures(s, m.to(CUDA), CUDA))
        results[step.name] = [error, sum(e.kind == "triton" for e in log.events)]
    return results


@contextmanager
def planted(owner: type, name: str, extra):
    """A method that does something more first."""
    real = getattr(owner, name)

    def method(self, *args, **options):
        extra(self, *args)
        return real(self, *args, **options)

    with mock.patch.object(owner, name, method):
        yield


def summary(events: list) -> dict:
    flat = list(launch_steps.flattened(events))
    return launch_steps.counts(events) | {
        "kinds": dict(Counter(f"{e.kind} {e.name}" for e in flat)),
        "waits": dict(Counter(e.where for e in launch_steps.full_waits(flat))),
    }


def steps(log: Log) -> dict:
    """A training step, by layers and width, a decode step, an online step; and with planted defects."""

    def train(config=SMALL, tokens: int = 1024, recompute: str = "full") -> dict:
        return summary(launch_steps.train(log, config, CUDA, tokens, recompute))

    launch_steps.PROMPT = launch_steps.ANSWER = 32
    online = launch_steps.rleif(log, replace(SMALL, layers=1), CUDA, 256, "none")
    results = {
        "train": train(),
        "deeper": train(replace(SMALL, layers=4)),
        "wider": train(replace(SMALL, width=1024, ffn_width=4096, vocab_size=8192)),
        "longer": train(tokens=8192),
        "selective": train(recompute="selective"),
        "none": train(recompute="none"),
        "decode": summary(launch_steps.decode(log, SMALL, CUDA, 4)),
        "rleif": summary(online[0]),
    }
    with planted(Run, "add", lambda self, loss, *rest: float(loss)):
        results["host read"] = train()
    with planted(Sharded, "finish", lambda self: [chunk.norm() for chunk in self.master.split(65536)]):
        results["launch a chunk"] = train()
    results["ledger"] = predict("small", 1024, log=log)
    with mock.patch.object(launch_steps, "rleif", lambda *arguments: online):
        results["online ledger"] = predict("small", 256, "rleif", log=log)
    return results


def main() -> None:
    with stand_in(checks=True) as log:
        results = {"tensors": tensors(), "waits": waits(log), "refusals": refusals(), "variants": variants(log)}
        log.variants.clear()
        results["operations"] = operations(log)
        results["steps"] = steps(log)
        results["compiled"] = {
            name: max(Counter(asked for asked, _ in pairs).values()) for name, pairs in log.variants.items()
        }
        results["caller"] = caller()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
