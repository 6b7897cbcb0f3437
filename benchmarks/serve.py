"""The server under load on loopback: requests at a fixed number at once, some of them left half-way.

A process of its own serves random weights; clients of this one ask. Every request either comes to its end or is one
that was left; tokens/s count those that came.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import SEED, build, describe, examples
from wizard_engine.model import save_model

PEER = None
REQUESTS, AT_ONCE, LEFT_EVERY = 1000, 64, 10
PRESET = "demo"
ROOT = Path(__file__).resolve().parents[1]


async def _ask(web: Any, number: int, messages: list[dict], outcomes: dict[str, list]) -> None:
    body = {
        "model": "model",
        "messages": messages,
        "max_tokens": 16 + number * 37 % 113,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, chunks = time.perf_counter(), None, 0
    async with web.stream("POST", "/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            outcomes["refused"].append(answer.status_code)
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                outcomes["seconds"].append(time.perf_counter() - began)
                # An answer may be empty.
                outcomes["first"] += [] if first is None else [first]
                return
            if '"content": "' in line and '"content": ""' not in line:
                first = first or time.perf_counter() - began
                chunks += 1
                if number % LEFT_EVERY == 0 and chunks > 4:
                    outcomes["left"].append(number)
                    return
            if '"usage": {' in line:
                outcomes["tokens"].append(int(line.partition('"completion_tokens": ')[2].partition(",")[0]))
    outcomes["lost"].append(number)


async def _load(url: str, prompts: list[list[dict]], count: int) -> dict[str, list]:
    import httpx

    outcomes: dict[str, list] = {name: [] for name in ("seconds", "first", "tokens", "left", "lost", "refused")}
    gate, limits = asyncio.Semaphore(AT_ONCE), httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as web:

        async def one(number: int) -> None:
            async with gate:
                await _ask(web, number, prompts[number % len(prompts)], outcomes)

        await asyncio.gather(*(one(number) for number in range(count)))
    return outcomes


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark; AssertionError where a request was lost or refused, or a page is not free at the end."""
    import httpx

    from wizard_engine import world

    count = 100 if quick else REQUESTS
    tokenizer, _ = examples(64)
    model = build(PRESET, tokenizer)
    rows = world.natural_corpus(500, SEED)[:64]
    prompts = [[{"role": m.role, "content": m.content} for m in row.messages[:1]] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder) / "model")
        command = [sys.executable, str(ROOT / "recipes" / "serve.py"), "--model", f"{folder}/model", "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
            try:
                url = server.stderr.readline().partition(" on ")[2].partition(",")[0]
                began = time.perf_counter()
                outcomes = asyncio.run(_load(url, prompts, count))
                seconds = time.perf_counter() - began
                # Those that were left may still be on their way out.
                time.sleep(0.5)
                metrics = httpx.get(url.removesuffix("/v1") + "/metrics").text
            finally:
                server.terminate()
                server.wait(30)
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert not outcomes["lost"] and not outcomes["refused"], outcomes
    assert len(outcomes["seconds"]) + len(outcomes["left"]) == count
    assert values["wizard_pages"] == values["wizard_pages_free"] and values["wizard_sequences_open"] == "0"
    shape = f"{describe(PRESET, model).partition(' V=')[0]}  {count}, {AT_ONCE} at once, {len(outcomes['left'])} left"
    rows = []
    for name, samples in (("first token", outcomes["first"]), ("whole answer", outcomes["seconds"])):
        p20, p50, p80, p95, p99 = np.percentile(samples, (20, 50, 80, 95, 99))
        rows.append(
            {
                "op": "serve",
                "shape": f"{shape}, p95 {1e3 * p95:.0f} p99 {1e3 * p99:.0f} ms",
                "variant": name,
                "seconds": {"p20": p20, "p50": p50, "p80": p80, "p95": p95, "p99": p99},
                "rate": sum(outcomes["tokens"]) / seconds,
                "unit": "tokens/s",
                "requests_per_second": count / seconds,
            }
        )
    return rows
