"""Python processes and ranks that start in milliseconds: forks of a process that has imported torch.

The import of torch takes two seconds of every process, and of every rank. Tests of torchrun itself, of signals and of
memory start processes of their own. Forks have one seed for the hashes of strings; the ranks of torchrun do not.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("fork_server.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Of a process whose kernels are Triton's own, not those of its interpreter.
COMPILING = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}


@functools.cache
def _server(interpreter: str | None) -> subprocess.Popen:
    """The server of this test process: one with Triton's interpreter, which is chosen at import, and one without."""
    environment = COMPILING | ({} if interpreter is None else {"TRITON_INTERPRET": interpreter})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SERVER)], env=environment, **pipes)


def _run(
    commands: Sequence[tuple[Sequence[object], Mapping[str, str]]], folder: str | Path, text: str, seconds: float
) -> subprocess.CompletedProcess:
    """Run commands with their environments at once: their outputs joined, and the first exit status that is not 0."""
    server, names = _server(commands[0][1].get("TRITON_INTERPRET")), ("stdin", "stdout", "stderr")
    with tempfile.TemporaryDirectory() as scratch:
        processes = []
        for number, (arguments, environment) in enumerate(commands):
            streams = [Path(scratch, f"{name}.{number}") for name in names]
            for stream in streams:
                stream.write_text(text if stream.stem == "stdin" else "")
            process = {"arguments": [*map(str, arguments)], "environment": dict(environment), "folder": str(folder)}
            processes.append(process | {"streams": [*map(str, streams)]})
        server.stdin.write(json.dumps({"processes": processes, "seconds": seconds}) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        outputs = ["".join(Path(process["streams"][i]).read_text() for process in processes) for i in (1, 2)]
    status = next((status for status in statuses if status), 0)
    return subprocess.CompletedProcess([process["arguments"] for process in processes], status, *outputs)


def run_python(
    *arguments: object,
    environment: Mapping[str, str] = ENVIRONMENT,
    folder: str | Path = ROOT,
    text: str = "",
    timeout: float = 240,
) -> subprocess.CompletedProcess:
    """What `python ARGUMENTS` does with `text` as its input: a script, `-m` a module or `-c` code."""
    return _run([(arguments, environment)], folder, text, timeout)


def run_together(commands: Sequence[Sequence[object]], timeout: float = 240) -> subprocess.CompletedProcess:
    """What several `python ARGUMENTS` do that start at once; their outputs one after the other."""
    return _run([(arguments, ENVIRONMENT) for arguments in commands], ROOT, "", timeout)


def run_ranks(ranks: int, *arguments: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    """What a script does on `ranks` ranks; their store is in this process, as torchrun's is in torchrun.

    Args:
        variables: further variables of their environment.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = ENVIRONMENT | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} | variables
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run([(arguments, environment) for environment in each], ROOT, "", timeout)
