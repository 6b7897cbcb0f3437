"""Triton attention, in the interpreter or on a GPU, against a loop over sequences and heads in float64."""

import contextlib
import math

import pytest
import torch
from closeness import check, scaled
from table_entries import distinct_entries

import kernels
from kernels.attention import attention
from kernels.configuration import use_arch, use_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 products are silently wrong in the interpreter.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LENGTHS = [1, 32, 33, 0, 67, 16]
ROWS = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


@contextlib.contextmanager
def small_tiles(variant="rotated", tma=True, **rows):
    """Tiles of 32 queries and 16 keys (backward of keys: 16 and 32), so that short sequences have many blocks."""
    config = ROWS | {"TMA": tma} | rows
    swapped = config | {"BLOCK_M": config["BLOCK_N"], "BLOCK_N": config["BLOCK_M"]}
    with (
        kernels.use_backend("triton"),
        use_config("attention_forward", VARIANT=variant, **config),
        use_config("attention_backward_kv", **swapped),
        use_config("attention_backward_q", **config),
    ):
        yield


def sequences(lengths, key_lengths, causal, window):
    """Of every sequence: rows of its queries and keys, mask of what is seen (key 0 by queries that see nothing), and
    the queries that see nothing; the last query is aligned with the last key."""
    start, start_k = 0, 0
    for rows, keys in zip(lengths, key_lengths or lengths):
        i = torch.arange(rows, device=DEVICE)[:, None] + keys - rows
        j = torch.arange(keys, device=DEVICE)[None, :]
        seen = ((j <= i) | (not causal)) & ((j > i - window) if window else torch.ones_like(j > i))
        blind = ~seen.any(-1, keepdim=True) if keys else torch.ones_like(i, dtype=torch.bool)
        yield slice(start, start + rows), slice(start_k, start_k + keys), seen | (blind & (j == 0)), blind
        start, start_k = start + rows, start_k + keys


def slow(q, k, v, lengths, key_lengths=None, causal=True, window=None, scale=0.3):
    """One softmax per sequence, head and query."""
    outputs = []
    for at, at_k, seen, blind in sequences(lengths, key_lengths, causal, window):
        heads = []
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            logits = (q[at, h] @ k[at_k, kv].T) * scale
            probability = logits.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(blind, 0.0)
            heads.append(probability @ v[at_k, kv])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


class Recomputed(torch.autograd.Function):
    """Attention of one head whose backward computes the probabilities again from the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, seen, scale):
        scores = (wide(q) @ wide(k).T * (scale * math.log2(math.e))).masked_fill(~seen, float("-inf"))
        row_max = scores.amax(-1, keepdim=True)
        row_sum = torch.exp2(scores - row_max).sum(-1, keepdim=True)
        out = ((torch.exp2(scores - row_max).to(v.dtype).to(scores.dtype) @ wide(v)) / row_sum).to(v.dtype)
        ctx.save_for_backward(q, k, v, seen, out, row_max + row_sum.log2())
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, seen, out, lse = ctx.saved_tensors
        factor = ctx.scale * math.log2(math.e)
        # The products of a kernel's backward are transposed, so they sum in another order than in its forward.
        half = q.shape[1] // 2
        scores = wide(q[:, half:]) @ wide(k[:, half:]).T + wide(q[:, :half]) @ wide(k[:, :half]).T
        p = torch.exp2(scores * factor - lse).masked_fill(~seen, 0.0)
        delta = (wide(out) * wide(dout)).sum(-1, keepdim=True)
        ds = (p * (wide(dout) @ wide(v).T - delta)).to(q.dtype)
        dq, dk = wide(ds) @ wide(k) * ctx.scale, wide(ds).T @ wide(q) * ctx.scale
        return dq.to(q.dtype), dk.to(k.dtype), (wide(p.to(v.dtype)).T @ wide(dout)).to(v.dtype), None, None


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def recomputed(q, k, v, lengths, key_lengths=None, causal=True, window=None, scale=0.3):
    """The eager form of what the kernels do, in whole sequences: as far off as they may be, times two."""
    outputs = []
    for at, at_k, seen, blind in sequences(lengths, key_lengths, causal, window):
        if not k[at_k].shape[0]:
            outputs.append(q[at] * 0.0)
            continue
        groups = q.shape[1] // k.shape[1]
        heads = [
            Recomputed.apply(q[at, h], k[at_k, h // groups], v[at_k, h // groups], seen, scale)
            for h in range(q.shape[1])
        ]
        outputs.append(torch.stack(heads, 1).masked_fill(blind[..., None], 0.0))
    return torch.cat(outputs)


def marks(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), max(lengths)


def inputs(lengths, key_lengths=None, heads=2, kv_heads=1, width=16, seed=0):
    rows, keys = sum(lengths), sum(key_lengths or lengths)
    drawn = {
        "q": 0.3 * scaled(rows, heads, width, seed=seed),
        "k": 0.3 * scaled(keys, kv_heads, width, seed=seed + 1),
        "v": scaled(keys, kv_heads, width, seed=seed + 2),
    }
    return {name: tensor.to(DEVICE) for name, tensor in drawn.items()}


def compare(lengths, tensors, dtype=torch.float32, key_lengths=None, **options):
    options.setdefault("scale", tensors["q"].shape[-1] ** -0.5)
    local = {} if key_lengths is None else dict(zip(("cu_seqlens_k", "max_seqlen_k"), marks(key_lengths)))
    check(
        lambda q, k, v: attention(q, k, v, *marks(lengths), **local, **options),
        lambda q, k, v: slow(q, k, v, lengths, key_lengths, **options),
        tensors,
        dtype,
        also=lambda q, k, v: recomputed(q, k, v, lengths, key_lengths, **options),
    )


# Catches: `<` for `<=` in is_seen; a missing `- 1` in the window's bound; the last block of a range left out;
# LSE without log2; dK without the scale; the group's second head left out; find_tile one sequence off.
@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (True, 40), (False, 21)])
@pytest.mark.parametrize(("variant", "tma"), [("rotated", True), ("plain", False)])
def test_attention_equals_a_loop(variant, tma, causal, window, dtype):
    with small_tiles(variant, tma):
        compare(LENGTHS, inputs(LENGTHS), dtype, causal=causal, window=window, scale=0.3)


@pytest.mark.parametrize(("variant", "tma"), [("plain", True), ("rotated", False)])
def test_attention_in_other_forms_equals_a_loop(variant, tma):
    with small_tiles(variant, tma):
        compare(LENGTHS, inputs(LENGTHS), torch.float16, window=24)


# Catches: keys aligned with the first query instead of the last; a row that is blind through two blocks (45 on 37) as
# NaN where a causal mask alone hides its keys.
@pytest.mark.every(2)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 7)])
@pytest.mark.parametrize("variant", ["rotated", "plain"])
def test_attention_of_other_keys_than_queries(variant, causal, window):
    lengths, key_lengths = [5, 40, 33, 3, 0, 17, 45], [37, 5, 33, 0, 12, 70, 37]
    tensors = inputs(lengths, key_lengths)
    with small_tiles(variant):
        compare(lengths, tensors, key_lengths=key_lengths, causal=causal, window=window)
    with kernels.use_backend("reference"):
        compare(lengths, tensors, key_lengths=key_lengths, causal=causal, window=window)


def test_attention_rows_without_keys_are_zero_and_give_no_gradient():
    leaves = [t.float().requires_grad_() for t in inputs([9, 4], [3, 0]).values()]
    cu, longest = marks([9, 4])
    cu_k, longest_k = marks([3, 0])
    with small_tiles():
        out = attention(*leaves, cu, longest, cu_seqlens_k=cu_k, max_seqlen_k=longest_k)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    blind = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert not out[blind].any() and not grads[0][blind].any() and out[6:9].all()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("width", [8, 24, 64, 80, 96, 128, 256])
def test_attention_of_every_head_width(width):
    lengths = [35, 1]
    with small_tiles("rotated" if width <= 128 else "plain"):
        compare(lengths, inputs(lengths, heads=1, width=width), torch.float16)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_attention_groups_query_heads(heads, kv_heads):
    with small_tiles():
        compare([20, 9], inputs([20, 9], heads=heads, kv_heads=kv_heads))


def entries():
    """Classes of the tables and their architectures, each program once."""
    return [
        pytest.param(arch, shape, id=f"sm{arch}-{shape['width']}-{8 * shape['bytes']}bit")
        for arch, shape in distinct_entries("attention_forward", "attention_backward_kv", "attention_backward_q")
    ]


@pytest.mark.every(6)
@pytest.mark.parametrize(("arch", "shape"), entries())
def test_attention_is_right_with_every_table_entry(arch, shape):
    if DEVICE == "cuda" and arch > 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip(f"the entries of sm_{arch} are for a newer GPU")
    lengths = [129, 2, 70]
    with kernels.use_backend("triton"), use_arch(arch):
        tensors = inputs(lengths, heads=2, width=shape["width"])
        for dtype in DTYPES:
            if dtype.itemsize == shape["bytes"]:
                compare(lengths, tensors, dtype, window=100)


@pytest.mark.parametrize("variant", ["rotated", "plain"])
def test_attention_of_integers_is_exact(variant):
    """Scores that are all equal give the mean of 2^n values; scores far apart give the one value they select."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(-8, 9, (64, 1, 64), generator=generator).half().to(DEVICE)
    zero = torch.zeros(64, 2, 64, dtype=torch.float16, device=DEVICE)
    cu = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    with kernels.use_backend("triton"), small_tiles(variant):
        mean = attention(zero, zero[:, :1], v.requires_grad_(), cu, 64, causal=False)
        (dv,) = torch.autograd.grad(mean.sum(), v)
        assert torch.equal(mean, v.mean(0, keepdim=True).expand(64, 2, 64))
        assert torch.equal(dv, torch.full_like(dv, 2.0))
        chosen = torch.stack([torch.randint(0, i + 1, (), generator=generator) for i in range(64)]).to(DEVICE)
        unit = torch.eye(64, dtype=torch.float16, device=DEVICE)[:, None]
        q = 2000 * unit[chosen].expand(64, 2, 64)
        assert torch.equal(attention(q, unit, v, cu, 64), v[chosen].expand(64, 2, 64))


# Catches: a descriptor's tail rows taken as they are (0 x NaN), padding rows left unwritten.
@pytest.mark.every(2)
@pytest.mark.parametrize(("variant", "tma"), [("rotated", True), ("plain", True), ("plain", False)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_keeps_nan_of_neighbours_and_padding_out(variant, tma, causal):
    lengths, kept = [20, 41, 19], [*range(20), *range(61, 80)]
    clean = {name: t.float() for name, t in inputs([*lengths, 30]).items()}
    cu, longest = marks(lengths)
    result = []
    for poison in (0.0, float("nan")):
        leaves = []
        for tensor in clean.values():
            copy = tensor.clone()
            copy[20:61] += poison
            copy[80:] += poison
            leaves.append(copy.requires_grad_())
        with small_tiles(variant, tma):
            out = attention(*leaves, cu, longest, causal=causal)
        cotangent = torch.full_like(out, poison)
        cotangent[kept] = out.detach()[kept].sin()
        grads = torch.autograd.grad(out, leaves, cotangent)
        assert not out[80:].any() and not any(g[80:].any() for g in grads)
        result.append([x[kept] for x in (out, *grads)])
    for a, b in zip(*result):
        assert torch.isfinite(b).all() and torch.equal(a, b)


def test_attention_takes_strided_inputs_and_repeats_bits():
    joined = scaled(80, 6, 64, seed=3).half().to(DEVICE)
    strided = joined[:, :2], joined[:, 2:3], joined[:, 3:4]
    runs = []
    with small_tiles():
        for inputs in (strided, strided, [x.contiguous() for x in strided]):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attention(*leaves, *marks([33, 47]))
            runs.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


def test_attention_of_unaligned_rows_does_without_descriptors():
    joined = scaled(40, 4, 17, seed=3).half().to(DEVICE)
    views = joined[:, :2, 1:], joined[:, 2:3, 1:], joined[:, 3:4, 1:]
    with small_tiles():
        out = attention(*views, *marks([40]), scale=0.3)
        assert torch.equal(out, attention(*(x.contiguous() for x in views), *marks([40]), scale=0.3))


def test_attention_of_nothing():
    for rows, keys in ((0, 0), (0, 7), (7, 0)):
        leaves = [
            torch.ones(n, heads, 16, device=DEVICE, requires_grad=True)
            for n, heads in ((rows, 2), (keys, 1), (keys, 1))
        ]
        cu, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (rows, keys))
        with small_tiles():
            out = attention(*leaves, cu, rows, cu_seqlens_k=cu_k, max_seqlen_k=keys)
        out.sum().backward()
        assert out.shape == (rows, 2, 16) and not out.any()
        assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def far_apart(rows, heads, width, seed):
    """(rows, heads, width) fp16 whose rows stand 2^30 elements apart; only their own pages are ever touched."""
    step = 2**30
    strided = torch.empty((rows - 1) * step + heads * width, dtype=torch.float16, device=DEVICE)
    strided = strided.as_strided((rows, heads, width), (step, width, 1))
    return strided.copy_(scaled(rows, heads, width, seed=seed))


# Catches: 32-bit row offsets in load_rows.
@pytest.mark.parametrize("tma", [False, True])
def test_attention_reads_rows_beyond_2_31_elements(tma):
    leaves = [far_apart(4, heads, 16, seed).requires_grad_() for seed, heads in enumerate((2, 1, 1))]
    near = [x.detach().contiguous().requires_grad_() for x in leaves]
    results = []
    for tensors in (leaves, near):
        with small_tiles("plain", tma, BLOCK_M=16):
            out = attention(*tensors, *marks([1, 3]))
            results.append((out, *torch.autograd.grad(out, tensors, far_apart(4, 2, 16, 9))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


# Catches: 32-bit row offsets in store_rows.
def test_attention_writes_rows_beyond_2_31_elements():
    """The only sequence stands behind row 2^26 of heads of 2 x 16; programs start with the last tile slots."""
    from kernels._attention_forward import attention_forward
    from kernels.launch import record

    start, heads, width = 2**26 + 64, 2, 16
    drawn = inputs([3], heads=heads, width=width)
    q = torch.empty(start + 3, heads, width, dtype=torch.float16, device=DEVICE)
    q[start:] = drawn["q"]
    k, v = (drawn[name].half() for name in "kv")
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([start, start + 3], [0, 3]))
    with small_tiles("plain", False), record() as launches:
        out, lse = attention_forward(q, k, v, cu_q, cu_k, True, None, 0.3)
    launches[0].kernel[(2 * heads,)](*launches[0].arguments, **launches[0].options)
    with small_tiles("plain", False):
        near = attention(q[start:], k, v, cu_k, 3, scale=0.3)
    assert out.numel() > 2**31 and torch.equal(out[start:], near) and torch.isfinite(lse[:, 2**26 : 2**26 + 3]).all()


def test_attention_traces_without_a_graph_break():
    tensors = [t.half().requires_grad_() for t in inputs([20, 9], width=64).values()]
    cu, longest = marks([20, 9])

    def twice(q, k, v):
        return attention(q, k, v, cu, longest).float().sin().sum()

    with small_tiles():
        traced = torch.compile(twice, fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(traced(*tensors), tensors)
        expected = torch.autograd.grad(twice(*tensors), tensors)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.fromkeys("qkv", torch.float64), r"q: expected dtype float32, float16, bfloat16, got float64"),
        ({"k": torch.float16}, r"k: expected the dtype of q, torch.float32, got torch.float16"),
        ({"cu": [1, 4]}, r"cu_seqlens: expected 0 first, got 1"),
        ({"cu": [0, 3, 2]}, r"cu_seqlens: expected marks that do not decrease, got 3, 2 at 1"),
        ({"cu": [0, 9]}, r"cu_seqlens: expected at most 8 \(the tokens\) last, got 9"),
        ({"cu": [0, 8], "longest": 7}, r"cu_seqlens: expected sequences of at most 7 \(max_seqlen\), got one of 8"),
        ({"cu": [0.0, 8.0]}, r"cu_seqlens: expected int32, got float32; use .int\(\)"),
        ({"window": 0}, r"window: expected at least 1 or None, got 0"),
        ({"scale": 0.0}, r"scale: expected > 0, got 0.0"),
        ({"transposed": True}, r"q: expected a contiguous last dim, got strides"),
        ({"width": 257}, r"q: expected heads of at most 256 elements, got 257"),
        ({"keys": [0, 8]}, r"max_seqlen_k: expected the longest key sequence beside cu_seqlens_k, got None"),
        ({"keys": [0, 4, 8]}, r"cu_seqlens_k: expected \(2,\), got \(3,\)|max_seqlen_k"),
    ],
)
def test_attention_refuses(change, message):
    width = change.get("width", 8)
    tensors = {name: torch.zeros(8, 1, width, device=DEVICE, dtype=change.get(name, torch.float32)) for name in "qkv"}
    if change.get("transposed"):
        tensors["q"] = tensors["q"].transpose(0, 2)
    cu = torch.tensor(change.get("cu", [0, 8]), device=DEVICE)
    cu = cu if cu.is_floating_point() else cu.int()
    options = {name: change[name] for name in ("window", "scale") if name in change}
    if "keys" in change:
        options["cu_seqlens_k"] = torch.tensor(change["keys"], dtype=torch.int32, device=DEVICE)
        if len(change["keys"]) == 3:
            options["max_seqlen_k"] = 4
    with kernels.use_backend("triton"), kernels.check_values(), pytest.raises(ValueError, match=message):
        attention(*tensors.values(), cu, change.get("longest", 8), **options)


def test_backends_are_named_and_the_triton_one_needs_a_gpu_or_the_interpreter(monkeypatch):
    with (
        pytest.raises(ValueError, match="backend: expected reference or triton, got 'cuda'"),
        kernels.use_backend("cuda"),
    ):
        pass
    monkeypatch.setattr("kernels.backend.is_interpreted", lambda: False)
    x = torch.zeros(4, 1, 8)
    with (
        kernels.use_backend("triton"),
        pytest.raises(ValueError, match=r"q: expected a CUDA tensor .* TRITON_INTERPRET=1"),
    ):
        attention(x, x, x, torch.tensor([0, 4], dtype=torch.int32), 4)
