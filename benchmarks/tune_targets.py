"""What tuning needs to know of each table: which problems an entry serves, which configurations are worth a try.

Launches of a problem are recorded on the meta device, without a GPU.

A table belongs to the operation whose name starts its own: `rms_norm_backward` to rms_norm; or, where the operation
says so, another prefix: `grouped_matmul` to experts.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention_problem import Attention
from benchmarks.decode_problem import DecodeAttention
from benchmarks.head_problem import LinearLogprob
from benchmarks.kernel_cases import OPERATIONS, Case
from benchmarks.kernel_problems import AdamW, Problem, RmsNorm, Rope, SwiGlu
from benchmarks.moe_problem import LAYOUT, Experts, MoeCombine, MoePermute, MoeRoute
from kernels.configuration import kernels, use_arch
from kernels.expert_tiles import TILE_ROWS
from kernels.launch import Launch, record

Config = dict[str, Any]
META = torch.device("meta")
# Registers of a thread that accumulators and scores may take, and bytes of shared memory of a block.
TILE_REGISTERS = 224
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Tables of kernels over a few numbers per token or one row per sample: a launch costs more than they do, and nothing is
# gained by tuning them. The norm of the gradient reads it once and does no more. Their entries are cases of the tests.
UNTUNED = frozenset(
    (
        "decode_attention_sum",
        "dpo",
        "gae",
        "grad_norm",
        "linear_logprob_merge",
        "moe_offsets",
        "moe_place",
        "ppo",
        "sample",
        "sequence_logprobs",
        "value_loss",
        "write_pages",
    )
)
# Tables whose kernel a backward launches in another form: a product with the other side of the weights.
BOTH_PHASES = ("grouped_matmul",)
FORWARDS = frozenset(("linear_logprob_statistics", "grouped_swiglu", "grouped_matmul"))
# Sequences of a check: around the tile sizes, an empty one, one token, an odd prime; small ones for the interpreter.
LENGTHS = (129, 0, 1, 64, 257, 63, 127)
SMALL_LENGTHS = (17, 0, 1, 33)
# Operations of models with experts alone.
MIXTURE = ("experts", "moe_route", "moe_permute", "moe_combine")
# Widths of each operation's classes that are worth their time first: those of the 7B and 70B presets, then others.
FIRST = {"attention": (128, 64, 256), "rms_norm": (4096, 8192), "rope": (128,), "swiglu": (2048,)}


@dataclass(frozen=True)
class Target:
    """An entry's table and class."""

    kernel: str
    keys: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, kernel: str, keys: Mapping[str, int]) -> "Target":
        """The target of a table's entry."""
        return cls(kernel, tuple(sorted(keys.items())))

    @property
    def shape(self) -> dict[str, int]:
        """The class by its keys."""
        return dict(self.keys)

    @property
    def op(self) -> str:
        """The operation that the kernel belongs to.

        Raises:
            ValueError: none has a name that starts the table's.
        """
        prefixes = {name: (name, *kind.tables) for name, kind in OPERATIONS.items()}
        ops = [name for name, names in prefixes.items() if any(f"{self.kernel}_".startswith(p + "_") for p in names)]
        if not ops:
            raise ValueError(f"{self.kernel}: expected the table of one of {', '.join(OPERATIONS)}; add its operation")
        return max(ops, key=len)

    @property
    def phase(self) -> str:
        """The phase that runs the kernel."""
        forward_too = self.kernel.endswith("_forward") or self.kernel == self.op or self.kernel in FORWARDS
        return OPERATIONS[self.op].phases[0] if forward_too else "backward"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes that the entry serves: bf16 first, where there is one."""
        half = [torch.bfloat16] if self.op == "adamw" else [torch.bfloat16, torch.float16]
        return {2: half, 4: [torch.float32]}.get(self.shape.get("bytes", 0), [torch.bfloat16, torch.float32])

    @property
    def importance(self) -> tuple:
        """Sorts what matters first: training and decode of 7B, 2-byte elements, widths of the presets, attention."""
        width, first = self.shape.get("width", 2 * self.shape.get("half", 0)), FIRST.get(self.op, ())
        place = first.index(width) if width in first else len(first) if width else 0
        # Training gives AdamW gradients in fp32.
        is_wide = self.shape.get("bytes", 2) != 2 and self.op != "adamw"
        is_other = is_wide or bool(place) or self.op in MIXTURE
        is_second = self.phase == "backward"
        return is_other, is_wide, place, list(OPERATIONS).index(self.op), is_second, self.kernel, -width

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.keys)])


def timed_case(target: Target) -> Case:
    """The case that decides between configurations of an entry: large, causal, with a residual stream."""
    shape, dtype = target.shape, target.dtypes[0]
    width = shape.get("width", 4096)
    if target.op == "attention":
        heads = max(4, min(32, 4096 // width))
        length = 4096 if dtype.itemsize == 2 else 1024
        return Case(Attention((length,) * 4, heads, heads // 4, width), target.phase, dtype)
    rows = max(256, 2**26 // width)
    problems: dict[str, Problem] = {
        "rms_norm": RmsNorm(rows, width, residual=True),
        "rope": Rope(16384, 32, 8, 2 * shape.get("half", 64)),
        "swiglu": SwiGlu(rows, 14336 if width >= 2048 else width),
        "adamw": AdamW(2**27),
        "linear_logprob": LinearLogprob(8192 if dtype.itemsize == 2 else 1024, 32000, 4096),
        "experts": Experts(8192, 6144, 16384) if dtype.itemsize == 2 else Experts(1024, 2048, 4096),
        "moe_route": MoeRoute(16384, 6144),
        "moe_permute": MoePermute(16384, 6144),
        "moe_combine": MoeCombine(16384, 6144),
        "decode_attention": DecodeAttention(64, 4096),
    }
    return Case(problems[target.op], target.phase, dtype)


def checked_cases(target: Target, *, full: bool, small: bool = False) -> Iterator[Case]:
    """Cases that an entry must get right: one, or where `full` every mask and dtype; `small` for the interpreter."""
    for dtype in target.dtypes if full else target.dtypes[:1]:
        for problem in _problems(target, full, small):
            both = target.kernel in (target.op, *BOTH_PHASES) and not problem.in_place
            for phase in problem.phases if both and full else (target.phase,):
                yield Case(problem, phase, dtype)


def _problems(target: Target, full: bool, small: bool) -> list[Problem]:
    shape = target.shape
    width = shape.get("width", 48)
    if target.op == "attention":
        if small:
            kinds, lengths, heads, kv_heads = [(True, 9)], SMALL_LENGTHS, 2, 1
        else:
            kinds, lengths = [(True, None), (False, None), (True, 96)], LENGTHS
            heads, kv_heads = timed_case(target).problem.heads, timed_case(target).problem.kv_heads
        some = kinds if full else kinds[:1]
        return [Attention(lengths, heads, kv_heads, width, causal, window, padding=5) for causal, window in some]
    rows = 9 if small else 517
    if target.op == "rms_norm":
        return [RmsNorm(rows, width, residual=residual) for residual in ((True, False) if full else (True,))]
    if target.op == "rope":
        return [Rope(rows, 6, 2, 2 * shape.get("half", 8))]
    if target.op == "linear_logprob":
        return [LinearLogprob(9, 70, 24) if small else LinearLogprob(517, 3001, 1032)]
    if target.op == "experts":
        if small:
            return [Experts(33, 48, 32, experts=3, load="zipf")]
        loads = ("zipf", "one", "idle") if full else ("zipf",)
        return [Experts(700, 512, 1088, load=load) for load in loads] + ([Experts(517, 456, 200)] if full else [])
    if target.op in ("moe_route", "moe_permute", "moe_combine"):
        return [OPERATIONS[target.op](rows, 40 if small else 1032)]
    if target.op == "decode_attention":
        if small:
            return [DecodeAttention(3, 40, 4, 2, 16, 16)]
        problems = [DecodeAttention(5, 1500, 32, 8, 128, 64), DecodeAttention(3, 700, 12, 12, 96, 16, window=200)]
        return problems if full else problems[:1]
    if target.op == "swiglu":
        wide = [SwiGlu(rows, 14336), SwiGlu(rows, width + 40)] if width >= 2048 else [SwiGlu(rows, width)]
        return wide[-1:] if small else wide if full else wide[:1]
    return [AdamW(5003 if small else 3_000_017)]


def tuned() -> list[str]:
    """Tables that tuning sweeps."""
    return [name for name in kernels() if name not in UNTUNED]


def candidates(target: Target, arch: int, entry: Config) -> list[Config]:
    """Configurations to try, the table's own first: tiles of attention that fit, or the neighbours of the entry."""
    tiles = {"attention_forward": _forward, "attention_backward_kv": _keys, "attention_backward_q": _queries}
    make = tiles.get(target.kernel)
    configs = neighbours(entry) if make is None else list(make(target.shape["width"], target.shape["bytes"], arch))
    configs = [config for config in configs if arch >= 90 or not config.get("TMA")]
    if target.op in ("experts", "moe_route"):
        configs = [config for config in configs if _is_product(config, target.shape["bytes"], arch)]
    if target.op == "decode_attention":
        configs = [c for c in configs if c["BLOCK_N"] >= 16 and c["SHARE"] % c["BLOCK_N"] == 0]
    return [entry, *(config for config in configs if config != entry)]


def neighbours(entry: Config) -> list[Config]:
    """Half and double of every block size and count of a configuration, fewer and more warps, the other switches."""
    choices: dict[str, list] = {}
    for name, value in entry.items():
        if isinstance(value, bool):
            choices[name] = [value, not value]
        elif name == "num_stages":
            choices[name] = [value] if value == 1 else [1, 2, 3]
        elif name == "num_warps":
            choices[name] = [n for n in (value // 2, value, 2 * value) if 1 <= n <= 32]
        elif isinstance(value, int):
            choices[name] = [n for n in (value // 2, value, 2 * value) if n >= 1]
        else:
            choices[name] = [value]
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def _is_product(config: Config, size: int, arch: int) -> bool:
    """True where blocks are what a product of tiles takes, divide the tile table's rows, and fit into shared memory."""
    blocks = {name: n for name, n in config.items() if name.startswith("BLOCK")}
    depth = blocks.get("BLOCK_K", blocks.get("BLOCK_R", blocks.get("BLOCK_D", 16)))
    ends = [n for name, n in blocks.items() if name in ("BLOCK_M", "BLOCK_N", "BLOCK_T")]
    shared = config["num_stages"] * depth * sum(ends) * size
    return min(blocks.values()) >= 16 and blocks.get("BLOCK_M", 16) <= TILE_ROWS and shared <= shared_limit(arch)


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a block may take."""
    return SHARED_BYTES[max((a for a in SHARED_BYTES if a <= arch), default=80)]


def _tiles(rows, columns, warps, stages, arch: int) -> Iterator[Config]:
    for block_m, block_n, num_warps, num_stages in itertools.product(rows, columns, warps, stages):
        for tma in (True, False) if arch >= 90 else (False,):
            yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "TMA": tma, "num_warps": num_warps, "num_stages": num_stages}


def _blocks(width: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns of tiles for elements of 2 or 4 bytes, smaller ones for wide heads."""
    if size == 2:
        return (64, 128), (32, 64, 128)
    return ((32, 64), (16, 32)) if width <= 128 else ((16, 32), (16, 32))


def _forward(width: int, size: int, arch: int) -> Iterator[Config]:
    """Tiles whose accumulators and scores fit into registers, and whose stages fit into shared memory."""
    rows, columns = _blocks(width, size)
    for tile in _tiles(rows, columns, (4, 8), (2, 3) if size == 2 else (1, 2), arch):
        threads, m, n = 32 * tile["num_warps"], tile["BLOCK_M"], tile["BLOCK_N"]
        shared = (m + 2 * tile["num_stages"] * n) * width * size
        if shared > shared_limit(arch):
            continue
        for variant, scores in (("plain", 1), ("rotated", 2)):
            if (m * width + scores * m * n) / threads <= TILE_REGISTERS:
                yield {"VARIANT": variant, **tile}


def _keys(width: int, size: int, arch: int) -> Iterator[Config]:
    """Tiles of dK and dV: two accumulators of a block of keys, two of scores."""
    rows, columns = ((32, 64, 128), (64, 128)) if size == 2 else ((16, 32), (16, 32))
    if width > 128 and size == 2:
        rows, columns = (16, 32, 64), (32, 64)
    for tile in _tiles(rows, columns, (4, 8), (1, 2, 3), arch):
        threads, m, n = 32 * tile["num_warps"], tile["BLOCK_M"], tile["BLOCK_N"]
        shared = 2 * (n + tile["num_stages"] * m) * width * size
        if (2 * n * width + 2 * m * n) / threads <= TILE_REGISTERS and shared <= shared_limit(arch):
            yield tile


def _queries(width: int, size: int, arch: int) -> Iterator[Config]:
    """Tiles of dQ: one accumulator of a block of queries, two of scores."""
    rows, columns = _blocks(width, size)
    for tile in _tiles(rows, columns, (4, 8), (1, 2, 3), arch):
        threads, m, n = 32 * tile["num_warps"], tile["BLOCK_M"], tile["BLOCK_N"]
        shared = 2 * (m + tile["num_stages"] * n) * width * size
        if (m * width + 2 * m * n) / threads <= TILE_REGISTERS and shared <= shared_limit(arch):
            yield tile


def launches(case: Case, arch: int) -> list[Launch]:
    """What a case launches on an architecture, its tensors on the meta device: no GPU is needed."""
    tensors = case.problem.inputs(case.dtype, META)
    with use_arch(arch), record() as made:
        _run(case.problem, case.phase, tensors)
    return [launch for launch in made if math.prod(launch.grid)]


def kernel_name(launch: Launch) -> str:
    """Name of the table that a launch takes its configuration from."""
    return launch.kernel.__name__.removesuffix("_kernel")


def _run(problem: Problem, phase: str, t: dict) -> None:
    """The kernels of a phase, past the public functions, which take no meta tensors."""
    if isinstance(problem, Attention):
        _run_attention(problem, phase, t)
    elif isinstance(problem, RmsNorm):
        from kernels import _rms_norm

        _, stream, rstd = _rms_norm.rms_norm_forward(t["x"], t["weight"], problem.epsilon, t.get("residual"))
        if phase == "backward":
            stream = stream if problem.residual else t["x"]
            _rms_norm.rms_norm_backward(t["dy"], t.get("ds"), stream, t["weight"], rstd)
    elif isinstance(problem, Rope):
        from kernels._rope import rope_forward

        rope_forward(t["q"], t["k"], t["cos"], t["sin"], None, phase == "backward")
    elif isinstance(problem, LinearLogprob):
        from kernels import _linear_logprob

        head = t["hidden"], t["weight"], t["targets"]
        statistics = _linear_logprob.linear_logprob_statistics(*head, 1.0, False, 0)
        if phase == "backward":
            _linear_logprob.linear_logprob_gradients(t["dlogprob"], None, *head, statistics, 1.0, 0, True, True)
    elif isinstance(problem, Experts):
        _run_experts(problem, phase, t)
    elif isinstance(problem, MoeRoute):
        from kernels._moe_route import moe_route

        moe_route(t["hidden"], t["router"], problem.per_token, None)
    elif isinstance(problem, MoePermute):
        from kernels._expert_rows import moe_permute

        moe_permute(t["x"], t["rows"], problem.per_token)
    elif isinstance(problem, MoeCombine):
        from kernels._expert_rows import moe_combine

        moe_combine(t["outer"], t["gates"], t["positions"])
    elif isinstance(problem, DecodeAttention):
        from kernels._decode_attention import decode_attention

        arguments = [t[name] for name in ("q", "keys", "values", "table", "lengths")]
        decode_attention(*arguments, problem.length, problem.window, problem.width**-0.5)
    elif isinstance(problem, SwiGlu):
        from kernels import _swiglu

        _swiglu.swiglu_backward(t["dy"], t["gate_up"]) if phase == "backward" else _swiglu.swiglu_forward(t["gate_up"])
    else:
        from kernels._adamw import adamw_step

        names, hyperparameters = (*AdamW.STATE, "gradient"), problem.options
        lr, betas, epsilon, decay, step = (
            hyperparameters[n] for n in ("lr", "betas", "epsilon", "weight_decay", "step")
        )
        adamw_step(*(t[n] for n in names), lr, *betas, epsilon, decay, step, None, t.get("copy"))


def _run_experts(problem: Experts, phase: str, t: dict) -> None:
    from kernels import _grouped_matmul as grouped

    layout = grouped.Layout(**{name: t[name] for name in LAYOUT})
    hidden, inner = grouped.grouped_swiglu(t["x"], t["gate_up"], layout, True)
    if phase != "backward":
        grouped.grouped_matmul(hidden, t["down"], layout)
        return
    dinner, gated, _ = grouped.grouped_dswiglu(t["dy"], t["down"], inner, t["gates"], layout)
    grouped.grouped_dweight(t["dy"], gated, layout, problem.experts, gathered="left")
    grouped.grouped_dweight(dinner, t["x"], layout, problem.experts, gathered="right")
    grouped.grouped_matmul(dinner, t["gate_up"], layout, transposed=True)


def _run_attention(problem: Attention, phase: str, t: dict) -> None:
    from kernels._attention_backward import attention_backward
    from kernels._attention_forward import attention_forward

    scale = problem.width**-0.5 if problem.scale is None else problem.scale
    marks, options = t["cu_seqlens"], (problem.causal, problem.window, scale)
    out, lse = attention_forward(t["q"], t["k"], t["v"], marks, marks, *options)
    if phase == "backward":
        attention_backward(t["dout"], t["q"], t["k"], t["v"], out, lse, marks, marks, *options)
