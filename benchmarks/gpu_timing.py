"""The timing protocol of the kernel benchmarks, the ceilings of their rates, and what numbers depend on.

On a GPU a call's kernel time is what passes on the device between two events around its launches, with a cold L2:
before each call a buffer larger than L2 is written, as often as it takes for the host to be ahead, so that no gap of
the host's launches stands between the events. Wall time is what the host waits for one call, launched into an idle
device. Variants take turns in an order that rotates. On a CPU there is wall time only.
"""

import contextlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.__main__ import environment as host_environment

FLUSH_BYTES = 256 * 2**20
MAX_WRITES = 64
COPY_BYTES = 2**30
MATRIX_SIZE = 8192
MAX_INNER = 32768
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds as {p20, p50, p80}: of the kernels (None on a CPU) and of the host's wait; calls measured."""

    kernel_us: dict[str, float] | None
    wall_us: dict[str, float]
    repeats: int

    @property
    def us(self) -> float:
        """Median that rates are computed from: kernel time, or wall time on a CPU."""
        return (self.kernel_us or self.wall_us)["p50"]


def percentiles(values: Any) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    return dict(zip(("p20", "p50", "p80"), (float(x) for x in np.percentile(values, (20, 50, 80)))))


def rotations(names: list[str], turns: int) -> Iterator[list[str]]:
    """The names in `turns` orders, each starting one later than the one before."""
    for turn in range(turns):
        at = turn % max(1, len(names))
        yield names[at:] + names[:at]


@contextlib.contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """An NVTX range of that name around the block; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """cudaProfilerStart and Stop around the block, for `nsys profile -c cudaProfilerApi`; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()


class Flush:
    """Writes a buffer larger than L2, often enough that the host is ahead of the device for a given time."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.buffer.zero_()
        start.record()
        for _ in range(10):
            self.buffer.zero_()
        end.record()
        torch.cuda.synchronize(device)
        self.us = max(1.0, 100 * start.elapsed_time(end))

    def write(self, host_us: float) -> None:
        """Keep the device busy for longer than the host needs to launch what follows."""
        for _ in range(writes_to_cover(host_us, self.us)):
            self.buffer.zero_()


def writes_to_cover(host_us: float, write_us: float) -> int:
    """Buffer writes that last twice the host's launch time: at least one, for the cold L2."""
    return min(MAX_WRITES, max(1, math.ceil(2 * host_us / write_us)))


def time_calls(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 0.4,
    repeats: tuple[int, int] = (7, 100),
    ranges: Mapping[str, str] | None = None,
) -> dict[str, Timing]:
    """Timing of each call under the protocol above.

    Args:
        seconds: how long the repeats of one call may take on average; decides their number within `repeats`.
        ranges: NVTX name of each call.
    """
    warmed = {name: warm_up(call, device) for name, call in calls.items()}
    whole = sum(cost for cost, _ in warmed.values())
    turns = int(min(max(len(calls) * seconds / max(whole, 1e-6), repeats[0]), repeats[1]))
    names = {name: (ranges or {}).get(name, name) for name in calls}
    with profiled(device):
        kernel = _kernel_times(calls, device, turns, {n: host for n, (_, host) in warmed.items()}, names)
        wall = _wall_times(calls, device, turns if kernel is None else min(turns, 15))
    return {
        name: Timing(None if kernel is None else percentiles(kernel[name]), percentiles(wall[name]), turns)
        for name in calls
    }


def warm_up(call: Call, device: torch.device) -> tuple[float, float]:
    """Seconds of a call with its wait for the device, and of its launches alone, after two calls unmeasured."""
    for _ in range(2):
        call()
    _wait(device)
    began = time.perf_counter()
    call()
    launched = time.perf_counter()
    _wait(device)
    return time.perf_counter() - began, launched - began


def check_alive(device: torch.device) -> None:
    """End the process with status 3 where an error has left the device unusable to it, as an illegal access does."""
    try:
        _wait(device)
    except RuntimeError as error:
        print(f"{device}: lost to this process: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
        raise SystemExit(3) from error


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernel_times(
    calls: Mapping[str, Call], device: torch.device, turns: int, host: Mapping[str, float], names: Mapping[str, str]
) -> dict[str, list[float]] | None:
    """Microseconds between events around each call, cold L2; None on a CPU."""
    if device.type != "cuda":
        return None
    flush, events = Flush(device), {name: [] for name in calls}
    for order in rotations(list(calls), turns):
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.write(1e6 * host[name])
            start.record()
            with marked(names[name], device):
                calls[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _wall_times(calls: Mapping[str, Call], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Microseconds that the host waits for each call."""
    seconds_of: dict[str, list[float]] = {name: [] for name in calls}
    for order in rotations(list(calls), turns):
        for name in order:
            _wait(device)
            began = time.perf_counter()
            calls[name]()
            _wait(device)
            seconds_of[name].append(1e6 * (time.perf_counter() - began))
    return seconds_of


def peak_memory_gib(call: Call, device: torch.device) -> float | None:
    """Memory that a call takes at most beside what was there before, GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers, the same for the same seed on one kind of device; none on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def copy_call(device: torch.device, size: int = COPY_BYTES) -> tuple[Call, int]:
    """A device-to-device copy of random data, and the bytes that it reads and writes."""
    source = normal(size // 4, dtype=torch.float32, device=device, seed=0)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


def matrix_call(device: torch.device, dtype: torch.dtype, flops: int) -> tuple[Call, int]:
    """Matrix products of random data, together of about that many operations, and how many they are.

    The faces are 8192 x 8192 where the operations suffice for an inner dim of 1024, smaller otherwise; an inner dim
    above 32768 is cut into several products.
    """
    side = MATRIX_SIZE
    while side > 256 and 2 * side * side * 1024 > flops:
        side //= 2
    products = max(1, math.ceil(flops / (2 * side * side * MAX_INNER)))
    inner = max(64, round(flops / (2 * side * side * products) / 64) * 64)
    left = normal(side, inner, dtype=dtype, device=device, seed=1)
    right = normal(inner, side, dtype=dtype, device=device, seed=2)
    out = torch.empty(side, side, dtype=dtype, device=device)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=out)

    return multiply, 2 * side * side * inner * products


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured now: copy bandwidth (GB/s, bytes read and written) and matrix rate (TFLOP/s, random data).

    On a GPU a copy of 1 GiB and a bf16 product of 8192^3; on a CPU 64 MiB and an fp32 product of 512^3.
    """
    on_gpu = device.type == "cuda"
    copy, moved = copy_call(device, COPY_BYTES if on_gpu else 2**26)
    size = MATRIX_SIZE if on_gpu else 512
    product, flops = matrix_call(device, torch.bfloat16 if on_gpu else torch.float32, 2 * size**3)
    timings = time_calls({"copy": copy, "matrix": product}, device, seconds=0.5)
    return {"copy_gbps": moved / timings["copy"].us / 1e3, "matrix_tflops": flops / timings["matrix"].us / 1e6}


def environment(device: torch.device) -> dict[str, Any]:
    """What a number depends on: commit, date, seed, versions, and on a GPU its name, driver and ptxas."""
    import triton

    about = host_environment() | {"device": device.type, "triton": triton.__version__}
    if device.type != "cuda":
        return about
    from benchmarks.machine_code import ptxas_version

    major, minor = torch.cuda.get_device_capability(device)
    smi = query(device, "driver_version", "power.limit", "clocks.max.sm")
    return about | {
        "gpu": torch.cuda.get_device_name(device),
        "arch": 10 * major + minor,
        "cuda": torch.version.cuda,
        "ptxas": ptxas_version(10 * major + minor),
        "driver": smi.get("driver_version", "unknown"),
        "power_limit_watt": _number(smi.get("power.limit")),
        "max_sm_mhz": _number(smi.get("clocks.max.sm")),
    }


def hardware(about: Mapping[str, Any]) -> str:
    """Name of the device that figures are from."""
    return about.get("gpu") or f"CPU ({about['hardware']})"


def state_under(call: Call, device: torch.device, seconds: float = 0.3) -> dict[str, Any]:
    """Clocks, power and throttle reasons read while the device works through `call`; empty without nvidia-smi."""
    if device.type != "cuda":
        return {}
    cost, _ = warm_up(call, device)
    for _ in range(int(min(max(seconds / max(cost, 1e-6), 1), 500))):
        call()
    reasons = "clocks_event_reasons.active"
    state = query(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", reasons)
    torch.cuda.synchronize(device)
    if not state:
        return {}
    return {
        "sm_mhz": _number(state["clocks.sm"]),
        "memory_mhz": _number(state["clocks.mem"]),
        "power_watt": _number(state["power.draw"]),
        "temperature_c": _number(state["temperature.gpu"]),
        "throttle": throttle_reasons(state[reasons]),
    }


# Bits of clocks_event_reasons.active; bit 0, idle, says nothing about a measurement.
THROTTLE = {
    1: "applications clocks",
    2: "power cap",
    3: "hardware slowdown",
    4: "sync boost",
    5: "software thermal",
    6: "hardware thermal",
    7: "hardware power brake",
    8: "display clocks",
}


def throttle_reasons(mask: str) -> list[str]:
    """Names of the bits of a mask such as 0x0000000000000004; empty for what is no number."""
    if not re.fullmatch(r"0x[0-9a-fA-F]+", mask):
        return []
    return [name for bit, name in THROTTLE.items() if int(mask, 16) >> bit & 1]


def query(device: torch.device, *fields: str) -> dict[str, str]:
    """What nvidia-smi says of the device; empty where it is absent or knows one of the fields under no name."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{uuid}" if uuid else str(device.index or 0)
    for names in (fields, [name.replace("_event_", "_throttle_") for name in fields]):
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "-i", which]
        try:
            printed = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        values = printed.stdout.strip().split(", ")
        if printed.returncode == 0 and len(values) == len(fields):
            return dict(zip(fields, values))
    return {}


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
