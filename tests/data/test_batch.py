"""Batches: packed inputs, targets and marks, by hand and by reconstruction."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample


def sample(tokens, weights):
    return Sample(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))


def test_collate_by_hand():
    batch = collate([sample([1, 5, 6, 2], [0, 0, 0.5, 1]), sample([1, 7], [0, 0]), sample([1, 8, 2], [0, 1, 1])])
    assert batch.tokens.tolist() == [1, 5, 6, 1, 1, 8]
    assert batch.targets.tolist() == [5, 6, 2, 7, 8, 2]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.max_seqlen == 3
    assert batch.weights.tolist() == [0, 0.5, 1, 0, 1, 1] and batch.num_supervised == 4
    dtypes = [getattr(batch, name).dtype for name in ("tokens", "targets", "positions", "cu_seqlens", "weights")]
    assert dtypes == [torch.int64] * 3 + [torch.int32, torch.float32]
    assert batch.inputs == (batch.tokens, batch.positions, batch.cu_seqlens, 3)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_collate_keeps_every_sample(lengths, seed):
    rng = np.random.default_rng(seed)
    samples = [sample(rng.integers(0, 99, n), np.r_[0, rng.integers(0, 2, n - 1)]) for n in lengths]
    batch = collate(samples)
    bounds = batch.cu_seqlens.tolist()
    assert batch.max_seqlen == max(lengths) - 1 and bounds[-1] == len(batch.tokens)
    for one, start, end in zip(samples, bounds[:-1], bounds[1:], strict=True):
        assert batch.tokens[start:end].tolist() == one.tokens[:-1].tolist()
        assert batch.targets[start:end].tolist() == one.tokens[1:].tolist()
        assert batch.weights[start:end].tolist() == one.weights[1:].tolist()
        assert batch.positions[start:end].tolist() == list(range(end - start))
    assert batch.num_supervised == sum(int((one.weights != 0).sum()) for one in samples)


@pytest.mark.parametrize("samples", [[], [sample([1], [0])], [sample([1, 2], [0, 1]), sample([], [])]])
def test_collate_refuses_nothing_to_predict(samples):
    with pytest.raises(ValueError, match="samples: expected at least one, of two or more tokens"):
        collate(samples)


def test_batch_moves_with_everything():
    moved = collate([sample([1, 2, 3], [0, 1, 1])]).to("meta")
    assert {tensor.device.type for tensor in moved.inputs[:3]} | {moved.weights.device.type} == {"meta"}
    assert (moved.max_seqlen, moved.num_supervised) == (2, 2)
