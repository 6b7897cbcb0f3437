"""What a GPU check asks Triton's compiler for, by where it comes from: what a compile cache made ahead must hold.

    python -m benchmarks.launch_sources operations --arch 90        the requests of a source, as lines of JSON

Steps run the check's own phases on a stand-in GPU, and take what the just-in-time compiler is asked for. Tables are
recorded on the meta device. Each source runs in a process of its own; what no source knows is compiled at its first
launch: slower, not wrong.
"""

import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks import jit_requests, launch_forms, tune, tune_targets
from benchmarks.command_line import Parser
from benchmarks.jit_requests import Request
from benchmarks.kernel_cases import OPERATIONS, cases
from benchmarks.kernel_peers import own_configs
from kernels.configuration import use_arch, use_config
from kernels.launch import Launch
from wizard_engine.model.config import PRESETS

GPU = torch.device("cuda:0")
# In front of a request, among whatever else a step prints.
MARK = "request: "
COMMAND = (sys.executable, "-m", "benchmarks.launch_sources")


def operations() -> None:
    """Every public operation in every dtype."""
    from benchmarks import every_operation, operation_check

    for dtype in operation_check.dtypes(GPU):
        for operation in every_operation.OPERATIONS:
            operation_check.rows(operation, GPU, dtype)
    for _, whole in every_operation.WHOLE:
        operation_check.rows(whole, GPU, torch.float32)


def training() -> None:
    """Supervised steps of the 7B shapes: what a block needs, the loss, the norm, AdamW. One layer asks for all."""
    from benchmarks import train_single

    config = replace(PRESETS["7b"], layers=1)
    for recompute in ("none", "selective", "full"):
        for lengths in dict.fromkeys(lengths for _, lengths in train_single.CASES):
            state = train_single.build(config, GPU, recompute)
            batch = train_single.Packed.of(lengths, config.vocab_size, GPU)
            for call in train_single.step_phases(state, batch).values():
                call()


def decoding() -> None:
    """Prompts and decode steps of the 7B shapes at every size of a batch that a graph is captured for."""
    from benchmarks import rollout

    model = rollout.empty(replace(PRESETS["7b"], layers=1), GPU)
    for batch in rollout.BATCHES:
        rollout.decode(model, batch, rollout.KEYS, 2)
    rollout.rollout(model, rollout.PROMPTS, rollout.PROMPT_TOKENS, 4)


def recipes() -> None:
    """A training step of each recipe with a tiny model."""
    from benchmarks import tiny_steps

    for _, rows in tiny_steps.cases(GPU):
        rows()


def rates() -> None:
    """What the planner's rates are measured on."""
    from benchmarks import plan_rates

    for preset in ("7b", "8x22b"):
        for call in plan_rates.calls_of(PRESETS[preset], 8192, GPU).calls.values():
            call()


def losses(arch: int) -> Iterator[Launch]:
    """Every form of the kernels that nobody tunes: losses, advantages, sampling, layouts of experts."""
    for table in sorted(tune_targets.UNTUNED):
        for case in launch_forms.cases(table, arch):
            yield launch_forms.launch_of(case)


def entries(arch: int) -> Iterator[Launch]:
    """What the check of the tables launches: every entry with every mask and dtype."""
    for target, config in tune.entries_for(arch, tune_targets.tuned()):
        for case in tune_targets.checked_cases(target, full=True):
            with use_config(target.kernel, **config):
                yield from tune_targets.launches(case, arch)


def measured(arch: int) -> Iterator[Launch]:
    """The cases that are measured, in every variant of this project."""
    with use_arch(arch):
        forms = [(case, config) for case in cases(list(OPERATIONS), GPU) for config in own_configs(case, GPU).values()]
    for case, config in forms:
        with use_config("attention_forward", **config) if config else contextlib.nullcontext():
            yield from tune_targets.launches(case, arch)


STEPS: dict[str, Callable[[], None]] = {
    "operations": operations,
    "training": training,
    "decoding": decoding,
    "recipes": recipes,
    "rates": rates,
}
TABLES: dict[str, Callable[[int], Iterator[Launch]]] = {"measured": measured, "losses": losses, "entries": entries}
# The most valuable first.
SOURCES = (*STEPS, *TABLES)


def run_source(name: str, arch: int, on_request: Callable[[Request], None]) -> None:
    """Run a source in this process, which is of no use for anything else afterwards."""
    if name in TABLES:
        jit_requests.requests(TABLES[name](arch), arch, on_request)
        return
    from benchmarks.standin import stand_in

    with stand_in(arch=arch), jit_requests.collected(arch, on_request):
        STEPS[name]()


@dataclass
class Asked:
    """The requests of sources while their processes run: iterate over it, close it.

    Attributes:
        failed: sources whose process failed, with the last line that it wrote.
    """

    names: Sequence[str]
    arch: int
    deadline: float = float("inf")
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._processes: list[subprocess.Popen] = []
        self._closed = threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
        self._waiting = [self._threads.submit(self._run, name) for name in self.names]

    def _run(self, name: str) -> None:
        with tempfile.TemporaryFile("w+") as errors:
            try:
                if self._closed.is_set():
                    return
                command = [*COMMAND, name, "--arch", str(self.arch)]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
                self._processes.append(process)
                for line in process.stdout or ():
                    self._lines.put(line)
                if process.wait() and not self._closed.is_set():
                    errors.seek(0)
                    self.failed.append(f"{name}: {(errors.read().strip().splitlines() or ['no word'])[-1][:200]}")
            finally:
                self._lines.put(None)

    def __iter__(self) -> Iterator[Request]:
        """Each binary once, as it is asked for, until the sources or the time end."""
        folders: set[str] = set()
        ended = 0
        while ended < len(self.names):
            try:
                line = self._lines.get(timeout=min(1e6, max(0.0, self.deadline - time.monotonic())))
            except queue.Empty:
                return
            ended += line is None
            if line is not None and line.startswith(MARK):
                request = Request(**json.loads(line.removeprefix(MARK)))
                if request.folder not in folders:
                    folders.add(request.folder)
                    yield request

    def close(self) -> None:
        """End the processes."""
        self._closed.set()
        for process in self._processes:
            process.kill()
        self._threads.shutdown()


def main(args: Sequence[str] | None = None) -> int:
    """Prints what a source asks for; returns the exit status."""
    reader = Parser("python -m benchmarks.launch_sources", __doc__ or "")
    reader.add_argument("source", help=f"of {', '.join(SOURCES)}")
    reader.add_argument("--arch", type=int, default=90, help="default: %(default)s")
    options = reader.parse_args(args)
    (name,) = reader.names("source", [options.source], SOURCES)
    run_source(name, options.arch, lambda request: print(MARK + json.dumps(asdict(request)), flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
