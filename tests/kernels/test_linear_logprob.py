"""Log-probabilities and entropies of targets against full logits."""

import itertools
import math

import pytest
import torch
from closeness import check, scaled

from kernels import _linear_logprob_chunks as chunks
from kernels.cross_entropy import cross_entropy
from kernels.linear_logprob import (
    VocabularyShard,
    linear_logprob,
    linear_logprob_partial,
    linear_logprob_reference,
    merge_partials,
)


def eager(hidden, weight, targets, temperature):
    wide = [x if x.dtype == torch.float64 else x.float() for x in (hidden, weight)]
    logits = wide[0] @ wide[1].T / temperature
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    rows = torch.arange(len(targets))
    keep = (targets >= 0).to(logits.dtype)
    return keep * logprobs[rows, targets.clamp(min=0)], -keep * (logprobs.exp() * logprobs).sum(-1)


def drawn(rows, width, vocabulary, seed=0):
    inputs = {
        "hidden": scaled(max(rows, 1), width, seed=seed)[:rows],
        "weight": 0.3 * scaled(vocabulary, width, seed=seed + 1),
    }
    targets = torch.randint(-1, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    return inputs, targets


@pytest.fixture(params=["whole", "chunks"])
def path(request, monkeypatch):
    """One chunk, and chunks of two rows, of one row at a time, which widen three vocabulary entries at a time."""
    if request.param == "chunks":
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 4 * 11 * 2)
        monkeypatch.setattr(chunks, "PART_BYTES", 4 * 11)
        monkeypatch.setattr(chunks, "VOCAB_BLOCK", 3)
    return request.param


# Catches: an entropy gradient of the wrong sign; weight sums restarted with every chunk; a missing temperature.
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_logprob_equals_full_logits(path, rows, temperature):
    inputs, targets = drawn(rows, 5, 11, seed=rows)
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True),
        lambda hidden, weight: eager(hidden, weight, targets, temperature),
        inputs,
    )
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, temperature=temperature)[0],
        lambda hidden, weight: eager(hidden, weight, targets, temperature)[0],
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_logprob_of_half_precision(path, dtype):
    inputs, targets = drawn(9, 5, 11)
    check(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, entropy=True),
        lambda hidden, weight: eager(hidden, weight, targets, 1.0),
        inputs,
        dtype,
    )


def test_linear_logprob_passes_gradcheck(path):
    inputs, targets = drawn(5, 3, 11)
    head = [x.requires_grad_() for x in inputs.values()]
    torch.autograd.gradcheck(
        lambda hidden, weight: linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True), head
    )


def test_linear_logprob_makes_only_the_gradients_that_are_asked_for(path):
    inputs, targets = drawn(9, 5, 11)
    hidden, weight = (x.float() for x in inputs.values())
    both = [x.clone().requires_grad_() for x in (hidden, weight)]
    linear_logprob(*both, targets)[0].sum().backward()
    for name in ("hidden", "weight"):
        arguments = {"hidden": hidden, "weight": weight}
        arguments[name] = arguments[name].clone().requires_grad_()
        linear_logprob(**arguments, targets=targets)[0].sum().backward()
        assert torch.equal(arguments[name].grad, both[name == "weight"].grad)


def test_linear_logprob_of_ignored_rows_is_0_even_where_they_are_nan(path):
    inputs, _ = drawn(6, 5, 11)
    targets = torch.tensor([1, -1, 4, 4, -1, 10])
    hidden = inputs["hidden"].float()
    hidden[targets < 0] = math.nan
    hidden.requires_grad_()
    weight = inputs["weight"].float().requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    assert torch.equal(logprob == 0, targets < 0) and torch.equal(entropy == 0, targets < 0)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal((hidden.grad == 0).all(-1), targets < 0) and weight.grad.isfinite().all()


def test_linear_logprob_of_a_uniform_and_of_a_certain_distribution():
    hidden = torch.tensor([[0.0], [1e4]])
    weight = torch.arange(4.0)[:, None]
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([2, 3]), entropy=True)
    torch.testing.assert_close(logprob, torch.tensor([-math.log(4), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), 0.0]))
    assert linear_logprob(hidden, weight, torch.tensor([2, 3]))[1] is None


def test_linear_logprob_of_logits_of_magnitude_1e4(path):
    """Two vocabulary entries 0.5 apart around 1e4, the rest at -1e4: p = 1 / (1 + e^-0.5), and its entropy."""
    weight = torch.full((11, 1), -1e4)
    weight[3], weight[7] = 1e4, 1e4 - 0.5
    hidden = torch.ones(2, 1, requires_grad=True)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([3, 7]), entropy=True)
    p = 1 / (1 + math.exp(-0.5))
    assert logprob.tolist() == pytest.approx([math.log(p), math.log(1 - p)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p)] * 2, rel=1e-6)
    (grad,) = torch.autograd.grad(logprob.sum(), hidden)
    # 1e4 times (1 - p) less 1e4 - 0.5 times (1 - p), in fp32
    assert grad[:, 0].tolist() == pytest.approx([0.5 * (1 - p), -0.5 * p], abs=2e-3)


def test_linear_logprob_of_rows_with_logits_of_minus_infinity(path):
    weight = torch.zeros(11, 1)
    weight[::2] = -torch.inf
    hidden = torch.ones(3, 1)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([1, 5, 2]), entropy=True)
    assert logprob.tolist() == pytest.approx([-math.log(5), -math.log(5), -math.inf])
    assert entropy.tolist() == pytest.approx([math.log(5)] * 3)
    nothing = linear_logprob(hidden, torch.full((11, 1), -torch.inf), torch.tensor([1, 5, 2]))[0]
    assert nothing.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_linear_logprob_of_a_logit_that_is_not_a_number_is_nan(path, bad):
    inputs, targets = drawn(6, 5, 11)
    hidden, weight = (x.float() for x in inputs.values())
    targets = targets.clamp(min=0)
    hidden[2, 1] = bad
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    for values in (logprob, entropy):
        assert values.isnan().tolist() == [False, False, True, False, False, False]


def shards(hidden, weight, targets, count, temperature):
    """A `VocabularyShard` of each slice, whose gather knows the statistics of all of them."""
    edges = [round(weight.shape[0] * i / count) for i in range(count + 1)]
    partials = [
        linear_logprob_partial(hidden, weight[a:b], targets, start=a, vocab_size=len(weight), temperature=temperature)
        for a, b in itertools.pairwise(edges)
    ]
    stacked = torch.stack(partials)
    return stacked, [
        (slice(a, b), VocabularyShard(a, weight.shape[0], lambda local: stacked)) for a, b in itertools.pairwise(edges)
    ]


# Catches: weighted sums that are not moved to the common peak.
@pytest.mark.parametrize("count", [2, 4, 11])
@pytest.mark.parametrize("infinite", [False, True])
def test_slices_of_the_vocabulary_equal_the_whole(path, count, infinite):
    inputs, targets = drawn(17, 5, 11, seed=3)
    hidden, weight = (x.float() for x in inputs.values())
    if infinite:
        hidden = hidden.abs()
        weight[:3] = -torch.inf
        targets = torch.where((targets >= 0) & (targets < 3), 5, targets)
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = linear_logprob(*whole, targets, temperature=0.7, entropy=True)
    grads = torch.randn(2, 17, generator=torch.Generator().manual_seed(1))
    if not infinite:
        (expected[0] * grads[0] + expected[1] * grads[1]).sum().backward()
    stacked, slices = shards(hidden, weight, targets, count, 0.7)
    merged = merge_partials(stacked, targets)
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for vocab_size, shard in slices:
        local = [x.clone().requires_grad_() for x in (hidden, weight[vocab_size])]
        result = linear_logprob(*local, targets, temperature=0.7, entropy=True, shard=shard)
        for x, y, z in zip(result, merged, expected):
            torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
        if not infinite:
            (result[0] * grads[0] + result[1] * grads[1]).sum().backward()
            dhidden += local[0].grad
            dweight[vocab_size] = local[1].grad
    if not infinite:
        for sums, expected in ((dhidden, whole[0].grad), (dweight, whole[1].grad)):
            torch.testing.assert_close(sums, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_slices_give_a_loss_its_gradients_too():
    inputs, targets = drawn(17, 5, 11, seed=4)
    hidden, weight = (x.float() for x in inputs.values())
    weights = torch.rand(17, generator=torch.Generator().manual_seed(2))
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = cross_entropy(*whole, targets, weights, num_tokens=5)
    expected.loss.backward()
    _, slices = shards(hidden, weight, targets, 3, 1.0)
    dhidden = torch.zeros_like(hidden)
    for vocab_size, shard in slices:
        local = [x.clone().requires_grad_() for x in (hidden, weight[vocab_size])]
        result = cross_entropy(*local, targets, weights, num_tokens=5, shard=shard)
        result.loss.backward()
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(local[1].grad, whole[1].grad[vocab_size], rtol=1e-5, atol=1e-6)
        dhidden += local[0].grad
    torch.testing.assert_close(dhidden, whole[0].grad, rtol=1e-5, atol=1e-6)


def test_merge_partials_refuses_another_shape():
    with pytest.raises(ValueError, match=r"parts: expected \(n, 4, 5\), got \(2, 3, 5\)"):
        merge_partials(torch.zeros(2, 3, 5), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(7, 5)},
            r"hidden, weight: expected \(T, D\), \(V, D\) with V >= 1, got \(3, 4\), \(7, 5",
        ),
        ({"weight": torch.zeros(0, 4)}, r"hidden, weight: expected .* got \(3, 4\), \(0, 4\)"),
        ({"hidden": torch.zeros(3, 4, 1)}, r"hidden, weight: expected .* got \(3, 4, 1\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets: expected \(3,\) int64, got \(2,\) int64"),
        ({"targets": torch.zeros(3)}, r"targets: expected \(3,\) int64, got \(3,\) float32"),
        ({"targets": torch.tensor([0, 7, 9])}, r"targets: expected -1 \(ignored\) to 6, got 7 at token 1"),
        ({"targets": torch.tensor([0, 1, -100])}, r"targets: expected -1 \(ignored\) to 6, got -100 at token 2"),
        ({"temperature": 0.0}, "temperature: expected > 0 and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected > 0 and finite, got nan"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "weight: expected the dtype of hidden"),
        ({"weight": torch.zeros(4, 7).T}, r"weight: expected a contiguous last dim, got strides \(1, 7\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden: expected a float dtype, got int32"),
    ],
)
def test_linear_logprob_refuses_what_does_not_fit(changes, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 1, -1])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **changes})


# Catches: a gradient of the wrong sign; an ignored incoming gradient.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_cross_entropy_equals_full_logits(path, rows, dtype):
    inputs, targets = drawn(rows, 5, 11, seed=rows)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.1
    weights[1::3] = 0
    check(
        lambda hidden, weight: cross_entropy(hidden, weight, targets, weights, num_tokens=7).loss,
        lambda hidden, weight: -(weights * eager(hidden, weight, targets, 1.0)[0]).sum() / 7,
        inputs,
        dtype,
    )


def test_cross_entropy_of_hand_worked_numbers():
    """Uniform over 4 vocabulary entries, weights 1, 0 and 0.5 of 6 tokens: 1.5 ln 4 / 6."""
    hidden, weight = torch.zeros(3, 2, requires_grad=True), torch.ones(4, 2)
    out = cross_entropy(hidden, weight, torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 0.5]), num_tokens=6)
    assert out.loss.item() == pytest.approx(1.5 * math.log(4) / 6) and out.metrics == {}
    assert out.logprob.tolist() == pytest.approx([-math.log(4), 0, -math.log(4)])


def test_cross_entropy_without_a_supervised_token_is_0_with_zero_gradients():
    inputs, targets = drawn(6, 5, 11)
    hidden, weight = (x.float().requires_grad_() for x in inputs.values())
    out = cross_entropy(hidden, weight, targets, torch.zeros(6), num_tokens=3)
    out.loss.backward()
    assert out.loss == 0 and not hidden.grad.any() and not weight.grad.any()
    with pytest.raises(ValueError, match="num_tokens: expected > 0 and finite, got 0"):
        cross_entropy(hidden, weight, targets, torch.zeros(6), num_tokens=0)


def test_loss_made_in_one_pass_gives_its_gradients_once():
    inputs, targets = drawn(6, 5, 11)
    hidden, weight = (x.float().requires_grad_() for x in inputs.values())
    loss = cross_entropy(hidden, weight, targets, torch.ones(6), num_tokens=3).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss: expected one backward"):
        loss.backward()


def test_reference_is_what_the_operation_computes():
    inputs, targets = drawn(9, 5, 11)
    result = linear_logprob(*inputs.values(), targets, temperature=0.7, entropy=True)
    for x, y in zip(result, linear_logprob_reference(*inputs.values(), targets, temperature=0.7)):
        torch.testing.assert_close(x, y)


def test_operations_of_linear_logprob_trace():
    inputs, targets = drawn(9, 5, 11)
    head = [x.float().requires_grad_() for x in inputs.values()]
    plain = torch.ops.wizard_engine.linear_logprob_statistics
    torch.library.opcheck(plain, (*head, targets, 0.7, True, 0), test_utils=("test_schema", "test_faketensor"))
    result = plain(*(x.detach() for x in head), targets, 0.7, True, 0)
    arguments = (torch.ones(9), torch.ones(9), *(x.detach() for x in head), targets, result, 0.7, 0, True, False)
    torch.library.opcheck(
        torch.ops.wizard_engine.linear_logprob_gradients, arguments, test_utils=("test_schema", "test_faketensor")
    )
