"""The process that a program runs in: ranks and devices, files, stages, command lines, metrics."""

from .process import Interrupted, Runtime, StopRequest, current_heartbeat, post_position, seed_all, start, stop

__all__ = ["Interrupted", "Runtime", "StopRequest", "current_heartbeat", "post_position", "seed_all", "start", "stop"]
