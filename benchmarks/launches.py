"""The ledger of launches: what a step asks of a GPU, and how long that should take, without a GPU.

    python -m benchmarks launches --preset 7b
    python -m benchmarks launches --preset 7b --tokens 16384 --step train --recompute full --json ledger.jsonl

A step of the engine runs on a stand-in device (benchmarks/standin): its Triton kernels go through the real launch
path, torch's operators through their shape functions. The ledger counts launches, bytes, operations and waits of the
host, and predicts the step's time:

    a launch takes     max(bytes / bandwidth, operations / rate of its kind, 2.5 us) on the device
    the host takes     its measured or assumed seconds per launch; it runs ahead of the device until it waits for it
    host-bound         share of the step in which the device has nothing to do
    MFU                operations by planning/flops.py (recomputation not counted) / seconds / peak of the GPU

These are predictions: no kernel has run. Rates are assumptions, printed with the result; --rates replaces them by those
that `python -m benchmarks.plan_rates` measured.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import Parser
from benchmarks.launch_costs import workload
from benchmarks.standin import Event, Log, stand_in
from benchmarks.standin.host import torch_launch_seconds, triton_launch_seconds
from wizard_engine.model import PRESETS, ModelConfig
from wizard_engine.planning.flops import TRAINING_FACTOR, flops_per_token
from wizard_engine.planning.rates import GPUS, rates_of

STEPS = ("train", "decode", "rleif")
DEVICE = torch.device("cuda", 0)
ATTENTION_FORWARD = ("attention_forward_kernel",)
ATTENTION_BACKWARD = ("attention_backward_kv_kernel", "attention_backward_q_kernel")
# Rows of the printed table.
SHOWN = 16
H200, PLANNED = GPUS["H200"], rates_of(None)


@dataclass(frozen=True)
class Rates:
    """What the prediction assumes of the device and the host."""

    peak: float = H200.flops
    """Dense bf16 operations per second of the data sheet: the denominator of MFU."""
    matrix: float = 788e12
    """Products of matrices, operations per second: measured on an H200 with random numbers."""
    memory: float = 4.3e12
    """Bytes read and written per second: a measured copy on an H200."""
    grouped: float = PLANNED.grouped * H200.flops
    """Products of experts, as the planner assumes."""
    attention_forward: float = PLANNED.attention_forward * H200.flops
    attention_backward: float = PLANNED.attention_backward * H200.flops
    link: float = 55e9
    """Copies between host and device, bytes per second."""
    shortest: float = 2.5e-6
    """Seconds that the smallest kernel takes."""
    torch_launch: float = 6e-6
    """Host seconds of a torch operator that launches a kernel: `--measure-host` on a core of a Xeon with AVX-512."""
    triton_launch: float = 150e-6
    """Host seconds a launch of an operation with Triton kernels, dispatch, autograd and arguments included: the same,
    120e-6 to 200e-6."""
    graph_launch: float = 10e-6
    """Host seconds to replay a CUDA graph."""
    graph_node: float = 1.2e-6
    """Device seconds between two kernels of a graph."""
    wait: float = 10e-6
    """Seconds from the end of the device's work to the host's next instruction."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step; of them, those in which the device waits for the host; the host's own."""

    seconds: float
    idle: float
    host: float


def device_seconds(event: Event, rates: Rates) -> float:
    """How long the device works on an event."""
    if event.kind == "graph":
        return sum(device_seconds(replayed, rates) + rates.graph_node for replayed in event.replayed)
    if event.kind in ("sync", "mark", "wait"):
        return 0.0
    if event.kind == "copy":
        return rates.shortest + event.bytes / rates.link
    rate = rates.matrix
    if event.name in ATTENTION_FORWARD:
        rate = rates.attention_forward
    elif event.name in ATTENTION_BACKWARD:
        rate = rates.attention_backward
    elif event.name.startswith("grouped_"):
        rate = rates.grouped
    work = max(event.bytes / rates.memory, event.flops / rate)
    return max(work, rates.shortest) + (event.launches - 1) * rates.shortest


def host_seconds(event: Event, rates: Rates) -> float:
    """How long the host takes to ask for an event."""
    known = {"graph": rates.graph_launch, "triton": rates.triton_launch} | dict.fromkeys(("sync", "mark", "wait"), 0.0)
    return known.get(event.kind, event.launches * rates.torch_launch)


def predict_events(events: Sequence[Event], rates: Rates) -> Prediction:
    """Run host and device against each other: one stream, in order, the host ahead until it waits."""
    host = device = idle = busy = 0.0
    marks: dict[str, float] = {}
    for event in events:
        if event.kind == "mark":
            marks[event.name] = device
            continue
        if event.kind in ("sync", "wait"):
            # An event of an earlier step has long passed.
            host = max(host, device if event.kind == "sync" else marks.get(event.name, 0.0)) + rates.wait
            continue
        taken = host_seconds(event, rates)
        host, busy = host + taken, busy + taken
        idle += max(0.0, host - device)
        device = max(device, host) + device_seconds(event, rates)
    return Prediction(max(host, device), idle, busy)


def rows_of(events: Sequence[Event], rates: Rates) -> list[dict[str, Any]]:
    """Launches, bytes, operations and device seconds by kernel and operator, the longest first."""
    from benchmarks.launch_steps import flattened, full_waits

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    waits = full_waits(list(flattened(events)))
    for event in (*(e for e in flattened(events) if e.kind not in ("sync", "mark", "wait")), *waits):
        kind, name = ("sync", "event") if event.kind == "wait" else (event.kind, event.name)
        row = rows.setdefault((kind, name), dict.fromkeys(("launches", "bytes", "flops", "seconds"), 0))
        row["launches"] += event.launches
        row["bytes"] += event.bytes
        row["flops"] += event.flops
        row["seconds"] += device_seconds(event, rates)
        if kind == "sync":
            row["count"] = row.get("count", 0) + 1
            row["where"] = sorted({*row.get("where", ()), event.where} - {""})
    named = [{"kind": kind, "name": name} | row for (kind, name), row in rows.items()]
    return sorted(named, key=lambda row: (-row["seconds"], -row["launches"]))


@contextlib.contextmanager
def _device_of(log: Log | None) -> Iterator[Log]:
    if log is not None:
        yield log
    else:
        with stand_in() as made:
            yield made


def predict(
    preset: str,
    tokens: int,
    step: str = "train",
    *,
    recompute: str = "full",
    layers: int | None = None,
    rates: Rates | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """The ledger of one step, as the JSON that the command writes.

    Args:
        tokens: of the packed row of a training step; sequences of a decode step; answer tokens of a step of RLEIF.
        layers: fewer or more than the preset has.   log: of a device that already stands in; None: make one.
    Raises:
        ValueError: an unknown preset, step or number of tokens, no triton or no compiler.
    """
    from benchmarks import launch_steps

    config = config_of(preset, tokens, step, layers)
    rates = rates or Rates()
    with _device_of(log) as device:
        if step == "train":
            lengths = launch_steps.documents_of(tokens)
            with workload(documents=lengths):
                events = launch_steps.train(device, config, DEVICE, tokens, recompute)
            flops = TRAINING_FACTOR * sum(n * flops_per_token(config, n) for n in lengths)
        elif step == "decode":
            with workload(keys=launch_steps.KEYS):
                events = launch_steps.decode(device, config, DEVICE, tokens)
            flops = tokens * flops_per_token(config, 2 * launch_steps.KEYS)
        else:
            events, flops = launch_steps.rleif(device, config, DEVICE, tokens, recompute)
    return result_of(
        events,
        rates,
        preset=preset,
        layers=config.layers,
        step=step,
        tokens=tokens,
        model_flops=flops,
        recompute=recompute,
    )


def result_of(
    events: Sequence[Event],
    rates: Rates,
    *,
    preset: str,
    layers: int,
    step: str,
    tokens: int,
    model_flops: float,
    recompute: str,
) -> dict[str, Any]:
    """The JSON of a ledger."""
    from benchmarks import launch_steps

    predicted = predict_events(events, rates)
    result = launch_steps.counts(events)
    rows = rows_of(events, rates)
    return {
        "preset": preset,
        "layers": layers,
        "step": step,
        "tokens": tokens,
        "recompute": recompute,
        **result,
        "host_seconds": predicted.host,
        "predicted_seconds": predicted.seconds,
        "host_bound": predicted.idle / predicted.seconds,
        "tokens_per_second": tokens / predicted.seconds,
        "mfu": model_flops / predicted.seconds / rates.peak,
        "share_of_copy": result["bytes"] / predicted.seconds / rates.memory,
        "rates": asdict(rates),
        "rows": rows,
    }


def config_of(preset: str, tokens: int, step: str, layers: int | None) -> ModelConfig:
    """The model of a ledger.

    Raises:
        ValueError: an unknown preset or step, or tokens out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if step not in STEPS:
        raise ValueError(f"--step: expected one of {', '.join(STEPS)}, got {step!r}")
    if not 1 <= tokens <= 2**20:
        raise ValueError(f"--tokens: expected 1 to {2**20}, got {tokens}")
    config = PRESETS[preset]
    return config if layers is None else replace(config, layers=layers)


def text_of(row: dict[str, Any]) -> str:
    """The ledger as lines: totals, the longest kernels, the waits of the host."""
    unit = "tokens" if row["step"] != "decode" else "sequences"
    kept = f", recomputation {row['recompute']}" if row["step"] != "decode" else ""
    lines = [
        f"{row['preset']}, {row['layers']} layers, {row['step']}, {row['tokens']} {unit}{kept}: predicted "
        f"{1e3 * row['predicted_seconds']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}, "
        f"{row['share_of_copy']:.0%} of copy bandwidth",
        f"{row['launches']:,} launches, {row['host_syncs']} waits of the host, {row['bytes'] / 1e9:,.1f} GB, "
        f"{row['flops'] / 1e12:,.1f} TFLOP, host {1e3 * row['host_seconds']:.1f} ms, device idle "
        f"{row['host_bound']:.1%}",
        f"{'kernel':48}{'launches':>9}{'GB':>10}{'TFLOP':>10}{'ms':>10}",
    ]
    work = [r for r in row["rows"] if r["kind"] != "sync"]
    for r in work[:SHOWN]:
        lines.append(_line(f"{r['kind']} {r['name']}", r))
    if len(work) > SHOWN:
        rest = {key: sum(r[key] for r in work[SHOWN:]) for key in ("launches", "bytes", "flops", "seconds")}
        lines.append(_line(f"{len(work) - SHOWN} others", rest))
    for r in row["rows"]:
        if r["kind"] == "sync":
            lines.append(f"waits: {r['count']} x {r['name']} at {', '.join(r['where']) or 'unknown'}")
    return "\n".join(lines)


def _line(name: str, r: dict[str, Any]) -> str:
    return f"{name:48}{r['launches']:9,}{r['bytes'] / 1e9:10.2f}{r['flops'] / 1e12:10.2f}{1e3 * r['seconds']:10.2f}"


def read_rates(path: Path | None) -> Rates:
    """Rates of a JSON file over the assumed ones.

    Raises:
        ValueError: no such file, no JSON, or a name or number that is no rate.
    """
    if path is None:
        return Rates()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--rates: expected a JSON file, got {path}: {error}") from None
    known = {field.name for field in fields(Rates)}
    wrong = [
        name for name, value in values.items() if name not in known or not isinstance(value, int | float) or value <= 0
    ]
    if wrong:
        raise ValueError(f"--rates: {path}: expected positive numbers named {', '.join(sorted(known))}, got {wrong[0]}")
    return replace(Rates(), **values)


def main(args: Sequence[str] | None = None) -> int:
    """Print the ledger and write its JSON; returns the exit status."""
    reader = Parser("python -m benchmarks launches", __doc__)
    reader.add_argument("--preset", default="7b", help=f"of {', '.join(PRESETS)}; default: %(default)s")
    reader.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="train: of the packed row, default 4096 16384; decode: sequences, default 1 32 256; rleif: answer tokens",
    )
    reader.add_argument("--step", default="train", help=f"{', '.join(STEPS)}; default: %(default)s")
    reader.add_argument(
        "--recompute", default="full", choices=("none", "selective", "full"), help="default: %(default)s"
    )
    reader.add_argument("--layers", type=int, help="of the model, default: the preset's")
    reader.add_argument(
        "--measure-host",
        action="store_true",
        help="measure this machine's host seconds of a launch first, instead of assuming them",
    )
    reader.add_argument("--rates", type=Path, metavar="FILE", help="JSON of rates in place of the assumed ones")
    reader.add_argument("--json", type=Path, metavar="PATH", help="write the ledgers as JSON lines")
    options = reader.parse_args(args)
    defaults = {"train": [4096, 16384], "decode": [1, 32, 256], "rleif": [16384]}
    try:
        rates = read_rates(options.rates)
        if options.measure_host:
            rates = replace(rates, triton_launch=triton_launch_seconds(), torch_launch=torch_launch_seconds())
        sizes = options.tokens or defaults.get(options.step, [1])
        for size in sizes:
            config_of(options.preset, size, options.step, options.layers)
        results = []
        with stand_in() as log:
            for size in sizes:
                results.append(
                    predict(
                        options.preset,
                        size,
                        options.step,
                        recompute=options.recompute,
                        layers=options.layers,
                        rates=rates,
                        log=log,
                    )
                )
                print(text_of(results[-1]), end="\n\n", flush=True)
    except ValueError as error:
        print(f"launches: {error}", file=sys.stderr)
        return 2
    host = "measured" if options.measure_host else "assumed"
    print(
        f"a prediction at assumed rates of the device; host seconds {host}: {1e6 * rates.triton_launch:.0f} us a "
        f"Triton launch, {1e6 * rates.torch_launch:.1f} us a torch operator; no kernel has run"
    )
    if options.json is not None:
        from benchmarks.__main__ import environment

        about = environment()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(about | row) + "\n" for row in results), encoding="utf-8")
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
