"""Flat layouts: every element of every parameter stands in exactly one part, matrices before vectors."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.parallel.flat_layout import ALIGNMENT, Layout

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=7)


@given(SHAPES, st.integers(1, 9))
@settings(max_examples=50)
def test_shards_cover_every_parameter_once(shapes, num_shards):
    named = [(str(number), shape) for number, shape in enumerate(shapes)]
    layout = Layout(named, num_shards)
    assert layout.size == layout.shard_size * num_shards and layout.shard_size % ALIGNMENT == 0
    flat = torch.full((layout.size,), -1)
    for slot in layout.slots:
        assert slot.start % ALIGNMENT == 0 and slot.stop - slot.start == math.prod(slot.shape)
        flat[slot.start : slot.stop] = int(slot.name)
    for gap in layout.gaps:
        assert (flat[gap] == -1).all()
        flat[gap] = -2
    assert not (flat == -1).any()
    ranges = {name: [] for name, _ in named}
    for index in range(num_shards):
        shard = flat.view(num_shards, -1)[index]
        for span in layout.spans(index):
            piece = shard[span.offset : span.offset + span.stop - span.start]
            assert (piece == int(span.slot.name)).all()
            ranges[span.slot.name].append((span.start, span.stop))
        split = layout.decayed(index)
        kinds = {len(shapes[name]) >= 2 for name in shard[:split].tolist() if name >= 0}
        assert kinds <= {True} and not any(len(shapes[n]) >= 2 for n in shard[split:].tolist() if n >= 0)
    for name, shape in named:
        assert [start for start, _ in ranges[name]] == [0, *(stop for _, stop in ranges[name][:-1])]
        assert ranges[name][-1][1] == math.prod(shape)
    views = layout.views(flat)
    assert all(views[name].shape == shape and (views[name] == int(name)).all() for name, shape in named)
