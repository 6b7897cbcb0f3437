"""Weights of trainers on two and four ranks, resharded into the sampler's layout, and the samples drawn from them."""

import json

import pytest
import torch
from forked import ROOT, run_ranks

from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel.mesh import Axis
from wizard_engine.parallel.shard_spec import Partition, ShardSpec
from wizard_engine.rl.sampler import Sampler
from wizard_engine.rl.weight_sync import WeightShard, checksum, plan_transfers


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def rank_results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampler") / "results"
    done = run_ranks(request.param, ROOT / "tests" / "rl" / "sampler_cases.py", out, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(out.with_name(f"results.{rank}").read_text()) for rank in range(request.param)]


# Catches: columns of another rank; swapped experts; logits joined in another order; reuse of old keys.
def test_samplers_of_any_layout_draw_the_samples_of_the_whole_model(rank_results):
    assert len(rank_results[0][0]) > 10
    for cases in zip(*(cases for cases, _ in rank_results)):
        for case in cases:
            where = case["name"], case["layout"], case["tp"], case["dtype"]
            first, second = case["results"]
            for mine, right, weights_checksum, error in (first, second):
                assert mine == right, where
                assert "sync the weights before sampling" in error and f"{weights_checksum:x}" in error
            assert first[0] != second[0] and first[2] != second[2] and case["absent"], where
        assert len({json.dumps(case["results"]) for case in cases}) == 1
        assert any(case["moved"] for case in cases) or cases[0]["layout"] == {"dp_shard": 1}


def test_checksums_do_not_depend_on_the_layout(rank_results):
    stamps = {}
    for case in rank_results[0][0]:
        stamps.setdefault((case["name"], case["dtype"]), set()).add((case["results"][0][2], case["results"][1][2]))
    assert all(len(values) == 1 for values in stamps.values()) and len(stamps) == 4
    assert len({next(iter(values)) for values in stamps.values()}) == 4


def test_damaged_weights_and_unfit_layouts_are_refused(rank_results):
    damaged, uneven = rank_results[1][1]
    assert "weights of the sampler: expected checksum" in damaged and damaged.startswith("[rank 1/")
    assert rank_results[0][1][0] == "nothing" and "sampler tp must divide the" in uneven


def test_unsharded_policies_are_sampled_in_place():
    policy = Transformer(PRESETS["tiny"], seed=0)
    sampler = Sampler(policy, cache_tokens=160)
    sampler.sync_weights()
    assert sampler.model is policy
    sampler.check(sampler.weights_checksum)
    with torch.no_grad():
        policy.norm.weight[0] += 1
    with pytest.raises(ValueError, match="rollout: expected one of the trainer's weights"):
        sampler.check(sampler.weights_checksum)
    with pytest.raises(ValueError, match="got none"):
        sampler.check(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_is_the_sum_over_shards_and_changes_with_every_bit_and_place(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 6, generator=generator, dtype=torch.float64).to(dtype)
    whole = ShardSpec.whole(values.shape)
    total = checksum([("a", whole, 0, values)])
    partition = Partition((12, 6), (8, 4), Axis(size=2))
    shards = []
    for index in range(2):
        local = partition.shard(index).of(values).reshape(-1)
        shards += [
            ("a", partition.shard(index), start, local[start : start + 10]) for start in range(0, len(local), 10)
        ]
    assert sum(checksum([shard]) for shard in shards) % 2**64 == total % 2**64
    columns = Partition((12, 6), (), Axis(size=3))
    local = [("a", columns.shard(i), 0, columns.shard(i).of(values).reshape(-1)) for i in range(3)]
    assert checksum(local) == total != checksum([("b", whole, 0, values)])
    swapped = values.clone()
    swapped[0, 0], swapped[0, 1] = values[0, 1], values[0, 0]
    nudged = values.clone().view(torch.int16 if dtype == torch.bfloat16 else torch.uint8)
    nudged[3, 0] ^= 1
    for other in (swapped, nudged.view(dtype)):
        assert checksum([("a", whole, 0, other)]) != total


def test_moves_cover_each_requested_element_once():
    shape = (8, 6)
    sources = [
        WeightShard("w", Partition(shape, (4, 4), Axis(size=2)).shard(1), start, start + 6) for start in range(0, 24, 6)
    ]
    targets = [
        WeightShard("w", Partition(shape, (), Axis(size=2)).shard(0), 0, 24),
        WeightShard("other", ShardSpec.whole((3,)), 0, 3),
    ]
    transfers = plan_transfers(sources, targets)
    marks = torch.zeros(shape)
    for transfer in transfers:
        transfer.overlap.inside(marks).add_(1)
        assert transfer.target == 0
    expected = torch.zeros(shape)
    expected[[2, 3, 6, 7], :3] = 1
    assert torch.equal(marks, expected)


# Catches: a prompt that reuses keys of the former weights.
def test_new_weights_without_a_release_invalidate_cached_keys():
    policy, prompt = Transformer(PRESETS["tiny"], seed=0), [5] * 40
    sampler = Sampler(policy, cache_tokens=320)
    for change in (1.0, 1.5):
        with torch.no_grad():
            policy.blocks[0].attention.qkv.weight.mul_(change)
        sampler.sync_weights()
        (row,) = sampler.engine.add(prompt, Sampling(4))
        sampler.engine.run()
        fresh = Engine(policy, cache_tokens=320)
        (right,) = fresh.add(prompt, Sampling(4))
        fresh.run()
        assert row.logprobs == right.logprobs and row.cached == 0
