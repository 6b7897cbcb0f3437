"""Gradient norm: the kernel against float64, its launches counted, and the bits of the CPU."""

import pytest
import torch
from closeness import scaled
from table_entries import distinct_entries
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels._grad_norm import chunk_squares
from kernels.configuration import use_arch, use_config
from kernels.grad_norm import CHUNK, _sum_of_squares, chunk_norms_reference, grad_norm
from kernels.launch import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1,), (CHUNK,), (CHUNK + 1, 7), (3 * CHUNK + 4099, 1, 2 * CHUNK)]


def drawn(sizes, dtype=torch.float32):
    """Buffers of mixed scales."""
    return [scaled(size, 1, seed=n)[:, 0].to(DEVICE, dtype) for n, size in enumerate(sizes)]


def wide(grads):
    return torch.cat([grad.double() for grad in grads]).norm()


# Catches: the mask of the last chunk; chunks that overlap; rows of the table mixed up; bf16 read as fp32.
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_float64(sizes, dtype):
    grads = drawn(sizes, dtype)
    with kernels.use_backend("triton"):
        result, again = grad_norm(grads), grad_norm(grads)
    # Sums of 65,536 squares in fp32, 4,096 side by side, and all further ones in fp64.
    assert abs(result - wide(grads)) <= 2e-7 * wide(grads) and result.dtype == torch.float64 and result.shape == ()
    assert torch.equal(result, again)
    assert abs(grad_norm(grads) - wide(grads)) <= 1e-5 * wide(grads)


def test_norm_of_both_dtypes_and_of_slices_between_nan():
    around = [
        torch.full((3000,), float("nan"), dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.bfloat16)
    ]
    for offset in (0, 8, 5):
        inside = [x[offset : offset + 1500] for x in around]
        for x, local in zip(inside, drawn((1500, 1500))):
            x.copy_(local)
        with kernels.use_backend("triton"):
            assert abs(grad_norm(inside) - wide(inside)) <= 2e-7 * wide(inside)
        for x in inside:
            x.fill_(float("nan"))


def test_norm_of_integers_is_exact_and_of_what_is_not_finite_is_not():
    grads = [torch.full((4 * CHUNK,), 3.0, device=DEVICE), torch.full((CHUNK,), 2.0, device=DEVICE).bfloat16()]
    with kernels.use_backend("triton"):
        assert grad_norm(grads).item() == (40 * CHUNK) ** 0.5
        for value in (float("nan"), float("inf"), -float("inf")):
            grads[1][-1] = value
            assert not grad_norm(grads).isfinite()


@pytest.mark.parametrize("arch", [arch for arch, _ in distinct_entries("grad_norm")])
def test_norm_is_right_with_every_table_entry(arch):
    if DEVICE == "cuda" and arch > 10 * torch.cuda.get_device_capability()[0]:
        pytest.skip(f"the entries of sm_{arch} are for a newer GPU")
    grads = drawn((CHUNK + 77,))
    with use_arch(arch), kernels.use_backend("triton"):
        assert abs(grad_norm(grads) - wide(grads)) <= 2e-7 * wide(grads)


class Operators(TorchDispatchMode):
    """Names of torch's operators, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


# How numbers of the host become a tensor on a device.
TABLE = ("lift_fresh.default", "detach.default", "_to_copy.default")


# Catches: a launch per chunk or per buffer; a table made anew where the buffers stayed.
def test_one_kernel_and_one_sum_whatever_the_buffers():
    seen = []
    for sizes in ((5,), (10 * CHUNK,), (CHUNK, 3, 2 * CHUNK, 9)):
        grads = [torch.empty(size, device="meta") for size in sizes]
        with kernels.use_backend("triton"), Operators() as outside:
            grad_norm(grads)
        # One operation, and the root; inside, beside the kernel, room for the sums and their sum.
        assert outside.names == ["grad_squares.default", "sqrt.default"]
        with record(), Operators() as inside:
            _sum_of_squares._init_fn(grads)
        assert [name for name in inside.names if name not in TABLE] == ["empty.memory_format", "sum.default"]
        with record() as made:
            chunk_squares(grads, CHUNK)
        seen.append([(launch.kernel.__name__, launch.grid) for launch in made])
    assert seen == [[("grad_norm_kernel", grid)] for grid in ((1, 1), (10, 1), (2, 4))]


# Catches: a table that is copied to the device anew where the buffers stayed, or is kept where they moved.
def test_table_is_made_once_for_the_same_buffers(monkeypatch):
    from kernels import _grad_norm

    made, inner = [], _grad_norm.from_host
    monkeypatch.setattr(_grad_norm, "from_host", lambda *values: made.append(1) or inner(*values))
    grads, others = drawn((100, 100)), drawn((300,))
    with kernels.use_backend("triton"):
        for local in (grads, others, grads, others, grads[:1]):
            assert abs(grad_norm(local) - wide(local)) <= 2e-7 * wide(local)
    assert len(made) == 3


# Catches: 32-bit offsets of a chunk.
@pytest.mark.skipif(DEVICE == "cuda", reason="shown in the interpreter, where untouched pages are free")
def test_norm_reaches_elements_beyond_2_31(monkeypatch):
    """Only the last program runs, on a buffer of 2^31 + 100 elements whose other pages are never touched."""
    from triton.runtime import interpreter

    from kernels import _grad_norm

    grad = torch.empty(2**31 + 100)
    grad[2**31 :] = torch.arange(100.0)
    number = interpreter.np.array
    ids = {axis: number([n], dtype=interpreter.np.int32) for axis, n in ((0, 2**31 // CHUNK), (1, 0), (2, 0))}
    sums = torch.zeros(2**31 // CHUNK + 1)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: interpreter.TensorHandle(ids[axis], interpreter.tl.int32),
    )
    monkeypatch.setattr(_grad_norm.torch, "empty", lambda *a, **k: sums)
    monkeypatch.setattr("triton.cdiv", lambda a, b: 1)
    with use_config("grad_norm", BLOCK=4096, num_warps=4, num_stages=1):
        _grad_norm.chunk_squares([grad], CHUNK)
    assert sums.sum() == torch.arange(100.0).square().sum()


# Catches: chunks of another size, bf16 summed in bf16, the reduction over ranks out of rounded norms.
def test_norm_on_the_cpu_has_the_bits_of_chunk_norms():
    grads = [grad.cpu() for grad in drawn((2 * CHUNK + 5, 100))]
    norms = torch.stack([chunk.norm() for grad in grads for chunk in grad.split(CHUNK)])
    assert torch.equal(grad_norm(iter(grads)), norms.norm().double())
    assert torch.equal(
        grad_norm(grads, reduce=lambda squares: squares.mul_(2)), norms.double().square().sum().mul(2).sqrt()
    )
    narrow = [grad.bfloat16() for grad in grads]
    assert torch.equal(chunk_norms_reference(narrow), chunk_norms_reference([grad.float() for grad in narrow]))


def test_reduction_over_ranks_receives_the_sum_of_squares():
    grads = drawn((100, 300))
    with kernels.use_backend("triton"):
        result = grad_norm(grads, reduce=lambda squares: squares.add_(3.0))
    assert abs(result.square() - wide(grads).square() - 3.0) <= 1e-6 * result.square()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "grads: expected at least one buffer, got none"),
        ([torch.zeros(4), torch.zeros(4, dtype=torch.float16)], "grads: expected float32 or bfloat16, got float16"),
        ([torch.zeros(2, 2)], r"grads: expected contiguous buffers of one dim, got \(2, 2\)"),
        ([torch.zeros(8)[::2]], "grads: expected contiguous buffers of one dim"),
        ([torch.zeros(4), torch.zeros(4, device="meta")], "grad: expected the device of grads"),
    ],
)
def test_norm_refuses(grads, message):
    grads = [grad if grad.is_meta else grad.to(DEVICE) for grad in grads]
    with kernels.use_backend("triton"), pytest.raises(ValueError, match=message):
        grad_norm(grads)
