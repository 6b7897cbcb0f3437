"""The launches of a GPU check by where they come from, recorded on the meta device: what a cache made ahead must hold.

`SOURCES` names each; a source yields launches of one architecture. What no source knows is compiled at its first
launch: slower, not wrong.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import launch_forms, tune, tune_targets
from benchmarks.kernel_cases import OPERATIONS, cases
from benchmarks.kernel_peers import own_configs
from kernels.configuration import use_arch, use_config
from kernels.launch import Launch, record
from wizard_engine.model.config import PRESETS, ModelConfig

GPU, META, DTYPE = torch.device("cuda:0"), torch.device("meta"), torch.bfloat16
# Tokens of a training step, sequences of a decode step and their longest: divisible by 16, and not.
TOKENS, BATCHES, LONGEST, PAGE = (4096, 4097), (1, 32, 256), (512, 2048, 8192), 64


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
        found = [(case, config) for case in cases(list(OPERATIONS), GPU) for config in own_configs(case, GPU).values()]
    for case, config in found:
        if config:
            with use_config("attention_forward", **config):
                yield from tune_targets.launches(case, arch)
        else:
            yield from tune_targets.launches(case, arch)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def training(arch: int) -> Iterator[Launch]:
    """A supervised training step of the 7B shapes: a block forward and backward, the loss, AdamW in each form."""
    for tokens in TOKENS:
        with use_arch(arch), record() as made:
            _block(PRESETS["7b"], tokens)
            _loss(PRESETS["7b"], tokens)
            _update(tokens * tokens)
        yield from made


def _block(config: ModelConfig, tokens: int) -> None:
    """Kernels of a block over a packed row, on views of one product as the model makes them."""
    from kernels._attention_backward import attention_backward
    from kernels._attention_forward import attention_forward
    from kernels._rms_norm import rms_norm_backward, rms_norm_forward
    from kernels._swiglu import swiglu_backward, swiglu_forward

    x_TD, weight = _meta(tokens, config.width, dtype=DTYPE), _meta(config.width, dtype=DTYPE)
    marks = _meta(2, dtype=torch.int32)
    for residual in (None, x_TD):
        _, stream, rstd = rms_norm_forward(x_TD, weight, config.norm_epsilon, residual)
        rms_norm_backward(x_TD, residual, x_TD if residual is None else stream, weight, rstd)
    q_THC, k_TKC, v_TKC = _rotated(config, tokens, inverse=False)
    options = True, config.window, config.head_width**-0.5
    out, lse = attention_forward(q_THC, k_TKC, v_TKC, marks, marks, *options)
    attention_backward(out, q_THC, k_TKC, v_TKC, out, lse, marks, marks, *options)
    _rotated(config, tokens, inverse=True)
    gate_up = _meta(tokens, 2 * config.ffn_width, dtype=DTYPE)
    swiglu_backward(swiglu_forward(gate_up), gate_up)


def _rotated(config: ModelConfig, tokens: int, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    from kernels._rope import rope_forward

    heads = _meta(tokens, config.heads + 2 * config.kv_heads, config.head_width, dtype=DTYPE)
    q_THC, k_TKC, v_TKC = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
    angles = _meta(tokens, config.head_width // 2, dtype=torch.float32)
    return *rope_forward(q_THC, k_TKC, angles, angles, None, inverse), v_TKC


def _loss(config: ModelConfig, tokens: int) -> None:
    from kernels._linear_logprob import linear_logprob_gradients, linear_logprob_statistics

    hidden, weight = _meta(tokens, config.width, dtype=DTYPE), _meta(config.vocab_size, config.width, dtype=DTYPE)
    targets, upstream = _meta(tokens, dtype=torch.int64), _meta(tokens, dtype=torch.float32)
    for entropy in (False, True):
        found = linear_logprob_statistics(hidden, weight, targets, 1.0, entropy, 0)
        second = upstream if entropy else None
        linear_logprob_gradients(upstream, second, hidden, weight, targets, found, 1.0, 0, True, True)


def _update(count: int) -> None:
    from kernels._adamw import adamw_step

    state = [_meta(count, dtype=torch.float32) for _ in range(3)]
    copy, scale = _meta(count, dtype=DTYPE), _meta(1, dtype=torch.float32)
    for grads in (_meta(count, dtype=torch.float32), copy):
        for out, factor in itertools.product((copy, None), (scale, None)):
            adamw_step(*state, grads, 1e-4, 0.9, 0.95, 1e-8, 0.1, 10, factor, out)


def decoding(arch: int) -> Iterator[Launch]:
    """Decode steps of the 7B shapes: the block at each batch, attention over pages at each length, sampling."""
    for batch in BATCHES:
        with use_arch(arch), record() as made:
            _decode(PRESETS["7b"], batch)
            _draw(PRESETS["7b"], batch)
        yield from made


def _decode(config: ModelConfig, batch: int) -> None:
    from kernels._decode_attention import decode_attention
    from kernels._rms_norm import rms_norm_forward
    from kernels._swiglu import swiglu_forward

    x_TD, weight = _meta(batch, config.width, dtype=DTYPE), _meta(config.width, dtype=DTYPE)
    for residual in (None, x_TD):
        rms_norm_forward(x_TD, weight, config.norm_epsilon, residual)
    swiglu_forward(_meta(batch, 2 * config.ffn_width, dtype=DTYPE))
    q_THC, _, _ = _rotated(config, batch, inverse=False)
    pages = _meta(256, PAGE, config.kv_heads, config.head_width, dtype=DTYPE)
    for longest in LONGEST:
        table, lengths = _meta(batch, longest // PAGE, dtype=torch.int32), _meta(batch, dtype=torch.int32)
        decode_attention(q_THC, pages, pages, table, lengths, longest, config.window, config.head_width**-0.5)


def _draw(config: ModelConfig, batch: int) -> None:
    from kernels._sample import sample_rows

    seeds, numbers = _meta(batch, dtype=torch.int64), _meta(batch, dtype=torch.float32)
    counts = _meta(batch, dtype=torch.int32)
    for dtype in (torch.float32, DTYPE):
        logits = _meta(batch, config.vocab_size, dtype=dtype)
        sample_rows(logits, seeds, None, numbers, None, None)
        sample_rows(logits, seeds, None, numbers, counts, numbers)


# The most valuable first.
SOURCES: dict[str, Callable[[int], Iterator[Launch]]] = {
    "training": training, "decoding": decoding, "losses": losses, "measured": measured, "entries": entries,
}  # fmt: skip


def launches(arch: int, names: Sequence[str] = tuple(SOURCES)) -> Iterator[Launch]:
    """The launches of the sources named, one source behind the other."""
    for name in names:
        yield from SOURCES[name](arch)
