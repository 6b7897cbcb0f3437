"""AdamW in host memory: csrc's one pass against torch's fused kernel with the passes that it needs around it.

    python -m benchmarks.offload --parameters 33554432 --repeats 15

Each takes bf16 gradients of the last micro-batch and fp32 ones that were accumulated, updates fp32 weights and moments,
and gives weights in bf16. Variants take turns; times are medians [20th, 80th percentile], the ratio that of each turn.
"""

import argparse
import time

import torch

from benchmarks.__main__ import environment
from kernels.offloaded_adamw import LEVELS, offloaded_adamw, widest_level

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
# Read and written: master, both moments and the sum 4 bytes each way, gradient read, copy written.
BYTES = 8 * 4 + 2 + 2


def buffers(size: int) -> dict[str, torch.Tensor]:
    """Weights, moments, gradients."""
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(size, generator=generator) for name in ("master", "exp_avg", "accumulated")}
    found["exp_avg_sq"] = torch.rand(size, generator=generator)
    found["gradient"] = torch.randn(size, generator=generator).bfloat16()
    return found | {"copy": torch.empty(size, dtype=torch.bfloat16)}


def fused(t: dict[str, torch.Tensor], count: torch.Tensor, wide: torch.Tensor) -> None:
    """torch: add the last gradient, update, clear, round; each a pass of its own, no buffer allocated."""
    wide.copy_(t["gradient"])
    wide.add_(t["accumulated"])
    (beta, beta_sq), more = OPTIONS["betas"], {"amsgrad": False, "maximize": False}
    torch._fused_adamw_(
        [t["master"]], [wide], [t["exp_avg"]], [t["exp_avg_sq"]], [], [count], lr=OPTIONS["lr"], beta1=beta,
        beta2=beta_sq, weight_decay=OPTIONS["weight_decay"], eps=OPTIONS["epsilon"], **more,
    )  # fmt: skip
    t["accumulated"].zero_()
    t["copy"].copy_(t["master"])


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values).quantile(q))


def main() -> None:
    """Measure and print a line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=2**25)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    t, count = buffers(options.parameters), torch.tensor(10.0)
    wide = torch.empty(options.parameters)
    names = LEVELS[: LEVELS.index(widest_level()) + 1]
    calls = {"torch fused": lambda: fused(t, count, wide)}
    calls |= {
        f"csrc {level}": lambda level=level: offloaded_adamw(
            t["master"], t["exp_avg"], t["exp_avg_sq"], t["gradient"], accumulated=t["accumulated"], copy=t["copy"],
            step=10, level=level, **OPTIONS,
        )
        for level in names
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(options.repeats + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            began = time.perf_counter()
            calls[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    about = environment()
    print(f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["torch fused"], times)]
        rate = BYTES * options.parameters / quantile(times, 0.5) / 1e9
        print(
            f"{name:14} P={options.parameters}  {1e3 * quantile(times, 0.5):7.1f} ms "
            f"[{1e3 * quantile(times, 0.2):.1f}, {1e3 * quantile(times, 0.8):.1f}]  {rate:5.1f} GB/s of the one pass  "
            f"{quantile(ratios, 0.5):.2f}x torch [{quantile(ratios, 0.2):.2f}, {quantile(ratios, 0.8):.2f}]"
        )


if __name__ == "__main__":
    main()
