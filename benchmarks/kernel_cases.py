"""What the kernel benchmarks measure: operations at their shapes, inputs, plain formulas, and counts of work.

Bytes are the fewest that device memory must move: every input read once, every output written once, in the dtype of the
case; weights of a norm, tables of angles and other small things are not counted. Operations of attention are those of
its products over visible pairs (masked pairs are no work); elementwise ones count one for each arithmetic instruction,
a transcendental included. T tokens, D width, F feed-forward width, H and K query and key heads, C channels of a head,
E experts, A of them per token, P parameters, b bytes of an element:

    attention  forward 4 C H pairs, backward 10 C H pairs     forward (2 H + 2 K) T C b + 4 T H bytes, backward twice
    rms_norm   forward 2 T D b, backward 3 T D b bytes        with a residual stream 4 T D b and 4 T D b
    rope       2 (H + K) T C b bytes
    swiglu     forward 3 T F b, backward 5 T F b bytes
    linear_logprob  forward 2 T V D, backward 6 T V D (a product for the logits, again)     (T + V) D b bytes, twice
    experts    forward 6 T A D F, backward 12 T A D F operations     (3 E D F + 2 T D + 3 T A F) b bytes, twice
    moe_route  forward 2 T D E operations     T (D b + 4 E) bytes, twice
    moe_permute, moe_combine  (1 + A) T D b bytes
    decode_attention  4 C H keys operations     2 (keys K + B H) C b bytes, of B sequences
    adamw      28 P bytes: fp32 master and moments read and written, bf16 gradient read, bf16 copy written
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention_problem import Attention
from benchmarks.decode_problem import DecodeAttention
from benchmarks.head_problem import LinearLogprob
from benchmarks.kernel_problems import AdamW, Problem, RmsNorm, Rope, SwiGlu, Work
from benchmarks.moe_problem import Experts, MoeCombine, MoePermute, MoeRoute


@dataclass(frozen=True)
class Case:
    """A problem in one phase and dtype."""

    problem: Problem
    phase: str
    dtype: torch.dtype

    @property
    def op(self) -> str:
        """Name of the operation."""
        return self.problem.op

    @property
    def label(self) -> str:
        """Shape and dtype as text."""
        return f"{self.problem.label} {DTYPES[self.dtype]}"

    @property
    def work(self) -> Work:
        """Operations and bytes of a call."""
        return self.problem.work(self.phase, self.dtype.itemsize)

    @property
    def range_name(self) -> str:
        """Name of its NVTX range, without the characters that profilers' filters take as their own."""
        return f"{self.op}.{self.phase}.{self.label}".replace(" ", "_").replace("=", "")


DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
OPERATIONS: dict[str, type[Problem]] = {
    kind.op: kind
    for kind in (
        Attention,
        LinearLogprob,
        Experts,
        MoeRoute,
        MoePermute,
        MoeCombine,
        RmsNorm,
        Rope,
        SwiGlu,
        AdamW,
        DecodeAttention,
    )
}
TOKENS = 16384
RAGGED = (9000, 6000, 4500, 3300, 2500, 2000, 1500, 1200, 900, 700, 500, 350, 200, 90, 27, 1)


def attention_problems(quick: bool = False) -> list[Attention]:
    """Shapes of a GPU: 32k tokens in sequences of 4k to 32k, ragged, a window, other head widths."""

    def equal(length: int, heads: int, kv_heads: int, width: int, **options: Any) -> Attention:
        return Attention((length,) * (32768 // length), heads, kv_heads, width, **options)

    grouped = [equal(length, 32, 8, 128, causal=causal) for causal in (True, False) for length in (4096, 16384)]
    special = [Attention(RAGGED, 32, 8, 128), equal(32768, 32, 8, 128, window=4096)]
    if quick:
        return grouped + special
    grouped += [equal(length, 32, 8, 128, causal=causal) for causal in (True, False) for length in (8192, 32768)]
    single = [equal(length, 16, 16, 128, causal=causal) for causal in (True, False) for length in (4096, 16384)]
    widths = [equal(8192, heads, heads // 4, width) for width, heads in ((64, 32), (96, 32), (256, 16))]
    return grouped + special + single + widths


def row_problems(quick: bool = False) -> list[Problem]:
    """Shapes of the 7B preset, and of the 70B one where not `quick`: norms, angles, gates, updates."""
    problems: list[Problem] = []
    for width, ffn_width, heads in ((4096, 14336, 32), (8192, 28672, 64))[: 1 if quick else None]:
        problems += [RmsNorm(TOKENS, width), RmsNorm(TOKENS, width, residual=True), Rope(TOKENS, heads, 8, 128)]
        problems += [SwiGlu(TOKENS, ffn_width), AdamW(2 * width * ffn_width)]
    return problems


def head_problems(quick: bool = False) -> list[LinearLogprob]:
    """Vocabularies of Mistral and of Llama 3 under 8k to 32k tokens of the 7B width."""
    shapes = [(8192, 32000), (8192, 128000)]
    if not quick:
        shapes += [(16384, 32000), (16384, 128000), (32768, 32000), (32768, 128000)]
    return [LinearLogprob(tokens, vocab_size, 4096) for tokens, vocab_size in shapes]


def moe_problems(quick: bool = False) -> list[Problem]:
    """A layer of 8x22B under 4k to 32k tokens, even and skewed loads; its routing, copies and sums apart."""
    loads = [(8192, "uniform"), (8192, "zipf")]
    if not quick:
        loads += [(4096, "uniform"), (16384, "uniform"), (32768, "uniform"), (8192, "one"), (8192, "idle")]
    layers: list[Problem] = [Experts(tokens, 6144, 16384, load=load) for tokens, load in loads]
    around = [kind(tokens, 6144) for kind in (MoeRoute, MoePermute, MoeCombine) for tokens in (8192, 32768)]
    return layers + around[: None if not quick else 6 : 1 if not quick else 2]


def decode_problems(quick: bool = False) -> list[DecodeAttention]:
    """The 7B shape at a step of generation: few sequences and many, short and long, two sizes of pages, a window."""
    shapes = [(32, 4096), (256, 2048)]
    if not quick:
        shapes += [(1, 4096), (1, 32768), (8, 32768), (256, 512)]
    problems = [DecodeAttention(batch, length) for batch, length in shapes]
    return (
        problems if quick else [*problems, DecodeAttention(256, 2048, page=16), DecodeAttention(32, 8192, window=4096)]
    )


def small_problems() -> list[Problem]:
    """Shapes for a CPU, to try the harness on."""
    return [
        Attention((48, 48), 4, 2, 16), Attention((31, 2, 40), 4, 2, 16, window=8), RmsNorm(64, 48),
        LinearLogprob(64, 96, 48), RmsNorm(64, 48, residual=True), Rope(64, 4, 2, 16), SwiGlu(64, 48), AdamW(5000),
        Experts(40, 48, 32, experts=4, load="zipf"), MoeRoute(40, 48), MoePermute(40, 48), MoeCombine(40, 48),
        DecodeAttention(3, 40, 4, 2, 16, 16),
    ]  # fmt: skip


def cases(names: Sequence[str], device: torch.device, quick: bool = False) -> list[Case]:
    """What is measured on the device, of the operations named: forwards of attention first, then its backwards."""
    on_gpu = device.type == "cuda"
    large = (attention_problems, head_problems, moe_problems, row_problems, decode_problems)
    problems = [p for make in large for p in make(quick)] if on_gpu else small_problems()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = [p for p in problems if p.op in names]
    if quick and not on_gpu:
        chosen = list({p.op: p for p in reversed(chosen)}.values())[::-1]
    matrix = [Case(p, phase, dtype) for phase in ("forward", "backward") for p in chosen if p.is_matrix]
    return matrix + [Case(p, phase, dtype) for p in chosen if not p.is_matrix for phase in p.timed]
