"""Kernels of linear log-probabilities against float64 full logits, in the interpreter or on a GPU."""

import itertools
import math

import pytest
import torch
from closeness import check, scaled
from table_entries import distinct_entries

import kernels
from kernels import _linear_logprob as module
from kernels.configuration import table, use_arch, use_config
from kernels.cross_entropy import cross_entropy
from kernels.dpo import dpo
from kernels.linear_logprob import (
    VocabularyShard,
    linear_logprob,
    linear_logprob_partial,
    linear_logprob_reference,
    merge_partials,
)
from kernels.ppo import ppo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="patches the interpreter, which no GPU needs")


@pytest.fixture(autouse=True)
def triton_backend():
    """Every test of this file runs the kernels, with small tiles unless it says otherwise."""
    tables = ("linear_logprob_statistics", "linear_logprob_dlogits")
    with (
        kernels.use_backend("triton"),
        use_config(tables[0], TMA=True, **SMALL),
        use_config(tables[1], TMA=True, **SMALL),
    ):
        yield


def drawn(rows, vocab_size, width, seed=0):
    """Inputs in float64, and targets of which some are -1."""
    inputs = {
        "hidden": scaled(max(rows, 1), width, seed=seed)[:rows],
        "weight": 0.3 * scaled(vocab_size, width, seed=seed + 1),
    }
    targets = torch.randint(-1, vocab_size, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {name: x.to(DEVICE) for name, x in inputs.items()}, targets


def against_full_logits(inputs, targets, dtype, *, entropy=True, temperature=1.0):
    """Results and both gradients by the rule of closeness.

    The second eager form rounds where the kernels do: exponentials through powers of two, the gradient of the logits in
    the dtype of the inputs before the products.
    """

    def eager(hidden, weight):
        result = linear_logprob_reference(hidden, weight, targets, temperature=temperature)
        return result if entropy else result[0]

    def ours(hidden, weight):
        result = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=entropy)
        return result if entropy else result[0]

    def apart(hidden, weight):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = (weight.to(wide) @ hidden.to(wide).T).T / temperature
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient.to(hidden.dtype).to(wide))
        row_max = logits.detach().amax(-1, keepdim=True)
        logprobs = logits - row_max - ((logits - row_max) * module.LOG2_E).exp2().sum(-1, keepdim=True).log()
        chosen = logprobs[torch.arange(len(targets)), targets.clamp(min=0)] * (targets >= 0)
        entropies = -((logprobs * module.LOG2_E).exp2() * logprobs).sum(-1) * (targets >= 0)
        return (chosen, entropies) if entropy else chosen

    check(ours, eager, inputs, dtype, also=apart)


# Catches: no mask of the tail entries; the target's column counted from the tile; decay applied to the new sum.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 37])
@pytest.mark.parametrize(("vocab_size", "width"), [(1, 16), (7, 5), (32, 1), (33, 64), (211, 33)])
def test_linear_logprob_equals_full_logits(rows, vocab_size, width, dtype):
    inputs, targets = drawn(rows, vocab_size, width, seed=rows)
    against_full_logits(inputs, targets, dtype)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob_with_temperature(temperature, entropy):
    inputs, targets = drawn(37, 75, 24)
    against_full_logits(inputs, targets, torch.float32, entropy=entropy, temperature=temperature)


ENTRIES = [
    (name, arch, shape["bytes"])
    for name in ("linear_logprob_statistics", "linear_logprob_dlogits")
    for arch, shape in distinct_entries(name)
]


@pytest.mark.every(4)
@pytest.mark.parametrize(("name", "arch", "size"), ENTRIES)
def test_every_table_entry(name, arch, size):
    inputs, targets = drawn(130, 300, 72, seed=3)
    with use_arch(arch) if DEVICE == "cpu" else use_arch(None):
        entry = next(e for e in table(name) if (e["arch"], e["class"]["bytes"]) == (arch, size))
        # The same tile in both kernels: the interpreter's products round by the shape of a tile.
        with use_config(ENTRIES[0][0], **entry["config"]), use_config(ENTRIES[-1][0], **entry["config"]):
            against_full_logits(inputs, targets, torch.float16 if size == 2 else torch.float32)


def test_tables_agree_in_the_order_of_sums():
    depths = [
        {(e["arch"], e["class"]["bytes"]): e["config"]["BLOCK_D"] for e in table(name)}
        for name in ("linear_logprob_statistics", "linear_logprob_dlogits")
    ]
    assert depths[0] == depths[1]


def test_linear_logprob_through_pointers_equals_that_through_descriptors():
    inputs, targets = drawn(37, 75, 24)
    head = [x.float().requires_grad_() for x in inputs.values()]

    def result():
        results = linear_logprob(*head, targets, entropy=True)
        return *results, *torch.autograd.grad(results[0].sum() + results[1].sum(), head)

    through = result()
    for name in ("linear_logprob_statistics", "linear_logprob_dlogits"):
        with use_config(name, TMA=False, **SMALL):
            assert all(torch.equal(a, b) for a, b in zip(result(), through))


def test_strided_rows_equal_copies():
    inputs, targets = drawn(19, 40, 24)
    wide = [torch.full((len(x), 40), math.nan, device=DEVICE) for x in inputs.values()]
    for buffer, x in zip(wide, inputs.values()):
        buffer[:, 8:32] = x.float()
    views = [buffer[:, 8:32].detach().requires_grad_() for buffer in wide]
    copies = [x.float().contiguous().requires_grad_() for x in inputs.values()]
    for leaves in (views, copies):
        linear_logprob(*leaves, targets)[0].sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(views, copies))


# Catches: gradients of ignored rows left in; a row's NaN that reaches another row.
def test_ignored_rows_are_0_whatever_their_hidden_states():
    inputs, targets = drawn(37, 75, 24, seed=5)
    hidden, weight = (x.float() for x in inputs.values())
    targets[3:7] = -1
    clean = [x.clone().requires_grad_() for x in (hidden.masked_fill((targets < 0)[:, None], 0.0), weight)]
    poisoned = [x.clone().requires_grad_() for x in (hidden.masked_fill((targets < 0)[:, None], math.nan), weight)]
    large = [x.clone().requires_grad_() for x in (hidden.masked_fill((targets < 0)[:, None], 1e4), weight)]
    outs = []
    for leaves in (clean, poisoned, large):
        result = linear_logprob(*leaves, targets, entropy=True)
        (result[0].sum() + result[1].sum()).backward()
        outs.append(result)
    for result, other in zip(outs[1:], (poisoned, large)):
        assert all(torch.equal(a, b) for a, b in zip(outs[0], result))
        assert torch.equal(clean[0].grad, other[0].grad)
    assert not clean[0].grad[targets < 0].any() and torch.equal(clean[1].grad, large[1].grad)


def test_two_runs_are_bit_equal():
    inputs, targets = drawn(37, 211, 24, seed=6)
    head = [x.float().requires_grad_() for x in inputs.values()]

    def result():
        results = linear_logprob(*head, targets, entropy=True)
        return *results, *torch.autograd.grad(results[0].sum() + results[1].sum(), head)

    assert all(torch.equal(a, b) for a, b in zip(result(), result()))


def test_integer_inputs_give_exact_targets_and_peaks():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-2, 3, (n, 40), generator=generator).float().to(DEVICE) for n in (37, 75))
    targets = torch.randint(75, (37,), generator=generator).to(DEVICE)
    result = linear_logprob_partial(hidden, weight, targets)
    logits = hidden @ weight.T
    assert torch.equal(result[0], logits.amax(-1))
    assert torch.equal(result[2], logits.gather(-1, targets[:, None])[:, 0])


# Catches: a sum that is not kept relative to the peak.
def test_logits_of_magnitude_1e4():
    weight = torch.full((40, 1), -1e4, device=DEVICE)
    weight[3], weight[37] = 1e4, 1e4 - 0.5
    hidden = torch.ones(2, 1, device=DEVICE)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([3, 37], device=DEVICE), entropy=True)
    p = 1 / (1 + math.exp(-0.5))
    assert logprob.tolist() == pytest.approx([math.log(p), math.log(1 - p)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p)] * 2, rel=1e-6)


def test_logits_of_minus_infinity():
    """Half of the vocabulary entries are -inf, and so is the whole first tile."""
    weight = torch.zeros(75, 1, device=DEVICE)
    weight[:40] = -torch.inf
    hidden, targets = torch.ones(3, 1, device=DEVICE), torch.tensor([41, 74, 2], device=DEVICE)
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    assert logprob.tolist() == pytest.approx([-math.log(35), -math.log(35), -math.inf])
    assert entropy.tolist() == pytest.approx([math.log(35)] * 3)
    nothing = torch.full((75, 1), -torch.inf, device=DEVICE)
    assert linear_logprob(hidden, nothing, targets)[0].isnan().all()


# Catches: 0 times -inf in the gradient of the logits.
@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_minus_infinity_have_no_gradient(entropy):
    """Nor do they change that of the others; the hidden states' gradient multiplies by them and is not asked for."""
    inputs, targets = drawn(20, 75, 24, seed=13)
    hidden, weight = inputs["hidden"].float().abs() + 1e-3, inputs["weight"].float()
    targets = targets % 40 + 35
    result = []
    for vocab_size, here in (
        (weight.masked_fill(torch.arange(75, device=DEVICE)[:, None] < 35, -torch.inf), targets),
        (weight[35:], targets - 35),
    ):
        leaf = vocab_size.clone().requires_grad_()
        logprob, entropies = linear_logprob(hidden, leaf, here, entropy=entropy)
        (logprob.sum() + entropies.sum() if entropy else logprob.sum()).backward()
        result.append(leaf.grad)
    assert not result[0][:35].any()
    torch.testing.assert_close(result[0][35:], result[1], rtol=0, atol=2e-6 * float(result[1].abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_affect_only_their_row(bad):
    inputs, targets = drawn(20, 75, 24)
    hidden, weight = (x.float() for x in inputs.values())
    targets = targets.clamp(min=0)
    hidden[2, 1] = bad
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    expected = [row == 2 for row in range(20)]
    assert logprob.isnan().tolist() == expected and entropy.isnan().tolist() == expected


# Catches: a start that is not taken off the targets; sums of an empty slice that are NaN.
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("infinite", [False, True])
def test_slices_of_the_vocabulary_equal_the_whole(count, infinite):
    inputs, targets = drawn(37, 150, 24, seed=7)
    hidden, weight = (x.float() for x in inputs.values())
    edges = [round(150 * i / count) for i in range(count + 1)]
    if infinite:
        hidden = hidden.abs() + 1e-3
        weight[: edges[1]] = -torch.inf
        targets = torch.where((targets >= 0) & (targets < edges[1]), 149, targets)
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = linear_logprob(*whole, targets, temperature=0.7, entropy=True)
    upstreams = torch.randn(2, 37, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    stacked = torch.stack(
        [
            linear_logprob_partial(hidden, weight[a:b], targets, start=a, vocab_size=150, temperature=0.7)
            for a, b in itertools.pairwise(edges)
        ]
    )
    for x, y in zip(merge_partials(stacked, targets), expected):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    if infinite:
        return
    (expected[0] * upstreams[0] + expected[1] * upstreams[1]).sum().backward()
    dhidden = torch.zeros_like(hidden)
    for a, b in itertools.pairwise(edges):
        local = [x.clone().requires_grad_() for x in (hidden, weight[a:b])]
        shard = VocabularyShard(a, 150, lambda _: stacked)
        result = linear_logprob(*local, targets, temperature=0.7, entropy=True, shard=shard)
        (result[0] * upstreams[0] + result[1] * upstreams[1]).sum().backward()
        dhidden += local[0].grad
        atol = 2e-6 * float(whole[1].grad.abs().max())
        torch.testing.assert_close(local[1].grad, whole[1].grad[a:b], rtol=0, atol=atol)
    atol = 2e-6 * float(whole[0].grad.abs().max())
    torch.testing.assert_close(dhidden, whole[0].grad, rtol=0, atol=atol)


# Catches: a slice's gradient in another slice's place; sums of the hidden states' gradient begun anew.
def test_gradients_do_not_depend_on_the_workspace(monkeypatch):
    inputs, targets = drawn(37, 211, 24, seed=8)
    head = [x.float().requires_grad_() for x in inputs.values()]

    def gradients():
        return torch.autograd.grad(linear_logprob(*head, targets)[0].sum(), head)

    whole = gradients()
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 37 * 4 * 64)
    assert module._slice_entries(37, 211, 32, 4) == 64
    chunked = gradients()
    assert torch.equal(whole[1], chunked[1])
    torch.testing.assert_close(whole[0], chunked[0], rtol=0, atol=1e-6 * float(whole[0].abs().max()))


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "size"), [(1, 1, 2), (16384, 128000, 2), (65536, 128256, 2), (8192, 32001, 4)]
)
def test_workspace_stays_within_its_bound(tokens, vocab_size, size):
    step = module._slice_entries(tokens, vocab_size, 256, size)
    assert step % 256 == 0 and step * tokens * size <= module.WORKSPACE_BYTES <= 256 * 2**20
    assert step >= min(vocab_size, module.WORKSPACE_BYTES // (4 * tokens * size)), "a slice takes a fair share of it"


# Catches: a last group of fewer row tiles that is counted as a full one.
@pytest.mark.parametrize("group", [1, 2, 3])
def test_results_do_not_depend_on_the_order_of_programs(group, monkeypatch):
    inputs, targets = drawn(90, 211, 24, seed=11)
    head = [x.float().requires_grad_() for x in inputs.values()]

    def result():
        results = linear_logprob(*head, targets, entropy=True)
        return *results, *torch.autograd.grad(results[0].sum() + results[1].sum(), head)

    monkeypatch.setattr(module, "_split_blocks", lambda *sizes: 2)
    expected = result()
    monkeypatch.setattr(module, "GROUP", group)
    assert all(torch.equal(a, b) for a, b in zip(result(), expected))


@pytest.mark.parametrize(("tiles", "blocks"), [(0, 1), (1, 1), (1, 500), (64, 500), (128, 125), (257, 500), (4096, 9)])
def test_splits_fill_the_device(tiles, blocks):
    """At least a program per multiprocessor of 132, and a group of row tiles that fills it with all splits."""
    splits = math.ceil(blocks / module._split_blocks(tiles, blocks, 132))
    assert 1 <= splits <= blocks
    assert 2 * tiles * splits >= min(tiles * blocks, 132)
    assert 2 * splits * module.GROUP >= min(blocks * module.GROUP, 132)


def test_many_splits_are_merged(monkeypatch):
    """More than two blocks of the merge kernel, 75 splits of a tile each."""
    with use_config("linear_logprob_merge", BLOCK_T=16, BLOCK_S=32, num_warps=4, num_stages=1):
        inputs, targets = drawn(17, 75 * 32 - 5, 16, seed=12)
        monkeypatch.setattr(module, "_split_blocks", lambda *sizes: 1)
        against_full_logits(inputs, targets, torch.float32)


def test_gradients_that_are_not_asked_for_are_not_made():
    inputs, targets = drawn(9, 40, 24)
    hidden, weight = (x.float() for x in inputs.values())
    both = [x.clone().requires_grad_() for x in (hidden, weight)]
    linear_logprob(*both, targets)[0].sum().backward()
    for name, twin in zip(("hidden", "weight"), both):
        arguments = {"hidden": hidden, "weight": weight}
        arguments[name] = arguments[name].clone().requires_grad_()
        linear_logprob(**arguments, targets=targets)[0].sum().backward()
        assert torch.equal(arguments[name].grad, twin.grad)


def losses(head, targets, device):
    """Cross-entropy, DPO and PPO of the same head."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(37, generator=generator).to(device)
    marks = torch.tensor([0, 8, 17, 30, 37], dtype=torch.int32, device=device)
    logprobs = [torch.randn(37, generator=generator).to(device) - 3 for _ in range(3)]
    other = [x.detach().flip(0) for x in head]
    return (
        cross_entropy(*head, targets, weights, num_tokens=20),
        dpo(*head, targets, weights, marks, tuple(other), beta=0.3, num_pairs=2, nll=0.1, num_chosen_tokens=9),
        ppo(*head, targets, *logprobs[:2], clip=0.2, num_tokens=20, reference=logprobs[2], kl=0.1, entropy=0.1),
    )


def test_losses_equal_those_of_the_reference():
    inputs, targets = drawn(37, 75, 24, seed=9)
    head = [(0.1 * x).float().requires_grad_() for x in inputs.values()]
    with kernels.use_backend("reference"):
        expected = losses(head, targets, DEVICE)
        upstreams = [torch.autograd.grad(out.loss, head) for out in expected]
    for out, target, gradients in zip(losses(head, targets, DEVICE), expected, upstreams):
        torch.testing.assert_close(out.loss, target.loss, rtol=1e-5, atol=1e-5)
        for name, value in target.metrics.items():
            torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-4, msg=name)
        for result, gradient in zip(torch.autograd.grad(out.loss, head), gradients):
            torch.testing.assert_close(result, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@needs_interpreter
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_rows_behind_2_to_the_31_elements(which):
    """A row stride of 2^30: the third row starts behind 2^31 elements; pages between are never touched."""
    inputs, targets = drawn(3, 3, 16, seed=10)
    tensors = {name: x.half() for name, x in inputs.items()}
    far = torch.empty(2**31 + 2**20, dtype=torch.float16).as_strided((3, 16), (2**30, 1))
    far.copy_(tensors[which])
    result = []
    for pointers in (False, True):
        for arguments in (tensors, {**tensors, which: far}):
            leaves = [x.detach().requires_grad_() for x in arguments.values()]
            configs = [
                use_config(name, TMA=not pointers, **SMALL)
                for name in ("linear_logprob_statistics", "linear_logprob_dlogits")
            ]
            with configs[0], configs[1]:
                logprob, _ = linear_logprob(*leaves, targets)
                grads = torch.autograd.grad(logprob.sum(), leaves)
            result.append((logprob, *grads))
    assert all(torch.equal(a, b) for other in result[1:] for a, b in zip(result[0], other))


@needs_interpreter
def test_gradients_of_logits_behind_2_to_the_31_elements(monkeypatch):
    """The last tile of 70,000 rows of 32,768 vocabulary entries, 2.3e9 elements, the only one that runs."""
    from triton.runtime import interpreter

    rows, vocab_size = 70000, 32768
    hidden, weight = torch.randn(rows, 16).half(), torch.randn(vocab_size, 16).half()
    targets, dlogprob = torch.full((rows,), vocab_size - 1), torch.ones(rows)
    logits = hidden[-32:].float() @ weight.float().T
    statistics = torch.zeros(4, rows)
    statistics[0, -32:], statistics[1, -32:] = logits.amax(-1), (logits - logits.amax(-1, keepdim=True)).exp().sum(-1)
    statistics[1, :-32] = 1
    dlogits = torch.empty(rows * vocab_size, dtype=torch.float16)
    programs = math.ceil(rows / 16) * vocab_size // 32
    last = interpreter.TensorHandle(
        interpreter.np.array([programs - 1], dtype=interpreter.np.int32), interpreter.tl.int32
    )
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda self, axis: last)
    module.linear_logprob_dlogits_kernel[(1,)](
        hidden,
        weight,
        None,
        None,
        targets,
        statistics,
        dlogprob,
        None,
        dlogits,
        rows,
        vocab_size,
        0,
        vocab_size // 32,
        0,
        1.0,
        16,
        16,
        vocab_size,
        WIDTH=16,
        ENTROPY=False,
        TMA=False,
        PRECISION="ieee",
        GROUP=module.GROUP,
        **SMALL,
    )
    expected = -logits.softmax(-1)[-16:, -32:]
    expected[:, -1] += 1
    torch.testing.assert_close(dlogits.view(rows, vocab_size)[-16:, -32:].float(), expected, rtol=2e-3, atol=1e-6)


def test_operations_trace_with_the_kernels():
    inputs, targets = drawn(9, 40, 24)
    head = [x.float() for x in inputs.values()]
    tests = ("test_schema", "test_faketensor")
    plain = torch.ops.wizard_engine.linear_logprob_statistics
    torch.library.opcheck(plain, (*head, targets, 0.7, True, 0), test_utils=tests)
    grad = torch.ones(9, device=DEVICE)
    arguments = (grad, grad, *head, targets, plain(*head, targets, 0.7, True, 0), 0.7, 0, True, False)
    torch.library.opcheck(torch.ops.wizard_engine.linear_logprob_gradients, arguments, test_utils=tests)
