"""Every table entry's launches, recorded on the meta device: what there is to compile, without tensors or a GPU.

A form is one way to launch a kernel that makes a binary of its own: masks, dtypes, optional tensors. `FORMS` names for
every table a function of the entry's class that yields each form's name and a call that launches it. To add a kernel,
write such a function and enter it; its kernel function must be called like its table, with `_kernel` behind.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import configuration
from kernels.configuration import use_arch, use_config
from kernels.launch import Launch, record

# Representative sizes: those of a 7B model, one row of 4096 tokens. None of them is a constant of a kernel but HEADS.
TOKENS, HEADS, KV_HEADS, WINDOW, VOCABULARY = 4096, 32, 8, 1024, 32000
DTYPES = {2: torch.bfloat16, 4: torch.float32}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Form = tuple[str, Callable[[], Any]]
Items = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """A form of a table entry, or of another configuration in its place; it travels between processes."""

    table: str
    arch: int
    shape: Items
    config: Items
    form: str

    @property
    def label(self) -> str:
        """Table, architecture, class and form as text: no two cases of the tables share one."""
        return f"{self.table} sm_{self.arch} {text_of(self.shape)} {self.form}".replace("  ", " ")


def text_of(items: Items) -> str:
    """`width=128 bytes=2`."""
    return " ".join(f"{name}={value}" for name, value in items)


def cases(table: str, arch: int) -> list[Case]:
    """Every form of every entry that a table has for an architecture."""
    all_cases = []
    for entry in configuration.table(table):
        if entry["arch"] == arch:
            all_cases += cases_of(table, arch, entry["class"], entry["config"])
    return all_cases


def cases_of(table: str, arch: int, shape: Mapping[str, int], config: Mapping[str, Any]) -> list[Case]:
    """Every form of one configuration of a class.

    Raises:
        ValueError: no function says how to launch the kernels of this table.
    """
    if table not in FORMS:
        known = ", ".join(FORMS)
        raise ValueError(f"{table}: expected a table of {known}; add its launches to benchmarks/launch_forms.py")
    items = tuple(shape.items()), tuple(config.items())
    return [Case(table, arch, *items, form) for form, _ in FORMS[table](dict(shape))]


def launch_of(case: Case) -> Launch:
    """The launch that a case stands for.

    Raises:
        ValueError: its call launches no kernel of its table.
    """
    call = dict(FORMS[case.table](dict(case.shape)))[case.form]
    with use_arch(case.arch), use_config(case.table, **dict(case.config)), record() as made:
        call()
    launches = [launch for launch in made if launch.kernel.__name__ == f"{case.table}_kernel"]
    if not launches:
        names = ", ".join(launch.kernel.__name__ for launch in made) or "none"
        raise ValueError(f"{case.label}: expected a launch of {case.table}_kernel, got {names}")
    return launches[0]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(shape: dict[str, int]) -> Iterator[Form]:
    """Causal, without a mask, with a window; fp16 once, since it differs from bf16 in the suffix of an instruction."""
    dtype = DTYPES[shape["bytes"]]
    for name, causal, window in (("causal", True, None), ("full", False, None), ("windowed", True, WINDOW)):
        yield f"{name} {NAMES[dtype]}", lambda c=causal, w=window: _attention(shape["width"], dtype, c, w)
    if shape["bytes"] == 2:
        yield "causal fp16", lambda: _attention(shape["width"], torch.float16, True, None)


def attention_delta(shape: dict[str, int]) -> Iterator[Form]:
    """Each dtype."""
    for dtype, name in NAMES.items():
        yield name, lambda d=dtype: _attention(shape["width"], d, True, None)


def _attention(width: int, dtype: torch.dtype, causal: bool, window: int | None) -> None:
    from kernels._attention_backward import attention_backward
    from kernels._attention_forward import attention_forward

    q, k, v = (_meta(TOKENS, heads, width, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cu_seqlens = _meta(5, dtype=torch.int32)
    out, lse = attention_forward(q, k, v, cu_seqlens, cu_seqlens, causal, window, width**-0.5)
    attention_backward(out, q, k, v, out, lse, cu_seqlens, cu_seqlens, causal, window, width**-0.5)


def rms_norm(shape: dict[str, int]) -> Iterator[Form]:
    """The class's widest rows, with and without a residual stream, and rows of three quarters of that."""
    dtype, widest = DTYPES[shape["bytes"]], shape["width"]
    for width, residual in ((widest, False), (widest, True), (widest * 3 // 4, True)):
        name = f"D={width} {'residual ' if residual else ''}{NAMES[dtype]}"
        yield name, lambda w=width, r=residual: _rms_norm(w, dtype, r)


def rms_norm_reduce(shape: dict[str, int]) -> Iterator[Form]:
    """The gradient of a weight of each dtype."""
    for dtype, name in NAMES.items():
        yield name, lambda d=dtype: _rms_norm(4096, d, True)


def _rms_norm(width: int, dtype: torch.dtype, residual: bool) -> None:
    from kernels._rms_norm import rms_norm_backward, rms_norm_forward

    x, weight = _meta(TOKENS, width, dtype=dtype), _meta(width, dtype=dtype)
    rms_norm_forward(x, weight, 1e-5, x if residual else None)
    rms_norm_backward(x, x if residual else None, x, weight, _meta(TOKENS, dtype=torch.float32))


def rope(shape: dict[str, int]) -> Iterator[Form]:
    """Forwards, with and without positions, and backwards: of q and k alone, and to the product they came out of."""
    dtype = DTYPES[shape["bytes"]]
    for name, packed, inverse in (("forward", True, False), ("forward one row", False, False), ("inverse", True, True)):
        yield f"{name} {NAMES[dtype]}", lambda p=packed, i=inverse: _rope(shape["half"], dtype, p, i)
    yield f"joined {NAMES[dtype]}", lambda: _rope_joined(shape["half"], dtype)


def _rope(half: int, dtype: torch.dtype, packed: bool, inverse: bool) -> None:
    from kernels._rope import rope_forward

    q, k = (_meta(TOKENS, heads, 2 * half, dtype=dtype) for heads in (HEADS, KV_HEADS))
    table, positions = _meta(TOKENS, half, dtype=torch.float32), _meta(TOKENS, dtype=torch.int32)
    rope_forward(q, k, table, table, positions if packed else None, inverse)


def write_pages(shape: dict[str, int]) -> Iterator[Form]:
    """With angles by position, as an engine on a GPU has them, and a row of angles for each token; fp16 once."""
    dtype = DTYPES[shape["bytes"]]
    for name, packed in (("by position", True), ("one row", False)):
        yield f"{name} {NAMES[dtype]}", lambda p=packed: _write_pages(shape["half"], dtype, p)
    if shape["bytes"] == 2:
        yield "by position fp16", lambda: _write_pages(shape["half"], torch.float16, True)


def _write_pages(half: int, dtype: torch.dtype, packed: bool) -> None:
    from kernels._write_pages import write_pages

    qkv = _meta(TOKENS, HEADS + 2 * KV_HEADS, 2 * half, dtype=dtype)
    pages, table = _meta(TOKENS, 64, KV_HEADS, 2 * half, dtype=dtype), _meta(TOKENS, half, dtype=torch.float32)
    slots = _meta(TOKENS, dtype=torch.int64)
    write_pages(qkv, table, table, pages, pages, slots, slots if packed else None)


def _rope_joined(half: int, dtype: torch.dtype) -> None:
    from kernels._rope import rope_joined

    q, k = (_meta(TOKENS, heads, 2 * half, dtype=dtype) for heads in (HEADS, KV_HEADS))
    table = _meta(TOKENS, half, dtype=torch.float32)
    rope_joined(q, k, k, table, table)


def swiglu(shape: dict[str, int]) -> Iterator[Form]:
    """A width that the tiles divide and one that they do not; the widest class stands for any width above it."""
    dtype, width = DTYPES[shape["bytes"]], shape["width"]
    for size in (14336, 11008) if width >= 2048 else (width, width * 3 // 4):
        yield f"F={size} {NAMES[dtype]}", lambda s=size: _swiglu(s, dtype)


def _swiglu(width: int, dtype: torch.dtype) -> None:
    from kernels._swiglu import swiglu_backward, swiglu_forward

    gate_up = _meta(TOKENS, 2 * width, dtype=dtype)
    swiglu_backward(swiglu_forward(gate_up), gate_up)


def adamw(shape: dict[str, int]) -> Iterator[Form]:
    """A gradient of this size, with and without a copy of the weights in its dtype."""
    dtype = DTYPES[shape["bytes"]]
    for name, copied in (("copy", True), ("no copy", False)):
        yield f"{name} {NAMES[dtype]}", lambda c=copied: _adamw(dtype, c)


def _adamw(dtype: torch.dtype, copied: bool) -> None:
    from kernels._adamw import adamw_step

    state = [_meta(TOKENS * TOKENS, dtype=torch.float32) for _ in range(3)]
    gradient = _meta(TOKENS * TOKENS, dtype=dtype)
    scale = _meta(1, dtype=torch.float32)
    adamw_step(*state, gradient, 1e-4, 0.9, 0.95, 1e-8, 0.1, 10, scale, gradient if copied else None)


def grad_norm(shape: dict[str, int]) -> Iterator[Form]:
    """One form: buffers of both dtypes, whose addresses are numbers to the kernel."""
    from kernels._grad_norm import chunk_squares
    from kernels.grad_norm import CHUNK

    grads = [_meta(TOKENS * TOKENS, dtype=dtype) for dtype in DTYPES.values()]
    yield "fp32 and bf16", lambda: chunk_squares(grads, CHUNK)


def linear_logprob(shape: dict[str, int]) -> Iterator[Form]:
    """With and without entropies; fp16 once."""
    dtype = DTYPES[shape["bytes"]]
    for name, entropy in (("", False), ("entropy ", True)):
        yield f"{name}{NAMES[dtype]}", lambda e=entropy: _linear_logprob(dtype, e)
    if shape["bytes"] == 2:
        yield "fp16", lambda: _linear_logprob(torch.float16, False)


def linear_logprob_merge(shape: dict[str, int]) -> Iterator[Form]:
    """One form, fp32 numbers per token; so few rows that the kernel splits the vocabulary."""
    yield "fp32", lambda: _linear_logprob(torch.bfloat16, True, tokens=128)


def _linear_logprob(dtype: torch.dtype, entropy: bool, tokens: int = TOKENS) -> None:
    from kernels._linear_logprob import linear_logprob_gradients, linear_logprob_statistics

    hidden, weight = _meta(tokens, 4096, dtype=dtype), _meta(VOCABULARY, 4096, dtype=dtype)
    targets = _meta(tokens, dtype=torch.int64)
    statistics = linear_logprob_statistics(hidden, weight, targets, 1.0, entropy, 0)
    grad = _meta(tokens, dtype=torch.float32)
    linear_logprob_gradients(grad, grad if entropy else None, hidden, weight, targets, statistics, 1.0, 0, True, True)


def dpo(shape: dict[str, int]) -> Iterator[Form]:
    """Each variant, of sums or means."""
    for variant, mean in (("sigmoid", False), ("sigmoid", True), ("robust", False), ("ipo", True)):
        yield f"{variant} {'mean' if mean else 'sum'}", lambda v=variant, m=mean: _dpo(v, m)


def _dpo(variant: str, mean: bool) -> None:
    from kernels._dpo import dpo_grads

    per_token, marks = _meta(TOKENS, dtype=torch.float32), _meta(17, dtype=torch.int32)
    dpo_grads(
        per_token,
        per_token,
        marks,
        _meta(16, dtype=torch.float32),
        beta=0.1,
        num_pairs=8,
        variant=variant,
        label_smoothing=0.1,
        mean=mean,
        nll_scale=0.1,
    )


def sequence_logprobs(shape: dict[str, int]) -> Iterator[Form]:
    """Sums and means."""
    from kernels._dpo import sequence_sums

    per_token, marks = _meta(TOKENS, dtype=torch.float32), _meta(17, dtype=torch.int32)
    for name, mean in (("sum", False), ("mean", True)):
        yield name, lambda m=mean: sequence_sums(per_token, per_token, marks, m)


def ppo(shape: dict[str, int]) -> Iterator[Form]:
    """Plain, and with every term, by each estimator."""
    yield "plain", lambda: _ppo(False, "k3")
    for estimator in ("k1", "k2", "k3"):
        yield f"all terms {estimator}", lambda e=estimator: _ppo(True, e)


def _ppo(everything: bool, estimator: str) -> None:
    from kernels._ppo import ppo_grads

    per_token = _meta(TOKENS, dtype=torch.float32)
    other = per_token if everything else None
    ppo_grads(
        per_token,
        per_token,
        per_token,
        per_token,
        per_token,
        clip=(0.2, 0.2),
        dual_clip=3.0 if everything else None,
        reference=other,
        kl=0.1,
        kl_estimator=estimator,
        entropy_bonus=0.01,
        sampled=other,
        importance_cap=2.0,
    )


def value_loss(shape: dict[str, int]) -> Iterator[Form]:
    """One form: fp32 numbers per token."""
    from kernels._ppo import value_loss_grads

    per_token = _meta(TOKENS, dtype=torch.float32)
    yield "fp32", lambda: value_loss_grads(per_token, per_token, per_token, 0.2, 0.1)


def gae(shape: dict[str, int]) -> Iterator[Form]:
    """One form: fp32 numbers per token."""
    from kernels._gae import gae_scan

    per_token, marks = _meta(TOKENS, dtype=torch.float32), _meta(17, dtype=torch.int32)
    yield "fp32", lambda: gae_scan(per_token, per_token, marks, 1.0, 0.95)


def sample(shape: dict[str, int]) -> Iterator[Form]:
    """Plain, and with both truncations, from seeds and from uniform numbers; logits of each dtype."""
    for dtype, name in NAMES.items():
        yield f"plain {name}", lambda d=dtype: _sample(d, False, True)
        yield f"top-k top-p {name}", lambda d=dtype: _sample(d, True, False)


def _sample(dtype: torch.dtype, truncated: bool, seeded: bool) -> None:
    from kernels._sample import sample_rows

    per_token, counts = _meta(64, dtype=torch.float32), _meta(64, dtype=torch.int32) if truncated else None
    seeds, uniform = (_meta(64, dtype=torch.int64), None) if seeded else (None, per_token)
    sample_rows(_meta(64, VOCABULARY, dtype=dtype), seeds, uniform, per_token, counts, per_token if truncated else None)


def decode_attention(shape: dict[str, int]) -> Iterator[Form]:
    """The 7B and 70B shapes, keys in one share and in several; other groups and widths, small pages, a window."""
    for dtype in (d for d in NAMES if d.itemsize == shape.get("bytes", 2)):
        for name, heads, kv_heads, width, page, longest, window in (
            ("7b", 32, 8, 128, 64, 8192, None),
            ("7b one share", 32, 8, 128, 64, 512, None),
            ("70b page=16", 64, 8, 128, 16, 8192, None),
            ("H=12/12 C=96 window", 12, 12, 96, 256, 8192, 4096),
        ):
            shapes = heads, kv_heads, width, page, longest, window
            yield f"{name} {NAMES[dtype]}", lambda d=dtype, s=shapes: _decode_attention(d, *s)


def decode_attention_sum(shape: dict[str, int]) -> Iterator[Form]:
    """Those of the above with several shares."""
    yield from (form for form in decode_attention(shape) if "one share" not in form[0])


def _decode_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, page: int, longest: int, window: int | None
) -> None:
    from kernels._decode_attention import decode_attention as attend

    pages = _meta(256, page, kv_heads, width, dtype=dtype)
    table, lengths = _meta(64, longest // page, dtype=torch.int32), _meta(64, dtype=torch.int32)
    attend(_meta(64, heads, width, dtype=dtype), pages, pages, table, lengths, longest, window, width**-0.5)


def moe_route(shape: dict[str, int]) -> Iterator[Form]:
    """The 8x22B shape, choosing and replaying; a width that the tiles do not divide, experts that are not all there."""
    dtype = DTYPES[shape["bytes"]]
    yield f"8x22b {NAMES[dtype]}", lambda: _moe_route(dtype, 6144, 8, 2, False)
    yield f"8x22b replay {NAMES[dtype]}", lambda: _moe_route(dtype, 6144, 8, 2, True)
    yield f"D=1000 E=60 A=4 {NAMES[dtype]}", lambda: _moe_route(dtype, 1000, 60, 4, False)


def moe_layout(shape: dict[str, int]) -> Iterator[Form]:
    """8 experts and 60."""
    for experts, choices in ((8, 2), (60, 4)):
        yield f"E={experts} A={choices}", lambda e=experts, a=choices: _moe_route(torch.bfloat16, 6144, e, a, False)


def _moe_route(dtype: torch.dtype, width: int, experts: int, choices: int, replay: bool) -> None:
    from kernels._moe_route import moe_route

    replayed = _meta(TOKENS, choices, dtype=torch.int32) if replay else None
    moe_route(_meta(TOKENS, width, dtype=dtype), _meta(experts, width, dtype=dtype), choices, replayed)


def experts(shape: dict[str, int]) -> Iterator[Form]:
    """The 8x22B shape, rows gathered in the load and permuted beforehand, and sizes that no tile divides."""
    dtype = DTYPES[shape["bytes"]]
    for name, width, ffn_width in (("8x22b", 6144, 16384), ("D=1088 F=2880", 1088, 2880)):
        yield f"{name} {NAMES[dtype]}", lambda w=width, f=ffn_width: _experts(dtype, w, f, True)
    yield f"8x22b permuted {NAMES[dtype]}", lambda: _experts(dtype, 6144, 16384, False)


def down_products(shape: dict[str, int]) -> Iterator[Form]:
    """Products with (E, N, K) and with (E, K, N): a forward's last and a backward's last."""
    dtype = DTYPES[shape["bytes"]]
    for name, width, ffn_width in (("8x22b", 6144, 16384), ("D=1088 F=2880", 1088, 2880)):
        for transposed in (False, True):
            label = f"{name}{' transposed' if transposed else ''} {NAMES[dtype]}"
            yield label, lambda w=width, f=ffn_width, t=transposed: _down_product(dtype, w, f, t)


def moe_rows(shape: dict[str, int]) -> Iterator[Form]:
    """Sums with gates and without; copies."""
    dtype = DTYPES[shape["bytes"]]
    for name, width in (("8x22b", 6144), ("D=1000", 1000)):
        for gated in (True, False):
            label = f"{name}{' gated' if gated else ''} {NAMES[dtype]}"
            yield label, lambda w=width, g=gated: _moe_rows(dtype, w, g)


EXPERTS, CHOICES = 8, 2


def _layout() -> Any:
    from kernels._grouped_matmul import Layout
    from kernels.expert_tiles import num_slots

    rows, slots = TOKENS * CHOICES, num_slots(TOKENS * CHOICES, EXPERTS)
    shapes = ((rows,), (TOKENS, CHOICES), (EXPERTS + 1,), (2, slots))
    return Layout(*(_meta(*shape, dtype=torch.int32) for shape in shapes))


def _experts(dtype: torch.dtype, width: int, ffn_width: int, gather: bool) -> None:
    from kernels import _grouped_matmul as grouped

    layout, x, rows = _layout(), _meta(TOKENS, width, dtype=dtype), TOKENS * CHOICES
    gate_up, down = _meta(EXPERTS, 2 * ffn_width, width, dtype=dtype), _meta(EXPERTS, width, ffn_width, dtype=dtype)
    with grouped.use_gather(gather):
        _, inner = grouped.grouped_swiglu(x, gate_up, layout, True)
        gates = _meta(TOKENS, CHOICES, dtype=torch.float32)
        grouped.grouped_dswiglu(x, down, inner, gates, layout)
        grouped.grouped_dweight(_meta(rows, 2 * ffn_width, dtype=dtype), x, layout, EXPERTS, gathered="right")


def _down_product(dtype: torch.dtype, width: int, ffn_width: int, transposed: bool) -> None:
    from kernels._grouped_matmul import grouped_matmul

    depth, columns = (2 * ffn_width, width) if transposed else (ffn_width, width)
    weight = _meta(EXPERTS, *((depth, columns) if transposed else (columns, depth)), dtype=dtype)
    grouped_matmul(_meta(TOKENS * CHOICES, depth, dtype=dtype), weight, _layout(), transposed=transposed)


def _moe_rows(dtype: torch.dtype, width: int, gated: bool) -> None:
    from kernels._expert_rows import moe_combine, moe_permute

    layout, gates = _layout(), _meta(TOKENS, CHOICES, dtype=torch.float32) if gated else None
    moe_combine(_meta(TOKENS * CHOICES, width, dtype=dtype), gates, layout.positions)
    moe_permute(_meta(TOKENS, width, dtype=dtype), layout.rows, CHOICES)


FORMS: dict[str, Callable[[dict[str, int]], Iterator[Form]]] = {
    "attention_forward": attention,
    "attention_backward_kv": attention,
    "attention_backward_q": attention,
    "attention_delta": attention_delta,
    "rms_norm_forward": rms_norm,
    "rms_norm_backward": rms_norm,
    "rms_norm_reduce": rms_norm_reduce,
    "rope": rope,
    "swiglu_forward": swiglu,
    "swiglu_backward": swiglu,
    "adamw": adamw,
    "grad_norm": grad_norm,
    "linear_logprob_statistics": linear_logprob,
    "linear_logprob_merge": linear_logprob_merge,
    "linear_logprob_dlogits": linear_logprob,
    "dpo": dpo,
    "sequence_logprobs": sequence_logprobs,
    "ppo": ppo,
    "value_loss": value_loss,
    "gae": gae,
    "sample": sample,
    "moe_route": moe_route,
    "moe_offsets": moe_layout,
    "moe_place": moe_layout,
    "moe_combine": moe_rows,
    "moe_permute": moe_rows,
    "grouped_swiglu": experts,
    "grouped_dswiglu": experts,
    "grouped_dweight": experts,
    "grouped_matmul": down_products,
    "decode_attention": decode_attention,
    "decode_attention_sum": decode_attention_sum,
    "write_pages": write_pages,
}
