"""Chooses the configurations of this GPU's architecture and writes them into kernels/configurations.

  python -m benchmarks.tune                              every table, most important classes first, 10 minutes
  python -m benchmarks.tune --kernel attention_forward --budget 300
  python -m benchmarks.tune --arch-check                 tunes nothing: is every entry of this architecture right here
  python -m benchmarks.tune --dry-run                    lists the candidates (of sm_90 where there is no GPU)

Candidates are compiled in parallel processes first. In a process of their own, which is started again if one breaks it,
each is checked against float64, on whole numbers with exact results and for equal bits in two runs, and only then
timed. The fastest that also passes with every mask and dtype is written, with what was measured. A configuration other
than the table's must be 1 % faster. Entries of other architectures stay as they are.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.command_line import Parser
from benchmarks.kernel_checks import failures
from benchmarks.kernel_peers import FAILURES
from benchmarks.kernel_problems import call_of
from benchmarks.tune_processes import REPLY, Compilers, Job, Worker
from benchmarks.tune_targets import Config, Target, candidates, checked_cases, shared_limit, timed_case, tuned
from kernels import configuration as tables
from kernels import use_backend
from kernels.configuration import SMALL_MEMORY, use_config
from wizard_engine.runtime.files import write_text

FINALISTS = 4
# Share by which a new configuration must beat the table's: less is noise.
GAIN = 0.01
# Bytes of spills above which a candidate is not worth its time.
SPILL_LIMIT = 1024
Ask = Callable[[dict[str, Any]], dict[str, Any]]
Clock = Callable[[], float]


def table_arch(arch: int) -> int:
    """The architecture whose entries a GPU looks up first."""
    return SMALL_MEMORY.get(arch, arch)


def entries_for(arch: int, names: Sequence[str]) -> list[tuple[Target, Config]]:
    """Targets of an architecture with the configuration that it takes now, the most important first."""
    entries: dict[Target, dict] = {}
    for name in names:
        for entry in tables.table(name):
            target = Target.of(name, entry["class"])
            if entry["arch"] <= table_arch(arch) and entry["arch"] >= entries.get(target, entry)["arch"]:
                entries[target] = entry
    return [(target, entries[target]["config"]) for target in sorted(entries, key=lambda target: target.importance)]


def answer(request: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What a worker does: `check` a configuration (`failures`) or `time` several together (`us` of each)."""
    target = Target.of(request["kernel"], request["class"])
    if request["do"] == "time":
        return {"us": _time(target, request["configs"], device)}
    small, results = device.type != "cuda", []
    backend = use_backend("triton") if small else contextlib.nullcontext()
    with backend, use_config(target.kernel, **request["config"]):
        for case in checked_cases(target, full=request["full"], small=small):
            dtype = torch.float32 if small else case.dtype
            wrong = failures(case.problem, case.phase, dtype, device)
            results += [f"{case.label} {case.phase} {text}" for text in wrong]
    return {"failures": results}


def _time(target: Target, configs: Sequence[Config], device: torch.device) -> list[float]:
    """Median microseconds of the timed case with each configuration, taking turns."""
    case = timed_case(target)
    tensors = case.problem.inputs(case.dtype, device)
    call = call_of(case.problem, case.problem.ours, tensors, case.phase)

    def configured(config: Config) -> Callable[[], Any]:
        def run() -> Any:
            with use_config(target.kernel, **config):
                return call()

        return run

    calls = {str(place): configured(config) for place, config in enumerate(configs)}
    timings = gpu_timing.time_calls(calls, device, seconds=0.1 if len(configs) > 1 else 0.05, repeats=(5, 40))
    return [timings[str(place)].us for place in range(len(configs))]


def serve(device: torch.device) -> int:
    """Answer requests, one JSON line each, until the input ends."""
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), device)
        except FAILURES as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(REPLY + json.dumps(reply), flush=True)
        gpu_timing.check_alive(device)
    return 0


def worker() -> Worker:
    """A worker of this module on the GPU at hand."""
    return Worker([sys.executable, "-m", "benchmarks.tune", "--worker"])


def worth_running(compiled: Mapping[str, Any], arch: int) -> bool:
    """False for a candidate that does not compile, fit or spills much; true for one that was not compiled."""
    fits = compiled.get("shared_bytes", 0) <= shared_limit(arch)
    return "error" not in compiled and fits and compiled.get("spill_bytes", 0) <= SPILL_LIMIT


@dataclass
class Choice:
    """The outcome of one target: the configuration, its time and the runner-up's, and what became of each candidate."""

    config: Config
    us: float
    runner_up_us: float | None
    candidates: int
    rejected: list[tuple[Config, str]] = field(default_factory=list)


def choose(
    target: Target,
    configs: Sequence[Config],
    ask: Ask,
    *,
    deadline: float = float("inf"),
    clock: Clock = time.monotonic,
) -> Choice | None:
    """The fastest right configuration of `configs`, whose first is the table's; None where none is right.

    After the deadline no further candidate is started; the table's own is always looked at.
    """
    rejected: list[tuple[Config, str]] = []
    timed: list[tuple[float, Config]] = []
    for place, config in enumerate(configs):
        if place and clock() > deadline:
            break
        wrong = _ask_check(ask, target, config, full=False)
        reply = {} if wrong else ask(_request(target, "time", configs=[config]))
        if "us" in reply:
            timed.append((reply["us"][0], config))
        else:
            rejected.append((config, wrong or _problem_of(reply)))
    ranking = _race(target, _finalists(timed, configs[0]), configs[0], ask) or sorted(timed, key=_first)
    right = [(us, config) for us, config in ranking if _passes(ask, target, config, rejected)][:2]
    if not right:
        return None
    (us, config), *others = right
    return Choice(config, us, others[0][0] if others else None, len(timed) + len(rejected), rejected)


def _first(pair: tuple[float, Config]) -> float:
    return pair[0]


def _finalists(timed: Sequence[tuple[float, Config]], current: Config) -> list[Config]:
    """The fastest few, with the table's configuration among them where it is right."""
    best = [config for _, config in sorted(timed, key=_first)[:FINALISTS]]
    if current not in best and any(config == current for _, config in timed):
        best.append(current)
    return best


def _race(target: Target, finalists: list[Config], current: Config, ask: Ask) -> list[tuple[float, Config]]:
    """Finalists by time, timed together; the table's comes first unless the fastest beats it by more than GAIN."""
    reply = ask(_request(target, "time", configs=finalists)) if finalists else {}
    ranking = sorted(zip(reply.get("us", []), finalists), key=_first)
    kept = [pair for pair in ranking if pair[1] == current and pair[0] * (1 - GAIN) <= ranking[0][0]]
    return kept + [pair for pair in ranking if pair not in kept]


def _passes(ask: Ask, target: Target, config: Config, rejected: list[tuple[Config, str]]) -> bool:
    wrong = _ask_check(ask, target, config, full=True)
    if wrong:
        rejected.append((config, wrong))
    return not wrong


def _ask_check(ask: Ask, target: Target, config: Config | None, *, full: bool) -> str:
    """What is wrong with a configuration, or ""."""
    reply = ask(_request(target, "check", config=config, full=full))
    if reply.get("failures") == []:
        return ""
    return "; ".join(reply["failures"][:3]) if "failures" in reply else _problem_of(reply)


def _request(target: Target, do: str, **more: Any) -> dict[str, Any]:
    return {"do": do, "kernel": target.kernel, "class": target.shape, **more}


def _problem_of(reply: Mapping[str, Any]) -> str:
    return next((f"{name}: {reply[name]}" for name in ("crash", "error") if name in reply), "no answer")


def table_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table's file: one entry per line."""
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
    return f'{{\n  "entries": [\n{lines}\n  ]\n}}\n'


def write_entry(target: Target, arch: int, config: Config, measured: Mapping[str, Any], folder: Path) -> None:
    """Put an entry into its table, in the place of that of the same architecture and class or behind its architecture's
    last; all other entries stay, and the file is replaced whole.
    """
    path = folder / f"{target.kernel}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    like = [entry["class"] for entry in entries if Target.of(target.kernel, entry["class"]) == target]
    new = {"arch": arch, "class": like[0] if like else target.shape, "config": config, "measured": dict(measured)}
    same = [i for i, e in enumerate(entries) if e["arch"] == arch and Target.of(target.kernel, e["class"]) == target]
    if same:
        entries[same[0]] = new
    else:
        entries.insert(sum(entry["arch"] <= arch for entry in entries), new)
    write_text(path, table_text(entries))


def measured_of(choice: Choice, about: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says of the measurement that chose it."""
    return {
        "gpu": about["gpu"],
        "date": about["date"][:10],
        "triton": about["triton"],
        "torch": about["torch"],
        "ptxas": about["ptxas"],
        "us": round(choice.us, 2),
        "runner_up_us": None if choice.runner_up_us is None else round(choice.runner_up_us, 2),
        "candidates": choice.candidates,
    }


def tune(
    arch: int, names: Sequence[str], about: Mapping[str, Any], ask: Ask, compilers: Compilers, *, deadline: float
) -> int:
    """Tunes the targets of an architecture until the deadline; returns how many were left out."""
    todo = entries_for(arch, names)
    for done, (target, current) in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"time is up: {len(todo) - done} classes not tuned, first {target}")
            return len(todo) - done
        began, configs = time.monotonic(), candidates(target, arch, current)
        case = timed_case(target)
        jobs = [Job(target.kernel, case, arch, tuple(config.items())) for config in configs]
        compiled = compilers.results(compilers.submit(jobs), deadline)
        kept = [
            config for i, (config, code) in enumerate(zip(configs, compiled)) if i == 0 or worth_running(code, arch)
        ]
        choice = choose(target, kept, ask, deadline=deadline)
        print(f"{target}: {len(configs)} candidates, {len(kept)} worth running, {time.monotonic() - began:.0f} s")
        _record(target, arch, current, choice, about)
    return 0


def _record(target: Target, arch: int, current: Config, choice: Choice | None, about: Mapping[str, Any]) -> None:
    """Write a choice into its table, and say what was chosen and rejected."""
    if choice is None:
        print("    NO RIGHT CONFIGURATION; the table is left as it is", flush=True)
        return
    write_entry(target, table_arch(arch), choice.config, measured_of(choice, about), tables.FOLDER)
    for config, reason in choice.rejected:
        print(f"    rejected {config}: {reason}")
    print(f"    {choice.us:.1f} us {choice.config} {_as_before(choice, current)}", flush=True)


def _as_before(choice: Choice, current: Config) -> str:
    return "as before" if choice.config == current else f"instead of {current}"


def entry_checks(
    arch: int, names: Sequence[str], ask: Ask, compilers: Compilers | None = None, deadline: float = float("inf")
) -> list[tuple[Target, Callable[[], dict[str, Any]]]]:
    """The entries that the architecture takes, the most important first, each with a check of it.

    A check gives kernel, class, config, what is wrong with it, seconds. With `compilers` the kernels are compiled ahead
    from now on, in that order; behind the deadline nothing waits for a compiler.
    """
    todo = entries_for(arch, names)
    ahead = [
        compilers.submit([Job(target.kernel, case, arch) for case in checked_cases(target, full=True)])
        for target, _ in (todo if compilers else ())
    ]

    def check(place: int) -> dict[str, Any]:
        (target, config), began = todo[place], time.monotonic()
        if compilers:
            compilers.results(ahead[place], deadline)
        wrong = _ask_check(ask, target, config, full=True)
        return {
            "kernel": target.kernel,
            "class": target.shape,
            "config": config,
            "wrong": wrong,
            "seconds": round(time.monotonic() - began, 2),
        }

    return [(target, functools.partial(check, place)) for place, (target, _) in enumerate(todo)]


def check_tables(
    arch: int, names: Sequence[str], ask: Ask, compilers: Compilers | None = None, deadline: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """What `entry_checks` find, in their order; after the deadline no further one is started."""
    for _, check in entry_checks(arch, names, ask, compilers, deadline):
        if time.monotonic() > deadline:
            return
        yield check()


def print_candidates(arch: int, names: Sequence[str]) -> None:
    """Every candidate of every target, one line each."""
    for target, current in entries_for(arch, names):
        configs = candidates(target, arch, current)
        print(f"{target} sm_{arch}: {len(configs)} candidates, timed on {timed_case(target).label} {target.phase}")
        for config in configs:
            print(f"    {json.dumps(config)}")


def _check_command(arch: int, names: Sequence[str], ask: Ask, compilers: Compilers, deadline: float) -> int:
    wrong = 0
    for row in check_tables(arch, names, ask, compilers, deadline):
        wrong += bool(row["wrong"])
        label = Target.of(row["kernel"], row["class"])
        print(f"{label}: {'WRONG: ' + row['wrong'] if row['wrong'] else 'right'} ({row['seconds']} s)", flush=True)
    print(f"{wrong} entries of sm_{table_arch(arch)} are wrong")
    return int(wrong > 0)


def main(args: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    reader = Parser("python -m benchmarks.tune", __doc__)
    known = tuned()
    reader.add_argument("--kernel", nargs="+", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    reader.add_argument("--arch-check", action="store_true", help="check the entries of this GPU, tune nothing")
    reader.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="default: %(default)s")
    reader.add_argument("--dry-run", action="store_true", help="list the candidates, run nothing")
    reader.add_argument("--worker", action="store_true", help="answer requests on the standard input (used by itself)")
    options = reader.parse_args(args)
    names = reader.names("--kernel", options.kernel, known)
    has_gpu = torch.cuda.is_available()
    if options.dry_run:
        arch = tables.architecture(torch.device("cuda:0" if has_gpu else "cpu"))
        print_candidates(arch, names)
        return 0
    if not has_gpu:
        print("tune: expected a GPU, got none; --dry-run lists the candidates", file=sys.stderr)
        return 2
    device = torch.device("cuda:0")
    return serve(device) if options.worker else _with_gpu(device, names, options)


def _with_gpu(device: torch.device, names: Sequence[str], options: Any) -> int:
    arch, about = tables.architecture(device), gpu_timing.environment(device)
    print("  ".join(f"{name} {about[name]}" for name in ("gpu", "arch", "driver", "torch", "triton", "ptxas", "date")))
    ask, compilers, deadline = worker(), Compilers(), time.monotonic() + options.budget
    try:
        if options.arch_check:
            return _check_command(arch, names, ask, compilers, deadline)
        tune(arch, names, about, ask, compilers, deadline=deadline)
        return 0
    finally:
        ask.close()
        compilers.close()


if __name__ == "__main__":
    sys.exit(main())
