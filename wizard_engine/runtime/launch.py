"""A program's main function run from the command line: options, errors in one line, the other ranks told."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .cli import cli
from .process import Interrupted, stop, watch


def launch(main: Callable[[Any], Any], config: type, presets: Mapping[str, Any] | None = None) -> None:
    """Run a recipe from the command line: options, then `main`, errors that a user can cause in one line.

    A rank that fails tells the others, which end with its error instead of their own collective's.
    """
    cfg = cli(config, presets)
    name = Path(sys.argv[0]).name
    try:
        main(cfg)
    except (ValueError, OSError) as error:
        _fail(name, error, f"{error}")
        raise SystemExit(1) from error
    except Interrupted as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(130) from stopped
    except Exception as error:
        if watch() is None:
            raise
        lost = isinstance(error, RuntimeError) and _is_of_collective(error)
        if not lost:
            traceback.print_exc()
        _fail(name, error, watch().explain() if lost else f"{type(error).__name__}: {error}", tell=not lost)
        raise SystemExit(1) from error
    finally:
        stop()


def _fail(name: str, error: Exception, text: str, *, tell: bool = True) -> None:
    """Print an error, tell the other ranks of it, and end at once where their collectives might keep this one."""
    heartbeat = watch()
    where = "" if heartbeat is None or text.startswith("[rank") else f"[rank {heartbeat.rank}/{heartbeat.world_size}] "
    print(f"{name}: error: {where}{text}", file=sys.stderr, flush=True)
    if heartbeat is not None:
        if tell:
            heartbeat.fail(text)
        sys.stdout.flush()
        os._exit(1)


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error is one of a collective whose other side is gone or late, rather than of this rank."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "peer", "socket")
    )
