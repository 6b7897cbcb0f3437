"""The engine at a model's shapes on one GPU: steps of single tokens at several batch sizes, and a whole rollout.

    python -m benchmarks.rollout --preset 7b --out rollout.jsonl

A step of single tokens reads all weights and all keys once: its share of the copy bandwidth says how far it is from
what the memory allows. Weights are random; sequences end at their limit.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.command_line import Parser
from wizard_engine.model import PRESETS, ModelConfig, Transformer
from wizard_engine.rollout.engine import Engine, Sampling, cache_bytes

BATCHES = (1, 32, 256)
KEYS, STEPS = 1024, 32
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


def decode(model: Transformer, batch: int, keys: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step of `batch` single tokens behind `keys` others each, and the bytes that it reads."""
    device = model.embedding.weight.device
    page = 64 if device.type == "cuda" else 16
    each = (-(-(keys + steps + 4) // page) + 1) * page
    engine = Engine(model, cache_tokens=batch * each, max_sequences=batch, page_size=page, max_tokens=8192)
    for i in range(batch):
        prompt = [(7 * i + 13 * j) % model.config.vocab_size for j in range(keys)]
        engine.add(prompt, Sampling(steps + 4))
    while len(engine.scheduler.waiting) or any(len(s.ids) == s.prompt_tokens for s in engine.scheduler.running):
        engine.step()
    seconds = []
    for number in range(min(steps, model.config.max_positions - keys - 8)):
        began = synchronised(device)
        if not engine.step():
            break
        if number > 3:
            seconds.append(synchronised(device) - began)
    weights = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes * (not model.config.tied)
    moved = weights + batch * cache_bytes(model, keys + steps // 2)
    spread = gpu_timing.spread(seconds)
    return {
        "op": "decode_step", "batch": batch, "keys": keys, "seconds": spread, "bytes": moved,
        "tokens_per_second": batch / spread["p50"], "bytes_per_second": moved / spread["p50"],
    }  # fmt: skip


def rollout(model: Transformer, prompts: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of a whole rollout, four samples a prompt, 256 at once."""
    device = model.embedding.weight.device
    at_once = min(256, prompts)
    engine = Engine(
        model, cache_tokens=at_once * (prompt_tokens + new_tokens + 192), max_sequences=at_once, max_tokens=8192
    )
    for i in range(prompts // 4):
        prompt = [(7 * i + 13 * j) % model.config.vocab_size for j in range(prompt_tokens)]
        engine.add(prompt, Sampling(new_tokens, 1.0, seed=i), n=4)
    began = synchronised(device)
    engine.run()
    seconds = synchronised(device) - began
    return {
        "op": "rollout", "sequences": prompts // 4 * 4, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "seconds": seconds, "tokens_per_second": engine.generated / seconds, "steps": engine.steps,
        "preemptions": engine.scheduler.preemptions,
    }  # fmt: skip


def measure(preset: str, device: torch.device, *, small: bool = False) -> list[dict[str, Any]]:
    """Rows of all of it."""
    model = empty(PRESETS[preset], device)
    copy = 1e9 * gpu_timing.ceilings(device)["copy_gbps"] if device.type == "cuda" else None
    keys, steps = (32, 12) if small else (KEYS, STEPS)
    rows = [decode(model, batch, keys, steps) for batch in ((1, 4) if small else BATCHES)]
    if copy:
        for row in rows:
            row["share_of_copy"] = row["bytes_per_second"] / copy
    return [*rows, rollout(model, *((8, 16, 16) if small else (PROMPTS, PROMPT_TOKENS, NEW_TOKENS)))]


def text_of(row: dict[str, Any]) -> str:
    """One line."""
    if row["op"] == "rollout":
        return (
            f"rollout      {row['sequences']} x {row['new_tokens']} tokens   {row['seconds']:.1f} s   "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
    share = f"   {100 * row['share_of_copy']:.0f} % of copy" if "share_of_copy" in row else ""
    return (
        f"decode_step  batch {row['batch']}, {row['keys']} keys   {1e3 * row['seconds']['p50']:.2f} ms   "
        f"{row['tokens_per_second']:,.0f} tokens/s{share}"
    )


def main(args: list[str] | None = None) -> int:
    """Measure and write; returns the exit status: 2 without a GPU."""
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
    rows = measure(options.preset, device)
    options.out.write_text("".join(json.dumps(about | {"preset": options.preset} | row) + "\n" for row in rows))
    for row in rows:
        print(text_of(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
