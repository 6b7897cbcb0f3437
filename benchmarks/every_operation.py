"""Every public operation of `kernels` once, at small odd shapes, against its reference (benchmarks/operation_check.py).

On a GPU widths are those of the 7B model, so that the kernels are those that training and generation launch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation_check import Operation, Sizes, Tensors, Triple, drawn, marks, whole
from kernels.adamw import adamw
from kernels.attention import attention
from kernels.backend import is_interpreted
from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.dpo import dpo, preference_loss, sequence_logprobs
from kernels.expert_permute import combine, permute, permute_rows
from kernels.gae import gae, whiten
from kernels.grad_norm import grad_norm
from kernels.grouped_matmul import expert_mlp
from kernels.linear_logprob import linear_logprob, linear_logprob_partial, merge_partials
from kernels.moe_route import expert_counts, expert_layout, load_balancing_loss, moe_route, router_z_loss
from kernels.offloaded_adamw import offloaded_adamw
from kernels.paged_attention import PagedBatch, paged_attention, write_pages
from kernels.ppo import clipped_value_loss, kl_estimates, ppo, token_scale
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_of_product, rope_tables
from kernels.sample import philox, row_seeds, sample, uniforms
from kernels.shared_prefix import Prefixes, pick, shared_attention
from kernels.swiglu import swiglu

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1, "step": 7}
# Public names that are no operation of a device: checks of arguments, tables of configurations, choice of a backend,
# parts of operations that stand here whole, code for CPUs alone.
NOT_OPERATIONS = frozenset(
    (
        "architecture",
        "attend_rows",
        "check",
        "check_cu_seqlens",
        "check_numbers",
        "check_per_token",
        "check_positive",
        "check_values",
        "configuration",
        "contiguous_rows",
        "fits_vectors",
        "from_host",
        "gathered",
        "gradients",
        "is_interpreted",
        "kernels",
        "launch",
        "linear_loss",
        "named",
        "num_packed",
        "num_slots",
        "observe",
        "pair_losses",
        "record",
        "runs_csrc",
        "runs_triton",
        "same_device",
        "same_dtype",
        "sequence_ids",
        "statistics",
        "table",
        "to_device",
        "use_arch",
        "use_backend",
        "use_config",
        "values_are_checked",
        "widest_level",
        "write_rows",
    )
)


def _qkv(s: Sizes, tokens: int) -> Tensors:
    return {
        name: drawn(tokens, heads, s.head, seed=i) for i, (name, heads) in enumerate((("q", 4), ("k", 2), ("v", 2)))
    }


def _attention(s: Sizes) -> Tensors:
    return _qkv(s, 26) | {"cu_seqlens": marks(5, 0, 17, 1)}


def _prefixes(device: torch.device) -> Prefixes:
    """Two prompts of 4 and 3 tokens, continued by 5 and 2, and by 6 tokens."""
    first, tails, owners = (4, 3), (5, 2, 6), (0, 0, 1)
    begin, at, keys = (0, 4), 7, []
    for owner, length in zip(owners, tails):
        keys += [torch.arange(begin[owner], begin[owner] + first[owner]), torch.arange(at, at + length)]
        at += length
    whole_lengths = [first[owner] + length for owner, length in zip(owners, tails)]
    return Prefixes(
        marks(*first),
        4,
        marks(*tails),
        6,
        marks(*whole_lengths),
        max(whole_lengths),
        torch.cat(keys),
        torch.arange(-1, at - 1).clamp(min=0),
        7,
        at,
    ).to(device)


def _norm(s: Sizes) -> Tensors:
    rows = drawn(7, s.width, seed=0) * torch.logspace(-3, 1, 7, dtype=torch.float64)[:, None]
    return {"x": rows, "weight": 1 + drawn(s.width, seed=1, scale=0.1), "residual": drawn(7, s.width, seed=2)}


def _rope(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    cos, sin = rope_tables(torch.arange(40, device=q.device), q.shape[-1], 10_000.0)
    return rope(q, k, cos, sin, positions)


def _rope_of_product(qkv: Tensor) -> tuple[Tensor, ...]:
    return rope_of_product(qkv, *rope_tables(torch.arange(19, device=qkv.device), qkv.shape[-1], 10_000.0), 2)


def _head(s: Sizes) -> Tensors:
    targets = whole(0, s.vocab, 19, seed=2)
    targets[3] = -1
    weight = drawn(s.vocab, s.hidden, seed=1, scale=s.hidden**-0.5)
    return {"hidden": drawn(19, s.hidden, seed=0), "weight": weight, "targets": targets}


def _tokens(s: Sizes, **names: float) -> Tensors:
    """Numbers of the 19 tokens of a head, by name, about as large as given."""
    return {name: drawn(19, seed=20 + i, scale=scale) for i, (name, scale) in enumerate(names.items())}


def _loss(out: Any) -> tuple[Tensor, ...]:
    """Loss, log-probabilities and metrics in the order of their names."""
    metrics = out.metrics if hasattr(out, "metrics") else out[1]
    more = (out.logprob,) if hasattr(out, "logprob") else ()
    return (out[0], *more, *(torch.as_tensor(metrics[name]).detach() for name in sorted(metrics)))


def _dpo(s: Sizes) -> Tensors:
    pairs = {"cu_seqlens": marks(5, 4, 6, 4), "reference": -20 + drawn(4, seed=9)}
    return _head(s) | {"weights": drawn(19, seed=8).abs()} | pairs


def _partials(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of a vocabulary in two slices, merged."""
    boundary, vocab_size = weight.shape[0] // 2 + 1, weight.shape[0]
    partials = [
        linear_logprob_partial(hidden, weight[:boundary], targets, start=0, vocab_size=vocab_size),
        linear_logprob_partial(hidden, weight[boundary:], targets, start=boundary, vocab_size=vocab_size),
    ]
    return merge_partials(torch.stack(partials), targets)


def _ppo(hidden, weight, targets, behaviour, advantages, apart) -> tuple[Tensor, ...]:
    return _loss(
        ppo(
            hidden,
            weight,
            targets,
            behaviour - 9,
            advantages,
            clip=(0.2, 0.3),
            num_sequences=3.0,
            cu_seqlens=marks(5, 8, 6).to(targets.device),
            dual_clip=3.0,
            reference=behaviour - 9 + apart,
            kl=0.1,
            entropy=0.05,
            sampled=behaviour - 9 - apart,
            importance_cap=1.3,
            temperature=0.9,
        )
    )


def _adamw(gradient: str) -> Callable[..., tuple[Tensor, ...]]:
    """An update in the form of training: fp32 gradient, or bf16 gradient with a scale that stands on the device; and
    one whose scale is infinite, which must leave every buffer alone."""

    def run(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        # The interpreter rounds to bf16 by cutting.
        half = torch.float16 if is_interpreted() else torch.bfloat16
        state, copy = [master, exp_avg, exp_avg_sq.square()], torch.zeros_like(master, dtype=half)
        grad_in, exact = grad.bfloat16() if gradient == "bf16" else grad, master.dtype == torch.float64
        # The reference in float64 takes the bf16 gradient's numbers in its own dtype, and no copy.
        grad_in, options = grad_in.to(master.dtype) if exact else grad_in, ADAMW | ({} if exact else {"copy": copy})
        update = adamw_plain if exact else adamw
        update(*state, grad_in, **options, scale=scale if gradient == "bf16" else None)
        before = [x.clone() for x in state]
        update(*state, grad_in, **options, scale=scale * float("inf"))
        kept = torch.tensor([float(torch.equal(a, b)) for a, b in zip(before, state)])
        return *state, state[0] if exact else copy, kept

    return run


def adamw_plain(*state: Tensor, scale: Tensor | None = None, **options: Any) -> None:
    """The reference, where the scale is finite."""
    from kernels.adamw import adamw_reference

    if scale is None or bool(scale.isfinite()):
        adamw_reference(*state, scale=scale, **options)


def _state(s: Sizes) -> Tensors:
    names = {"master": 1.0, "exp_avg": 0.1, "exp_avg_sq": 0.1, "grad": 1.0}
    return {name: drawn(5003, seed=i, scale=x) for i, (name, x) in enumerate(names.items())} | {
        "scale": torch.tensor(0.37, dtype=torch.float64)
    }


def _offloaded(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """An update in host memory, gradients of a micro-batch before it included."""
    if master.dtype == torch.float64:
        state = [master, exp_avg, exp_avg_sq.square()]
        adamw_plain(*state, 2 * grad, **ADAMW, scale=scale)
        return tuple(state)
    state = [x.cpu() for x in (master, exp_avg, exp_avg_sq.square())]
    offloaded_adamw(*state, grad.cpu(), accumulated=grad.cpu().clone(), **ADAMW, scale=float(scale))
    return tuple(state)


def _routed(hidden: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    """Routing, and the losses of a router."""
    routing = moe_route(hidden, router, experts_per_token=2)
    real = torch.arange(hidden.shape[0], device=hidden.device) < 30
    counts = expert_counts(routing.experts, router.shape[0], real)
    balance = load_balancing_loss(routing.logits, routing.experts, num_tokens=30.0, real=real)
    z_loss = router_z_loss(routing.logits, num_tokens=30.0, real=real)
    layout = (routing.experts, routing.offsets, routing.rows, routing.positions, routing.tiles[0], counts)
    return routing.logits, routing.gates, balance, z_loss, *layout


def _mixture(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """Tokens through their experts, and through the same in steps: rows permuted, experts, rows summed."""
    # The chosen experts are given: a tie in a smaller dtype would send a token elsewhere.
    tokens = torch.arange(x.shape[0], device=x.device)
    replayed = torch.stack((tokens % 3, tokens % 3 + 1 + tokens % 2), 1) % 4
    routing = moe_route(x, router, experts_per_token=2, replayed_experts=replayed)
    rows = permute_rows(x, routing)
    counts = routing.counts[None].long()
    inner = expert_mlp(rows, gate_up, down, expert_layout(counts, rows.shape[0]))
    return expert_mlp(x, gate_up, down, routing), combine(inner, routing), permute(x.detach(), routing.rows, 2)


def _experts(s: Sizes) -> Tensors:
    width, inner = (1032, 520) if s.width > 1000 else (24, 40)
    return {
        "x": drawn(33, width, seed=0),
        "router": drawn(4, width, seed=1, scale=width**-0.5),
        "gate_up": drawn(4, 2 * inner, width, seed=2, scale=width**-0.5),
        "down": drawn(4, width, inner, seed=3, scale=inner**-0.5),
    }


def _cache(s: Sizes) -> Tensors:
    """Pages of 16 tokens of three sequences of 40, 3 and 17 keys."""
    table = torch.tensor([[5, 2, 7], [1, 0, 0], [4, 6, 0]], dtype=torch.int32)
    shape = (8, 16, 2, s.head)
    return {
        "q": drawn(3, 4, s.head, seed=0),
        "keys": drawn(*shape, seed=1),
        "values": drawn(*shape, seed=2),
        "table": table,
        "lengths": torch.tensor([40, 3, 17], dtype=torch.int32),
    }


def _paged(q, keys, values, table, lengths) -> Tensor:
    """One new token of the first sequence, three and nine of the others, then padding."""
    batch = PagedBatch(table, lengths, [1, 3, 9], 40, 1, 16)
    return paged_attention(q.repeat(5, 1, 1), keys, values, batch, window=20)


def _written(qkv, keys, values, slots) -> tuple[Tensor, ...]:
    cos, sin = rope_tables(torch.arange(qkv.shape[0], device=qkv.device), qkv.shape[-1], 10_000.0)
    return write_pages(qkv, cos, sin, keys, values, slots), keys, values


def _sampled(logits: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    plain, truncated = sample(logits, seeds), sample(logits, seeds, temperature=0.7, top_k=20, top_p=0.9)
    chosen = row_seeds(3, torch.arange(4, device=seeds.device), 2)
    return *plain, *truncated, *sample(logits, seeds, temperature=0.0), uniforms(seeds), chosen % 1009, *philox(seeds)


def _critic(logprob, reference, rewards) -> tuple[Tensor, ...]:
    """What a critic's update takes: advantages, their whitening, divergences, the loss, the tokens' factors."""
    boundaries = marks(5, 0, 13, 1).to(rewards.device)
    advantages, returns = gae(rewards, reference.detach(), boundaries, gamma=0.99, lam=0.95)
    estimates = kl_estimates(logprob.detach(), reference)
    targets = torch.arange(19, device=rewards.device) % 5 - 1
    value = clipped_value_loss(logprob, reference, returns, clip=0.2, num_tokens=19.0)
    # Nothing is clipped: every token has its gradient.
    loose = clipped_value_loss(logprob, reference, returns, clip=50.0, num_tokens=19.0)[0]
    factors = token_scale(targets, num_sequences=4.0, cu_seqlens=boundaries)
    sums = (
        sequence_logprobs(logprob.detach(), factors.to(logprob.dtype), boundaries, mean=mean) for mean in (False, True)
    )
    return (
        *_loss(value),
        loose,
        advantages,
        returns,
        whiten(advantages),
        *(estimates[n] for n in sorted(estimates)),
        *sums,
    )


def _preference(chosen, rejected, ref_chosen, ref_rejected) -> tuple[Tensor, ...]:
    return _loss(preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, num_pairs=5.0))


def _packed(window: int | None) -> Callable[..., Tensor]:
    return lambda q, k, v, cu_seqlens: attention(q, k, v, cu_seqlens, 17, window=window)


OPERATIONS: tuple[Operation, ...] = (
    Operation("rms_norm", ("rms_norm",), lambda s: dict(list(_norm(s).items())[:2]), rms_norm, ("x", "weight")),
    Operation("rms_norm residual", ("rms_norm",), _norm, rms_norm, ("x", "weight", "residual")),
    Operation(
        "rope",
        ("rope", "rope_tables"),
        lambda s: {n: x for n, x in _qkv(s, 19).items() if n != "v"} | {"positions": whole(0, 40, 19, seed=5)},
        _rope,
        ("q", "k"),
    ),
    Operation(
        "rope_of_product",
        ("rope_of_product",),
        lambda s: {"qkv": drawn(19, 8, s.head, seed=6)},
        _rope_of_product,
        ("qkv",),
    ),
    Operation(
        "grad_norm",
        ("grad_norm",),
        lambda s: {n: drawn(c, seed=c) for n, c in (("one", 70_001), ("other", 13))},
        lambda one, other: grad_norm([one, other]),
    ),
    Operation("swiglu", ("swiglu",), lambda s: {"gate_up": drawn(7, 2 * s.ffn, seed=0)}, swiglu, ("gate_up",)),
    Operation("attention", ("attention",), _attention, _packed(None), ("q", "k", "v")),
    Operation("attention window", ("attention",), _attention, _packed(7), ("q", "k", "v")),
    Operation(
        "shared_attention",
        ("shared_attention", "pick"),
        lambda s: _qkv(s, 21),
        lambda q, k, v: (shared_attention(q, k, v, _prefixes(q.device)), pick(k, torch.tensor([3, 0, 3]).to(q.device))),
        ("q", "k", "v"),
    ),
    Operation(
        "linear_logprob",
        ("linear_logprob",),
        _head,
        lambda **t: linear_logprob(**t, temperature=0.8, entropy=True),
        ("hidden", "weight"),
    ),
    Operation("linear_logprob slices", ("linear_logprob_partial", "merge_partials"), _head, _partials),
    Operation(
        "cross_entropy",
        ("cross_entropy",),
        lambda s: _head(s) | _tokens(s, weights=1.0),
        lambda **t: _loss(cross_entropy(**t, num_tokens=11.0)),
        ("hidden", "weight"),
        ("weights",),
    ),
    Operation(
        "dpo",
        ("dpo",),
        _dpo,
        lambda **t: _loss(dpo(**t, beta=0.3, num_pairs=2, nll=0.2, num_chosen_tokens=9.0)),
        ("hidden", "weight"),
        ("weights", "reference"),
    ),
    Operation(
        "ppo",
        ("ppo",),
        lambda s: _head(s) | _tokens(s, behaviour=0.3, advantages=1.0, apart=0.2),
        _ppo,
        ("hidden", "weight"),
        ("behaviour", "advantages", "apart"),
    ),
    Operation(
        "critic",
        ("gae", "whiten", "kl_estimates", "clipped_value_loss", "token_scale", "sequence_logprobs"),
        lambda s: _tokens(s, logprob=1.0, reference=1.0, rewards=1.0),
        _critic,
        ("logprob",),
        ("logprob", "reference", "rewards"),
    ),
    Operation(
        "preference_loss",
        ("preference_loss",),
        lambda s: {n: drawn(5, seed=i) for i, n in enumerate(("chosen", "rejected", "ref_chosen", "ref_rejected"))},
        _preference,
        ("chosen", "rejected"),
        ("chosen", "rejected", "ref_chosen", "ref_rejected"),
    ),
    Operation("adamw fp32 gradient", ("adamw",), _state, _adamw("fp32"), wide=tuple(_state(Sizes(*[1] * 5)))),
    Operation("adamw bf16 gradient, scale", ("adamw",), _state, _adamw("bf16"), wide=tuple(_state(Sizes(*[1] * 5)))),
    Operation("offloaded_adamw", ("offloaded_adamw",), _state, _offloaded, wide=tuple(_state(Sizes(*[1] * 5)))),
    Operation(
        "moe_route",
        ("moe_route", "expert_counts", "load_balancing_loss", "router_z_loss"),
        lambda s: {"hidden": drawn(33, s.width, seed=0), "router": drawn(8, s.width, seed=1, scale=s.width**-0.5)},
        _routed,
        ("hidden", "router"),
    ),
    Operation(
        "experts",
        ("expert_mlp", "expert_layout", "permute", "permute_rows", "combine"),
        _experts,
        _mixture,
        ("x", "router", "gate_up", "down"),
    ),
    Operation(
        "decode_attention",
        ("decode_attention",),
        _cache,
        lambda q, keys, values, table, lengths: decode_attention(q, keys, values, table, lengths, 48, window=30),
    ),
    Operation("paged_attention", ("paged_attention",), _cache, _paged),
    Operation(
        "write_pages",
        ("write_pages",),
        lambda s: (
            {"qkv": drawn(5, 8, s.head, seed=3), "slots": torch.tensor([40, 3, 127, 16, 90])}
            | {name: x for name, x in _cache(s).items() if name in ("keys", "values")}
        ),
        _written,
    ),
    Operation(
        "sample",
        ("sample", "uniforms", "row_seeds", "philox"),
        lambda s: {"logits": drawn(4, s.vocab, seed=0, scale=2.0), "seeds": whole(0, 2**60, 4, seed=1)},
        _sampled,
        wide=("logits",),
    ),
)


def gradient_norm(device: torch.device, dtype: torch.dtype) -> list[Triple]:
    """The norm that the engine finds of gradients in more than one chunk, against that of the same gradients."""
    from benchmarks import tiny_steps
    from wizard_engine.model import Transformer

    config = replace(tiny_steps.config(device=device), vocab_size=1500, layers=1)
    step = replace(tiny_steps.STEPS[0], build=lambda device: Transformer(config, seed=3))
    model = step.build(device).to(device)
    grads, _ = tiny_steps.figures(step, model, device)
    norm = tiny_steps.engine_norm(step, model, device, None)
    plain = torch.cat([grad.flatten() for grad in grads.grads.values()])
    return [tuple(torch.as_tensor(x).double() for x in (norm, plain.norm(), plain.float().norm()))]


def decode_graph(device: torch.device, dtype: torch.dtype) -> list[Triple]:
    """Tokens and log-probabilities of a replayed CUDA graph against those of plain steps; greedy and drawn."""
    from benchmarks.tiny_steps import config
    from wizard_engine.generation.engine import Engine, Sampling
    from wizard_engine.model import Transformer

    model = Transformer(config(device=device), seed=3).to(device, dtype).requires_grad_(False)
    runs = []
    for use_graphs in (True, False):
        engine = Engine(model, cache_tokens=1024, max_sequences=4, use_graphs=use_graphs)
        rows = [
            row
            for n, temperature in enumerate((0.0, 1.0, 0.7))
            for row in engine.add([5 + n, 7, 11 + n], Sampling(12, temperature, seed=n))
        ]
        engine.run()
        runs.append((torch.tensor([row.ids for row in rows]), torch.tensor([row.logprobs for row in rows])))
    (tokens, logprobs), (same, close) = runs
    # Batches of another size round apart in fp32.
    return [(tokens, same.double(), same), (logprobs, close.double(), close + 1e-5)]


# Operations of the engine on top of kernels, in fp32.
WHOLE = (("gradient norm", gradient_norm), ("decode graph against plain steps", decode_graph))
