"""What fails for one sequence is that sequence's error: the others get the same bits, and every page comes back."""

from dataclasses import replace

import pytest
import torch

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import answer_texts, generate, penalties, token_sampling
from wizard_engine.generation import engine as engine_module
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.offline import continued
from wizard_engine.generation.paged_cache import PagePool
from wizard_engine.generation.scheduler import Scheduler
from wizard_engine.generation.step_batch import Packer
from wizard_engine.generation.streaming import Streamer
from wizard_engine.model import PRESETS, Transformer

# An id that no other prompt has; its sequence is the one that fails.
MARK = 11


def tiny(name="tiny-llama"):
    return Transformer(replace(PRESETS[name], init_std=0.3), seed=4).eval()


PROMPTS = [[5, 9, 2], [30] * 40, [5, 9, 2, 7, 1], [44] * 17, [61, 62]]
HOWS = [
    Sampling(12, 1.0, seed=1), Sampling(9), Sampling(20, 0.7, top_k=5, seed=2, top_logprobs=2),
    Sampling(14, 1.0, top_p=0.8, seed=3, frequency_penalty=0.5), Sampling(30, 1.3, seed=4, row=9),
]  # fmt: skip


def played(model, victim=None, *, n=1, lookahead=False, pages=60, after=2, sampling=None):
    """Results of the ordinary sequences, those of the victim, and the engine; the victim comes after some steps."""
    engine = Engine(
        model, cache_tokens=16 * pages, max_sequences=8, max_tokens=40, record_routes=True, lookahead=lookahead
    )
    rows = [engine.add(prompt, how)[0] for prompt, how in zip(PROMPTS[:3], HOWS)]
    seen = set()
    for _ in range(after):
        engine.step()
    victims = []
    if victim is not None:
        how = sampling or Sampling(12, 0.9, seed=8, top_logprobs=2, presence_penalty=0.1)
        victims = engine.add(victim, how, n=n)
    rows += [engine.add(prompt, how)[0] for prompt, how in zip(PROMPTS[3:], HOWS[3:])]
    while engine.has_work:
        seen |= {id(s) for s in engine.step() if s.reason == "error"}
    assert seen == {id(s) for s in victims if s.reason == "error"}, "a failure was not reported"
    assert engine.pool.free == engine.pages and sorted(engine.scheduler._rows) == list(range(8))
    assert not engine.scheduler.penalised and not engine.failures.failed
    return [(s.ids, s.logprobs, s.top, s.reason) for s in rows], victims, engine


class Injected(Exception):
    """What nobody expects."""


def is_marked(value):
    """Whether an argument is the marked sequence, its ids or sampling, or a list with one of them."""
    if isinstance(value, Sampling):
        return value.seed == 8
    if isinstance(value, (list, tuple)):
        return list(value[:1]) == [MARK] or any(map(is_marked, value))
    return list(getattr(getattr(value, "sequence", value), "ids", ())[:1]) == [MARK]


def failing(original, calls):
    """The function, which raises from the given call about a marked sequence on."""
    count = 0

    def function(*arguments, **named):
        nonlocal count
        if any(map(is_marked, arguments[:2])):
            count += 1
            if count >= calls:
                raise Injected("planted")
        return original(*arguments, **named)

    return function


PLACES = {
    "admission": (Scheduler, "_admit"),
    "start": (Scheduler, "_run"),
    "page allocation": (PagePool, "allocate"),
    "page registration": (Scheduler, "register"),
    "a further page": (Scheduler, "_plan_single"),
    "page table": (Packer, "_write_table"),
    "packing": (Packer, "_tokens"),
    "sampling options": (engine_module.Draws, "of"),
    "uniform numbers": (token_sampling, "next_uniforms"),
    "penalties": (penalties, "start"),
    "likeliest tokens": (engine_module, "likeliest"),
    "reported tokens": (engine_module, "kept"),
    "reading": (Engine, "_grow"),
    "recorded routes": (Engine, "_keep_experts"),
    "last step": (Engine, "_retire"),
}


@pytest.mark.every(7)
@pytest.mark.parametrize("lookahead", [False, True], ids=["synchronous", "lookahead"])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_at_any_place_ends_one_sequence(place, calls, lookahead, monkeypatch):
    model = tiny()
    expected, _, _ = played(model, lookahead=lookahead)
    owner, name = PLACES[place]
    original = getattr(owner, name)
    function = failing(original, calls)
    monkeypatch.setattr(owner, name, classmethod(lambda _, rows: function(rows)) if name == "of" else function)
    actual, (victim,), _ = played(model, [MARK, 3, 4], lookahead=lookahead)
    assert actual == expected
    is_reached = calls == 1 or place not in ("admission", "start", "page allocation", "recorded routes", "last step")
    if place == "last step" and not lookahead:
        is_reached = False
    assert (victim.reason == "error") == is_reached
    assert victim.error == ("Injected: planted" if is_reached else "")


# Catches: followers that wait for a leader that has failed; a leader that fails with a follower.
@pytest.mark.parametrize("lookahead", [False, True], ids=["synchronous", "lookahead"])
@pytest.mark.parametrize("failed", [0, 1, 3])
def test_one_of_several_answers_fails_alone(failed, lookahead, monkeypatch):
    model = tiny()
    prompt = [7] * 20
    _, right, _ = played(model, prompt, n=4, lookahead=lookahead)
    expected, _, _ = played(model, lookahead=lookahead)
    for owner, name in ((Scheduler, "_run"), (Engine, "_grow"), (Scheduler, "done")):
        original = getattr(owner, name)

        def function(self, sequence, *rest, original=original):
            if sequence.sampling.row == 100 + failed:
                raise Injected("planted")
            return original(self, sequence, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            actual, answers, _ = played(
                model, prompt, n=4, lookahead=lookahead, sampling=replace(right[0].sampling, row=100)
            )
        assert actual == expected
        assert [s.reason for s in answers] == ["error" if i == failed else "length" for i in range(4)], name


def test_pages_come_back_where_allocation_breaks_off_half_way(monkeypatch):
    pool = PagePool(8, 4)
    first = pool.allocate([1] * 12)
    pool.register(first, [1] * 12)
    fresh, count = PagePool._fresh, 0

    def breaks(self):
        nonlocal count
        count += 1
        if count % 2 == 0:
            raise Injected
        return fresh(self)

    monkeypatch.setattr(PagePool, "_fresh", breaks)
    for action in (lambda: pool.allocate([1] * 18), lambda: pool.allocate([2] * 8), lambda: pool.fork(first, 9)):
        count = 0 if action.__code__.co_consts[-1] != 9 else 1
        free = pool.free
        with pytest.raises(Injected):
            action()
        assert pool.free == free
    pool.release(first)
    assert pool.free == 8


def poisoned(model, value):
    """The model with an embedding of the marked id that makes its logits NaN."""
    with torch.no_grad():
        model.embedding.weight[MARK] = value
    return model


# Catches: a NaN that leaves its page, or its row of a product; a sampler that raises for the whole batch.
@pytest.mark.parametrize("lookahead", [False, True], ids=["synchronous", "lookahead"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pages", [60, 9])
def test_a_row_without_numbers_ends_its_sequence_alone(value, pages, lookahead):
    model = tiny()
    expected, _, _ = played(model, lookahead=lookahead, pages=pages)
    poisoned(model, value)
    for how in (Sampling(12), Sampling(12, 1.0, top_k=4), Sampling(12, 1.0, top_p=0.5, top_logprobs=3)):
        actual, victims, engine = played(model, [3, MARK, 4] * 9, n=3, lookahead=lookahead, pages=pages, sampling=how)
        assert actual == expected
        assert [s.reason for s in victims] == ["error"] * 3 and not any(s.tokens for s in victims)
        assert "logits: expected numbers for new token 0, got NaN or infinity" in victims[0].error
        # The prompt that failed is in nobody's way.
        rows = [engine.add(prompt, how)[0] for prompt, how in zip(PROMPTS, HOWS)]
        engine.run()
        assert [(s.ids, s.logprobs, s.top, s.reason) for s in rows] == expected


def test_a_mixture_sends_a_row_without_numbers_nowhere():
    model = tiny("tiny-mixtral")
    expected, _, _ = played(model)
    poisoned(model, float("nan"))
    actual, (victim,), _ = played(model, [3, MARK, 4])
    assert victim.reason == "error" and [row[0] for row in actual] == [row[0] for row in expected]


# Temperatures and shares that fp32 has no number for.
@pytest.mark.every(5)
@pytest.mark.parametrize("lookahead", [False, True], ids=["synchronous", "lookahead"])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.1754944e-38}, {"temperature": 1e-45}, {"temperature": 5e-324}, {"temperature": 3e-10},
        {"temperature": 1e-9}, {"temperature": 1.0, "top_p": 1e-46}, {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 1e-40}, {"temperature": 1.0, "top_k": 1, "top_p": 5e-324},
    ],
)  # fmt: skip
def test_numbers_that_fp32_does_not_have_draw_the_likeliest_token(how, lookahead):
    model = tiny()
    expected, _, _ = played(model, lookahead=lookahead)
    _, (greedy,), _ = played(model, [3, 4, 5], sampling=Sampling(12))
    actual, (row,), _ = played(model, [3, 4, 5], lookahead=lookahead, sampling=Sampling(12, **how))
    assert actual == expected and row.tokens == greedy.tokens and row.reason == "length"


@pytest.mark.parametrize(
    "how", [{"top_k": 2**40}, {"top_k": 2**80}, {"top_p": 1 - 1e-12}, {"seed": 2**70}, {"seed": -5}]
)
def test_large_numbers_are_taken_as_what_they_mean(how):
    model = tiny()
    expected, _, _ = played(model)
    actual, (row,), _ = played(model, [3, 4, 5], sampling=Sampling(12, 1.0, **how))
    assert actual == expected and row.reason == "length"
    if "seed" not in how:
        _, (right,), _ = played(model, [3, 4, 5], sampling=Sampling(12, 1.0))
        assert right.tokens == row.tokens


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": 1e39}, "temperature: expected >= 0 and finite, got 1e"),
        ({"temperature": float("nan")}, "temperature: expected >= 0 and finite, got nan"),
        ({"top_k": 2.5}, "top_k: expected >= 0, got 2.5"),
        ({"top_p": float("nan")}, r"top_p: expected in \(0, 1\], got nan"),
        ({"row": 2**63}, "row: expected -2"),
        ({"frequency_penalty": 2.1}, "frequency_penalty: expected -2 to 2, got 2.1"),
        ({"presence_penalty": float("nan")}, "presence_penalty: expected -2 to 2, got nan"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias: expected -100 to 100, got 101.0 for id 3"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias: expected each id once"),
    ],
)
def test_options_out_of_range_are_refused_before_they_run(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(4, **how)


def test_offline_callers_say_what_failed():
    model = poisoned(tiny(), float("nan"))
    prompts = [[3, 4], [5, MARK], [6]]
    engine = Engine(model, cache_tokens=640)
    generation = continued(engine, prompts, [Sampling(4)] * 3)
    assert [bool(error) for error in generation.errors] == [False, True, False]
    assert [len(tokens) for tokens in generation.tokens] == [4, 0, 4]
    with pytest.raises(ValueError, match=r"prompts\[1\]: 1 of 3 answers failed; the first: logits: expected numbers"):
        generate(model, prompts, max_new_tokens=4, eos_ids=())
    with pytest.raises(ValueError, match="answer: expected a further token, got none: logits: expected numbers"):
        list(Streamer(model, ()).stream(prompts[1], max_new_tokens=4))
    streamer = Streamer(model, ())
    for _ in range(2):
        with pytest.raises(ValueError, match="logits"):
            list(streamer.stream(prompts[1], max_new_tokens=4))
        assert len(list(streamer.stream(prompts[0], max_new_tokens=4))) == 4


def padded(size, holes=()):
    """A model with a larger vocabulary than its tokenizer, whose further ids are the likeliest."""
    tokenizer = train_tokenizer(["What is two and two? It is four."], vocab_size=300, atoms=CHAT_ATOMS)
    config = replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size + size, init_std=0.3, tied=False)
    model = Transformer(config, seed=1).eval()
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 9
    return model, tokenizer


def test_ids_without_a_text_are_never_drawn():
    from wizard_engine.data.records import Message
    from wizard_engine.generation.allowed_ids import allowed_ids

    model, tokenizer = padded(61)
    allowed = allowed_ids(tokenizer, model.config.vocab_size)
    assert int(allowed.sum()) == tokenizer.vocab_size and allowed_ids(tokenizer, tokenizer.vocab_size) is None
    free = generate(model, [[1, 2, 3]], max_new_tokens=40, temperature=1.5, eos_ids=())
    assert max(free.tokens[0]) >= tokenizer.vocab_size
    allowed[5:90] = False
    for temperature in (0.0, 1.0, 1.5):
        engine = Engine(model, cache_tokens=1600, allowed_ids=allowed)
        rows = engine.add([1, 2, 3], Sampling(40, temperature, top_logprobs=20, seed=2), n=3)
        engine.run()
        for row in rows:
            assert all(allowed[token] for token in row.tokens)
            assert all(allowed[token] for top in row.top for token, _ in top)
            total = sum(torch.tensor([value for _, value in row.top[0]]).exp())
            assert len(row.top[0]) == 20 and total <= 1 + 1e-4
    texts = answer_texts(model, tokenizer, [[Message("user", "What is two?")]], max_new_tokens=40, temperature=1.5)
    assert isinstance(texts[0], str)


def test_masks_that_do_not_fit_are_refused():
    model = tiny()
    size = model.config.vocab_size
    for mask, message in (
        (torch.zeros(size, dtype=torch.bool), "expected at least one id"),
        (torch.ones(size - 1, dtype=torch.bool), "allowed_ids: expected"),
        (torch.zeros(size), "bool, got"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, cache_tokens=160, allowed_ids=mask)
    mask = torch.arange(size) < size - 5
    engine = Engine(model, cache_tokens=160, allowed_ids=mask)
    for token in (size - 1, size, -1):
        with pytest.raises(ValueError, match="logit_bias: expected ids that text has"):
            engine.add([1], Sampling(4, logit_bias=((token, 1.0),)))


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-40, 0.5])
def test_a_share_is_above_0_as_fp32_too(top_p):
    assert torch.tensor(Sampling(4, top_p=top_p).top_p, dtype=torch.float32) >= torch.finfo(torch.float32).tiny
