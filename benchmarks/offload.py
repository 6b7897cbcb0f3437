"""AdamW in host memory: csrc's one pass against the kernels of torch and DeepSpeed with the passes they need around.

    python -m benchmarks.offload --parameters 33554432 --repeats 15

DeepSpeed takes part where it is installed. Each takes bf16 gradients of the last micro-batch and fp32 ones that were
accumulated, updates fp32 weights and moments, and gives weights in bf16. Variants take turns; times are medians [20th,
80th percentile], ratios those of each turn to csrc at the widest level. `--stagger` moves the buffers apart by so many
elements.
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.__main__ import environment
from kernels.offloaded_adamw import LEVELS, offloaded_adamw, widest_level

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
# Read and written: master, both moments and the sum 4 bytes each way, gradient read, copy written.
BYTES = 8 * 4 + 2 + 2


def buffers(size: int, stagger: int) -> dict[str, torch.Tensor]:
    """Weights, moments, gradients."""
    generator = torch.Generator().manual_seed(0)

    def placed(number: int, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.new_zeros(number * stagger), values])[number * stagger :]

    names = ("master", "exp_avg", "accumulated")
    tensors = {name: placed(i, torch.randn(size, generator=generator)) for i, name in enumerate(names)}
    tensors["exp_avg_sq"] = placed(3, torch.rand(size, generator=generator))
    tensors["gradient"] = placed(4, torch.randn(size, generator=generator).bfloat16())
    return tensors | {"copy": placed(5, torch.empty(size, dtype=torch.bfloat16))}


def deepspeed(t: dict[str, torch.Tensor], wide: torch.Tensor) -> Callable[[], None] | None:
    """DeepSpeed's kernel with the same passes around; None where it is not installed."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    parameter = torch.nn.Parameter(torch.zeros(1))
    inner = DeepSpeedCPUAdam([parameter], lr=OPTIONS["lr"], adamw_mode=True)
    kernel, number = inner.ds_opt_adam, inner.opt_id

    def step(_keep: object = inner) -> None:
        wide.copy_(t["gradient"])
        wide.add_(t["accumulated"])
        kernel.adam_update(
            number,
            10,
            OPTIONS["lr"],
            *OPTIONS["betas"],
            OPTIONS["epsilon"],
            OPTIONS["weight_decay"],
            True,
            t["master"],
            wide,
            t["exp_avg"],
            t["exp_avg_sq"],
        )
        t["accumulated"].zero_()
        t["copy"].copy_(t["master"])

    return step


def fused(t: dict[str, torch.Tensor], count: torch.Tensor, wide: torch.Tensor) -> None:
    """torch: add the last gradient, update, clear, round; each a pass of its own, no buffer allocated."""
    wide.copy_(t["gradient"])
    wide.add_(t["accumulated"])
    (beta, beta_sq), more = OPTIONS["betas"], {"amsgrad": False, "maximize": False}
    torch._fused_adamw_(
        [t["master"]],
        [wide],
        [t["exp_avg"]],
        [t["exp_avg_sq"]],
        [],
        [count],
        lr=OPTIONS["lr"],
        beta1=beta,
        beta2=beta_sq,
        weight_decay=OPTIONS["weight_decay"],
        eps=OPTIONS["epsilon"],
        **more,
    )
    t["accumulated"].zero_()
    t["copy"].copy_(t["master"])


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values).quantile(q))


def main() -> None:
    """Measure and print a line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=2**25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stagger", type=int, default=0)
    options = parser.parse_args()
    t, count = buffers(options.parameters, options.stagger), torch.tensor(10.0)
    wide = torch.empty(options.parameters)
    names = LEVELS[: LEVELS.index(widest_level()) + 1]
    calls = {"torch fused": lambda: fused(t, count, wide)}
    theirs = deepspeed(t, wide)
    if theirs is not None:
        calls["deepspeed"] = theirs
    calls |= {
        f"csrc {level}": lambda level=level: offloaded_adamw(
            t["master"],
            t["exp_avg"],
            t["exp_avg_sq"],
            t["gradient"],
            accumulated=t["accumulated"],
            copy=t["copy"],
            step=10,
            level=level,
            **OPTIONS,
        )
        for level in names
    }
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
        ratios = [a / b for a, b in zip(times, seconds[f"csrc {names[-1]}"])]
        rate = BYTES * options.parameters / quantile(times, 0.5) / 1e9
        print(
            f"{name:14} P={options.parameters}  {1e3 * quantile(times, 0.5):7.1f} ms "
            f"[{1e3 * quantile(times, 0.2):.1f}, {1e3 * quantile(times, 0.8):.1f}]  {rate:5.1f} GB/s of the one pass  "
            f"{quantile(ratios, 0.5):.2f}x as long [{quantile(ratios, 0.2):.2f}, {quantile(ratios, 0.8):.2f}]"
        )


if __name__ == "__main__":
    main()
