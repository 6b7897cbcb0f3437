"""Triton kernels of RMS norm, rotary embedding, SwiGLU and AdamW, in the interpreter or on a GPU, against formulas."""

import pytest
import torch
from closeness import assert_close, check, scaled
from table_entries import distinct_entries

import kernels
from kernels.adamw import adamw, adamw_reference
from kernels.configuration import use_arch, use_config
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_of_product, rope_tables
from kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 arithmetic is silently wrong in the interpreter.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def triton_backend():
    """Every test of this file runs the kernels."""
    with kernels.use_backend("triton"):
        yield


def drawn(*shape, seed=0, least=1):
    """Numbers with mixed row scales; a first dim of 0 gives none."""
    return scaled(max(shape[0], least), *shape[1:], seed=seed)[: shape[0]].to(DEVICE)


def entries(kernel):
    """(arch, class) of a table, each program of a class once."""
    return [
        pytest.param(arch, shape, id=f"sm{arch}-" + "-".join(str(value) for value in shape.values()))
        for arch, shape in distinct_entries(kernel)
    ]


def runs_here(arch):
    if DEVICE == "cuda" and arch > 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip(f"the entries of sm_{arch} are for a newer GPU")


def far_apart(rows, width, seed):
    """(rows, width) fp16 whose rows stand 2^30 elements apart; only their own pages are ever touched."""
    step = 2**30
    strided = torch.empty((rows - 1) * step + width, dtype=torch.float16, device=DEVICE)
    return strided.as_strided((rows, width), (step, 1)).copy_(scaled(rows, width, seed=seed))


def results(function, *tensors):
    """Outputs and gradients; the cotangents depend on shapes alone."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [scaled(*out.shape, seed=5 + n).to(out) for n, out in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, leaves, cotangents)]


def same_bits(ours, theirs):
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def plain_norm(x, weight, residual=None, epsilon=1e-5):
    stream = x if residual is None else x + residual
    normed = wide(stream) / (wide(stream).pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    y = normed.to(x.dtype) * weight
    return y if residual is None else (y, stream)


def norm_inputs(rows, width, residual, seed=0):
    tensors = {"x": drawn(rows, width, seed=seed), "weight": scaled(width, seed=9).to(DEVICE)}
    return tensors | ({"residual": drawn(rows, width, seed=seed + 1)} if residual else {})


def check_norm(rows, width, residual, dtype, seed=0):
    check(
        lambda x, weight, residual=None: rms_norm(x, weight, residual=residual),
        plain_norm,
        norm_inputs(rows, width, residual, seed),
        dtype,
    )


# Catches: the mean over the padded width; dstream left out of dx; the last program's partial row left out of dweight.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (2, 31), (129, 16), (67, 64), (5, 1000), (3, 4096)])
def test_rms_norm_equals_its_formula(rows, width, residual, dtype):
    check_norm(rows, width, residual, dtype)


def norm_classes():
    both = {}
    for kernel in ("rms_norm_forward", "rms_norm_backward"):
        both |= {parameter.id: parameter for parameter in entries(kernel)}
    return list(both.values())


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), norm_classes())
def test_rms_norm_is_right_with_every_table_entry(arch, shape):
    runs_here(arch)
    dtypes = [dtype for dtype in DTYPES if dtype.itemsize == shape["bytes"]]
    rows = 19 if shape["width"] <= 1024 else 7
    with use_arch(arch):
        check_norm(rows, shape["width"] - (shape["width"] > 256), True, dtypes[-1], seed=2)


def test_rms_norm_of_signs_is_exact_and_repeats_bits():
    x = torch.randint(0, 2, (50, 64), generator=torch.Generator().manual_seed(0)).half().to(DEVICE) * 2 - 1
    weight = torch.arange(64, device=DEVICE).half()
    assert torch.equal(rms_norm(x, weight, 0.0), x * weight)
    runs = [results(rms_norm, drawn(300, 96).half(), scaled(96, seed=1).half().to(DEVICE)) for _ in range(2)]
    same_bits(*runs)


def test_rms_norm_nan_affects_only_its_row():
    x = drawn(40, 48).float()
    weight = torch.ones(48, device=DEVICE)
    clean = results(lambda x: rms_norm(x, weight), x)
    x[7] = float("nan")
    y, dx = results(lambda x: rms_norm(x, weight), x)
    kept = [i for i in range(40) if i != 7]
    assert torch.equal(y[kept], clean[0][kept]) and torch.equal(dx[kept], clean[1][kept]) and y[7].isnan().all()


def test_rms_norm_takes_strides_and_rows_beyond_2_31_elements():
    far, weight = far_apart(4, 64, 0), scaled(64, seed=1).half().to(DEVICE)
    same_bits(results(rms_norm, far, weight), results(rms_norm, far.contiguous(), weight))
    both = lambda x, w: rms_norm(x, w, residual=x)  # noqa: E731
    same_bits(results(both, far, weight), results(both, far.contiguous(), weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight: expected \(4,\), got \(3,\)"),
        ({"x": torch.zeros(2, 4).double(), "weight": torch.zeros(4).double()}, "x: expected dtype"),
        ({"weight": torch.zeros(4, dtype=torch.float16)}, "weight: expected the dtype of x"),
        ({"x": torch.zeros(4, 2).T}, "x: expected a contiguous last dim"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x: expected a float dtype, got int32"),
        ({"residual": torch.zeros(3, 4)}, r"residual: expected \(2, 4\), got \(3, 4\)"),
        ({"epsilon": -1.0}, "epsilon: expected >= 0, got -1.0"),
        ({"x": torch.zeros(2, 16385), "weight": torch.zeros(16385)}, "x: expected rows of at most 16384 elements"),
    ],
)
def test_rms_norm_refuses(change, message):
    options = {"x": torch.zeros(2, 4), "weight": torch.zeros(4)} | change
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        rms_norm(**options)


def plain_rope(q, k, cos, sin):
    def turned(x):
        first, second = wide(x).chunk(2, -1)
        c, s = cos[:, None].to(first.dtype), sin[:, None].to(first.dtype)
        return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)

    return turned(q), turned(k)


# Catches: the backward turning by the positive angle; the second half's sign; k turned as q's last heads.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(0, 2, 1, 8), (1, 1, 1, 2), (33, 5, 2, 20), (67, 4, 4, 64), (9, 3, 1, 256)],
)
def test_rope_turns_q_and_k(tokens, heads, kv_heads, width, dtype):
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tables = [x.to(DEVICE) for x in rope_tables(torch.arange(50), width, 100.0)]
    local = [x[positions] for x in tables]
    tensors = {"q": drawn(tokens, heads, width), "k": drawn(tokens, kv_heads, width, seed=1)}
    for form in (lambda q, k: rope(q, k, *tables, positions), lambda q, k: rope(q, k, *local)):
        check(form, lambda q, k: plain_rope(q, k, *local), tensors, dtype)


# Catches: v's gradient turned, or put where k's last heads stand; a head of the wrong neighbour's.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"), [(1, 1, 1, 2), (33, 5, 2, 20), (67, 4, 4, 64), (9, 3, 1, 256)]
)
def test_rope_of_a_product_is_that_of_its_slices(tokens, heads, kv_heads, width, dtype):
    tables = [x.to(DEVICE) for x in rope_tables(torch.arange(tokens), width, 100.0)]
    qkv = drawn(tokens, heads + 2 * kv_heads, width).to(dtype)

    def of_slices(qkv):
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        return *rope(q, k, *tables), v

    product = lambda qkv: rope_of_product(qkv, *tables, kv_heads)  # noqa: E731
    same_bits(results(product, qkv), results(of_slices, qkv))
    with kernels.use_backend("reference"):
        same_bits(results(product, qkv), results(of_slices, qkv))
    assert product(qkv)[2].data_ptr() == qkv[:, heads + kv_heads :].data_ptr()


def test_rope_of_a_product_keeps_infinite_gradients_of_v_apart():
    qkv = drawn(3, 4, 8).float().requires_grad_()
    _, _, v = rope_of_product(qkv, *(x.to(DEVICE) for x in rope_tables(torch.arange(3), 8, 100.0)), 1)
    dv = torch.full_like(v, float("inf"))
    dv[:, :, 4:] = 1.0
    (result,) = torch.autograd.grad(v, qkv, dv)
    assert torch.equal(result[:, 3:], dv) and not result[:, :3].any()


@pytest.mark.parametrize(("shape", "kv_heads"), [((3, 2, 8), 1), ((3, 4, 8), 0), ((3, 4, 8), 2), ((3, 32), 1)])
def test_rope_of_a_product_refuses_heads_that_do_not_fit(shape, kv_heads):
    with pytest.raises(ValueError, match=r"qkv: expected \(T, H \+ 2 K, C\) with H, K >= 1, got"):
        rope_of_product(torch.zeros(shape, device=DEVICE), *rope_tables(torch.arange(3), 8, 100.0), kv_heads)


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), entries("rope"))
def test_rope_is_right_with_every_table_entry(arch, shape):
    runs_here(arch)
    dtype = next(dtype for dtype in reversed(DTYPES) if dtype.itemsize == shape["bytes"])
    tables = [x.to(DEVICE) for x in rope_tables(torch.arange(131), 2 * shape["half"], 100.0)]
    tensors = {"q": drawn(131, 5, 2 * shape["half"]), "k": drawn(131, 2, 2 * shape["half"], seed=1)}
    with use_arch(arch):
        check(lambda q, k: rope(q, k, *tables), lambda q, k: plain_rope(q, k, *tables), tensors, dtype)


def test_rope_of_quarter_turns_is_exact_and_takes_strides():
    qkv = torch.randint(-9, 10, (40, 6, 16), generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    q, k = qkv[:, :3], qkv[:, 3:5]
    turns = torch.arange(40, device=DEVICE) % 4
    cos, sin = (
        torch.tensor(x, device=DEVICE)[turns][:, None].expand(40, 8).contiguous()
        for x in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0])
    )
    result = rope(q, k, cos, sin)
    same_bits(result, plain_rope(q, k, cos, sin))
    same_bits(result, rope(q.contiguous(), k.contiguous(), cos, sin))


def test_rope_reads_rows_beyond_2_31_elements():
    tables = [x.to(DEVICE) for x in rope_tables(torch.arange(4), 16, 100.0)]
    q, k = far_apart(4, 64, 0).unflatten(1, (4, 16)), far_apart(4, 32, 1).unflatten(1, (2, 16))
    form = lambda q, k: rope(q, k, *tables)  # noqa: E731
    same_bits(results(form, q, k), results(form, q.contiguous(), k.contiguous()))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 4], r"positions: expected 0 to 3 \(rows of cos\), got 0 to 4"),
        ([0, -1, 2], r"positions: expected 0 to 3 \(rows of cos\), got -1 to 2"),
        ([0, 1], r"positions: expected \(3,\) int32 or int64, got \(2,\)"),
        ([0.0, 1.0, 2.0], r"positions: expected \(3,\) int32 or int64"),
    ],
)
def test_rope_refuses_positions(positions, message):
    tables = [x.to(DEVICE) for x in rope_tables(torch.arange(4), 8, 100.0)]
    x = torch.zeros(3, 1, 8, device=DEVICE)
    with kernels.check_values(), pytest.raises(ValueError, match=message):
        rope(x, x, *tables, torch.tensor(positions, device=DEVICE))


def plain_swiglu(gate_up):
    gate, up = wide(gate_up).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


# Catches: gate and up exchanged in the gradient; a derivative of silu without its second term.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (2, 16), (129, 17), (67, 640), (3, 5000)])
def test_swiglu_equals_its_formula(rows, width, dtype):
    check(swiglu, plain_swiglu, {"gate_up": drawn(rows, 2 * width)}, dtype)


def gate_classes():
    both = {}
    for kernel in ("swiglu_forward", "swiglu_backward"):
        both |= {parameter.id: parameter for parameter in entries(kernel)}
    return list(both.values())


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), gate_classes())
def test_swiglu_is_right_with_every_table_entry(arch, shape):
    runs_here(arch)
    dtype = next(dtype for dtype in reversed(DTYPES) if dtype.itemsize == shape["bytes"])
    with use_arch(arch):
        check(swiglu, plain_swiglu, {"gate_up": drawn(11, 2 * (shape["width"] + shape["width"] // 2))}, dtype)


def test_swiglu_of_extremes_rows_of_nan_and_rows_beyond_2_31_elements():
    out = swiglu(torch.tensor([[0.0, 100.0, -100.0, 3.0, 2.0, 5.0]], device=DEVICE))
    assert torch.equal(out, torch.tensor([[0.0, 200.0, 0.0]], device=DEVICE))
    far = far_apart(4, 64, 0)
    same_bits(results(swiglu, far), results(swiglu, far.contiguous()))
    near = far.contiguous()
    clean = results(swiglu, near)
    near[2] = float("nan")
    for a, b in zip(results(swiglu, near), clean):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) and a[2].isnan().all()


def state(count, seed=0, gradient=torch.float32):
    """Buffers of an optimizer in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    buffers = {"master": draw(), "exp_avg": 0.1 * draw(), "exp_avg_sq": 0.01 * draw().square(), "gradient": draw()}
    dtypes = {"gradient": gradient}
    return {name: x.to(dtypes.get(name, torch.float32)).to(DEVICE) for name, x in buffers.items()}


HYPERPARAMETERS = {"lr": 0.03, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1, "step": 7}


def updated(function, buffers, dtype, **options):
    """Copies of the buffers in `dtype` after one update."""
    local = {
        name: (x if name == "gradient" and dtype == torch.float32 else x.to(dtype)).clone()
        for name, x in buffers.items()
    }
    function(**local, **(HYPERPARAMETERS | options))
    return local


# Catches: decay after the step instead of beside it; a bias correction of the wrong beta; the last block's mask.
@pytest.mark.parametrize("gradient", [torch.float32] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 5003])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_adamw_equals_its_formula(count, step, gradient):
    buffers = state(count, gradient=gradient)
    scale = torch.tensor(0.37, device=DEVICE)
    out = updated(adamw, buffers, torch.float32, scale=scale, step=step)
    base = updated(adamw_reference, buffers, torch.float32, scale=scale, step=step)
    ref = updated(adamw_reference, buffers, torch.float64, scale=scale.double(), step=step)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert_close(out[name], base[name], ref[name], name)


@pytest.mark.every(4)
@pytest.mark.parametrize(("arch", "shape"), entries("adamw"))
def test_adamw_is_right_with_every_table_entry(arch, shape):
    runs_here(arch)
    with use_arch(arch):
        test_adamw_equals_its_formula(
            2049, 3, torch.float32 if DEVICE == "cpu" or shape["bytes"] == 4 else torch.bfloat16
        )


# Catches: a copy of the value before the update.
def test_adamw_writes_the_rounded_copy():
    buffers = state(3000)
    copy = torch.zeros(3000, dtype=torch.float16, device=DEVICE)
    adamw(**buffers, **HYPERPARAMETERS, copy=copy)
    assert torch.equal(copy, buffers["master"].half())


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_adamw_changes_nothing_where_the_scale_is_not_finite(scale):
    buffers = state(1500)
    before = {name: x.clone() for name, x in buffers.items()}
    copy = torch.full((1500,), 3.0, dtype=torch.float16, device=DEVICE)
    for backend in ("triton", "reference"):
        with kernels.use_backend(backend):
            adamw(**buffers, **HYPERPARAMETERS, copy=copy, scale=torch.tensor(scale, device=DEVICE))
    assert all(torch.equal(buffers[name], before[name]) for name in before) and bool((copy == 3).all())


def test_adamw_repeats_bits():
    runs = [updated(adamw, state(4097), torch.float32) for _ in range(2)]
    same_bits(list(runs[0].values()), list(runs[1].values()))


# Catches: 32-bit offsets of a block.
@pytest.mark.skipif(
    DEVICE == "cuda", reason="34 GB of buffers: shown in the interpreter, where untouched pages are free"
)
def test_adamw_reaches_elements_beyond_2_31(monkeypatch):
    """Only the last program runs, on buffers of 2^31 + 100 elements whose other pages are never touched."""
    from triton.runtime import interpreter

    count = 2**31 + 100
    buffers = {name: torch.empty(count) for name in ("master", "exp_avg", "exp_avg_sq", "gradient")}
    near = state(100)
    for name, x in buffers.items():
        x[2**31 :] = near[name]
    last = interpreter.TensorHandle(interpreter.np.array([2**21], dtype=interpreter.np.int32), interpreter.tl.int32)
    with use_config("adamw", BLOCK=1024, num_warps=4, num_stages=1):
        expected = updated(adamw, near, torch.float32)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda self, axis: last)
        monkeypatch.setattr("triton.cdiv", lambda a, b: 1)
        adamw(**buffers, **HYPERPARAMETERS)
    assert all(torch.equal(buffers[name][2**31 :], expected[name]) for name in buffers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master": torch.zeros(4, dtype=torch.float64)}, "master: expected float32, got float64"),
        ({"exp_avg": torch.zeros(3)}, r"exp_avg: expected \(4,\), got \(3,\)"),
        ({"gradient": torch.zeros(4, dtype=torch.float16)}, "gradient: expected float32 or bfloat16, got float16"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, "exp_avg_sq: expected a contiguous last dim"),
        ({"copy": torch.zeros(4)}, "copy: expected bfloat16 or float16, got float32"),
        ({"scale": torch.zeros(1)}, r"scale: expected \(\), got \(1,\)"),
        ({"step": 0}, "step: expected >= 1, got 0"),
        ({"lr": -1.0}, "lr: expected >= 0 and finite, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers"),
    ],
)
def test_adamw_refuses(change, message):
    options = (
        {name: torch.zeros(4) for name in ("master", "exp_avg", "exp_avg_sq", "gradient")} | HYPERPARAMETERS | change
    )
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        adamw(**options)


@pytest.mark.every(4)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("experts", [0, 4])
def test_a_block_traces_without_a_graph_break(backend, experts):
    """A whole transformer block, forward and backward, is one graph on either backend, with the results of eager."""
    if experts and backend == "reference":
        pytest.skip("the reference of the experts counts their rows on the host")
    from wizard_engine.model import ModelConfig
    from wizard_engine.model.transformer import Block

    config = ModelConfig(
        width=32, layers=1, heads=4, kv_heads=2, head_width=16, ffn_width=48, window=6, experts=experts
    )
    torch.manual_seed(0)
    block = Block(config, 0).to(DEVICE)
    x = torch.randn(13, 32, device=DEVICE)
    positions = torch.cat((torch.arange(5), torch.arange(8))).to(DEVICE)
    tables = rope_tables(positions, 16, 1e4)
    cu = torch.tensor([0, 5, 13], dtype=torch.int32, device=DEVICE)
    result = []
    with kernels.use_backend(backend):
        for form in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
            block.zero_grad()
            stream, delta = form(x, x.flip(0), *tables, cu, 8)
            out = stream + delta
            out.sin().sum().backward()
            result.append([out, *(p.grad for p in block.parameters())])
    torch._dynamo.reset()
    for traced, eager in zip(*result):
        torch.testing.assert_close(traced, eager)
