"""A block's sums with the residual stream: the same numbers as of sums apart from the norms, and fewer launches."""

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from closeness import scaled
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import use_backend
from kernels.attention import attention
from kernels.launch import record
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.model.mixture import Mixture
from wizard_engine.parallel.recompute import recompute_block

TINY = dataclasses.replace(PRESETS["tiny"], layers=3)
CONFIGS = {
    "tied": TINY,
    "window": dataclasses.replace(TINY, tied=False, window=5),
    "mixture": dataclasses.replace(TINY, experts=4, tied=False),
}
LENGTHS = [0, 7, 8, 20]


def plain_forward(model, tokens, positions, cu_seqlens, longest):
    """The model written out: each sum on its own, q, k and v sliced, nothing computed again."""
    c = model.config
    cos, sin = rope_tables(positions, c.head_width, c.rope_base)
    x = F.embedding(tokens, model.embedding.weight)
    for block in model.blocks:
        heads = F.linear(rms_norm(x, block.attention_norm.weight, c.norm_epsilon), block.attention.qkv.weight)
        q, k, v = heads.view(len(tokens), -1, c.head_width).split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        out = attention(*rope(q, k, cos, sin), v, cu_seqlens, longest, window=c.window)
        x = x + F.linear(out.reshape(len(tokens), -1), block.attention.out.weight)
        y = rms_norm(x, block.feed_forward_norm.weight, c.norm_epsilon)
        if isinstance(block.feed_forward, Mixture):
            x = x + block.feed_forward(y)
        else:
            x = x + F.linear(swiglu(F.linear(y, block.feed_forward.gate_up.weight)), block.feed_forward.down.weight)
    return rms_norm(x, model.norm.weight, c.norm_epsilon)


def inputs():
    cu_seqlens = torch.tensor(LENGTHS, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(LENGTHS)])
    tokens = torch.randint(0, TINY.vocab_size, (LENGTHS[-1],), generator=torch.Generator().manual_seed(3))
    return tokens, positions, cu_seqlens, 12


def results(forward, model, dtype):
    """Hidden states and the gradient of every parameter that trains."""
    model.zero_grad()
    hidden = forward(*inputs())
    hidden.backward(scaled(*hidden.shape, seed=4).to(dtype))
    return [hidden.detach(), *(p.grad for n, p in model.named_parameters() if p.requires_grad and n != "head.weight")]


# Catches: a delta that is added twice or left out, normed rows of the summand instead of the sum, a stream's gradient
# that does not pass the norm.
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_give_the_bits_of_sums_apart(name, dtype, recompute):
    model = Transformer(CONFIGS[name], seed=5).to(dtype)
    expected = results(lambda *row: plain_forward(model, *row), model, dtype)
    for block in model.blocks:
        recompute_block(block, recompute)
    actual = results(model, model, dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(model(*inputs()), expected[0])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("frozen", ["attention_norm", "blocks.0", "blocks.1.feed_forward", "embedding"])
def test_frozen_weights_do_not_change_the_other_gradients(frozen, recompute):
    model = Transformer(CONFIGS["window"], seed=5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    expected = results(lambda *row: plain_forward(model, *row), model, torch.float32)
    for block in model.blocks:
        recompute_block(block, recompute)
    actual = results(model, model, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_stream_and_summand_apart_serve_one_block():
    model = Transformer(TINY, seed=1)
    block, (tokens, positions, cu_seqlens, longest) = model.blocks[1], inputs()
    tables = rope_tables(positions, TINY.head_width, TINY.rope_base)
    x, delta = (scaled(len(tokens), TINY.width, seed=seed).float() for seed in (1, 2))
    with torch.no_grad():
        apart = block(x, delta, *tables, cu_seqlens, longest)
        summed = block(x + delta, None, *tables, cu_seqlens, longest)
        assert all(torch.equal(a, b) for a, b in zip(apart, summed))
        qkv, stream = block.projected(x, delta)
        assert torch.equal(qkv, block.projected(x + delta)) and torch.equal(stream, x + delta)


# Operators that launch nothing.
FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "detach",
    "split_with_sizes",
    "slice",
    "as_strided",
    "select",
    "unsqueeze",
    "expand",
    "alias",
    "empty",
    "new_empty",
    "permute",
    "reshape",
    "split",
    "empty_like",
}


class Operators(TorchDispatchMode):
    """Torch operators that launch something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace == "wizard_engine":
            # On the meta device an operation stops at its shapes; what it launches is wanted.
            return OPDEFS[f"wizard_engine::{name}"]._init_fn(*args, **(kwargs or {}))
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counted(run):
    """Launches of the engine's kernels and of torch's operators, by name."""
    with record() as made, Operators() as operators:
        out = run()
    return out, Counter(launch.kernel.__name__ for launch in made) + operators.counts


def launches(recompute, config=PRESETS["7b"], tokens=64):
    """Those of a block's forward, and of its backward."""
    config = dataclasses.replace(config, layers=2, vocab_size=64)
    with torch.device("meta"), use_backend("triton"):
        block = Transformer(config).blocks[1].bfloat16()
        recompute_block(block, recompute)
        x, delta = (torch.empty(tokens, config.width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        tables = [torch.empty(tokens, config.head_width // 2) for _ in range(2)]
        marks = torch.empty(2, dtype=torch.int32)
        out, forward = counted(lambda: block(x, delta, *tables, marks, tokens))
        grads = [torch.empty(tokens, config.width, dtype=torch.bfloat16) for _ in range(2)]
        _, backward = counted(lambda: torch.autograd.grad(out, [x, delta, *block.parameters()], grads))
    return forward, backward


# Catches: a sum of the stream on its own, gradients of q, k and v copied or concatenated, products made again.
def test_launches_of_a_dense_block_are_few():
    attention_names = {f"attention_{name}_kernel" for name in ("forward", "delta", "backward_kv", "backward_q")}
    for recompute, others in (("none", 6), ("selective", 9)):
        forward, backward = launches(recompute)
        print(recompute, dict(forward), dict(backward))
        assert forward["mm"] == 4 and backward["mm"] == 8
        assert forward["attention_forward_kernel"] == 1
        assert sum(backward[name] for name in attention_names) == 3
        rest = [
            sum(n for name, n in c.items() if name != "mm" and name not in attention_names) for c in (forward, backward)
        ]
        assert rest == [4, others]
    forward, backward = launches("full")
    assert not {"add", "cat", "clone", "copy_"} & {*forward, *backward}, (forward, backward)
    assert sum(forward.values()) == 9


# Catches: a last norm that takes a sum made before it.
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_adds_to_its_stream_nowhere_apart(recompute):
    config = dataclasses.replace(PRESETS["7b"], layers=2, vocab_size=64, tied=False)
    with torch.device("meta"), use_backend("triton"):
        model = Transformer(config).bfloat16()
        for block in model.blocks:
            recompute_block(block, recompute)
        ids, marks = torch.empty(64, dtype=torch.int64), torch.empty(2, dtype=torch.int32)
        hidden, forward = counted(lambda: model(ids, ids, marks, 64))
        weights = [p for n, p in model.named_parameters() if n != "head.weight"]
        _, backward = counted(lambda: torch.autograd.grad(hidden, weights, torch.empty_like(hidden)))
    assert forward["add"] == 0 and forward["rms_norm_forward_kernel"] == 2 * config.layers + 1
    # The first block's stream has a norm and a sum that take it, and no delta.
    assert backward["add"] == 1
