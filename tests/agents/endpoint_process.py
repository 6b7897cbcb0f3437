"""An endpoint in a process of its own, which writes down what it answered: python endpoint_process.py LOG SECONDS.

The reply to a prompt depends on the prompt alone. SECONDS is the median latency; latencies are heavy-tailed.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route


def latency(prompt: str, median: float) -> float:
    """Seconds until the reply to a prompt: Pareto with a mean of about three medians, at most 20."""
    return min(20 * median, median * random.Random(prompt).paretovariate(1.4) / 2 ** (1 / 1.4))


def reply(prompt: str) -> str:
    """What the endpoint says to a prompt."""
    return "I say " + hashlib.sha256(prompt.encode()).hexdigest()[:20]


def serve(log: Path, median: float) -> None:
    """Answer until killed."""
    file = open(log, "a")  # noqa: SIM115 - open as long as the process lives

    async def complete(request):
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        await asyncio.sleep(latency(prompt, median))
        file.write(json.dumps(prompt) + "\n")
        file.flush()
        message = {"role": "assistant", "content": reply(prompt)}
        answer = {
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 5},
        }
        return Response(json.dumps(answer), media_type="application/json")

    app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    listening = config.bind_socket()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def endpoint(log: Path, median: float):
    """The address of such a process, within the block."""
    command = [sys.executable, __file__, str(log), str(median)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def answered(log: Path) -> list[str]:
    """The prompts that were answered so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(condition, seconds: float = 60.0) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
