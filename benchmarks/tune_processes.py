"""Processes of tuning: one that runs candidates and may break, and many that compile them."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_cases import Case
from benchmarks.kernel_peers import FAILURES
from benchmarks.machine_code import assembler_log, count, read, source_of, spills_of
from benchmarks.tune_targets import kernel_name, launches
from kernels.configuration import use_config
from kernels.launch import Launch

ANSWER_SECONDS = 60.0
REPLY = "reply: "


class Worker:
    """A process that answers requests; started again after one that it did not survive or answer in time."""

    def __init__(self, command: Sequence[str], seconds: float = ANSWER_SECONDS) -> None:
        self.command, self.seconds = list(command), seconds
        self.process: subprocess.Popen | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply, or {"crash": what happened}."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"crash": f"the process ended with {self._stop()}"}
        return self._reply()

    def _start(self) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=_forward_lines, args=(self.process.stdout, self.lines), daemon=True).start()

    def _reply(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._stop()
                return {"crash": f"no answer in {self.seconds:.0f} s"}
            if line is None:
                return {"crash": f"the process ended with {self._stop()}"}
            if line.startswith(REPLY):
                return json.loads(line.removeprefix(REPLY))

    def _stop(self) -> int:
        self.process.kill()
        return self.process.wait()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self._stop()


def _forward_lines(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


@dataclass(frozen=True)
class Job:
    """A kernel to compile: the launches of that name ("": of every name) that a case makes, with a configuration."""

    kernel: str
    case: Case
    arch: int
    config: tuple[tuple[str, Any], ...] = ()


def compile_one(job: Job) -> dict[str, Any]:
    """Largest registers, spills and shared memory of a job's binaries; `error` where one does not compile.

    They land in Triton's cache, where a launch on the GPU finds them.
    """
    usage: dict[str, int] = {}
    try:
        with use_config(job.kernel, **dict(job.config)) if job.config else contextlib.nullcontext():
            made = [launch for launch in launches(job.case, job.arch) if job.kernel in ("", kernel_name(launch))]
        for launch in made:
            source, options = launcher_source(launch)
            compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
            for name, value in resources(compiled, job.arch, options).items():
                usage[name] = max(usage.get(name, 0), value)
    except FAILURES as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return usage


def resources(compiled: Any, arch: int, options: dict[str, Any]) -> dict[str, int]:
    """Registers, bytes of spills and shared memory, and warp groups' register changes of a binary.

    Shared memory alone where the binary cannot be read. Nothing of spills where a binary with a stack came out of a
    cache made ahead, which keeps no PTX to assemble again.
    """
    try:
        shared, registers, stack, instructions = read(compiled.asm["cubin"], arch)
        spills = {"spill_bytes": 0}
        if stack or count(instructions, "LDL", "STL"):
            log = assembler_log(compiled.asm["ptx"], arch, options) if "ptx" in compiled.asm else None
            spills = {} if log is None else {"spill_bytes": sum(spills_of(log))}
    except (OSError, subprocess.SubprocessError):
        return {"shared_bytes": compiled.metadata.shared}
    return spills | {
        "registers": registers,
        "shared_bytes": compiled.metadata.shared + shared,
        "group_registers": count(instructions, "USETMAXREG"),
    }


def launcher_source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Source and options of a launch, with the key that Triton 3.6's launcher looks up in the cache.

    That key also lists, without attributes, every text and every specialised argument that 16 does not divide. Under a
    release whose key differs a launch compiles again: slower, not wrong.
    """
    source, options = source_of(launch)
    runtime = iter(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.options.get(parameter.name) if parameter.is_constexpr else next(runtime)
        is_text = parameter.is_constexpr and isinstance(value, str)
        is_number = isinstance(value, int) and not isinstance(value, bool) and value != 1
        is_odd = not parameter.is_constexpr and (is_number or isinstance(value, Tensor))
        if is_text or (is_odd and not parameter.do_not_specialize):
            source.attrs.setdefault((index,), [])
    source.attrs = dict(sorted(source.attrs.items()))
    return source, options


class Compilers:
    """Processes that do a job each at a time; a job that breaks its process costs no other job."""

    def __init__(self, workers: int | None = None, work: Callable[[Any], dict[str, Any]] | None = None) -> None:
        """`workers` processes, by default one less than there are cores, that do `work`, by default `compile_one`."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = concurrent.futures.ThreadPoolExecutor(workers or max(1, cores - 1))
        self.thread_state, self.processes, self.work = threading.local(), [], work or compile_one

    def submit(self, jobs: Sequence[Any]) -> list[concurrent.futures.Future]:
        """Start the jobs, in their order."""
        return [self.threads.submit(self._run, job) for job in jobs]

    def _run(self, job: Any) -> dict[str, Any]:
        """The work in the process of this thread."""
        process = getattr(self.thread_state, "process", None)
        if process is None:
            context = multiprocessing.get_context("spawn")
            process = self.thread_state.process = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
            self.processes.append(process)
        try:
            return process.submit(self.work, job).result()
        except BrokenProcessPool:
            self.thread_state.process = None
            return {"error": "the compiler ended its process"}

    def results(self, waiting: Sequence[concurrent.futures.Future], deadline: float) -> list[dict[str, Any]]:
        """What became of each; {} for one that missed the deadline or failed in another way than compiling."""
        concurrent.futures.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        return [job.result() if job.done() and not job.exception() else {} for job in waiting]

    def close(self) -> None:
        """Start no further job, and let the processes end behind what they compile now."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.shutdown(wait=False, cancel_futures=True)
