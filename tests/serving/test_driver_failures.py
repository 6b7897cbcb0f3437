"""The driver where one job's text, callback or admission fails: that job hears of it, the others do not."""

import pytest
import torch

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation.engine import Engine
from wizard_engine.generation.scheduler import Sampling
from wizard_engine.generation.streaming import TextStream
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.serving import driver as driver_module
from wizard_engine.serving.driver import Driver, Job

TEXT = "one two three four five six seven eight nine ten"
STOP = "stops here"


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def driver(request):
    tokenizer = train_tokenizer([TEXT], vocab_size=300, atoms=CHAT_ATOMS)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=4, kv_heads=2, head_width=8, ffn_width=48,
        max_positions=128, init_std=0.25, tied=False,
    )  # fmt: skip
    model = Transformer(config, seed=5).eval()
    engine = Engine(model, cache_tokens=1600, max_sequences=8, lookahead=request.param)
    return Driver(engine, tokenizer, max_jobs=8)


def job(driver, n=1, count=10, stop=(), deliver=None, text="two three", **how):
    heard = []
    prompt = [driver.tokenizer.bos_id, *driver.tokenizer.encode(text)]
    made = Job(prompt, Sampling(count, **how), n, deliver or heard.extend, stop)
    made.heard = heard
    return made


def drained(driver, *jobs):
    """Pieces of each job once all have ended; the driver's loop is to survive."""
    for each in jobs:
        driver.submit(each)
    turns = 0
    while driver.open or driver.engine.has_work:
        assert driver._turn() and turns < 200
        turns += 1
    assert driver.engine.pool.free == driver.engine.pages and not driver._jobs
    return [each.heard for each in jobs]


def pieces(heard):
    return [(p.choice, p.text, p.token, p.logprob, p.reason) for p in heard]


class Injected(Exception):
    """What nobody expects."""


def raises(*_, **__):
    raise Injected("planted")


def fails_in(monkeypatch, place, driver):
    """Let a place fail for jobs with STOP among their stop strings."""
    if place == "stop strings":
        create = TextStream.__init__

        def init(self, tokenizer, stop=(), **named):
            if STOP in stop:
                raises()
            create(self, tokenizer, stop, **named)

        monkeypatch.setattr(TextStream, "__init__", init)
    elif place == "admission":
        add = Engine.add
        monkeypatch.setattr(
            Engine, "add", lambda self, prompt, how, *, n: raises() if how.row == 7 else add(self, prompt, how, n=n)
        )
    else:
        method = {"text": "push", "last text": "end"}[place]
        original = getattr(TextStream, method)
        monkeypatch.setattr(
            TextStream, method, lambda self, *args: raises() if STOP in self.stop else original(self, *args)
        )


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", ["stop strings", "admission", "text", "last text"])
def test_a_job_that_fails_hears_of_it_alone(place, n, driver, monkeypatch):
    others = [{"n": 2, "temperature": 1.0, "seed": 3}, {"count": 25, "top_logprobs": 2}]
    expected = [pieces(heard) for heard in drained(driver, *(job(driver, **how) for how in others))]
    fails_in(monkeypatch, place, driver)
    bad = job(driver, n, stop=(STOP,), row=7, text="nine ten", temperature=1.0)
    first, heard, second = drained(driver, job(driver, **others[0]), bad, job(driver, **others[1]))
    assert [pieces(first), pieces(second)] == expected
    ends = [piece for piece in heard if piece.reason is not None]
    assert sorted(piece.choice for piece in ends) == list(range(n)) and driver.open == 0
    assert all((piece.reason, piece.error) == ("error", "Injected: planted") for piece in ends)


@pytest.mark.parametrize("error", [RuntimeError, Injected, KeyError])
def test_a_callback_that_raises_ends_its_job_alone(error, driver):
    (expected,) = drained(driver, job(driver, count=25))
    calls = []

    def deliver(pieces):
        calls.append(pieces)
        raise error("planted")

    bad = job(driver, n=3, count=30, deliver=deliver, temperature=1.0)
    _, heard = drained(driver, bad, job(driver, count=25))
    assert pieces(heard) == pieces(expected)
    assert len(calls) <= 2 and bad.open == 0
    assert all(s.reason == "cancelled" for s in bad.sequences)


def test_logits_without_numbers_are_the_error_of_their_job(driver):
    (expected,) = drained(driver, job(driver, count=25))
    with torch.no_grad():
        driver.engine.model.embedding.weight[driver.tokenizer.encode(" seven")[-1]] = float("nan")
    heard, other = drained(driver, job(driver, n=2, text="six seven"), job(driver, count=25))
    assert pieces(other) == pieces(expected)
    assert [(p.reason, p.token) for p in heard] == [("error", None)] * 2
    assert "logits: expected numbers" in heard[0].error


def test_other_ranks_repeat_a_job_that_is_refused(driver):
    command = ("add", [1] * 1000, Sampling(10), 2)
    error = driver_module.apply(driver.engine, command)
    assert isinstance(error, ValueError) and not driver.engine.has_work
