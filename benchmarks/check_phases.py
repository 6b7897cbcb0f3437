"""What the phases of the GPU check do, each in a process of its own; what only one of them needs is imported there."""

import gzip
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_timing, kernels
from benchmarks.check_cases import DONE, LEFT_OUT, WRONG, Row, Visit, run_cases
from benchmarks.check_files import FILE_BYTES, TRACE
from benchmarks.kernel_cases import OPERATIONS
from benchmarks.kernel_cases import Case as KernelCase
from benchmarks.kernel_cases import cases as kernel_cases
from benchmarks.phase_processes import ROOT, Phase
from benchmarks.tune_targets import MIXTURE

GIB = 2**30
MIXTURE_GOALS = {"forward": 0.82, "backward": 0.72}
# Peers that compile for tens of seconds, and of attention all but cuDNN and varlen.
COMPILED, OTHER_ATTENTION = ("compile",), ("flex", "eager", "sdpa flash")
TESTS = "tests/kernels"


def gpu() -> torch.device:
    """The device of the check; every phase takes it from its visit, which takes it from here."""
    return torch.device("cuda:0")


def device_bytes(device: torch.device) -> int:
    """Memory of the device."""
    return torch.cuda.get_device_properties(device).total_memory


def compile_ahead(visit: Visit) -> int:
    """Compile, in parallel, what the check will ask for; nothing where a cache made ahead is used."""
    from benchmarks import compile_cache, launch_sources

    major, minor = torch.cuda.get_device_capability(visit.device)
    arch, folder = 10 * major + minor, Path(os.environ.get("TRITON_CACHE_DIR", ""))
    if (folder / compile_cache.MANIFEST).is_file() and not compile_cache.reasons_against(folder, arch):
        visit.note(f"the cache made ahead is used: {folder}")
        return DONE
    if str(arch) not in compile_cache.ARCHS:
        visit.note(f"sm_{arch}: expected one of {', '.join(compile_cache.ARCHS)}; kernels are compiled as they are met")
        return LEFT_OUT

    def case() -> Iterator[Row]:
        text = compile_cache.compile_missing(launch_sources.SOURCES, arch, visit.deadline)
        yield {"compiled": text}
        visit.note(text)

    return run_cases(visit, [("kernels", case)])


def operations(visit: Visit) -> int:
    """What figures depend on, the ceilings, and every public operation once against its reference."""
    from benchmarks import every_operation, operation_check

    device = visit.device
    named = [
        (f"{operation.name} {str(dtype).removeprefix('torch.')}", operation, dtype)
        for dtype in operation_check.dtypes(device)
        for operation in every_operation.OPERATIONS
    ]
    named += [(name, operation, torch.float32) for name, operation in every_operation.WHOLE]
    checks = [(name, lambda o=o, t=dtype: operation_check.rows(o, device, t)) for name, o, dtype in named]
    first = ("environment", lambda: [environment(device)])
    return run_cases(visit, [first, *checks, ("ceilings", lambda: [{"ceilings": gpu_timing.ceilings(device)}])])


def environment(device: torch.device) -> Row:
    """Names and versions of everything that figures depend on."""
    about = gpu_timing.environment(device)
    for name, value in about.items():
        print(f"{name:18}{value}")
    return {"environment": about}


def train(visit: Visit) -> int:
    """Training steps of the 7B shapes, the first beside the ledger's prediction."""
    from benchmarks import train_step

    def case(recompute: str, lengths: Sequence[int], is_first: bool) -> Iterator[Row]:
        row = train_step.run(visit.device, recompute=recompute, lengths=lengths)
        yield {"train_step": row}
        visit.note(train_step.text_of(row))
        if is_first:
            yield from predicted(visit, row)

    named = [
        (f"recompute={recompute} tokens={sum(lengths)} documents={len(lengths)}", recompute, lengths)
        for recompute, lengths in train_step.CASES
    ]
    return run_cases(
        visit, [(name, lambda r=r, n=n, first=not i: case(r, n, first)) for i, (name, r, n) in enumerate(named)]
    )


def predicted(visit: Visit, row: Row) -> Iterator[Row]:
    """The ledger's prediction of a measured step; none where there is no ledger, or it refuses the shape."""
    try:
        from benchmarks import launches

        prediction = launches.predict("7b", row["tokens"], "train")
    except (ImportError, AttributeError, ValueError) as error:
        print(f"no prediction: {error}")
        return
    seconds = row["seconds"]["step"]["p50"]
    yield {
        "prediction": prediction,
        "measured_seconds": seconds,
        "measured_over_predicted": seconds / prediction["predicted_seconds"],
    }
    visit.note(
        f"the ledger predicts {prediction['predicted_seconds']:.3f} s and {prediction['mfu']:.1%} MFU, "
        f"measured {seconds:.3f} s"
    )


def trace(visit: Visit) -> int:
    """A Chrome trace of a step of one layer, compressed; left out where it is larger than a file may be."""
    from benchmarks import train_step

    def write() -> list[Row]:
        plain, packed = visit.scratch / "trace.json", visit.scratch / TRACE
        train_step.trace(visit.device, plain)
        with open(plain, "rb") as source, gzip.open(packed, "wb") as target:
            shutil.copyfileobj(source, target)
        fits = packed.stat().st_size <= FILE_BYTES
        if fits:
            shutil.copyfile(packed, visit.out / TRACE)
        row = {"trace": TRACE if fits else None, "bytes": packed.stat().st_size}
        return [row | ({} if fits else {"note": f"left out: more than {FILE_BYTES:,} bytes"})]

    return run_cases(visit, [("one layer", write)])


def chosen_cases(phase: str, device: torch.device) -> list[KernelCase]:
    """Kernel cases of a phase: those of a quick run first, then the others."""
    groups = {"attention": ("attention",), "linear_logprob": ("linear_logprob",), "mixture": MIXTURE}
    taken = {name for group in groups.values() for name in group}
    names = groups.get(phase) or [name for name in OPERATIONS if name not in taken]
    quick = kernel_cases(names, device, quick=True)
    if phase == "attention":
        # A shape's backward behind its forward: what ends early has both of the first.
        quick = sorted(quick, key=lambda case: [c.problem for c in quick].index(case.problem))
    return list(dict.fromkeys([*quick, *kernel_cases(names, device)]))


def skipped_peers(case: KernelCase) -> tuple[str, ...]:
    """Peers that are not measured here."""
    return OTHER_ATTENTION if case.op == "attention" else COMPILED


def measure(phase: str) -> Callable[[Visit], int]:
    """The phase that measures the kernels of that name."""

    def run(visit: Visit) -> int:
        chosen = chosen_cases(phase, visit.device)
        command = f"python -m benchmarks.gpu_check --only {phase}"
        session = kernels.start(visit.device, command=command, seconds=0.12)
        print(kernels.ceilings_line(session), flush=True)
        kernels.compile_ahead(session, chosen, time.monotonic() + 0.35 * visit.seconds)
        status = run_cases(visit, [(f"{c.op} {c.phase} {c.label}", lambda c=c: measured(session, c)) for c in chosen])
        for text in mixture_shares(session.rows):
            visit.note(text)
        return status

    return run


def measured(session: kernels.Session, case: KernelCase) -> list[Row]:
    """Rows of a case, printed."""
    session.skip = skipped_peers(case)
    rows = kernels.measure(session, case)
    session.add(rows)
    return rows


def mixture_shares(rows: Sequence[Row]) -> list[str]:
    """Routing, copies and sums of rows as a share of a layer's forward (goal: below 5 %); layers against cuBLAS."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["op"] in MIXTURE and row["phase"] == "forward" and row["is_ours"] and "us" in row:
            name = row["op"] + (" " + row["label"].split()[5] if row["op"] == "experts" else "")
            times.setdefault(row["label"].split()[0], {})[name] = row["us"]
    lines = []
    for tokens, us in times.items():
        layer, forms = us.get("experts uniform"), [us.get(name) for name in MIXTURE[1:]]
        if layer is not None and None not in forms:
            lines.append(f"{tokens}: routing and rows {sum(forms) / (layer + forms[0]):.1%} of the layer's forward")
    for row in rows:
        if row["op"] == "experts" and row["is_ours"] and "share_of_equal" in row:
            lines.append(
                f"{row['label']} {row['phase']}: {row['share_of_equal']:.2f} of cuBLAS at equal FLOPs, goal "
                f"{MIXTURE_GOALS[row['phase']]}"
            )
    return lines


def rollout(visit: Visit) -> int:
    """The engine at the shapes of 7B: steps of single tokens, a rollout."""
    from benchmarks import rollout as engine

    def rows() -> Iterator[Row]:
        for row in engine.measure("7b", visit.device):
            is_wrong = {"status": "error", "note": row["error"]} if "error" in row else {}
            yield {"rollout": row} | is_wrong
            visit.note(engine.text_of(row))

    return run_cases(visit, [("7b", rows)])


def tables(visit: Visit) -> int:
    """Table entries, those of 7B first: random and exact numbers, every mask and dtype, two runs."""
    from benchmarks import tune
    from benchmarks.tune_processes import Compilers
    from benchmarks.tune_targets import tuned
    from kernels.configuration import architecture

    ask, compilers = tune.worker(), Compilers()

    def case(check: Callable[[], Row]) -> list[Row]:
        row = check()
        return [{"entry": row, "status": "wrong" if row["wrong"] else "right", "note": row["wrong"]}]

    try:
        checks = tune.entry_checks(architecture(visit.device), tuned(), ask, compilers, visit.deadline)
        return run_cases(visit, [(str(target), lambda c=check: case(c)) for target, check in checks])
    finally:
        ask.close()
        compilers.close()


def recipes(visit: Visit) -> int:
    """A training step of each recipe with a tiny model against the CPU."""
    from benchmarks import tiny_steps

    return run_cases(visit, tiny_steps.cases(visit.device))


def one_rank(visit: Visit) -> int:
    """NCCL with one rank: every collective of the engine, and a training step."""
    from benchmarks import one_rank as process

    with process.joined(visit.device):
        return run_cases(visit, process.cases(visit.device))


def plan_rates(visit: Visit) -> int:
    """What the planner assumes of a GPU, at the shapes of 7B and 8x22B, and its seconds for a block of each."""
    from benchmarks import plan_rates as rates
    from wizard_engine.planning import planner as plan

    name = torch.cuda.get_device_name(visit.device)
    gpu_name = next((known for known in plan.GPUS if known.partition("-")[0] in name), None)
    if gpu_name is None:
        visit.note(f"{name}: expected one of {', '.join(plan.GPUS)}; shares are of an H200's data sheet")

    def case(preset: str) -> list[Row]:
        config, known = rates.PRESETS[preset], gpu_name or "H200"
        measured = rates.measure(config, 8192, visit.device, plan.GPUS[known])
        measured = rates.compared(measured, preset, config, 8192, known)
        visit.note(f"{preset}: planned block over measured {measured['planned_over_measured']:.3f}, goal within 10 %")
        return [{"plan_rates": measured | {"preset": preset, "tokens": 8192, "data_sheet": known}}]

    return run_cases(visit, [(preset, lambda p=preset: case(p)) for preset in ("7b", "8x22b")])


def tests(visit: Visit) -> int:
    """The kernels' tests on the GPU in the time that is left, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        visit.note("pytest is not installed: not run")
        return LEFT_OUT
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "-x", "-p", "no:cacheprovider"]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=max(1.0, visit.seconds)).returncode
    except subprocess.TimeoutExpired:
        visit.note(f"{TESTS}: no failure in {visit.seconds:.0f} s, then ended; run them with python -m pytest {TESTS}")
        return DONE
    return WRONG if status else DONE


# Seconds of 510, in the order of what a figure is worth.
PHASES = (
    Phase("compile", 40, compile_ahead),
    Phase("operations", 60, operations, 4 * GIB),
    Phase("train_step", 80, train, 20 * GIB),
    Phase("attention", 70, measure("attention"), 20 * GIB),
    Phase("rollout", 55, rollout, 60 * GIB),
    Phase("tables", 45, tables, 12 * GIB),
    Phase("recipes", 25, recipes, 6 * GIB),
    Phase("mixture", 30, measure("mixture"), 40 * GIB),
    Phase("linear_logprob", 25, measure("linear_logprob"), 30 * GIB),
    Phase("row_kernels", 20, measure("row_kernels"), 12 * GIB),
    Phase("one_rank", 15, one_rank, 2 * GIB),
    Phase("plan_rates", 20, plan_rates, 40 * GIB),
    Phase("pytest", 15, tests, 4 * GIB),
    Phase("trace", 10, trace, 8 * GIB),
)


def run_phase(phase: Phase, out: Path, scratch: Path, seconds: float) -> int:
    """Run a phase in this process, unless the device has less memory than it needs; returns its exit status."""
    device = gpu()
    visit = Visit(phase.name, out, scratch, seconds, device, began=time.monotonic())
    memory = device_bytes(device)
    if memory < phase.bytes:
        visit.note(f"needs {phase.bytes / GIB:.0f} GiB of the GPU's memory, there are {memory / GIB:.0f}: left out")
        return LEFT_OUT
    assert phase.run is not None
    return phase.run(visit)
