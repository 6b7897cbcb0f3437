"""Numbers, ids or logits of one client beside the answer of another: the first may get an error, not the second."""

import io
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import httpx
import served_model
import torch
from served_model import Serving

from recipes import accuracy, chat, rleif, serve
from wizard_engine import runtime
from wizard_engine.agents.local import LocalAgent
from wizard_engine.agents.protocol import Request
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation.allowed_ids import allowed_ids
from wizard_engine.model import Transformer, load_model, save_model
from wizard_engine.rl.options import RolloutOptions
from wizard_engine.rl.sampler import Sampler
from wizard_engine.rl.trajectories import roll_out

ORDINARY = {
    "model": "small", "messages": [{"role": "user", "content": "What is two and three?"}],
    "max_tokens": 60, "temperature": 1.5, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def serving():
    with Serving() as server:
        yield server


def asked(serving, **fields):
    return httpx.post(serving.url + "/v1/chat/completions", json=ORDINARY | fields, timeout=30)


def beside(serving, **fields):
    """An ordinary client's text while another request runs, and the other's response."""
    texts = []
    thread = threading.Thread(target=lambda: texts.append(asked(serving).json()["choices"][0]["message"]["content"]))
    serving.slow = 0.002
    thread.start()
    response = asked(serving, **fields)
    thread.join()
    serving.slow = 0.0
    return texts[0], response


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.1754944e-38}, {"temperature": 1e-45}, {"temperature": 5e-324}, {"temperature": 1e-30},
        {"temperature": 1, "top_p": 1e-46}, {"temperature": 1, "top_p": 5e-324}, {"temperature": 1, "top_k": 2**31},
    ],
)  # fmt: skip
def test_numbers_that_fp32_does_not_have_harm_nobody(serving, fields):
    expected = asked(serving).json()["choices"][0]["message"]["content"]
    text, response = beside(serving, max_tokens=8, **fields)
    assert text == expected and response.status_code in (200, 400)
    if response.status_code == 200 and "top_k" not in fields:
        greedy = asked(serving, max_tokens=8, temperature=0).json()
        assert response.json()["choices"][0]["message"] == greedy["choices"][0]["message"]
    assert httpx.get(serving.url + "/health").status_code == 200
    serving.until(serving.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_without_numbers_is_the_error_of_its_request(stream, monkeypatch):
    create = served_model.small_model
    monkeypatch.setattr(served_model, "small_model", lambda: create(tied=False))
    with Serving() as serving:
        expected = asked(serving).json()["choices"][0]["message"]["content"]
        with torch.no_grad():
            serving.model.embedding.weight[serving.tokenizer.encode(" ten")[-1]] = float("nan")
        bad = [{"role": "user", "content": "Count to ten"}]
        text, response = beside(serving, messages=bad, stream=stream, n=2)
        assert text == expected and "logits: expected numbers" in response.text
        assert response.status_code == (200 if stream else 500)
        echo = {"model": "small", "prompt": "Count to ten", "echo": True, "logprobs": 1, "stream": stream}
        response = serving.web.post("/v1/completions", json=echo)
        assert "logits: expected numbers for the prompt" in response.text and "sequence_failed" in response.text
        assert asked(serving).status_code == 200 and httpx.get(serving.url + "/health").status_code == 200
        serving.until(serving.is_idle)


# A vocabulary that is padded to a multiple, whose further rows are the likeliest.
@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    model, tokenizer = served_model.small_model()
    config = replace(model.config, vocab_size=tokenizer.vocab_size + 61, tied=False)
    model = Transformer(config, seed=5).eval()
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 9
    folder = tmp_path_factory.mktemp("padded") / "model"
    save_model(model, tokenizer, folder)
    return folder


def test_the_server_never_draws_padding(padded):
    tokenizer = load_tokenizer(padded)
    cfg = serve.Config(padded, device="cpu", cache_gib=0.01)
    engine, *_ = serve._engine(cfg, tokenizer, runtime.start("cpu"))
    assert engine.masked_ids.tolist() == list(range(tokenizer.vocab_size, engine.config.vocab_size))


def test_chat_and_accuracy_never_draw_padding(padded, tmp_path):
    out = io.StringIO()
    cfg = chat.Config(padded, prompt="What is two?", temperature=1.5, max_new_tokens=40, device="cpu")
    chat.main(cfg, stdin=io.StringIO(), stdout=out, stderr=io.StringIO())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is two?\nWhat is three?\n")
    cfg = replace(cfg, prompt=None, prompts=prompts, answers=tmp_path / "answers.jsonl")
    chat.main(cfg, stdin=io.StringIO(), stdout=out, stderr=io.StringIO())
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    turns = [{"role": "user", "content": "What is two?"}, {"role": "assistant", "content": "The answer is 2."}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    cfg = accuracy.Config(
        str(padded), rows, tmp_path / "out", temperature=1.5, max_new_tokens=40, device="cpu", quiet=True
    )
    assert accuracy.main(cfg)["total"] == 1


def test_rollouts_never_draw_padding(padded):
    policy, tokenizer = load_model(padded)
    cfg = SimpleNamespace(rollout=RolloutOptions(max_new_tokens=40, samples_per_prompt=4))
    prompts = [(Message("user", "What is two?"),)]
    sampler = rleif.sampler_of(cfg, tokenizer, policy, prompts, runtime.start("cpu"))
    sampler.sync_weights()
    rollout = roll_out(sampler, tokenizer, prompts, samples=4, max_new_tokens=40, temperature=1.5, seed=3)
    assert max(max(sample.tokens) for sample in rollout.samples) < tokenizer.vocab_size


def test_rollouts_and_agents_say_what_failed(padded):
    policy, tokenizer = load_model(padded)
    with torch.no_grad():
        policy.embedding.weight[tokenizer.encode(" ten")[-1]] = float("nan")
    prompts = [(Message("user", "What is two?"),), (Message("user", "Count to ten"),)]
    sampler = Sampler(policy, cache_tokens=1600, allowed_ids=allowed_ids(tokenizer, policy.config.vocab_size))
    sampler.sync_weights()
    with pytest.raises(ValueError, match=r"rollout: answers\[2\]: 2 of 4 answers failed; the first: logits"):
        roll_out(sampler, tokenizer, prompts, samples=2, max_new_tokens=8, temperature=1.0, seed=3)
    # The sampler is as good as before.
    rollout = roll_out(sampler, tokenizer, prompts[:1], samples=2, max_new_tokens=8, temperature=1.0, seed=3)
    assert len(rollout.samples) == 2 and not sampler.engine.has_work
    replies = LocalAgent(policy, tokenizer, "small").respond([Request("answer", p, 0, 0.0, 8) for p in prompts])
    assert [reply.ok for reply in replies] == [True, False]
    assert "answer failed: logits: expected numbers" in replies[1].error
