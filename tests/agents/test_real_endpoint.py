"""Runs on an endpoint in another process: at full rate, killed at any moment, ended by signals."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import clock
import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from asking import ask
from endpoint_process import answered, endpoint, latency, wait_until
from forked import ENVIRONMENT

from wizard_engine.agents import Ledger, Scheduler, make_agent

# Two calls a row, the second of which depends on the first; what rows give is written in their order.
RUN = """
import sys
from dataclasses import dataclass
from pathlib import Path
from wizard_engine.agents import Cast, Request
from wizard_engine.data.records import Message
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.spill import Spill

@dataclass(frozen=True)
class Config:
    url: str
    out: Path

def main(cfg):
    cast = Cast(cfg.out / "ledger.sqlite", Runtime(), quiet=True)
    agent = cast.agent(f"openai:m@{cfg.url}#concurrency=16")

    async def row(number):
        first = await cast.scheduler.ask(agent, Request("answer", (Message("user", f"row {number}"),), row=str(number)))
        second = await cast.scheduler.ask(agent, Request("answer", (Message("user", f"on {first.text}"),)))
        return [number, first.text, second.text]

    spill = Spill(cfg.out)
    work = lambda: cast.scheduler.run(cast.scheduler.rows(range(200), row, spill.put, desc="r", agents=(agent,)))
    cast.conduct(work)
    (cfg.out / "rows.txt").write_text("".join(f"{item}\\n" for item in spill))
    cast.close()

launch(main, Config)
"""


def command(tmp_path, url, out):
    (tmp_path / "run.py").write_text(RUN)
    return [sys.executable, str(tmp_path / "run.py"), "--url", url, "--out", str(out)]


def stored_prompts(out):
    ledger = Ledger(out / "ledger.sqlite")
    prompts = {call.request.messages[-1].content for call in ledger.calls()}
    ledger.close()
    return prompts


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_has_the_same_bytes_and_repeats_no_stored_call(tmp_path):
    log, out = tmp_path / "log", tmp_path / "killed"
    with endpoint(log, 0.03) as url:
        subprocess.run(command(tmp_path, url, tmp_path / "whole"), env=ENVIRONMENT, check=True)
        whole = len(answered(log))
        assert whole == 400 == len(set(answered(log)))
        stored, first = set(), len(answered(log))
        for moment in range(10):
            process = subprocess.Popen(command(tmp_path, url, out), env=ENVIRONMENT)
            wait_until(lambda moment=moment: len(answered(log)) >= first + 5 + 37 * moment)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            wait_until(lambda: time.sleep(0.7) is None)
            before, stored = stored, stored_prompts(out)
            assert before <= stored
            kept = Counter(answered(log)[first:])
        subprocess.run(command(tmp_path, url, out), env=ENVIRONMENT, check=True)
        asked = Counter(answered(log)[first:])
    assert (out / "rows.txt").read_bytes() == (tmp_path / "whole" / "rows.txt").read_bytes()
    assert all(asked[prompt] == kept[prompt] for prompt in stored), "a stored call was made again"
    repeated = sum(asked.values()) - 400
    print(f"{repeated} calls of 400 were in flight at one of ten kills, and made again")
    assert set(asked.values()) <= set(range(1, 11)) and repeated <= 10 * 16
    assert {path.name for path in out.iterdir()} == {"ledger.sqlite", "rows.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_one_line(tmp_path, number):
    log, out = tmp_path / "log", tmp_path / "out"
    with endpoint(log, 0.05) as url:
        process = subprocess.Popen(command(tmp_path, url, out), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(answered(log)) >= 60)
        began = time.monotonic()
        process.send_signal(number)
        error = process.communicate()[1]
        assert time.monotonic() - began < 5 and process.returncode == 130
        assert error.count("\n") == 1 and f"run.py: stopped by {signal.Signals(number).name}; what was" in error
        stored = len(stored_prompts(out))
        assert stored >= 50
        subprocess.run(command(tmp_path, url, out), env=ENVIRONMENT, check=True)
        assert len(answered(log)) <= 400 + 16


# A call takes the client about 2.5 ms of one core, and the endpoint 1 ms: 1,500 calls at 64 with latencies of 0.6 s
# on average need 20 s in an ideal queue, of which both processes work 5. Of two runs each, the better one counts.
@pytest.mark.slow
def test_heavy_tailed_calls_over_http_take_little_more_than_an_ideal_queue(tmp_path):
    requests = [ask(f"question {number}") for number in range(1500)]
    latencies = [latency(request.messages[-1].content, 0.35) for request in requests]
    ratios = []
    with endpoint(tmp_path / "log", 0.35) as url:
        for _ in range(2):
            agent, run = make_agent(f"openai:m@{url}#concurrency=64"), Scheduler(quiet=True)
            began = time.monotonic()
            run.run(run.rows(requests, lambda r: run.ask(agent, r), lambda *_: None, desc="r", agents=(agent,)))  # noqa: B023
            ratios.append((time.monotonic() - began) / clock.ideal_seconds(latencies, 64))
    print(f"ideal {clock.ideal_seconds(latencies, 64):.1f} s, times of it: {ratios}")
    assert min(ratios) <= 1.15


# Two rivals at once on endpoints of their own take the time of one.
@pytest.mark.slow
def test_rivals_are_asked_at_once(tmp_path):
    requests = [ask(f"question {number}") for number in range(300)]
    ideal = clock.ideal_seconds([latency(request.messages[-1].content, 0.3) for request in requests], 32)
    with endpoint(tmp_path / "a", 0.3) as one, endpoint(tmp_path / "b", 0.3) as two:
        agents, run = [make_agent(f"openai:m@{url}#concurrency=32") for url in (one, two)], Scheduler(quiet=True)

        async def row(request):
            replies = await asyncio.gather(*(run.ask(agent, request) for agent in agents))
            assert all(reply.ok for reply in replies)

        began = time.monotonic()
        run.run(run.rows(requests, row, lambda *_: None, desc="r", agents=agents))
        assert time.monotonic() - began <= 1.5 * ideal
        assert Path(tmp_path / "a").read_text().count("\n") == 300
