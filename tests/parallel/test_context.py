"""Which tokens a rank has, and attention over chunks of a row, on the kernels, without other ranks."""

import dataclasses

import pytest
import torch

import kernels
from kernels.attention import attention
from wizard_engine.parallel import context
from wizard_engine.parallel.context import ParallelContext
from wizard_engine.parallel.mesh import Axis


def ranks_of(cp, tp):
    """The context of every rank of a row, in their order."""
    return [
        ParallelContext(Axis(tp, t), Axis(cp, c), Axis(), Axis(cp * tp, c * tp + t))
        for c in range(cp)
        for t in range(tp)
    ]


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (1, 1)])
def test_every_token_has_one_rank_and_the_shards_join_to_the_row(monkeypatch, cp, tp, tokens):
    ranks, row = ranks_of(cp, tp), torch.arange(1, tokens + 1)
    shards = [rank.shard_tokens(row) for rank in ranks]
    assert sorted(int(x) for shard in shards for x in shard if x > 0) == row.tolist()
    assert len({len(shard) for shard in shards}) == 1 and sum(map(len, shards)) < tokens + 2 * cp * tp
    # Ranks of cp have chunks from both ends, and those of tp halves of what theirs has.
    for c in range(cp):
        together = torch.cat(shards[c * tp : (c + 1) * tp])
        assert torch.equal(together, ranks[c * tp].shard_over_cp(row))
    if cp * tp > 1:
        together = torch.cat(shards)
        monkeypatch.setattr(context.AllGatherReplicated, "apply", lambda x, axis: together)
        assert torch.equal(ranks[0].gather_tokens(shards[0], tokens), row)
    if cp > 1:
        rows = torch.cat([ranks[c * tp].shard_over_cp(row) for c in range(cp)])
        monkeypatch.setattr(context, "all_gather_rows", lambda x, axis: (rows, None))
        assert torch.equal(ranks[0].gather_over_cp(shards[0], tokens), row)


def test_all_ranks_have_equally_many_query_key_pairs():
    for cp in (2, 4, 8):
        positions = torch.arange(64)
        pairs = {int((rank.shard_over_cp(positions) + 1).sum()) for rank in ranks_of(cp, 1)}
        assert len(pairs) == 1


@pytest.mark.every(8)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[64], [1, 30, 2, 31], [17, 40], [5, 5, 5, 5, 5, 5]])
def test_attention_over_chunks_is_that_of_the_row(monkeypatch, backend, window, lengths):
    """Documents that end in the middle of a chunk, that a chunk has nothing of, and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest, tokens = max(lengths), 64
    q, k, v = (torch.randn(tokens, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2))
    cotangent = torch.randn(tokens, 4, 16, generator=generator)
    cotangent[int(marks[-1]) :] = 0.0
    with kernels.use_backend("reference"):
        expected = attention(q, k, v, marks, longest, window=window)
        expected = expected, *torch.autograd.grad(expected, (q, k, v), cotangent)
    ranks = ranks_of(4, 1)
    # Keys in the order in which a gather has them; every rank's work with them adds up.
    monkeypatch.setattr(context.AllGather, "apply", lambda x, axis: x)
    order = torch.cat([rank.shard_over_cp(torch.arange(tokens)) for rank in ranks])
    with kernels.use_backend(backend):
        outputs = [
            rank.attend(rank.shard_over_cp(q), k[order], v[order], marks, longest, window=window) for rank in ranks
        ]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(tokens))
    out = torch.cat(outputs)[places]
    with kernels.use_backend(backend):
        out = out, *torch.autograd.grad(out, (q, k, v), cotangent)
    last = int(marks[-1])
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a[:last], b[:last], rtol=2e-5, atol=2e-5)


def test_a_model_gathered_whole_divides_nothing():
    one = dataclasses.replace(ranks_of(2, 2)[1], is_gathered=True)
    x = torch.arange(5)
    assert one.shard_tokens(x) is x and one.gather_tokens(x, 5) is x and one.vocabulary_shard(torch.zeros(4, 2)) is None
    assert not one.shards_tokens
