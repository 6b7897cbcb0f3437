"""Sizes of the experts' exchange: the host waits for them once a layer, with work queued behind it, and never again."""

import dataclasses

import pytest
import torch

from wizard_engine.model import PRESETS, Transformer
from wizard_engine.model.mixture import Routes
from wizard_engine.parallel import expert_parallel as experts_module
from wizard_engine.parallel.context import ParallelContext
from wizard_engine.parallel.expert_parallel import Dispatch
from wizard_engine.parallel.mesh import Axis
from wizard_engine.parallel.recompute import recompute_block

LAYERS, TOKENS = 3, 40
CONFIG = dataclasses.replace(PRESETS["tiny"], layers=LAYERS, experts=4)


@pytest.fixture
def log(monkeypatch):
    """What happens to sizes and rows, in order, on one of two ranks whose twin has the same rows."""
    waits = []

    def twin(out, x, received=None, sent=None, group=None):
        waits.append("rows" if x.is_floating_point() else "counts")
        if received is None:
            # The experts of this rank, the first two, get what both ranks have for them.
            out.copy_(x[:1].expand_as(out))
            return
        mine = x[: sent[0]]
        out.copy_(torch.cat((mine, mine)) if sum(received) == 2 * sent[0] else mine.new_zeros(out.shape))

    read, permute = Dispatch._read, experts_module.permute_rows
    monkeypatch.setattr(torch.distributed, "all_to_all_single", twin)
    monkeypatch.setattr(Dispatch, "_read", lambda self: waits.append("wait") or read(self))
    monkeypatch.setattr(experts_module, "permute_rows", lambda *a: waits.append("permute") or permute(*a))
    return waits


def sharded_mixture(again):
    """A mixture whose experts two ranks share."""
    model = Transformer(CONFIG, seed=1)
    parallel = ParallelContext(ep=Axis(2))
    for module in model.modules():
        if hasattr(module, "parallel"):
            module.parallel = parallel
    for block in model.blocks:
        for name in ("gate_up", "down"):
            whole = getattr(block.feed_forward.experts, name)
            setattr(block.feed_forward.experts, name, torch.nn.Parameter(whole.detach()[:2].clone()))
        recompute_block(block, again)
    return model


def inputs():
    tokens = torch.arange(TOKENS) * 7 % CONFIG.vocab_size
    return tokens, torch.arange(TOKENS), torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS


# Catches: sizes read again where a block is computed again; a wait before the permutation is queued.
@pytest.mark.parametrize("again", ["none", "selective", "full"])
@pytest.mark.parametrize("replays_routes", [False, True])
def test_host_waits_once_a_layer_in_the_forward_and_never_in_the_backward(log, again, replays_routes):
    model = sharded_mixture(again)
    routes = Routes() if replays_routes else None
    hidden = model(*inputs(), routes)
    assert log == ["counts", "permute", "wait", "rows", "rows"] * LAYERS
    log.clear()
    hidden.sum().backward()
    assert "wait" not in log and "counts" not in log
    # Every way of the forward goes back; of a block computed again, the rows travel once more.
    assert log.count("rows") == LAYERS * (4 if again == "full" else 2)
    assert log.count("permute") == (LAYERS if again == "full" else 0)


def test_next_pass_with_the_same_routes_exchanges_its_own_counts(log):
    model, routes = sharded_mixture("none"), Routes()
    for _ in range(2):
        model(*inputs(), routes)
        assert log.count("wait") == log.count("counts") == LAYERS
        log.clear()


def test_dispatch_reads_sizes_of_both_ways(monkeypatch):
    incoming = torch.tensor([[5, 0], [1, 2]], dtype=torch.int32)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda out, x, group=None: out.copy_(incoming))
    dispatch = Dispatch()
    dispatch.begin(torch.tensor([[5, 0], [0, 7]], dtype=torch.int32), Axis(2))
    assert dispatch.sizes(12) == ([5, 7], [5, 3]) == dispatch.sizes(12)


def test_dispatch_without_counts_assumes_an_even_load(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda out, x, group=None: None)
    dispatch = Dispatch()
    dispatch.begin(torch.empty(2, 2, dtype=torch.int32, device="meta"), Axis(2))
    assert dispatch.sizes(13) == ([7, 6], [7, 6])
