"""The engine at a model's shapes on one GPU: decode steps at several batch sizes, and a whole rollout.

    python -m benchmarks.rollout --preset 7b --out rollout.jsonl

A decode step reads all weights and all keys once: its share of the copy bandwidth says how far it is from
what the memory allows. Weights are random; sequences end at their limit.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.command_line import Parser
from wizard_engine.generation.cuda_graphs import batch_size
from wizard_engine.generation.engine import Engine, Sampling, cache_bytes
from wizard_engine.model import PRESETS, ModelConfig, Transformer

BATCHES = (1, 32, 256)
KEYS, STEPS, WARM_STEPS = 1024, 32, 4
PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 512, 512, 256
GOAL = 0.78


def empty(config: ModelConfig, device: torch.device) -> Transformer:
    """Random weights, made where they are used."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=config.init_std, generator=generator) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.eval()


def synchronised(device: torch.device) -> float:
    """Seconds now, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def decode(model: Transformer, batch: int, keys: int, steps: int, *, most: int = 8192) -> dict[str, Any]:
    """Median seconds of a decode step of `batch` sequences behind `keys` prompt tokens each, and the bytes it reads.

    Every sequence runs from the first timed step to the last, and graphs are captured before; where that turns out
    otherwise the row has an `error` and no figures.

    Args:
        most: tokens of a step while prompts are computed.
    """
    device = model.embedding.weight.device
    page = 64 if device.type == "cuda" else 16
    # Steps in which prompts are computed: those that are done with theirs go on meanwhile.
    lead = -(-batch * keys // (most - batch)) + 4
    new = lead + WARM_STEPS + steps + 2
    each = (-(-(keys + new) // page) + 1) * page
    engine = Engine(model, cache_tokens=batch * each, max_sequences=batch, page_size=page, max_tokens=most)
    engine.capture([batch], keys + new)
    for i in range(batch):
        engine.add([(7 * i + 13 * j) % model.config.vocab_size for j in range(keys)], Sampling(new))
    while engine.scheduler.waiting or any(not s.drawn for s in engine.scheduler.running):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    row = {"op": "decode_step", "batch": batch, "keys": keys}
    seconds, error = timed_steps(engine, batch, steps)
    if error:
        return row | {"error": error}
    weights = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes * (not model.config.tied)
    length = sum(len(s.ids) for s in engine.scheduler.running) // batch - steps // 2
    moved = weights + batch * cache_bytes(model, length)
    step_seconds = gpu_timing.percentiles(seconds)
    return row | {
        "seconds": step_seconds,
        "bytes": moved,
        "tokens_per_second": batch / step_seconds["p50"],
        "bytes_per_second": moved / step_seconds["p50"],
    }


def timed_steps(engine: Engine, batch: int, steps: int) -> tuple[list[float], str]:
    """Seconds between the ends of steps, and what was not as it had to be: '' where all was.

    Nothing waits for the device but the engine itself, which reads each step's tokens.
    """
    seconds, captures, began = [], engine.captures, synchronised(engine.device)
    for number in range(steps):
        grown = len(engine.step())
        running = len(engine.scheduler.running)
        ended = time.perf_counter()
        seconds.append(ended - began)
        began = ended
        if grown != batch or running != batch:
            return [], f"step {number}: expected a batch of {batch}, got {grown}, {running} after it"
    if engine.captures != captures:
        return [], f"expected no capture of a graph while steps are timed, got {engine.captures - captures}"
    return seconds, ""


def rollout(model: Transformer, prompts: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of a whole rollout, four samples a prompt, 256 at once; graphs are captured before."""
    at_once = min(256, prompts)
    engine = Engine(
        model, cache_tokens=at_once * (prompt_tokens + new_tokens + 192), max_sequences=at_once, max_tokens=8192
    )
    engine.capture(sorted({batch_size(n, at_once) for n in range(1, at_once + 1)}), prompt_tokens + new_tokens)
    for i in range(prompts // 4):
        prompt = [(7 * i + 13 * j) % model.config.vocab_size for j in range(prompt_tokens)]
        engine.add(prompt, Sampling(new_tokens, 1.0, seed=i), n=4)
    row = {
        "op": "rollout",
        "sequences": prompts // 4 * 4,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "captures": engine.captures,
    }
    began = synchronised(engine.device)
    engine.run()
    seconds = synchronised(engine.device) - began
    if engine.captures != row["captures"]:
        extra = engine.captures - row["captures"]
        return row | {"error": f"expected no capture of a graph while a rollout is timed, got {extra}"}
    return row | {
        "seconds": seconds,
        "tokens_per_second": engine.generated / seconds,
        "steps": engine.steps,
        "preemptions": engine.scheduler.preemptions,
    }


def measure(preset: str, device: torch.device, *, small: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of all of it, each as soon as it is measured."""
    model = empty(PRESETS[preset], device)
    copy = 1e9 * gpu_timing.ceilings(device)["copy_gbps"] if device.type == "cuda" else None
    keys, steps = (32, 12) if small else (KEYS, STEPS)
    for batch in (1, 4) if small else BATCHES:
        row = decode(model, batch, keys, steps)
        if copy and "error" not in row:
            row["share_of_copy"] = row["bytes_per_second"] / copy
        yield row
    yield rollout(model, *((8, 16, 16) if small else (PROMPTS, PROMPT_TOKENS, NEW_TOKENS)))


def text_of(row: dict[str, Any]) -> str:
    """One line."""
    is_step = row["op"] == "decode_step"
    what = f"batch {row['batch']}, {row['keys']} keys" if is_step else f"{row['sequences']} sequences"
    if "error" in row:
        return f"{row['op']:<11}  {what}   error: {row['error']}"
    if not is_step:
        return (
            f"rollout      {row['sequences']} x {row['new_tokens']} tokens   {row['seconds']:.1f} s   "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
    share = f"   {100 * row['share_of_copy']:.0f} % of copy" if "share_of_copy" in row else ""
    return (
        f"decode_step  {what}   {1e3 * row['seconds']['p50']:.2f} ms   {row['tokens_per_second']:,.0f} tokens/s{share}"
    )


def main(args: list[str] | None = None) -> int:
    """Measure and write; returns the exit status: 1 where a row is an error, 2 without a GPU."""
    reader = Parser("python -m benchmarks.rollout", __doc__)
    reader.add_argument("--preset", default="7b", help="of the model; default: %(default)s")
    reader.add_argument("--out", type=Path, default=Path("rollout.jsonl"), help="default: %(default)s")
    options = reader.parse_args(args)
    reader.names("--preset", [options.preset], list(PRESETS))
    if not torch.cuda.is_available():
        print("rollout: expected a GPU, got none; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda:0")
    about = gpu_timing.environment(device)
    errors = 0
    with options.out.open("w", encoding="utf-8") as file:
        for row in measure(options.preset, device):
            file.write(json.dumps(about | {"preset": options.preset} | row) + "\n")
            file.flush()
            print(text_of(row), flush=True)
            errors += "error" in row
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
