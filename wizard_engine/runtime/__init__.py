"""The process that a program runs in: ranks and devices, files, stages, command lines, metrics."""

from .process import Interrupted, Runtime, StopRequest, mark, seed_all, start, stop, watch

__all__ = ["Interrupted", "Runtime", "StopRequest", "mark", "seed_all", "start", "stop", "watch"]
