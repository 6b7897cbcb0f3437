"""Whether a result is right: against float64 by the project's tolerance, on exact whole numbers, and bit for bit twice.

    max|out - ref| <= 2 max|base - ref| + 4 * 2^-23 max|ref|

`ref` is the plain formula in float64 and `base` the same formula in the tested dtype. Where results are exact whole
numbers, they must be the reference rounded once: half a unit in the last place and 4 * 2^-23 max|ref|.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_problem import Attention, checked_heads, in_blocks, select_heads
from benchmarks.kernel_problems import Problem, Tensors, call_of

UNIT = 2.0**-23
# Elements of a tensor that are compared in float64 at a time.
CHUNK = 2**26
# Pairs up to which torch's fused attention serves as a second base: it computes probabilities again in its backward.
FUSED_PAIRS = 2**22


@dataclass(frozen=True)
class Verdict:
    """How far one result is off: largest error and its limit, and the root mean square of errors over that of `ref`."""

    name: str
    error: float
    limit: float
    rms: float

    @property
    def is_right(self) -> bool:
        """True within the limit; NaN never is."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3e}, limit {self.limit:.3e}"


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same ranges of the flattened tensors, in float64."""
    flat = [x.reshape(-1) for x in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield [x[start : start + CHUNK].double() for x in flat]


def largest_error(out: Tensor, ref: Tensor) -> float:
    """max|out - ref|, NaN where either has one."""
    return max((float((a - b).abs().max()) for a, b in _chunks(out, ref)), default=0.0, key=_nan_first)


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value


def relative_rms(out: Tensor, ref: Tensor) -> float:
    """Root mean square of out - ref over that of ref."""
    sums = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in _chunks(out, ref)]
    wrong, whole = (sum(column) for column in zip(*sums)) if sums else (0.0, 0.0)
    return (wrong / whole) ** 0.5 if whole else wrong**0.5


class Oracle:
    """The float64 results of a problem in a phase, and what plain PyTorch in the tested dtype gives."""

    def __init__(self, problem: Problem, tensors: Tensors, phase: str) -> None:
        self.problem, self.heads = problem, None
        if isinstance(problem, Attention):
            self.heads = checked_heads(problem, phase)
            dtype, forms = tensors["q"].dtype, (False, True) if problem.pairs <= FUSED_PAIRS else (False,)
            self.bases = [in_blocks(problem, tensors, phase, dtype, self.heads, fused=fused) for fused in forms]
            self.ref = in_blocks(problem, tensors, phase, torch.float64, self.heads)
        else:
            forms = (problem.formula, *problem.other_forms())
            bases = (call_of(problem, form, fresh(problem, tensors), phase)() for form in forms)
            self.bases = [{name: x.detach() for name, x in base.items()} for base in bases]
            self.ref = by_rows(problem, tensors, phase)

    @property
    def scope(self) -> str:
        """What part of the results is compared."""
        if self.heads is None or len(self.heads) == self.problem.kv_heads:
            return "all"
        return f"{len(self.heads)} of {self.problem.kv_heads} key heads"

    def _checked(self, results: Tensors) -> Tensors:
        return results if self.heads is None else select_heads(self.problem, results, self.heads)

    def verdicts(self, results: Tensors) -> list[Verdict]:
        """One for each result, by the rule of this module; a missing or misshapen one is off without limit."""
        return self._verdicts(results, lambda name, ref: 2 * max(largest_error(b[name], ref) for b in self.bases))

    def _verdicts(self, results: Tensors, allowance) -> list[Verdict]:
        verdicts, checked = [], self._checked(results)
        for name, ref in self.ref.items():
            out = checked.get(name)
            if out is None or out.shape != ref.shape:
                verdicts.append(Verdict(name, float("inf"), 0.0, float("inf")))
                continue
            limit = allowance(name, ref) + 4 * UNIT * largest_error(ref, torch.zeros_like(ref))
            verdicts.append(Verdict(name, largest_error(out, ref), limit, relative_rms(out, ref)))
        return verdicts

    def exact_verdicts(self, results: Tensors) -> list[Verdict]:
        """The same where results are exact but for one rounding, each element by its own unit in the last place."""
        verdicts, checked = [], self._checked(results)
        for name, ref in self.ref.items():
            out = checked[name]
            half = torch.finfo(out.dtype).eps / 2 * (1 + 2.0**-10)
            over = max(
                (float(((a - b).abs() - half * b.abs()).max()) for a, b in _chunks(out, ref)),
                default=0.0,
                key=_nan_first,
            )
            limit = 4 * UNIT * largest_error(ref, torch.zeros_like(ref))
            verdicts.append(Verdict(name, over, limit, relative_rms(out, ref)))
        return verdicts


def fresh(problem: Problem, tensors: Tensors) -> Tensors:
    """The tensors, cloned where the operation writes its inputs."""
    return {name: x.clone() for name, x in tensors.items()} if problem.in_place else tensors


def by_rows(problem: Problem, tensors: Tensors, phase: str) -> Tensors:
    """float64 results of the plain formula, some rows at a time; gradients of whole tensors summed over the rows."""
    rowed = [x for name, x in tensors.items() if name not in problem.whole]
    rows = rowed[0].shape[0]
    step = max(1, CHUNK * rows // max(1, problem.row_elements * rows, *(x.numel() for x in rowed)))
    chunks: dict[str, list[Tensor]] = {}
    sums: Tensors = {}
    for start in range(0, rows, step):
        some = {name: (x if name in problem.whole else x[start : start + step]).double() for name, x in tensors.items()}
        for name, result in call_of(problem, problem.formula, some, phase)().items():
            if name not in problem.whole:
                chunks.setdefault(name, []).append(result.detach())
            # Added up as they come: kept apart, those of the experts' weights would not fit into a GPU.
            elif name in sums:
                sums[name] += result.detach()
            else:
                sums[name] = result.detach()
    return {name: torch.cat(chunks.pop(name)) for name in list(chunks)} | sums


def roughened(problem: Problem, tensors: Tensors, seed: int = 0) -> Tensors:
    """The tensors with rows of scales from 1e-3 to 10, in random order; queries and keys a third as large."""
    changed = dict(tensors)
    for index, name in enumerate(name for name in problem.rough if name in tensors):
        x = tensors[name]
        generator = torch.Generator().manual_seed(seed + index)
        scales = torch.logspace(-3, 1, x.shape[0])[torch.randperm(x.shape[0], generator=generator)]
        scales = scales.view(-1, *[1] * (x.dim() - 1)).to(x.device)
        changed[name] = (x.float() * scales * (0.3 if name in ("q", "k") else 1)).to(x.dtype)
    return changed


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty gives with NaN inside the block, so that an element that is never written shows."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def repeats_bits(first: Tensors, second: Tensors) -> bool:
    """True if two runs gave the same bits, NaN equal to itself."""
    return all(torch.equal(x.nan_to_num(), second[name].nan_to_num()) for name, x in first.items())


def failures(problem: Problem, phase: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[str]:
    """What is wrong with this project's function: on rough random rows, on exact whole numbers, between two runs."""
    rough = roughened(problem, problem.inputs(dtype, device, seed), seed)
    easy, whole = problem.exact(dtype, device, seed)
    reasons = []
    for kind, one, tensors in (("random", problem, rough), ("exact", easy, whole)):
        with poisoned_memory():
            runs = [call_of(one, one.ours, fresh(one, tensors), phase)() for _ in range(2)]
        first, second = ({name: x.detach() for name, x in run.items()} for run in runs)
        oracle = Oracle(one, tensors, phase)
        verdicts = oracle.verdicts(first) if kind == "random" else oracle.exact_verdicts(first)
        reasons += [f"{kind}: {verdict}" for verdict in verdicts if not verdict.is_right]
        if not repeats_bits(first, second):
            reasons.append(f"{kind}: two runs differ")
    return reasons
