"""Penalties and biases: those of the definition, whatever runs beside them, in every order of host and device."""

import random
from dataclasses import replace

import pytest
import torch

from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.penalties import penalised
from wizard_engine.model import PRESETS, Transformer

PROMPTS = [[5, 9, 2], [30] * 40, [5, 9, 2, 7, 1], [44] * 17, [61, 62]]
HOWS = [
    {"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": -0.7, "presence_penalty": -1.0},
    {"logit_bias": ((17, 3.0), (400, -100.0), (0, 0.25))}, {},
    {"frequency_penalty": 0.3, "presence_penalty": 0.9, "logit_bias": ((33, 100.0),)},
]  # fmt: skip


def tiny():
    return Transformer(replace(PRESETS["tiny"], init_std=0.3), seed=4).eval()


def forward(model, ids):
    """(V,) logits behind some ids."""
    count = len(ids)
    hidden = model(torch.tensor(ids), torch.arange(count), torch.tensor([0, count], dtype=torch.int32), count)
    return model.logits(hidden[-1:])[0]


def changed(logits, sampled, sampling):
    """The definition, token by token: c[j] freq + (c[j] > 0) presence less, and the bias."""
    logits = logits.double().clone()
    for token in set(sampled):
        logits[token] -= sampled.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    return logits


# Catches: the prompt's tokens counted; a count one step late; a penalty after the temperature; another row's.
@pytest.mark.every(2)
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_definition(how, temperature):
    model = tiny()
    for lookahead in (False, True):
        engine = Engine(model, cache_tokens=1600, lookahead=lookahead)
        sampling = Sampling(12, temperature, seed=3, top_logprobs=4, **how)
        rows = [engine.add(prompt, replace(sampling, row=i))[0] for i, prompt in enumerate(PROMPTS[:2])]
        engine.run()
        for row in rows:
            for step, (token, logprob, top) in enumerate(zip(row.tokens, row.logprobs, row.top)):
                with torch.no_grad():
                    logits = forward(model, row.ids[: row.prompt_tokens + step])
                logits = changed(logits, row.tokens[:step], sampling)
                right = (logits / (temperature or 1.0)).log_softmax(-1)
                assert logprob == pytest.approx(float(right[token]), abs=2e-5)
                assert temperature or token == int(logits.argmax())
                for other, value in top:
                    assert value == pytest.approx(float(right[other]), abs=2e-5, rel=2e-6)


def test_a_penalty_keeps_greedy_answers_from_repeating():
    engine = Engine(tiny(), cache_tokens=1600)
    rows = [engine.add([5], Sampling(60, presence_penalty=value))[0] for value in (0.0, 2.0)]
    biased = [engine.add([5], Sampling(60, logit_bias=((9, value),)))[0] for value in (100.0, -100.0)]
    engine.run()
    assert len(set(rows[1].tokens)) > len(set(rows[0].tokens))
    assert set(biased[0].tokens) == {9} and 9 not in biased[1].tokens


def played(model, draw, *, lookahead, pages, most, tokens, plain=True):
    """Results of random sequences, of which every other one has penalties; without the others if not `plain`."""
    engine = Engine(model, cache_tokens=16 * pages, max_sequences=most, max_tokens=tokens, lookahead=lookahead)
    rows = []
    for i in range(12):
        how = HOWS[draw.randrange(len(HOWS))]
        prompt = [draw.randrange(512) for _ in range(draw.randint(1, 40))]
        count, temperature, top = draw.randint(1, 30), draw.choice([0.0, 1.0]), draw.choice([0, 2])
        sampling = Sampling(count, temperature, seed=i, top_logprobs=top, **how)
        n = draw.choice([1, 1, 3])
        if plain or sampling.is_penalised:
            rows += engine.add(prompt, sampling, n=n)
        if draw.random() < 0.5:
            engine.step()
    engine.run()
    assert engine.pool.free == pages and not engine.scheduler.penalised
    assert all(row.counts is None and row.bias is None for row in rows)
    results = {
        (s.sampling.seed, s.sampling.row): (s.tokens, s.logprobs, s.top) for s in rows if s.sampling.is_penalised
    }
    return results, engine.scheduler.preemptions


# Catches: counts lost in preemption, shared by forks, or of a token that is on the device alone.
@pytest.mark.every(3)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU products of other sizes round otherwise")
@pytest.mark.parametrize("seed", range(3))
def test_penalised_sequences_are_bit_equal_whatever_runs_beside_them(seed):
    model, preemptions = tiny(), 0
    expected, _ = played(model, random.Random(seed), lookahead=False, pages=300, most=24, tokens=2048)
    assert len(expected) > 5
    for lookahead in (False, True):
        for pages, most, tokens in ((7, 6, 24), (60, 3, 9)):
            for plain in (False, True):
                actual, count = played(
                    model, random.Random(seed), lookahead=lookahead, pages=pages, most=most, tokens=tokens, plain=plain
                )
                assert actual == expected
                preemptions += count
    assert preemptions


def test_sequences_without_penalties_pay_nothing(monkeypatch):
    engine = Engine(tiny(), cache_tokens=1600)

    def unexpected(*_):
        raise AssertionError("penalties were looked for")

    monkeypatch.setattr(Engine, "_penalties", unexpected)
    engine.add([5], Sampling(5, 1.0), n=3)
    engine.run()
    assert engine.generated == 15


@pytest.mark.parametrize("rows", [1, 5])
def test_penalised_logits_equal_enumeration(rows):
    generator = torch.Generator().manual_seed(rows)
    logits, bias = (torch.randn(rows, 37, generator=generator).double() for _ in range(2))
    counts = torch.randint(0, 4, (rows, 37), generator=generator).double()
    frequency, presence = (torch.randn(rows, generator=generator).double() for _ in range(2))
    out = penalised(logits, counts, frequency, presence, bias)
    for r in range(rows):
        for v in range(37):
            c = float(counts[r, v])
            right = float(logits[r, v]) - c * float(frequency[r]) - (c > 0) * float(presence[r]) + float(bias[r, v])
            assert float(out[r, v]) == pytest.approx(right, abs=1e-12)
