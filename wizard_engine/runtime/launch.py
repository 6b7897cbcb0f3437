"""Runs a main function from the command line: options, one-line errors, errors posted to the other ranks."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .cli import cli
from .metrics import silenced
from .process import Interrupted, current_heartbeat, stop
from .text_lines import printable


def launch(main: Callable[[Any], Any], config: type, presets: Mapping[str, Any] | None = None) -> None:
    """Run a recipe from the command line: parse the options, call `main`, print errors of users in one line.

    A rank that fails posts its error. The other ranks exit with that error instead of the one of their collective.
    """
    cfg = _options(config, presets)
    name = Path(sys.argv[0]).name
    try:
        with silenced(getattr(cfg, "quiet", False)):
            main(cfg)
    except (ValueError, OSError) as error:
        _fail(name, error, f"{error}")
        raise SystemExit(1) from error
    except Interrupted as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(130) from stopped
    except Exception as error:
        if current_heartbeat() is None:
            raise
        lost = isinstance(error, RuntimeError) and _is_of_collective(error)
        if not lost:
            traceback.print_exc()
        _fail(name, error, current_heartbeat().explain() if lost else f"{type(error).__name__}: {error}", tell=not lost)
        raise SystemExit(1) from error
    finally:
        stop()


def _options(config: type, presets: Mapping[str, Any] | None) -> Any:
    """The options of the command line; ends quietly where nobody reads the help to its end."""
    try:
        try:
            return cli(config, presets)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _fail(name: str, error: Exception, text: str, *, tell: bool = True) -> None:
    """Print an error and post it to the other ranks; exit at once if a collective could block this rank."""
    heartbeat = current_heartbeat()
    where = "" if heartbeat is None or text.startswith("[rank") else f"[rank {heartbeat.rank}/{heartbeat.world_size}] "
    # An error may quote a row, a file's name or an endpoint: none of them may move the cursor or begin a line.
    print(f"{name}: error: {where}{printable(text)}", file=sys.stderr, flush=True)
    if heartbeat is not None:
        if tell:
            heartbeat.fail(text)
        sys.stdout.flush()
        os._exit(1)


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error comes from a collective whose peer failed or is late, not from this rank."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        cause in text for cause in ("gloo", "nccl", "connection", "timed out", "peer", "socket")
    )
