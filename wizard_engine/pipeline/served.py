"""Models that the driver serves while a stage asks them."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wizard_engine.runtime.process import Runtime

from .run_file import RunFile, Served

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "recipes" / "serve.py"
# What torchrun tells a rank; processes that it starts are no ranks.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
# A large model takes minutes to load.
START_SECONDS = 1800.0


def clean_environment() -> dict[str, str]:
    """The environment of a process of its own: without what torchrun told this one, and with the project's folder."""
    kept = {key: value for key, value in os.environ.items() if key not in _OF_RANKS and "TORCHELASTIC" not in key}
    for name in ("MASTER_ADDR", "MASTER_PORT") if "RANK" in os.environ else ():
        kept.pop(name, None)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))}


@contextmanager
def served(run: RunFile, config: Any, runtime: Runtime) -> Iterator[None]:
    """Serve, on rank 0, the models that a stage's agents name, until the block ends.

    Raises:
        ValueError: a server that ends or does not answer; says where its output is.
    """
    text = repr(config)
    asked = [name for name in run.served if f"openai:{name}@http://127.0.0.1:{run.served[name].port}/" in text]
    with ExitStack() as stack:
        if runtime.is_main:
            for name in asked:
                stack.enter_context(_server(name, run.served[name], run.out / f"served_{name}.log"))
        yield


@contextmanager
def _server(name: str, model: Served, log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(SERVER), "--model", str(model.model), "--port", str(model.port), "--name", name]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*words, *model.words], stdout=output, stderr=subprocess.STDOUT, env=clean_environment()
        )
    try:
        _wait(name, model, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(name: str, model: Served, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ValueError(f"served.{name}: expected a server, got exit status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{model.port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ValueError(f"served.{name}: expected an answer in {START_SECONDS:.0f} s, got none; see {log}")
