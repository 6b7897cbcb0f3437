"""The host one step ahead of what it has read: the tokens of the synchronous order, under random loads, no leak."""

import random
from dataclasses import replace

import pytest
import torch

from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.offline import generate
from wizard_engine.generation.staging import Staging
from wizard_engine.generation.streaming import Streamer
from wizard_engine.generation.token_sampling import Flight
from wizard_engine.model import PRESETS, Transformer

EOS = 7


def tiny(name="tiny"):
    return Transformer(replace(PRESETS[name], init_std=0.3), seed=4).eval()


def load(draw, vocab_size, count):
    """Prompts, some of which begin alike, with settings of every kind, and how many samples of each."""
    stem = [draw.randrange(vocab_size) for _ in range(50)]
    for i in range(count):
        prompt = stem[: draw.randint(0, 40)] + [draw.randrange(vocab_size) for _ in range(draw.randint(1, 20))]
        how = Sampling(
            draw.choice([1, 2, 9, 30]),
            draw.choice([0.0, 0.7, 1.0]),
            draw.choice([None, 0, 5]),
            draw.choice([None, 1.0, 0.8]),
            seed=i,
            eos_ids=(EOS,),
            top_logprobs=draw.choice([0, 0, 3]),
        )
        yield prompt, how, draw.choice([1, 1, 1, 3])


def played(model, seed, *, lookahead, cancels=0.0):
    """What every sequence of a random load got, and how its engine did."""
    draw = random.Random(seed)
    pages, most, tokens = draw.choice([(8, 9, 40), (12, 4, 11), (60, 9, 64), (9, 6, 512)])
    engine = Engine(
        model, cache_tokens=16 * pages, max_sequences=most, max_tokens=tokens, record_routes=True, lookahead=lookahead
    )
    coming, everyone, chance = list(load(draw, model.config.vocab_size, 14)), [], random.Random(seed + 1)
    while coming or engine.has_work:
        if coming and chance.random() < 0.4:
            prompt, how, n = coming.pop()
            everyone += engine.add(prompt, how, n=n)
        if everyone and chance.random() < cancels:
            engine.cancel(chance.choice(everyone))
        oldest = min((s.number for s in engine.scheduler.running), default=None)
        steps = engine.steps
        engine.step()
        if oldest is not None and engine.steps > steps:
            served = {s.number for s in engine.scheduler.running} | {s.number for s in everyone if s.row < 0}
            assert oldest in served, "the oldest that runs did not go on"
        assert engine.has_work or not engine.scheduler.has_work
    assert engine.pool.free == engine.pages and not any(s.row >= 0 for s in everyone)
    assert sorted(engine.scheduler._rows) == list(range(engine.max_sequences))
    return everyone, engine


def results(everyone, exact=True):
    """What sequences got; without log-probabilities where these may round otherwise."""
    return [
        (s.ids, s.reason, None if s.experts is None else s.experts.tolist(), *((s.logprobs, s.top) if exact else ()))
        for s in everyone
    ]


# Catches: a token taken from another's place, pages of one that ended, uniforms of another step, a token too many.
@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-mixtral"])
def test_random_loads_produce_the_tokens_of_the_synchronous_order(name):
    model, preemptions = tiny(name), 0
    # Products of experts have as many rows as tokens chose them: they round by what else is in a step.
    exact = not model.config.experts
    for seed in range(8):
        (right, _), (actual, engine) = (played(model, seed, lookahead=ahead) for ahead in (False, True))
        assert results(actual, exact) == results(right, exact)
        for a, b in zip(actual, right):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)
        preemptions += engine.scheduler.preemptions
    assert preemptions > 2


def test_cancelled_sequences_are_prefixes_of_uncancelled_ones():
    model, cancelled = tiny(), 0
    for seed in range(8):
        right, _ = played(model, seed, lookahead=False)
        actual, _ = played(model, seed, lookahead=True, cancels=0.2)
        for mine, whole in zip(actual, right, strict=True):
            assert mine.pending == 0 or mine.reason is not None
            assert mine.tokens == whole.tokens[: mine.steps] and mine.logprobs == whole.logprobs[: mine.steps]
            assert mine.reason == "cancelled" or results([mine]) == results([whole])
            cancelled += mine.reason == "cancelled"
    assert cancelled > 20


def test_a_step_is_launched_before_the_one_before_is_read(monkeypatch):
    events = []
    read, launch = Flight.read, Engine._launch

    def reads(self):
        events.append("read")
        return read(self)

    def launches(self, chunks):
        events.append("launch")
        return launch(self, chunks)

    monkeypatch.setattr(Flight, "read", reads)
    monkeypatch.setattr(Engine, "_launch", launches)
    for lookahead, expected in (
        (False, ["launch", "read"] * 4),
        (True, ["launch", *["launch", "read"] * 3, "read"]),
    ):
        events.clear()
        engine = Engine(tiny(), cache_tokens=160, lookahead=lookahead)
        (row,) = engine.add([3, 4], Sampling(4))
        grown = []
        while engine.has_work:
            grown.append(engine.step())
        assert events == expected and sum(map(len, grown)) == 4 and engine.generated == 4
        assert row.reason == "length" and bool(grown[0]) == (not lookahead)


def test_a_token_behind_an_end_is_dropped_and_its_pages_come_back():
    model = tiny()
    probe = Engine(model, cache_tokens=160)
    (row,) = probe.add([3, 4], Sampling(6))
    probe.run()
    eos = row.tokens[2]
    engine = Engine(model, cache_tokens=160, lookahead=True)
    (actual,) = engine.add([3, 4], Sampling(60, eos_ids=(eos,)))
    while actual.reason is None:
        engine.step()
    stop = row.tokens.index(eos) + 1
    assert actual.tokens == row.tokens[:stop] and actual.reason == "stop" and engine.pool.free == 10
    # A step that had begun is nobody's.
    assert not engine.has_work and engine.steps == stop + 1 and engine.generated == stop
    engine.release()
    engine.restore()
    (again,) = engine.add([3, 4], Sampling(60, eos_ids=(eos,)))
    engine.run()
    assert again.tokens == actual.tokens and engine.generated == 2 * stop


# Catches: pages whose last ids are read when their sequence has given them back already.
@pytest.mark.parametrize("new", range(20, 25))
def test_answers_reuse_the_cache_as_in_the_synchronous_order(new):
    model, cached = tiny(), []
    for lookahead in (False, True):
        engine = Engine(model, cache_tokens=320, lookahead=lookahead)
        (first,) = engine.add([5] * 10, Sampling(new))
        engine.run()
        (second,) = engine.add(first.ids + [3, 4], Sampling(2))
        engine.run()
        cached.append((second.cached, second.tokens))
    assert cached[0] == cached[1] and cached[0][0] == (32 if new > 22 else 16)


def test_memory_that_runs_out_is_taken_from_nobody_whose_token_is_unread():
    model = tiny()
    for lookahead in (False, True):
        engine = Engine(model, cache_tokens=16 * 6, max_sequences=4, lookahead=lookahead)
        rows = [engine.add([i + 1] * 17, Sampling(40, 1.0, seed=i))[0] for i in range(4)]
        engine.run()
        assert engine.scheduler.preemptions
        if not lookahead:
            expected, preemptions = [s.tokens for s in rows], engine.scheduler.preemptions
    assert [s.tokens for s in rows] == expected and engine.scheduler.preemptions == preemptions


def test_streams_and_generation_are_as_in_the_synchronous_order(monkeypatch):
    model, prompts = tiny(), [[1, 2, 3], [4] * 20, [1, 2, 3]]
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5, "eos_ids": (EOS,)}
    right = generate(model, prompts, **options)
    original = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *args, **named: original(self, *args, **named | {"lookahead": True})
    )
    actual = generate(model, prompts, **options)
    assert (actual.tokens, actual.logprobs, actual.finished) == (right.tokens, right.logprobs, right.finished)
    stream = Streamer(model, (EOS,))
    for _ in range(2):
        ids = list(stream.stream([1, 2, 3], max_new_tokens=12, temperature=0.8, seed=5))
        assert ids == right.tokens[0]
    # One that is left in the middle changes nothing for the next one.
    first = stream.stream([1, 2, 3], max_new_tokens=12, temperature=0.8, seed=5)
    assert next(first) == ids[0]
    first.close()
    assert list(stream.stream([1, 2, 3], max_new_tokens=12, temperature=0.8, seed=5)) == ids


def test_staged_arrays_stand_where_those_of_the_same_shapes_stood():
    staging = Staging(torch.device("cpu"), capacity=400, kept=20)
    staging.buffer[:32] = 9
    shapes = [((3,), torch.int64), ((0,), torch.float32), ((2, 5), torch.int32), ((4,), torch.float32)]
    places = set()
    for turn in range(5):
        arrays = [torch.full(shape, turn + 1, dtype=dtype) for shape, dtype in shapes]
        views = staging.put(arrays)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, views))
        places.add(tuple(view.data_ptr() for view in views))
    assert len(places) == 1 and bool((staging.buffer[:32] == 9).all()) and views[0].data_ptr() % 16 == 0
    with pytest.raises(AssertionError, match="staging: 800 bytes of a step, room for 400"):
        staging.put([torch.zeros(100, dtype=torch.int64)])
