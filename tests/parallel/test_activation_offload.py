"""Activations in host memory: when copies start and what waits for them, how much the device holds, and the numbers."""

import dataclasses
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel import Sharding
from wizard_engine.parallel import recompute as recompute_module
from wizard_engine.parallel.mesh import MeshShape
from wizard_engine.parallel.recompute import ActivationOffload, Copies, recompute_block
from wizard_engine.planning.estimate import activation_bytes, mesh_of

CPU = torch.device("cpu")
LAYERS, TOKENS = 5, 96
CONFIG = dataclasses.replace(PRESETS["tiny"], layers=LAYERS)


class Recorded(Copies):
    """Copies that are made at once and written down: ("out" or "back", block), ("wait", what, block)."""

    def __init__(self) -> None:
        self.log, self.block, self.hosts, self.on_device = [], None, {}, []

    def start(self, target, source):
        target.copy_(source)
        back, host = self.hosts.get(source.untyped_storage()._cdata, (None, None))
        if back is None or host.expired():
            storage = target.untyped_storage()
            self.hosts[storage._cdata] = self.block, StorageWeakRef(storage)
            event = ("out", self.block)
            self.on_device.append((self.block, StorageWeakRef(source.untyped_storage()), source.nbytes))
        else:
            event = ("back", back)
            self.on_device.append((back, StorageWeakRef(target.untyped_storage()), source.nbytes))
        self.log.append(event)
        return event

    def wait(self, event):
        self.log.append(("wait", *event))

    def held(self):
        """Bytes of offloaded tensors that are on the device, and of how many blocks."""
        alive = [(block, size) for block, ref, size in self.on_device if not ref.expired()]
        return sum(size for _, size in alive), len({block for block, _ in alive})


def offloaded(again, copies, monkeypatch, least=1024):
    """A model whose blocks tell the copies which of them runs, and its plain twin."""
    monkeypatch.setattr(recompute_module, "LEAST_BYTES", least)
    model, twin = (Transformer(CONFIG, seed=2) for _ in range(2))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    offload = ActivationOffload(CPU, lambda x: x.untyped_storage().data_ptr() in weights, copies)
    for number, block in enumerate(model.blocks):
        recompute_block(block, again)
        offload.wrap(block)
        block.forward = marked(copies, number, block.forward)
    return model, twin, offload


def marked(copies, number, forward):
    def call(*args):
        copies.block = number
        copies.log.append(("block", number))
        out = forward(*args)
        copies.most = max(getattr(copies, "most", (0, 0)), copies.held())
        if out[1].requires_grad:
            out[1].register_hook(lambda _: copies.log.append(("backward", number)))
        return out

    return call


def inputs():
    tokens = torch.arange(TOKENS) % CONFIG.vocab_size
    return tokens, torch.arange(TOKENS), torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS


@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_offloaded_gradients_are_those_of_what_stays(again, monkeypatch):
    model, twin, _ = offloaded(again, Recorded(), monkeypatch)
    for _ in range(2):
        for one in (model, twin):
            hidden = one(*inputs())
            hidden.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters()))


# Catches: settling as soon as the next block starts, or never; fetching what is still there; another step's blocks
# fetched before the first.
@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_copies_have_a_block_of_time_before_anything_waits(again, monkeypatch):
    copies = Recorded()
    model, _, _ = offloaded(again, copies, monkeypatch)
    for _ in range(2):
        copies.log.clear()
        model(*inputs()).sum().backward()
        running, going, settled, fetched = None, None, [], []
        for kind, *more in copies.log:
            if kind == "block":
                running = more[0]
            elif kind == "backward":
                going = more[0]
            elif kind == "out":
                assert going is None and more[0] == running
            elif kind == "wait" and more[0] == "out":
                # The block before the last one lets go where this one starts.
                assert going is None and more[1] == running - 2
                settled.append(more[1])
            elif kind == "back":
                assert more[0] in (going, going - 1)
                fetched.append(more[0])
            else:
                assert more == ["back", going]
        # What of the last two blocks the backward finds on the device comes from nowhere.
        assert sorted(set(settled)) == sorted(set(fetched)) == list(range(LAYERS - 2))
        assert fetched == sorted(fetched, reverse=True)


def test_device_holds_two_blocks_at_most_and_nothing_after_the_backward(monkeypatch):
    for again in ("none", "selective", "full"):
        copies = Recorded()
        model, _, offload = offloaded(again, copies, monkeypatch)
        hidden = model(*inputs())
        size, blocks = copies.most
        assert blocks == 2 and LAYERS * size == 2 * offload.moved_bytes
        # The closed form says the same of the kernels' activations; CPUs keep attention's probabilities too.
        mesh, sharding = mesh_of(MeshShape(1, 1, 1, 1, 1), CPU), Sharding(dtype="float32", recompute=again)
        stays, _ = activation_bytes(model, mesh, TOKENS, sharding, torch.float32)
        away = dataclasses.replace(sharding, offload_activations=True)
        held, _ = activation_bytes(model, mesh, TOKENS, away, torch.float32)
        assert 2 * stays <= LAYERS * held < 2.2 * stays
        hidden.sum().backward()
        del hidden
        gc.collect()
        assert copies.held()[0] == 0


def test_what_a_block_saves_twice_travels_once(monkeypatch):
    """The stream: the norm's node saves it, and what is computed again takes it."""
    copies = Recorded()
    model, _, offload = offloaded("full", copies, monkeypatch)
    hidden = model(*inputs())
    assert copies.log.count(("out", 2)) == 1 and offload.moved_bytes == LAYERS * TOKENS * CONFIG.width * 4
    hidden.sum().backward()


def test_second_backward_of_a_graph_that_stays_finds_the_same(monkeypatch):
    model, _, _ = offloaded("none", Recorded(), monkeypatch)
    loss = model(*inputs()).square().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters)))
