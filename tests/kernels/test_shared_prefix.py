"""Sequences whose shared prefix is computed once against whole sequences: outputs and gradients."""

import itertools

import pytest
import torch

import kernels
from kernels.attention import attention_reference
from kernels.shared_prefix import pick, shared_attention
from wizard_engine.data.batch import prompt_groups, share_prompts
from wizard_engine.data.chat import Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Samples as (prompt, tokens of the prompt, tokens of the answer).
GROUPS = [
    [("a", 5, 3), ("a", 5, 1), ("b", 2, 7), ("a", 5, 9)],
    [("a", 1, 1)],
    [("c", 40, 30), ("c", 40, 2), ("d", 33, 17), ("d", 33, 1), ("e", 3, 21)],
]


def samples_of(group, vocab_size=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = {name: torch.randint(vocab_size, (n,), generator=generator) for name, n, _ in group}
    rows, counts = [], []
    for name, count, answer in group:
        tokens = torch.cat((prompts[name], torch.randint(vocab_size, (answer,), generator=generator)))
        rows.append(Sample(tokens.int().numpy(), torch.ones(len(tokens)).numpy()))
        counts.append(count)
    return rows, counts


def whole(q, k, v, batch, window):
    """Attention of the whole of each sample; rows of a prompt are the same in all of its samples."""
    out, cu_k = torch.zeros_like(q), batch.prefixes.cu_keys.tolist()
    for first, last in itertools.pairwise(cu_k):
        rows = batch.prefixes.keys[first:last]
        cu = torch.tensor([0, len(rows)], dtype=torch.int32, device=q.device)
        out = out.index_copy(0, rows, attention_reference(q[rows], k[rows], v[rows], cu, len(rows), window=window))
    return out


def run(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out.detach(), *torch.autograd.grad((out * grads).sum(), leaves)


@pytest.mark.every(5)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("group", range(len(GROUPS)))
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_shared_prefixes_change_no_result(group, window, last, backend):
    if backend == "triton" and not (DEVICE == "cuda" or kernels.backend.is_interpreted()):
        pytest.skip("Triton needs a GPU or its interpreter")
    rows, counts = samples_of(GROUPS[group])
    batch = share_prompts(rows, counts, last=last).to(DEVICE)
    dtype = torch.float32 if backend == "triton" else torch.float64
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch.prefixes.tokens, heads, 16) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]
    expected = run(lambda q, k, v: whole(q, k, v, batch, window), [x.double() for x in inputs])

    def ours():
        return run(lambda q, k, v: shared_attention(q, k, v, batch.prefixes, window=window), inputs)

    if backend == "cpu":
        result = ours()
    else:
        with kernels.use_backend(backend):
            result = ours()
    for a, b in zip(result, expected):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-11 if dtype == torch.float64 else 3e-5)


def test_rows_behind_the_last_one_are_padding():
    rows, counts = samples_of(GROUPS[0])
    batch = share_prompts(rows, counts)
    q, k, v = (torch.randn(batch.prefixes.tokens + 3, heads, 8) for heads in (2, 1, 1))
    out = shared_attention(q, k, v, batch.prefixes)
    assert not out[-3:].any() and torch.equal(out[:-3], shared_attention(q[:-3], k[:-3], v[:-3], batch.prefixes))
    with pytest.raises(ValueError, match="q: expected at least"):
        shared_attention(q[:4], k[:4], v[:4], batch.prefixes)


def test_picked_rows_add_their_gradients_up():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 0, 2, 0])
    assert torch.equal(pick(x, rows), x[rows])
    assert torch.autograd.gradcheck(lambda x: pick(x, rows), (x,))


def test_shared_batches_hold_every_token_once_and_predict_every_answer():
    rows, counts = samples_of(GROUPS[0])
    batch = share_prompts(rows, counts)
    assert batch.prefixes.tokens == len(batch.tokens) == 5 + 2 + (2 + 0 + 6 + 8) and batch.prefixes.prefix_tokens == 7
    assert batch.cu_answers.tolist() == [0, 3, 4, 11, 20]
    at = 0
    for sample, count in zip(rows, counts):
        for i in range(count, len(sample.tokens)):
            assert batch.targets[at] == sample.tokens[i]
            row = int(batch.rows[at])
            assert batch.tokens[row] == sample.tokens[i - 1] and batch.positions[row] == i - 1
            # The chain of tokens before it is the sample's own.
            for back in range(i - 1, 0, -1):
                row = int(batch.prefixes.previous[row])
                assert batch.tokens[row] == sample.tokens[back - 1] and batch.positions[row] == back - 1
            at += 1
    read = share_prompts(rows, counts, last=True)
    assert torch.equal(read.tokens[read.target_positions], read.targets) and (batch.target_positions == -1).all()
    for sample, first, last in batch.pieces:
        assert last - first == counts[sample] or first == counts[sample]


def test_prompt_groups_keep_the_answers_of_a_prompt_together():
    rows, counts = samples_of([("a", 10, 5)] * 4 + [("b", 3, 2)] * 3 + [("c", 30, 40)])
    runs = prompt_groups(rows, counts, range(8), 35)
    assert sorted(i for run in runs for i in run) == list(range(8))
    assert [sorted(run) for run in runs] == [[4, 5, 6], [0, 1, 2, 3], [7]]
    for run in runs:
        size = share_prompts([rows[i] for i in run], [counts[i] for i in run], last=True).prefixes.tokens
        assert size <= 35 or len(run) == 1
    assert len(prompt_groups(rows, counts, [0, 1, 2, 3], 20)) == 2


@pytest.mark.parametrize(("count", "message"), [(0, "got 0"), (8, "got 8")])
def test_samples_without_a_prompt_or_an_answer_are_refused(count, message):
    rows, _ = samples_of([("a", 5, 3)])
    with pytest.raises(ValueError, match=f"prompt tokens in sample 0, {message}"):
        share_prompts(rows, [count])
    with pytest.raises(ValueError, match="samples: expected at least one"):
        share_prompts([], [])
