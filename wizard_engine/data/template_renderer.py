"""Renders chat templates: a process beside this one does the work, so that no template can hold or fill this one."""

import atexit
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from wizard_engine.runtime.input_files import shown

# Longest wait for a rendering, and how often it is asked for.
ANSWER_SECONDS, TRIES = 60.0, 2
WORKER = Path(__file__).with_name("template_worker.py")


class Rendering(NamedTuple):
    """Text of a conversation, and the spans (start, end) of its generation blocks, in characters."""

    text: str
    spans: list[tuple[int, int]]


class TemplateFault(ValueError):
    """The template itself is at fault: its syntax, its time, its memory, what it reaches for."""


class _Worker:
    """The process that renders, started at the first use and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner, self._lock = 0, threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. TemplateFault: the process died of it."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for _ in range(TRIES):
                process = self._running()
                try:
                    process.stdin.write(line)
                    process.stdin.flush()
                    # It bounds its own time. Where no answer comes it was lost, or the process does not run.
                    is_late = not select.select([process.stdout], [], [], ANSWER_SECONDS)[0]
                    reply = b"" if is_late else process.stdout.readline()
                except BrokenPipeError:
                    is_late, reply = False, b""
                except BaseException:
                    # Between a question and its answer, by Ctrl-C: the next answer would be that of this question.
                    self.close()
                    raise
                if reply:
                    return json.loads(reply)
                if not is_late:
                    break
                self.close()
            else:
                raise TemplateFault(f"no answer of the process that renders it in {ANSWER_SECONDS:g} s")
            status = process.wait()
            self._process = None
        if status == -signal.SIGVTALRM:
            raise TemplateFault("one operation of more than half a second")
        raise TemplateFault(f"the end of the process that renders it (status {status})")

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process = None

    def _running(self) -> subprocess.Popen:
        # The process of a parent that was forked belongs to the parent.
        if importlib.util.find_spec("jinja2") is None:
            raise TemplateFault("no jinja2 to render it with; pip install 'jinja2>=3.1.6'")
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._owner = os.getpid()
        return self._process


_WORKER = _Worker()
atexit.register(_WORKER.close)


def render(template: str, variables: dict[str, Any]) -> Rendering:
    """What a template makes of its variables, within a second or two of work and a bounded memory.

    Raises:
        TemplateFault: its syntax, its time, its memory, an attribute that it may not reach; or jinja2 is missing.
        ValueError: what the template says with `raise_exception`: it does not take this conversation.
    """
    reply = _WORKER.ask({"template": template, "variables": variables})
    if "refused" in reply:
        raise ValueError(shown(reply["refused"], 400))
    if "failed" in reply:
        raise TemplateFault(shown(reply["failed"], 400))
    return Rendering(reply["text"], [(start, end) for start, end in reply["spans"]])
