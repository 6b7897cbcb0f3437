"""The driver turn by turn, without its thread: jobs that begin, end, stop, and are dropped at any moment."""

import pytest

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import generate
from wizard_engine.generation.engine import Engine
from wizard_engine.generation.scheduler import Sampling
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.serving.driver import Driver, Job, QueueFull

TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(params=[False, True], ids=["synchronous", "lookahead"])
def driver(request):
    tokenizer = train_tokenizer([TEXT], vocab_size=300, atoms=CHAT_ATOMS)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=4, kv_heads=2, head_width=8, ffn_width=48,
        max_positions=128, init_std=0.25,
    )  # fmt: skip
    model = Transformer(config, seed=5).eval()
    engine = Engine(model, cache_tokens=1600, max_sequences=8, lookahead=request.param)
    return Driver(engine, tokenizer, max_jobs=8)


def job(driver, n=1, count=10, stop=(), **how):
    heard = []
    prompt = [driver.tokenizer.bos_id, *driver.tokenizer.encode("two three")]
    made = Job(prompt, Sampling(count, **how), n, heard.extend, stop)
    made.heard = heard
    return made


def is_idle(driver):
    return not driver.open and not driver.engine.has_work and driver.engine.pool.free == driver.engine.pages


def test_jobs_hear_of_every_token_and_of_their_end(driver):
    jobs = [job(driver, n=2, temperature=1.0, seed=3), job(driver, count=4)]
    for each in jobs:
        driver.submit(each)
    assert driver.open == 3
    while driver.open:
        assert driver._turn()
    right = generate(
        driver.engine.model, [jobs[0].prompt] * 2, max_new_tokens=10, temperature=1.0, seed=3, eos_ids=(-1,)
    )
    for choice in range(2):
        chunks = [chunk for chunk in jobs[0].heard if chunk.choice == choice]
        assert [chunk.token for chunk in chunks] == right.tokens[choice]
        assert [chunk.reason for chunk in chunks] == [None] * 9 + ["length"]
        whole = driver.tokenizer.decode(right.tokens[choice]).strip()
        assert "".join(chunk.text for chunk in chunks) == whole
    assert len(jobs[1].heard) == 4 and is_idle(driver)


# Catches: a job that nobody waits for any more, and that is continued all the same.
def test_a_job_that_is_cancelled_before_it_begins_never_runs(driver):
    dropped, kept = job(driver, n=3), job(driver, count=2)
    driver.submit(dropped)
    driver.submit(kept)
    driver.cancel(dropped)
    driver._turn()
    drawn = [s.drawn for s in driver.engine.scheduler.running]
    assert driver.open == 1 and drawn == [1] and driver.engine.generated == (0 if driver.engine.lookahead else 1)
    while driver.open:
        driver._turn()
    assert not dropped.heard and len(kept.heard) == 2 and is_idle(driver)


def test_a_job_that_is_cancelled_half_way_frees_its_pages_before_the_next_step(driver):
    dropped, kept = job(driver, n=3, count=50), job(driver, count=50)
    for each in (dropped, kept):
        driver.submit(each)
    for _ in range(3):
        driver._turn()
    heard = len(dropped.heard)
    driver.cancel(dropped)
    driver.cancel(dropped)
    driver._turn()
    assert len(driver.engine.scheduler.running) == 1 and driver.open == 1 and len(dropped.heard) == heard
    driver.cancel(kept)
    driver._turn()
    assert is_idle(driver)


def test_a_stop_string_ends_a_choice_and_its_sequence(driver):
    free = job(driver, count=40)
    driver.submit(free)
    while driver.open:
        driver._turn()
    text = "".join(chunk.text for chunk in free.heard)
    stop = text[8:11]
    stopped = job(driver, count=40, stop=(stop,))
    driver.submit(stopped)
    steps = driver.engine.steps
    while driver.open:
        driver._turn()
    assert "".join(chunk.text for chunk in stopped.heard) == text[: text.index(stop)].rstrip()
    assert stopped.heard[-1].reason == "stop" and driver.engine.steps - steps < 40 and is_idle(driver)


def test_no_more_than_the_limit_is_taken_and_nothing_at_the_end(driver):
    with pytest.raises(QueueFull, match="at most 8 are taken"):
        driver.submit(job(driver, n=9))
    driver.submit(job(driver, n=8))
    with pytest.raises(QueueFull, match="8 sequences run and wait"):
        driver.submit(job(driver))
    with pytest.raises(ValueError, match="prompt: expected 1 to"):
        driver.submit(job(driver, count=1000))
    driver.start()
    driver.close(drain_seconds=20)
    assert is_idle(driver)
    with pytest.raises(QueueFull, match="about to end"):
        driver.submit(job(driver))
