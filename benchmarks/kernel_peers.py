"""Who is timed beside this project's kernels on the same inputs: plain PyTorch, torch.compile, torch's fused attention,
flex_attention, torch's packed attention, Liger.

A variant prepares its function once for a problem (masks, compilation) and never runs where it says why it cannot.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.attention_problem import Attention
from benchmarks.decode_problem import DecodeAttention
from benchmarks.head_problem import LinearLogprob, linear_logprob_formula
from benchmarks.kernel_cases import Case
from benchmarks.kernel_problems import (
    AdamW,
    Function,
    Problem,
    RmsNorm,
    Rope,
    SwiGlu,
    Tensors,
    adamw_formula,
    rms_norm_formula,
    rope_formula,
    swiglu_formula,
)
from benchmarks.moe_problem import Experts, MoeCombine, MoePermute, MoeRoute
from kernels.configuration import configuration, use_config

# What foreign packages and compilers raise when they cannot run something; out of memory is a RuntimeError.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    AttributeError,
    AssertionError,
    OSError,
    ArithmeticError,
    NotImplementedError,
    triton.TritonError,
)
EAGER_SCORES_BYTES, EAGER_LOGITS_BYTES = 6 * 2**30, 9 * 2**30
LIGER = "liger-kernel is not installed"


class Variant(NamedTuple):
    """A name, what makes its function for a problem, and why it is absent ("" where it runs).

    `mutates` ones write their inputs and get their own; `is_ours` ones are this project's.
    """

    name: str
    prepare: Callable[[Problem, torch.device], Function] = lambda problem, device: problem.ours
    absent: str = ""
    mutates: bool = False
    is_ours: bool = False


def variants(case: Case, device: torch.device) -> list[Variant]:
    """This project's variants, then the peers, in the order in which they are shown."""
    if device.type != "cuda":
        return [Variant("reference", is_ours=True), Variant("eager", lambda problem, _: problem.formula)]
    special = {Attention: _attention_peers, LinearLogprob: _head_peers, Experts: _expert_peers}
    special |= dict.fromkeys((MoeRoute, MoePermute, MoeCombine, DecodeAttention), _plain_peers)
    peers = special[type(case.problem)](case) if type(case.problem) in special else _row_peers(case.problem)
    ours = own_configs(case, device).items()
    return [*(Variant(name, _with_config(config), is_ours=True) for name, config in ours), *peers]


def own_configs(case: Case, device: torch.device) -> dict[str, dict]:
    """This project's variants on a GPU: as the tables say ({}), and the attention forward's forms with their tile."""
    if case.op != "attention" or case.phase != "forward":
        return {"triton": {}}
    from kernels._attention_forward import shape_class

    q = torch.empty(1, case.problem.heads, case.problem.width, dtype=case.dtype, device="meta")
    entry = configuration("attention_forward", device, **shape_class(q))
    return {"triton": {}} | {f"triton {form}": config for form, config in forms(entry).items()}


def forms(entry: dict) -> dict[str, dict]:
    """A configuration of the attention forward in each form."""
    return {form: {**entry, "VARIANT": form} for form in ("plain", "rotated")}


def _with_config(config: dict) -> Callable[[Problem, torch.device], Function]:
    def prepare(problem: Problem, device: torch.device) -> Function:
        if not config:
            return problem.ours

        def function(tensors: Tensors) -> tuple[Tensor, ...]:
            with use_config("attention_forward", **config):
                return problem.ours(tensors)

        return function

    return prepare


def _attention_peers(case: Case) -> list[Variant]:
    problem = case.problem
    scores = problem.heads * sum(length**2 for length in problem.lengths) * case.dtype.itemsize
    large = f"scores of {scores / 2**30:.1f} GiB" if scores > EAGER_SCORES_BYTES else ""
    whole = "takes sequences of one length only" if problem.is_ragged else "takes no window" if problem.window else ""
    return [
        Variant("sdpa cudnn", _fused("CUDNN_ATTENTION"), whole),
        Variant("sdpa flash", _fused("FLASH_ATTENTION"), whole),
        Variant("torch varlen", _packed, "" if _has("torch.nn.attention.varlen") else "torch has no varlen_attn"),
        Variant("flex", _flex),
        Variant("eager", lambda problem, _: problem.formula, large or ("ragged" if problem.is_ragged else "")),
    ]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _scale(problem: Attention) -> float:
    return problem.width**-0.5 if problem.scale is None else problem.scale


def _fused(backend: str) -> Callable[[Problem, torch.device], Function]:
    """scaled_dot_product_attention on one backend, batches as views of the packed rows.

    A backend that takes no grouped heads gets its keys repeated, inside the call, as its user would have to.
    """

    def prepare(problem: Attention, device: torch.device) -> Function:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def function(tensors: Tensors, repeat: bool = False) -> tuple[Tensor, ...]:
            q, k, v = (tensors[n].unflatten(0, (-1, problem.lengths[0])).transpose(1, 2) for n in ("q", "k", "v"))
            grouped = problem.heads != problem.kv_heads
            if grouped and repeat:
                k, v = (x.repeat_interleave(problem.heads // problem.kv_heads, 1) for x in (k, v))
            with sdpa_kernel(getattr(SDPBackend, backend)):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=problem.causal, scale=_scale(problem), enable_gqa=grouped and not repeat
                )
            return (out.transpose(1, 2).flatten(0, 1),)

        def with_repeated_keys(tensors: Tensors) -> tuple[Tensor, ...]:
            return function(tensors, repeat=True)

        return function if _takes_groups(problem, backend, device) else with_repeated_keys

    return prepare


def _takes_groups(problem: Attention, backend: str, device: torch.device) -> bool:
    from torch.backends import cuda

    if problem.heads == problem.kv_heads:
        return True
    allowed = {"CUDNN_ATTENTION": cuda.can_use_cudnn_attention, "FLASH_ATTENTION": cuda.can_use_flash_attention}[
        backend
    ]
    q, k = (
        torch.empty(1, n, 128, problem.width, dtype=torch.bfloat16, device=device)
        for n in (problem.heads, problem.kv_heads)
    )
    return bool(allowed(cuda.SDPAParams(q, k, k, None, 0.0, problem.causal, True)))


def _packed(problem: Attention, device: torch.device) -> Function:
    """torch's own attention over cu_seqlens (FlashAttention 2)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, left = max(problem.lengths), -1 if problem.window is None else problem.window - 1
    options = {"scale": _scale(problem), "window_size": (left, 0 if problem.causal else -1)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = problem.heads != problem.kv_heads

    def function(tensors: Tensors) -> tuple[Tensor, ...]:
        q, k, v, marks = (tensors[n] for n in ("q", "k", "v", "cu_seqlens"))
        return (varlen_attn(q, k, v, marks, marks, longest, longest, **options),)

    return function


def _flex(problem: Attention, device: torch.device) -> Function:
    """Compiled flex_attention: equal sequences as a batch, ragged ones as one row with a mask of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention)
    length = problem.tokens if problem.is_ragged else problem.lengths[0]
    document = torch.repeat_interleave(torch.tensor(problem.lengths, device=device)) if problem.is_ragged else None

    def sees(b, h, query, key):
        seen = key <= query if problem.causal else key > -1
        if problem.window is not None:
            seen = seen & (key > query - problem.window)
        return seen if document is None else seen & (document[query] == document[key])

    is_plain = not (problem.causal or problem.window or problem.is_ragged)
    mask = None if is_plain else create_block_mask(sees, None, None, length, length, device=device)

    def function(tensors: Tensors) -> tuple[Tensor, ...]:
        q, k, v = (tensors[n].unflatten(0, (-1, length)).transpose(1, 2) for n in ("q", "k", "v"))
        out = attend(q, k, v, block_mask=mask, scale=_scale(problem), enable_gqa=problem.heads != problem.kv_heads)
        return (out.transpose(1, 2).flatten(0, 1),)

    return function


def compiled(function: Callable) -> Callable:
    """torch.compile for one shape; buffers are kept, so that a backward can run more than once."""
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _head_peers(case: Case) -> list[Variant]:
    """Full logits where they fit; Liger's fused cross-entropy, whose gradients are made in its forward."""
    logits = case.problem.tokens * case.problem.vocab_size * 4
    large = f"logits of {logits / 2**30:.1f} GiB in fp32" if logits > EAGER_LOGITS_BYTES else ""
    liger = LIGER if not _has("liger_kernel") else "" if case.phase == "forward" else "its forward makes the gradients"
    return [
        Variant("eager", lambda problem, _: problem.formula, large),
        Variant("compile", lambda problem, _: _row_function(problem, compiled), large),
        Variant("liger forward + backward", _liger, liger),
    ]


def _plain_peers(case: Case) -> list[Variant]:
    eager = Variant("eager", lambda problem, _: problem.formula)
    return (
        [Variant("csrc/cuda or triton", lambda problem, _: _permuted), eager] if case.op == "moe_permute" else [eager]
    )


def _permuted(t: Tensors) -> tuple[Tensor, ...]:
    """What the engine calls: the CUDA library where nvcc built it, else Triton."""
    from kernels.expert_permute import permute

    return (permute(t["x"], t["rows"], t["rows"].shape[0] // t["x"].shape[0]),)


def _expert_peers(case: Case) -> list[Variant]:
    """The loop over experts, torch's grouped product, and Liger's fused experts."""
    grouped = "" if hasattr(F, "grouped_mm") else "torch has no grouped_mm"
    liger = "" if _has("liger_kernel.ops.fused_moe") else "liger-kernel with fused_moe is not installed"
    return [
        Variant("torch grouped_mm", lambda problem, _: functools.partial(_grouped_experts, problem), grouped),
        Variant("liger", lambda problem, _: _liger_experts, liger),
        Variant("eager", lambda problem, _: problem.formula),
    ]


def _grouped_experts(problem: Experts, t: Tensors) -> tuple[Tensor, ...]:
    """Rows permuted, two of torch's grouped products with the activation between, rows summed by token."""
    ends = t["offsets"][1:]
    rows = t["x"][t["rows"].long() // problem.per_token]
    gate, up = F.grouped_mm(rows, t["gate_up"].mT, offs=ends).chunk(2, dim=-1)
    outer = F.grouped_mm(F.silu(gate) * up, t["down"].mT, offs=ends)
    weighted = t["gates"].to(outer.dtype)[..., None] * outer[t["positions"].long()]
    return (weighted.sum(1),)


def _liger_experts(t: Tensors) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction as Fused

    return (Fused.apply(t["x"], t["gate_up"], t["down"], t["experts"].long(), t["gates"]),)


def _liger_head(t: Tensors) -> tuple[Tensor, ...]:
    """Minus each token's cross-entropy; with weights that have a gradient its forward makes the gradients too."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    results = Fused.apply(t["hidden"], t["weight"], t["targets"], None, None, -100, 0.0, 0.0, "none")
    return (-(results[0] if isinstance(results, tuple) else results),)


def _row_peers(problem: Problem) -> list[Variant]:
    liger = "" if _has("liger_kernel") else LIGER
    return [
        Variant("eager", lambda problem, _: problem.formula, mutates=problem.in_place),
        Variant("compile", lambda problem, _: _row_function(problem, compiled), mutates=problem.in_place),
        *(
            [Variant("torch fused", _fused_adamw, mutates=True)]
            if isinstance(problem, AdamW)
            else [Variant("liger", _liger, liger, mutates=isinstance(problem, Rope))]
        ),
    ]


def _row_function(problem: Problem, change: Callable[[Callable], Callable]) -> Function:
    """The plain formula of a row operation, changed by `change`, over its tensors by name."""
    if isinstance(problem, RmsNorm):
        norm = change(functools.partial(rms_norm_formula, epsilon=problem.epsilon))
        return lambda t: _as_tuple(norm(t["x"], t["weight"], *([t["residual"]] if problem.residual else [])))
    if isinstance(problem, Rope):
        both = change(lambda q, k, cos, sin: (rope_formula(q, cos, sin), rope_formula(k, cos, sin)))
        return lambda t: both(t["q"], t["k"], t["cos"], t["sin"])
    if isinstance(problem, LinearLogprob):
        logprob = change(linear_logprob_formula)
        return lambda t: (logprob(t["hidden"], t["weight"], t["targets"]),)
    if isinstance(problem, SwiGlu):
        gate = change(swiglu_formula)
        return lambda t: (gate(t["gate_up"]),)
    update = change(functools.partial(adamw_formula, options=problem.options))

    def step(t: Tensors) -> tuple[Tensor, ...]:
        update(t["master"], t["exp_avg"], t["exp_avg_sq"], t["gradient"], t.get("copy"))
        return problem.written(t)

    return step


def _as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _fused_adamw(problem: AdamW, device: torch.device) -> Function:
    """torch's fused AdamW kernel, with the casts from the gradient and to the copy that its user needs."""
    names = {"betas": None, "epsilon": "eps"}
    options = {names.get(n, n): value for n, value in problem.options.items() if n not in ("betas", "step")}
    options |= {"beta1": problem.betas[0], "beta2": problem.betas[1], "amsgrad": False, "maximize": False}
    step = torch.tensor(float(problem.step), device=device)

    def function(t: Tensors) -> tuple[Tensor, ...]:
        wide = t["gradient"].float()
        torch._fused_adamw_([t["master"]], [wide], [t["exp_avg"]], [t["exp_avg_sq"]], [], [step], **options)
        if "copy" in t:
            t["copy"].copy_(t["master"])
        return problem.written(t)

    return function


def _liger(problem: Problem, device: torch.device) -> Function:
    """Liger's kernel for the same operation, its options set so that it writes no input but those of the rotation."""
    if isinstance(problem, RmsNorm) and problem.residual:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused

        return lambda t: Fused.apply(t["x"], t["residual"], t["weight"], problem.epsilon, 0.0, "llama", False)
    if isinstance(problem, RmsNorm):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

        return lambda t: (Norm.apply(t["x"], t["weight"], problem.epsilon, 0.0, "llama", False),)
    if isinstance(problem, Rope):
        return _liger_rope(problem)
    if isinstance(problem, LinearLogprob):
        return _liger_head
    from liger_kernel.ops import swiglu

    fused = getattr(swiglu, "LigerFusedGateUpSiLUMulFunction", None)
    if fused is not None:
        return lambda t: (fused.apply(t["gate_up"]),)
    return lambda t: (swiglu.LigerSiLUMulFunction.apply(*t["gate_up"].chunk(2, dim=-1)),)


def _liger_rope(problem: Rope) -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def function(t: Tensors) -> tuple[Tensor, ...]:
        cos, sin = (torch.cat(2 * [t[n].reshape(1, problem.tokens, -1)], -1) for n in ("cos", "sin"))
        q, k = (t[n].transpose(0, 1)[None] for n in ("q", "k"))
        turned = LigerRopeFunction.apply(q, k, cos, sin)
        return tuple(x[0].transpose(0, 1) for x in turned)

    return function
