"""Sampling against enumeration, its distribution, the kernel against the reference, the numbers behind it."""

import math

import pytest
import torch
from table_entries import distinct_entries

import kernels
from kernels.configuration import use_arch, use_config
from kernels.sample import philox, row_seeds, sample, uniforms
from tests.closeness import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seeds(count, seed=0):
    return row_seeds(seed, torch.arange(count), 1)[:, 0]


def test_philox_of_the_published_vector():
    """Random123's first known answer: counter 0 and key 0."""
    output = [int(value) for value in philox(torch.zeros(1, dtype=torch.int64))]
    assert output == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_takes_all_64_bits_of_a_key():
    keys = torch.tensor([0, 1, 1 << 31, 1 << 32, -1, -(1 << 63)])
    outputs = torch.stack(philox(keys))
    assert len({tuple(column) for column in outputs.T.tolist()}) == 6 and int(outputs.min()) >= 0
    assert int(outputs.max()) < 2**32


def test_uniforms_are_inside_0_and_1_and_even():
    values = uniforms(seeds(20000))
    assert values.dtype == torch.float32 and float(values.min()) > 0 and float(values.max()) < 1
    counts = torch.histc(values, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # 99.9 % of chi-square with 19 degrees


def test_row_seeds_depend_on_row_step_and_seed_alone():
    whole = row_seeds(7, torch.arange(50), 30)
    assert len(set(whole.flatten().tolist())) == 1500
    assert torch.equal(row_seeds(7, torch.tensor([31, 4]), 9), whole[[31, 4], :9])
    assert not torch.equal(row_seeds(8, torch.arange(50), 30), whole)
    assert torch.equal(row_seeds(2**64 - 1, torch.arange(3), 2), row_seeds(-1, torch.arange(3), 2))
    # SplitMix64's first output from state 0, published with its reference code.
    from kernels.sample import _mixed

    assert int(_mixed(torch.tensor([-7046029254386353131]))) % 2**64 == 0xE220A8397B1DCDAF


def enumerated(logits, u, temperature, top_k, top_p):
    """One row, one vocabulary entry at a time, in Python floats."""
    vocab_size = range(len(logits))
    if temperature == 0:
        token = max(vocab_size, key=lambda w: (logits[w], -w))
        return token, logits[token] - math.log(sum(math.exp(z) for z in logits))
    z = [x / temperature for x in logits]
    kept = list(vocab_size)
    if top_k:
        least = sorted(z, reverse=True)[min(top_k, len(z)) - 1]
        kept = [w for w in kept if z[w] >= least]
    if top_p and top_p < 1:
        whole, mass = sum(math.exp(z[w]) for w in kept), 0.0
        for w in sorted(kept, key=lambda w: -z[w]):
            mass += math.exp(z[w]) / whole
            if mass >= top_p:
                kept = [other for other in kept if z[other] >= z[w]]
                break
    whole, before = sum(math.exp(z[w]) for w in kept), 0.0
    for w in kept:
        before += math.exp(z[w])
        if before > u * whole:
            break
    return w, z[w] - math.log(whole)


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_k": 0},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"top_k": 4, "top_p": 0.7, "temperature": 1.3},
    {"temperature": 0.0, "top_k": 2, "top_p": 0.1},
]


# Catches: a threshold that drops ties; top-p before top-k; a log-probability of the whole distribution.
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sample_equals_enumeration(options):
    logits = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)).mul(2).round(decimals=1).double()
    logits[:, 3] = logits[:, 5]
    uniform = torch.rand(60, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = sample(logits, uniform=uniform, **options)
    full = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    for row in range(60):
        token, logprob = enumerated(logits[row].tolist(), float(uniform[row]), **full)
        assert int(tokens[row]) == token and float(logprobs[row]) == pytest.approx(logprob, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}])
def test_sample_has_the_distribution_that_it_says(options):
    logits = torch.tensor([0.3, 1.2, -0.5, 0.0, 2.0, -1.0])
    rows = 20000
    tokens, logprobs = sample(logits.expand(rows, 6).contiguous(), seeds(rows, 3), **options)
    counts = torch.bincount(tokens, minlength=6).double()
    expected = torch.zeros(6, dtype=torch.float64)
    expected[tokens] = logprobs.double().exp()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    kept = expected > 0
    assert float(((counts - rows * expected)[kept] ** 2 / (rows * expected)[kept]).sum()) < 20.5  # 99.9 %, 5 degrees


def awkward(rows, vocab_size, dtype, seed=0):
    """Logits with ties, -inf, a single finite entry, and magnitudes of 1e4."""
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[:, ::5] = logits[:, :1].clone()
    logits[1::7, 1:] = -torch.inf
    logits[2::7, : vocab_size // 2] = -torch.inf
    logits[3::7] += 1e4 if dtype != torch.float16 else 1e3
    logits[4::7] = 0.0
    return logits.to(dtype)


# Catches: a carry between blocks lost; an index of the block for one of the row; bisection that ends one off.
@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (65, torch.float16),
        (64, torch.float32),
        (211, torch.float32),
        (63, torch.bfloat16),
        (1, torch.float32),
        (2, torch.float16),
    ],
)
def test_kernel_draws_what_the_reference_draws(vocab_size, dtype):
    # Seven kinds of rows; the interpreter takes a while to bisect.
    rows = 7
    logits, drawn = awkward(rows, vocab_size, dtype, vocab_size), seeds(rows, vocab_size)
    generator = torch.Generator().manual_seed(5)
    mixed = {
        "temperature": torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.2),
        "top_k": torch.randint(0, 12, (rows,), generator=generator),
        "top_p": 1 - torch.rand(rows, generator=generator),
    }
    for options in ({}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.0}, mixed):
        there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        expected = sample(logits, drawn, **options)
        with kernels.use_backend("triton"), use_config("sample", BLOCK=64, num_warps=4, num_stages=1):
            result = sample(logits.to(DEVICE), drawn.to(DEVICE), **there)
        assert torch.equal(result[0].cpu(), expected[0]), options
        torch.testing.assert_close(result[1].cpu(), expected[1], rtol=2e-6, atol=2e-6)
    with kernels.use_backend("triton"), use_config("sample", BLOCK=64, num_warps=4, num_stages=1):
        again = sample(logits.to(DEVICE), uniform=uniforms(drawn).to(DEVICE), **there)
    assert torch.equal(result[0], again[0]) and torch.equal(result[1], again[1])


def on_kernel(logits, drawn, **options):
    """Results of the kernel, on the CPU, with blocks of 64 vocabulary entries."""
    there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with kernels.use_backend("triton"), use_config("sample", BLOCK=64, num_warps=4, num_stages=1):
        return [x.cpu() for x in sample(logits.to(DEVICE), drawn.to(DEVICE), **there)]


# Catches: a row's options read from another row; a token of the block's number alone.
def test_kernel_draws_what_the_reference_draws_in_many_rows():
    logits, drawn = awkward(130, 65, torch.float32), seeds(130, 4)
    row_temperature = torch.linspace(0, 2, 130)
    for options in ({}, {"temperature": row_temperature}):
        expected, result = sample(logits, drawn, **options), on_kernel(logits, drawn, **options)
        assert torch.equal(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_logprobs_are_as_near_to_float64_as_those_of_eager(options):
    logits, drawn = torch.randn(9, 131, generator=torch.Generator().manual_seed(4)).mul(3), seeds(9, 5)
    options = {name: torch.full((9,), x) if name == "temperature" else x for name, x in options.items()}
    exact, base = sample(logits.double(), drawn, **options), sample(logits, drawn, **options)
    result = on_kernel(logits, drawn, **options)
    assert torch.equal(result[0], exact[0]) and torch.equal(base[0], exact[0])
    assert_close(result[1], base[1], exact[1])


def test_kernel_takes_rows_options_and_seeds_of_any_stride():
    logits, drawn = torch.randn(4, 90, generator=torch.Generator().manual_seed(6)).mul(2), seeds(8, 1)
    mixed = torch.tensor([0.5, 9.0, 1.0, 9.0, 0.0, 9.0, 2.0, 9.0])[::2]
    counts = torch.tensor([3, 1, 70, 1, 0, 1, 9, 1])[::2]
    probability = torch.tensor([0.6]).expand(4)
    expected = sample(logits[:, :70].clone(), drawn[::2].clone(), temperature=mixed, top_k=counts, top_p=probability)
    with kernels.use_backend("triton"), use_config("sample", BLOCK=64, num_warps=4, num_stages=1):
        result = sample(
            logits.to(DEVICE)[:, :70],
            drawn.to(DEVICE)[::2],
            temperature=mixed.to(DEVICE),
            top_k=counts.to(DEVICE),
            top_p=probability.to(DEVICE),
        )
    assert torch.equal(result[0].cpu(), expected[0])
    torch.testing.assert_close(result[1].cpu(), expected[1], rtol=2e-6, atol=2e-6)


def test_numbers_and_tensors_mean_the_same():
    logits, drawn = torch.randn(5, 33, generator=torch.Generator().manual_seed(7)), seeds(5)
    for row_temperature in (0.003, 0.7, 0.9, 1.0, 1.3, 1e-50, 0.0):
        one, many = (sample(logits, drawn, temperature=t) for t in (row_temperature, torch.full((5,), row_temperature)))
        assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
    for count in (33, 2**31, 2**40):
        for top_k in (count, torch.full((5,), count)):
            for result in (sample(logits, drawn, top_k=top_k), on_kernel(logits, drawn, top_k=top_k)):
                assert torch.equal(result[0], sample(logits, drawn)[0])


def test_greedy_takes_the_largest_logit_where_logprobs_round_to_a_tie():
    logits = torch.zeros(2, 600)
    logits[0, 300] = 1e-8
    assert len(logits[0].log_softmax(-1).unique()) == 1
    for row_temperature in (0.0, torch.zeros(2), torch.tensor([0.0, 1.0])):
        for result in (
            sample(logits, seeds(2), temperature=row_temperature),
            on_kernel(logits, seeds(2), temperature=row_temperature),
        ):
            assert int(result[0][0]) == 300 and float(result[1][0]) == pytest.approx(-math.log(600))


def test_no_rows():
    for result in (sample(torch.zeros(0, 5), seeds(0), top_k=2), on_kernel(torch.zeros(0, 5), seeds(0), top_p=0.5)):
        assert [(x.shape, x.dtype) for x in result] == [((0,), torch.int64), ((0,), torch.float32)]


@pytest.mark.parametrize("arch", [arch for arch, _ in distinct_entries("sample")])
def test_every_table_entry(arch):
    logits, drawn = awkward(3, 2100, torch.float32), seeds(3, 9)
    for options in ({}, {"top_k": 50, "top_p": 0.9}):
        expected = sample(logits, drawn, **options)
        with kernels.use_backend("triton"), use_arch(arch if DEVICE == "cpu" else None):
            result = sample(logits.to(DEVICE), drawn.to(DEVICE), **options)
        assert torch.equal(result[0].cpu(), expected[0])
        torch.testing.assert_close(result[1].cpu(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a buffer that is hardly touched, which a GPU would allocate")
def test_rows_behind_2_to_the_31_elements():
    far = torch.empty(2**31 + 2**20, dtype=torch.float16).as_strided((3, 50), (2**30, 1))
    far.copy_(awkward(3, 50, torch.float16))
    with kernels.use_backend("triton"):
        result = sample(far, seeds(3), top_k=5)
        expected = sample(far.contiguous(), seeds(3), top_k=5)
    assert all(torch.equal(a, b) for a, b in zip(result, expected))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_rows_without_a_distribution_are_named(bad):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[2] = bad
    with pytest.raises(ValueError, match=f"logits: expected numbers, some above -inf, got {bad} in row 2"):
        sample(logits, seeds(4))
    with kernels.use_backend("triton"):
        tokens, logprobs = torch.ops.wizard_engine.sample(
            logits.to(DEVICE), seeds(4).to(DEVICE), None, torch.ones(4, device=DEVICE), None, None
        )
    assert logprobs.isnan().tolist() == [False, False, True, False] and int(tokens[2]) == 0


def test_sample_operation_traces():
    logits = torch.randn(4, 9).to(DEVICE)
    row_temperature, counts = torch.ones(4, device=DEVICE), torch.full((4,), 3, dtype=torch.int32, device=DEVICE)
    with kernels.use_backend("triton"):
        torch.library.opcheck(
            torch.ops.wizard_engine.sample,
            (logits, seeds(4).to(DEVICE), None, row_temperature, counts, row_temperature),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits: expected \(B, V\) with V >= 1, got \(3,\)"),
        ({"logits": torch.zeros(3, 0)}, r"logits: expected \(B, V\) with V >= 1, got \(3, 0\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits: expected a float dtype, got int64"),
        ({"logits": torch.zeros(4, 3).T}, "logits: expected a contiguous last dim"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds: expected \(3,\) int64, got \(2,\) int64"),
        ({"seeds": torch.zeros(3)}, r"seeds: expected \(3,\) int64, got \(3,\) float32"),
        ({"seeds": None}, "seeds, uniform: expected one of the two, got none"),
        ({"uniform": torch.rand(3)}, "seeds, uniform: expected one of the two, got both"),
        ({"temperature": -0.1}, "temperature: expected >= 0 and finite, got -0.1"),
        ({"temperature": math.inf}, "temperature: expected >= 0 and finite, got inf"),
        ({"temperature": torch.tensor([1.0, math.nan, 1.0])}, "temperature: expected >= 0 and finite, got nan"),
        ({"temperature": torch.ones(2)}, r"temperature: expected \(3,\) on cpu, got \(2,\) on cpu"),
        ({"temperature": torch.ones(3, device="meta")}, r"temperature: expected \(3,\) on cpu, got \(3,\) on meta"),
        ({"seeds": torch.zeros(3, dtype=torch.int64, device="meta")}, "seeds: expected the device of logits, cpu, got"),
        ({"seeds": None, "uniform": torch.zeros(3).double()}, r"uniform: expected \(3,\) float32, got \(3,\) float64"),
        ({"top_k": -1}, "top_k: expected >= 0 and finite, got -1"),
        ({"top_k": torch.tensor([1, -2, 0])}, "top_k: expected >= 0 and finite, got -2"),
        ({"top_k": 2.5}, "top_k: expected integers, got 2.5"),
        ({"top_k": torch.ones(3)}, "top_k: expected integers, got torch.float32"),
        ({"top_k": torch.ones(2, dtype=torch.int64)}, r"top_k: expected \(3,\) on cpu, got \(2,\) on cpu"),
        ({"top_p": math.nan}, r"top_p: expected in \(0, 1\], got nan"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0.0"),
        ({"top_p": torch.tensor([0.5, 1.5, 1.0])}, r"top_p: expected in \(0, 1\], got 1.5"),
    ],
)
def test_sample_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"logits": torch.zeros(3, 4), "seeds": torch.zeros(3, dtype=torch.int64), **changes})


# Catches: truncation that drops the NaN of a row, so that it looks like one with a distribution.
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 3, "top_p": 0.4}, {"temperature": 0.0}], ids=str)
def test_rows_without_a_distribution_are_marked_and_change_no_other(options):
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(8))
    expected = sample(logits, seeds(5), **options)
    invalid = logits.clone()
    invalid[2, 66], invalid[4, 0] = math.nan, math.inf
    with kernels.use_backend("triton"), use_config("sample", BLOCK=64, num_warps=4, num_stages=1):
        on_device = sample(invalid.to(DEVICE), seeds(5).to(DEVICE), checks_values=False, **options)
    others = [0, 1, 3]
    on_host = sample(invalid, seeds(5), checks_values=False, **options)
    for tokens, logprobs in (on_host, map(torch.Tensor.cpu, on_device)):
        assert logprobs.isnan().tolist() == [False, False, True, False, True] and not tokens[[2, 4]].any()
        assert torch.equal(tokens[others], expected[0][others])
        torch.testing.assert_close(logprobs[others], expected[1][others], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 1e-46}, r"top_p: expected in \(0, 1\], got 1e-46"),
        ({"temperature": 1e39}, r"temperature: expected >= 0 and finite, got 1e\+39"),
    ],
)
def test_numbers_are_checked_as_fp32(options, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(3, 4), seeds(3), **options)
