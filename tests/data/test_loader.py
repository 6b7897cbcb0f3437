"""The loader: every sample once an epoch, exact resume, and an order that no number of ranks changes."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.loader import Loader, split_packs


def make(count=97, capacity=64, seed=3, **settings):
    lengths = np.random.default_rng(count).integers(1, capacity + 1, count)
    defaults = {"packs_per_step": 4, "epochs": 1.0, "window": 32}
    return Loader(lengths, capacity=capacity, seed=seed, **(defaults | settings))


def plain(steps):
    return [[pack.tolist() for pack in packs] for packs in steps]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 12]), st.integers(1, 3), st.integers(0, 20), st.integers(0, 5))
def test_loader_gives_every_sample_once_an_epoch_within_capacity(count, packs_per_step, epochs, window, seed):
    loader = make(count, packs_per_step=packs_per_step, epochs=epochs, window=window, seed=seed)
    steps = list(loader)
    assert len(steps) == loader.steps
    seen = np.concatenate([pack for packs in steps for pack in packs])
    assert np.array_equal(np.bincount(seen, minlength=count), np.full(count, epochs))
    assert all(loader.lengths[pack].sum() <= 64 and len(pack) for packs in steps for pack in packs)
    assert all(len(packs) == packs_per_step for packs in steps[:-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.sampled_from([2, 3, 4]), st.sampled_from([0.4, 1.0, 2.5]), st.integers(0, 5))
def test_loader_order_does_not_depend_on_world_size(count, world_size, epochs, seed):
    one = make(count, packs_per_step=12, epochs=epochs, seed=seed)
    ranks = [
        make(count, packs_per_step=12, epochs=epochs, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for packs, *shards in zip(one, *ranks, strict=True):
        merged = [None] * len(packs)
        for rank, shard in enumerate(shards):
            merged[rank::world_size] = shard
        assert plain([merged]) == plain([packs])
        for loader in ranks:
            assert np.array_equal(loader.global_step_indices(), one.global_step_indices())
        assert np.array_equal(np.concatenate(packs), one.global_step_indices())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(0, 30), st.sampled_from([1.0, 2.7, None]), st.sampled_from([1, 2]))
def test_loader_resumes_exactly(count, taken, epochs, world_size):
    options = {"epochs": epochs, "world_size": world_size, "rank": world_size - 1}
    loader = make(count, **options)
    before = list(islice(loader, taken))
    state = json.loads(json.dumps(loader.state()))
    rest = plain(islice(loader, 20))
    resumed = make(count, **options)
    resumed.load_state(state)
    assert plain(islice(resumed, 20)) == rest
    assert plain(before) + rest == plain(islice(make(count, **options), len(before) + len(rest)))


def test_loader_state_inside_the_loop_points_at_the_next_step():
    loader = make()
    for step, _ in enumerate(loader):
        if step == 2:
            state = loader.state()
            break
    assert state["step"] == 3
    resumed = make()
    resumed.load_state(state)
    assert plain(resumed) == plain(make())[3:] and len(resumed) == 0


def test_loader_resumes_with_more_epochs_and_another_world_size():
    loader = make(epochs=1.5)
    seen = plain(islice(loader, loader.steps - 1))
    longer = [make(epochs=3, world_size=2, rank=rank) for rank in range(2)]
    for item in longer:
        item.load_state(loader.state())
    following = [even for even, _ in zip(*map(plain, longer), strict=True)]
    whole = plain(make(epochs=3))
    assert seen == whole[: len(seen)]
    assert [step[::2] for step in whole[len(seen) :]] == following


def test_loader_seeds_epochs_and_windows_change_the_order():
    first = plain(make())
    assert plain(make()) == first
    assert plain(make(seed=4)) != first and plain(make(window=97)) != first
    twice = make(epochs=2, packs_per_step=1)
    steps = plain(twice)
    epochs = [
        {tuple(sorted(packs[0])) for packs in half} for half in (steps[: len(first) * 4], steps[len(first) * 4 :])
    ]
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 2


def test_loader_window_bounds_what_is_packed_together():
    loader = Loader(np.full(64, 2), capacity=8, packs_per_step=1, seed=0, epochs=1, window=6)
    assert sorted(len(pack) for packs in loader for pack in packs) == [2] * 10 + [4] * 11
    whole = Loader(np.full(64, 2), capacity=8, packs_per_step=1, seed=0, epochs=1, window=0)
    assert {len(pack) for packs in whole for pack in packs} == {4}


def test_split_packs_cuts_the_largest_first():
    packs = [np.array([1]), np.array([2, 3, 4, 5]), np.array([6, 7])]
    assert plain([split_packs(packs, 5)]) == [[[1], [2], [3], [4, 5], [6, 7]]]
    assert plain([split_packs(packs, 20)]) == [[[1], [2], [3], [4], [5], [6], [7]]]


# Catches: the rest of a pass that was a fraction skipped; packs of a later pass left out where the last step had few.
@pytest.mark.parametrize("lengths", [(0.4, 1.0), (1.0, 2.0), (0.3, 0.7, 1.5, 3.0), (1.5, 1.6, 2.0)])
@pytest.mark.parametrize("packs_per_step", [1, 4, 7])
def test_loader_that_is_given_more_epochs_yields_every_sample_once_a_pass(lengths, packs_per_step):
    seen, state = [], None
    for epochs in lengths:
        loader = make(epochs=epochs, packs_per_step=packs_per_step)
        if state is not None:
            loader.load_state(state)
        steps = list(loader)
        assert len(loader) == 0 and loader.steps == len(steps) + (state["step"] if state else 0)
        seen += [index for packs in steps for pack in packs for index in pack.tolist()]
        state = loader.state()
    whole = [i for packs in make(epochs=lengths[-1], packs_per_step=packs_per_step) for p in packs for i in p.tolist()]
    assert sorted(seen) == sorted(whole)


def test_loader_of_other_samples_or_settings_refuses_the_state():
    state = make().state()
    for other in (make(seed=9), make(count=96), make(packs_per_step=2), make(window=5), make(capacity=65)):
        with pytest.raises(ValueError, match=r"loader state: expected order .*; resume with the same samples"):
            other.load_state(state)
    done = make(epochs=5)
    list(done)
    with pytest.raises(ValueError, match=r"loader state: expected a position within 1 epochs, got pack 0 of epoch 5"):
        make().load_state(done.state())


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"packs_per_step": 3, "world_size": 2}, "world_size must divide packs_per_step"),
        ({"packs_per_step": 0}, "packs_per_step: expected at least 1"),
        ({"epochs": 0}, "epochs: expected a number above 0"),
        ({"epochs": float("nan")}, "epochs: expected a number above 0"),
        ({"rank": 1}, "rank: expected less than world_size 1"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"count": 0}, "lengths: expected at least one sample"),
    ],
)
def test_loader_refuses_bad_settings(options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**options)


def test_loader_without_end_has_no_steps_and_no_step_before_the_first():
    loader = make(epochs=None)
    assert loader.steps is None and len(list(islice(loader, 500))) == 500
    with pytest.raises(TypeError, match="no length"):
        len(loader)
    with pytest.raises(ValueError, match="iterate first"):
        make().global_step_indices()
