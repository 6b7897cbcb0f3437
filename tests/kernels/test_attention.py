"""Attention of packed sequences against a loop over sequences and heads."""

import pytest
import torch
import torch.nn.functional as F
from closeness import check, scaled

from kernels import attention as module
from kernels.attention import attention

LENGTHS = {"one": [1], "odd": [7, 1, 13], "empty": [0, 5, 0, 3, 0], "long": [31, 2]}


def slow(q, k, v, lengths, causal, window, scale):
    """One softmax per sequence, head and query."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs, start = [], 0
    groups = q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (j <= i) | (not causal)
        seen = seen if window is None else seen & (j > i - window)
        heads = []
        for h in range(q.shape[1]):
            logits = (q[rows, h] @ k[rows, h // groups].T) * scale
            heads.append(logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v[rows, h // groups])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


def eager(q, k, v, lengths, causal, window, scale):
    """torch's own attention of each sequence."""
    outputs = []
    for rows in torch.arange(sum(lengths)).split(lengths):
        i, j = torch.arange(len(rows))[:, None], torch.arange(len(rows))[None, :]
        seen = (j <= i) | (not causal)
        seen = seen if window is None else seen & (j > i - window)
        heads = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def compare(lengths, tensors, dtype=torch.float32, causal=True, window=None, scale=0.3):
    options = {"causal": causal, "window": window, "scale": scale}
    check(
        lambda q, k, v: attention(q, k, v, *marks(lengths), **options),
        lambda q, k, v: slow(q, k, v, lengths, **options),
        tensors,
        dtype,
        also=lambda q, k, v: eager(q, k, v, lengths, **options),
    )


def inputs(lengths, heads=4, kv_heads=2, width=6, seed=0):
    tokens = sum(lengths)
    return {
        "q": 0.3 * scaled(tokens, heads, width, seed=seed),
        "k": 0.3 * scaled(tokens, kv_heads, width, seed=seed + 1),
        "v": scaled(tokens, kv_heads, width, seed=seed + 2),
    }


def marks(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


@pytest.fixture(params=["short", "general"])
def path(request, monkeypatch):
    """Both ways through the CPU: explicit probabilities, and the padded reference."""
    if request.param == "general":
        monkeypatch.setattr(module, "SHORT_PROBABILITIES", -1)
    return request.param


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 3])
def test_attention_equals_a_loop(path, lengths, causal, window):
    compare(lengths, inputs(lengths), causal=causal, window=window)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_with_a_window_of_one_is_the_value_itself(path, lengths):
    """One key has probability 1 whatever its score: the gradients of q and k are 0, up to what cancels in fp32."""
    leaves = [tensor.float().requires_grad_() for tensor in inputs(lengths).values()]
    out = attention(*leaves, *marks(lengths), window=1)
    assert torch.equal(out, leaves[2].repeat_interleave(2, dim=1))
    dq, dk, dv = torch.autograd.grad((out * out.detach()).sum(), leaves)
    torch.testing.assert_close(dv, 2 * leaves[2].detach())
    unit = 4 * 2.0**-23 * float(leaves[2].detach().norm(dim=-1).max()) ** 2
    assert float(dq.abs().max()) <= unit * float(leaves[1].detach().abs().max())
    assert float(dk.abs().max()) <= 2 * unit * float(leaves[0].detach().abs().max())


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_attention_groups_query_heads(path, kv_heads):
    compare([5, 9], inputs([5, 9], heads=6, kv_heads=kv_heads), scale=None)


def test_attention_of_bfloat16(path):
    compare([5, 9], inputs([5, 9]), torch.bfloat16)


def test_attention_of_nothing(path):
    tensors = [torch.zeros(0, n, 4, requires_grad=True) for n in (2, 1, 1)]
    out = attention(*tensors, torch.tensor([0, 0], dtype=torch.int32), 0)
    out.sum().backward()
    assert out.shape == (0, 2, 4) and all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_keeps_a_neighbour_of_nan_out(path, causal):
    """A sequence of NaN, and the padding that its greater length makes, reach neither results nor gradients."""
    lengths, kept = [3, 11, 5], [0, 1, 2, *range(14, 19)]
    clean = {name: t.float() for name, t in inputs(lengths).items()}
    poisoned = {name: t.clone() for name, t in clean.items()}
    for tensor in poisoned.values():
        tensor[3:14] = float("nan")
    result = []
    for tensors in (clean, poisoned):
        leaves = [t.requires_grad_() for t in tensors.values()]
        out = attention(*leaves, *marks(lengths), causal=causal)[kept]
        result.append([out, *(g[kept] for g in torch.autograd.grad(out.sin().sum(), leaves))])
    for a, b in zip(*result):
        assert torch.isfinite(b).all() and torch.equal(a, b)


def test_attention_takes_strided_inputs_and_repeats_bits(path):
    lengths = [6, 2]
    joined = scaled(8, 8, 6, seed=3).float()
    views = joined[:, :4], joined[:, 4:6], joined[:, 6:]
    strided = attention(*views, *marks(lengths))
    assert torch.equal(strided, attention(*(p.contiguous() for p in views), *marks(lengths)))
    assert torch.equal(strided, attention(*views, *marks(lengths)))


@pytest.mark.parametrize(
    ("shapes", "cu", "message"),
    [
        (((4, 2, 3), (4, 2, 3), (4, 1, 3)), [0, 4], r"q, k, v: expected \(T, H, C\)"),
        (((4, 2, 3), (5, 2, 3), (5, 2, 3)), [0, 4], r"q, k, v: expected"),
        (((4, 6), (4, 6), (4, 6)), [0, 4], r"q, k, v: expected"),
        (((4, 3, 3), (4, 2, 3), (4, 2, 3)), [0, 4], r"must divide the query heads: got 2 and 3"),
        (((4, 2, 3), (4, 2, 3), (4, 2, 3)), [0], r"cu_seqlens: expected \(S \+ 1,\), got \(1,\)"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, cu, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes), torch.tensor(cu, dtype=torch.int32), 4)
