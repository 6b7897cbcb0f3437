"""The process a recipe runs in: ranks, device, seeds, signals."""

import ctypes
import datetime
import gc
import importlib
import os
import random
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from .heartbeat import Heartbeat, run_store

PR_SET_PDEATHSIG = 1
AGENT_SECONDS = 30.0
RANK_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))

_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class Runtime:
    """Rank of this process among `world_size`, its rank on this machine, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}; choose one of them")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, got none; use --device cpu or install a CUDA build of torch")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device("cpu")


def start(device: str = "auto", threads: int | None = None, *, timeout_seconds: float = 600.0) -> Runtime:
    """Runtime of this process; under torchrun this also creates the default process group.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        threads: CPU threads of torch operations; None leaves torch's choice.
        timeout_seconds: longest wait for the other ranks in one collective.
    Raises:
        ValueError: an unknown device, CUDA without a GPU, fewer than one thread.
        OSError: the torchrun that started this rank has exited.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in RANK_VARIABLES)
    chosen = _device(device, local_rank)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}; leave it out for torch's choice")
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _die_with_parent()
        _look_for_agent()
        # Functions of this module bind the default group at import. The threads of such a group abort the process at
        # exit of the interpreter. Imported before the group exists, the functions bind none.
        importlib.import_module("torch.distributed.nn.functional")
        timeout = datetime.timedelta(seconds=timeout_seconds)
        options = {"store": run_store("groups"), "rank": rank, "world_size": world_size} if _has_agent_store() else {}
        if chosen.type == "cuda":
            # With a device id NCCL connects now, where its errors name their cause, and later groups are splits of it.
            options["device_id"] = chosen
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout, **options)
        global _heartbeat
        if world_size > 1:
            _heartbeat = Heartbeat(run_store("watch"), rank, world_size, timeout_seconds)
    return Runtime(rank, world_size, local_rank, chosen)


def stop() -> None:
    """Destroy the process group, if there is one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.close()
        _heartbeat = None
    if dist.is_initialized():
        # Sharded models hold the groups of their mesh and are part of reference cycles.
        gc.collect()
        dist.destroy_process_group()


def current_heartbeat() -> Heartbeat | None:
    """The heartbeat of this rank; None on one rank."""
    return _heartbeat


def post_position(text: str, *, limited: bool = False) -> None:
    """Post the position of this rank; `limited`: the next position must follow within the timeout."""
    if _heartbeat is not None:
        _heartbeat.post_position(text, limited=limited)


def return_free_memory() -> None:
    """Give memory that was freed back to the system, also where it lies between blocks that are in use.

    The C heap keeps it otherwise. Phases that take turns with blocks of other sizes then make the heap grow from step
    to step, to twice of what is in use. Nothing happens where the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _die_with_parent() -> None:
    """Ask Linux to kill this rank when torchrun dies, so that a killed run leaves no rank writing to its directory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _look_for_agent() -> None:
    """Raises OSError if the torchrun that started this rank has exited: the rank would wait for its peers forever.

    torchrun serves the store of its ranks itself, so the store answers before they start.
    """
    if not _has_agent_store():
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=AGENT_SECONDS).close()
    except OSError as error:
        raise OSError(f"torchrun: expected its store at {address[0]}:{address[1]}, got {error}; start again") from error


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; the engine itself draws from explicit generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`; a second one ends the process as usual.

    Signals can be caught in the main thread only; elsewhere `requested` stays False.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.requested = True
        self.close()

    def close(self) -> None:
        """Restore the former signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Interrupted(SystemExit):
    """Raised after a stop request once the state is saved; the same command resumes."""

    def __init__(self, step: int, out: Path) -> None:
        super().__init__(f"stopped at step {step}, saved in {out}; the same command resumes")
