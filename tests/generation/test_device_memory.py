"""Memory that comes and goes under addresses that stay, on a driver that watches; graphs that stay valid."""

import ctypes
import gc
from dataclasses import replace

import pytest
import torch

from wizard_engine.generation import device_memory
from wizard_engine.generation.cuda_graphs import Captured, DecodeGraphs
from wizard_engine.generation.device_memory import OUT_OF_MEMORY, DriverError, LentTensors, MappedRange
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.step_batch import Step
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.rl.sampler import Sampler

CPU = torch.device("cpu")
GRANULARITY = 4096


class Driver:
    """libcuda's virtual memory management on host memory: refuses what the real one refuses, and counts what is held.

    Memory that is not mapped is filled with 0xCD.
    """

    def __init__(self, fails=(), room=2**30):
        self.calls, self.fails, self.room = [], list(fails), room
        self.ranges, self.handles, self.mapped, self.usable, self.buffers = {}, {}, {}, set(), []

    def _said(self, name):
        self.calls.append(name)
        if self.fails and self.fails[0][0] == name:
            return self.fails.pop(0)[1]
        return 0

    def cuMemGetAllocationGranularity(self, out, kind, option):
        kind = kind._obj
        assert (kind.type, kind.location.type, kind.location.id, option) == (1, 1, 0, 0)
        out._obj.value = GRANULARITY
        return self._said("granularity")

    def cuMemAddressReserve(self, out, size, alignment, address, flags):
        assert size.value and size.value % GRANULARITY == 0 and not (alignment.value or address.value or flags.value)
        if code := self._said("reserve"):
            return code
        buffer = ctypes.create_string_buffer(size.value + GRANULARITY)
        at = -(-ctypes.addressof(buffer) // GRANULARITY) * GRANULARITY
        self.buffers.append(buffer)
        self.ranges[at] = size.value
        out._obj.value = at
        return 0

    def cuMemCreate(self, out, size, kind, flags):
        assert size.value and size.value % GRANULARITY == 0 and not flags.value
        if code := self._said("create"):
            return code
        if sum(self.handles.values()) + size.value > self.room:
            return OUT_OF_MEMORY
        out._obj.value = len(self.calls)
        self.handles[out._obj.value] = size.value
        return 0

    def cuMemMap(self, place, size, offset, handle, flags):
        if code := self._said("map"):
            return code
        assert self.ranges[place.value] == size.value == self.handles[handle.value] and not offset.value
        assert place.value not in self.mapped and handle.value not in self.mapped.values()
        self.mapped[place.value] = handle.value
        return 0

    def cuMemSetAccess(self, place, size, access, count):
        assert place.value in self.mapped and count.value == 1 and access._obj.flags == 3
        if code := self._said("access"):
            return code
        self.usable.add(place.value)
        return 0

    def cuMemUnmap(self, place, size):
        assert self.mapped.pop(place.value) and size.value == self.ranges[place.value]
        self.usable.discard(place.value)
        ctypes.memset(place.value, 0xCD, size.value)
        return self._said("unmap")

    def cuMemRelease(self, handle):
        assert handle.value not in self.mapped.values(), "released before it was unmapped"
        del self.handles[handle.value]
        return self._said("release")

    def cuMemAddressFree(self, place, size):
        assert place.value not in self.mapped and self.ranges.pop(place.value) == size.value
        return self._said("free")

    @property
    def is_empty(self):
        return not (self.ranges or self.handles or self.mapped)


def on_the_host(owner, offset, shape, dtype, device):
    """What `tensor_at` gives for a device, over the driver's host memory."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    assert owner.is_mapped and offset + size <= owner.size
    flat = torch.frombuffer((ctypes.c_char * size).from_address(owner.address + offset), dtype=dtype)
    flat.owner = owner
    return flat.view(shape)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(device_memory, "tensor_at", on_the_host)


LIKE = [((3, 5), torch.bfloat16), ((1000,), torch.float32), ((7,), torch.int16)]


def test_tensors_come_back_at_the_same_addresses_without_a_leak(host):
    driver = Driver()
    lent = LentTensors(LIKE, CPU, driver=driver)
    places = set()
    for _ in range(10):
        tensors = lent.restore()
        assert [(tuple(x.shape), x.dtype) for x in tensors] == LIKE and lent.restore()[0] is tensors[0]
        for number, x in enumerate(tensors):
            x.fill_(number + 1)
        assert all(bool((x == number + 1).all()) for number, x in enumerate(tensors))
        assert driver.usable == set(driver.mapped) and sum(driver.handles.values()) == 2 * GRANULARITY
        places.add(tuple(x.data_ptr() for x in tensors))
        lent.release()
        lent.release()
        assert not driver.handles and not driver.mapped
    assert len(places) == 1 and all(at % 512 == 0 for at in places.pop()) and lent.keeps_addresses
    assert driver.calls.count("reserve") == 1 and driver.calls.count("create") == driver.calls.count("release") == 10
    assert driver.calls[-2:] == ["unmap", "release"]
    lent.restore()
    del lent, tensors, x
    gc.collect()
    assert driver.is_empty


def ranged(driver, **options):
    calls = []
    made = MappedRange(
        driver,
        0,
        5000,
        settle=lambda: calls.append("settle"),
        free_cached=lambda: calls.append("free cached"),
        **options,
    )
    return made, calls


def test_the_device_is_waited_for_before_memory_goes():
    driver = Driver()
    made, calls = ranged(driver)
    assert made.size == 2 * GRANULARITY and not made.is_mapped
    made.map()
    with pytest.raises(AssertionError, match="mapped already"):
        made.map()
    made.unmap()
    assert calls == ["settle"]
    with pytest.raises(AssertionError, match="not mapped"):
        made.unmap()
    made.map()
    made.close()
    assert calls == ["settle"] * 2 and driver.is_empty


@pytest.mark.parametrize(("where", "code"), [("map", 1), ("access", 700), ("create", 999)])
def test_failed_calls_leak_nothing(where, code):
    driver = Driver(fails=[(where, code)])
    made, _ = ranged(driver)
    with pytest.raises(DriverError, match=f"expected CUDA_SUCCESS, got error {code}"):
        made.map()
    assert not driver.handles and not driver.mapped and not made.is_mapped
    made.map()
    made.close()
    assert driver.is_empty


def test_memory_that_torch_keeps_for_itself_is_asked_for():
    driver = Driver(fails=[("create", OUT_OF_MEMORY)])
    made, calls = ranged(driver)
    made.map()
    assert calls == ["free cached"] and made.is_mapped
    made.close()
    lent = LentTensors(LIKE, CPU, driver=Driver(room=GRANULARITY))
    with pytest.raises(torch.OutOfMemoryError, match=r"expected 0\.00 GiB of free memory on cpu, got less; use fewer"):
        lent.restore()


@pytest.mark.parametrize("driver", [Driver(fails=[("granularity", 801)]), Driver(fails=[("reserve", 2)]), object()])
def test_without_the_driver_s_help_tensors_are_new_and_that_is_said(driver, capsys):
    lent = LentTensors(LIKE, CPU, driver=driver)
    first = lent.restore()
    lent.release()
    assert not lent.keeps_addresses and [(tuple(x.shape), x.dtype) for x in first] == LIKE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "each release makes CUDA graphs be captured anew" in said[0] and "got error" in said[0]


class Counting(DecodeGraphs):
    """Graphs that count their captures, and replay by calling the function with the tensors of the capture."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.captured = []

    def _capture(self, step):
        self.captured.append((len(step.batch.counts), step.batch.max_length))
        hidden = self.function(step)
        graphs = self

        class Graph:
            def replay(self):
                batch = replace(step.batch, _rows=None, _prefill_chunks=None)
                hidden.copy_(graphs.function(Step(*step[:4], batch)))

        return Captured(Graph(), step, hidden)


def watched(engine, driver=None):
    """The engine with graphs that count, and a cache on the driver that watches."""
    engine.graphs = Counting(engine._blocks, engine.device, sequences=engine.max_sequences, length=192)
    engine.keys = engine.values = engine.routes = None
    if driver is not None:
        engine.memory = LentTensors(engine.memory.like, CPU, driver=driver)
    engine.restore()
    return engine.graphs


def rleif(sampler, policy, steps):
    """Token ids of each RL step: sync the weights, sample, release the memory, update in place."""
    tokens_by_step = []
    for step in range(steps):
        sampler.sync_weights()
        rows = [sampler.engine.add([i + 1] * 20, Sampling(30, 1.0, seed=step, row=i))[0] for i in range(9)]
        sampler.engine.run()
        tokens_by_step.append([s.tokens for s in rows])
        sampler.release()
        with torch.no_grad():
            policy.blocks[0].attention.qkv.weight.mul_(1.01)
    return tokens_by_step


def policy_and_sampler():
    policy = Transformer(replace(PRESETS["tiny"], init_std=0.3), seed=4).eval()
    return policy, Sampler(policy, cache_tokens=16 * 40, max_sequences=9)


def test_ten_steps_of_rleif_capture_each_graph_once(host):
    right = rleif(*reversed(policy_and_sampler()), 10)
    policy, sampler = policy_and_sampler()
    driver = Driver()
    graphs = watched(sampler.engine, driver)
    assert rleif(sampler, policy, 10) == right
    assert len(graphs.captured) == len(set(graphs.captured)) == graphs.captures == sampler.engine.captures > 0
    assert not driver.handles and driver.calls.count("create") == 10 and driver.calls.count("reserve") == 1


def test_graphs_are_forgotten_where_cache_or_weights_stand_elsewhere(host, monkeypatch):
    policy, sampler = policy_and_sampler()
    # Memory that torch gives again might stand where it stood: keep it from that.
    held, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: held.append(empty(*args, **options)) or held[-1])
    graphs = watched(sampler.engine)
    rleif(sampler, policy, 3)
    assert len(graphs.captured) == 3 * len(set(graphs.captured)) > 0
    monkeypatch.setattr(torch, "empty", empty)
    policy, sampler = policy_and_sampler()
    graphs = watched(sampler.engine, Driver())
    rleif(sampler, policy, 1)
    once = len(graphs.captured)
    policy.norm.weight.data = policy.norm.weight.data.clone()
    rleif(sampler, policy, 2)
    assert len(graphs.captured) == 2 * once


def test_graphs_are_captured_ahead_of_the_steps():
    model = Transformer(replace(PRESETS["tiny"], init_std=0.3, max_positions=2048), seed=4).eval()
    engine = Engine(model, cache_tokens=4096, max_sequences=9)
    graphs = engine.graphs = Counting(engine._blocks, engine.device, sequences=9, length=2048)
    engine.capture([1, 8], 600)
    assert graphs.captured == [(1, 512), (1, 2048), (8, 512), (8, 2048)]
    rows = [engine.add([i + 1] * 505, Sampling(20, 1.0, seed=i))[0] for i in range(5)]
    engine.run()
    assert graphs.captures == engine.captures == 4
    plain = Engine(model, cache_tokens=4096, max_sequences=9)
    plain.capture([1], 600)
    assert plain.captures == 0
    again = [plain.add([i + 1] * 505, Sampling(20, 1.0, seed=i))[0] for i in range(5)]
    plain.run()
    assert [s.tokens for s in rows] == [s.tokens for s in again]
