"""What a launch of a Triton kernel costs, from its arguments: bytes that must move, operations that it does.

Bytes count every element that a kernel reads or writes once, as if what is read again came from the cache; where a
kernel updates a tensor in place it counts twice. What depends on numbers that only the device has (lengths of
documents, keys of a sequence) is told by `workload`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from kernels.launch import Launch
from wizard_engine.planning.flops import mean_keys

Arguments = dict[str, Any]
# Tensors that a kernel reads and writes.
UPDATED = {"adamw_kernel": ("master", "exp_avg", "exp_avg_sq")}
FP32_PARTIALS = ("partial", "shares", "norms")


@dataclass(frozen=True)
class Cost:
    """bytes: read and written.   flops: operations of matrix products."""

    bytes: int
    flops: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Lengths of the packed documents of a pass (None: one document), and keys of each sequence that decodes."""

    documents: tuple[int, ...] | None = None
    keys: int | None = None


_workload = Workload()


@contextmanager
def workload(*, documents: Sequence[int] | None = None, keys: int | None = None) -> Iterator[None]:
    """Inside the block, passes are over documents of these lengths, and decode steps behind so many keys."""
    global _workload
    before, _workload = _workload, Workload(tuple(documents) if documents else None, keys)
    try:
        yield
    finally:
        _workload = before


def arguments_of(launch: Launch) -> Arguments:
    """Run-time arguments and constexprs by name."""
    return dict(zip(launch.kernel.arg_names, launch.arguments)) | launch.options


def cost_of(launch: Launch) -> Cost:
    """Bytes and operations of a launch."""
    arguments, name = arguments_of(launch), launch.kernel.__name__
    return COSTS.get(name, _default)(arguments, name)


def size_of(tensor: Any) -> int:
    """Bytes of a tensor's elements, or of what a descriptor describes; 0 of anything else."""
    if isinstance(tensor, Tensor):
        return tensor.numel() * tensor.element_size()
    return 0


def _default(arguments: Arguments, name: str) -> Cost:
    """Every tensor once, updated ones twice; descriptors describe tensors that are arguments too."""
    updated = UPDATED.get(name, ())
    return Cost(sum(size_of(x) * (2 if key in updated else 1) for key, x in arguments.items()))


def _without(arguments: Arguments, *names: str) -> int:
    return sum(size_of(x) for key, x in arguments.items() if key not in names)


def _pairs(tokens: int, causal: bool, window: int) -> float:
    """(query, key) pairs of packed documents."""
    documents = _workload.documents
    if documents is None or sum(documents) != tokens:
        documents = (tokens,)
    if not causal:
        return float(sum(n * n for n in documents))
    return sum(n * mean_keys(n, window or None) for n in documents if n)


def _attention(products: int) -> Callable[[Arguments, str], Cost]:
    """`products` matrix products over the pairs, each 2 H C operations a pair."""

    def cost(arguments: Arguments, name: str) -> Cost:
        q = arguments["q"]
        window = arguments["window"] if arguments["WINDOWED"] else 0
        pairs = _pairs(q.shape[0], arguments["CAUSAL"], window)
        return Cost(_default(arguments, name).bytes, 2.0 * products * pairs * q.shape[1] * q.shape[2])

    return cost


def _logprob(arguments: Arguments, name: str) -> Cost:
    """One product of the rows with those of the vocabulary that this launch sees."""
    hidden = arguments["hidden"]
    rows = arguments["blocks"] * arguments["BLOCK_V"] if "blocks" in arguments else arguments["vocab_size"]
    rows = min(rows, arguments["weight"].shape[0])
    weight = rows * hidden.shape[1] * hidden.element_size()
    return Cost(_without(arguments, "weight") + weight, 2.0 * hidden.shape[0] * hidden.shape[1] * rows)


def _grouped(arguments: Arguments, name: str) -> Cost:
    """Rows x (COLUMNS x DEPTH); gate and up are one product of COLUMNS columns."""
    out = arguments.get("out") if "out" in arguments else arguments["gated"]
    rows = out.shape[0]
    width = arguments["COLUMNS"] * (2 if "swiglu" in name else 1)
    return Cost(_default(arguments, name).bytes, 2.0 * rows * width * arguments["DEPTH"])


def _grouped_dweight(arguments: Arguments, name: str) -> Cost:
    rows = arguments["right"].shape[0]
    return Cost(_default(arguments, name).bytes, 2.0 * rows * arguments["ROWS"] * arguments["COLUMNS"])


def _decode(arguments: Arguments, name: str) -> Cost:
    """Keys and values of every sequence once; the cache holds more than those."""
    q, keys = arguments["q"], arguments["keys"]
    seen = _workload.keys or arguments["table"].shape[1] * arguments["PAGE"]
    if arguments["WINDOW"]:
        seen = min(seen, arguments["WINDOW"])
    batch = arguments["lengths"].shape[0]
    row = prod(keys.shape[-2:]) * keys.element_size()
    moved = 2 * batch * seen * row
    return Cost(moved + _without(arguments, "keys", "values"), 4.0 * batch * seen * q.shape[1] * q.shape[2])


def _grad_norm(arguments: Arguments, name: str) -> Cost:
    """Every element of every buffer of the table (address, elements, bytes of an element) once."""
    from benchmarks.standin.tensors import KNOWN_VALUES

    known = KNOWN_VALUES.of(arguments["table"])
    read = 0 if known is None else int((known.view(-1, 3)[:, 1] * known.view(-1, 3)[:, 2]).sum())
    return Cost(read + size_of(arguments["sums"]))


def _write_pages(arguments: Arguments, name: str) -> Cost:
    """The rows of a step; the cache holds more than those."""
    rows = size_of(arguments["qkv"])
    return Cost(2 * rows + size_of(arguments["slots"]))


COSTS: dict[str, Callable[[Arguments, str], Cost]] = {
    "attention_forward_kernel": _attention(2),
    "attention_backward_kv_kernel": _attention(4),
    "attention_backward_q_kernel": _attention(3),
    "linear_logprob_statistics_kernel": _logprob,
    "linear_logprob_dlogits_kernel": _logprob,
    "grouped_matmul_kernel": _grouped,
    "grouped_swiglu_kernel": _grouped,
    "grouped_dswiglu_kernel": _grouped,
    "grouped_dweight_kernel": _grouped_dweight,
    "decode_attention_kernel": _decode,
    "grad_norm_kernel": _grad_norm,
    "write_pages_kernel": _write_pages,
}
