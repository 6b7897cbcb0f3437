"""A checkpoint as an agent: prompts, seeds, failures, identity."""

import pytest
import torch

from wizard_engine.agents import Ledger, LedgeredAgent, Request, make_agent
from wizard_engine.agents.local import LocalAgent
from wizard_engine.data.chat import CHAT_ATOMS, encode_conversation, encode_opening
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, ScoringModel, Transformer, save_model

TEXTS = ["Tom has 12 apples. He gives away 5.", "How many apples does Tom have now?", "12-5=7 The answer is 7."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, atoms=CHAT_ATOMS)


def model(tokenizer, seed=0):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn_width=32,
        max_positions=96, init_std=0.5,
    )  # fmt: skip
    return Transformer(config, seed=seed)


@pytest.fixture(scope="module")
def agent(tokenizer):
    return LocalAgent(model(tokenizer), tokenizer, "tiny")


def ask(text, seed=0, temperature=0.0, max_tokens=12, task="answer"):
    return Request(task, (Message("user", text),), seed=seed, temperature=temperature, max_tokens=max_tokens)


def texts(replies):
    assert all(reply.ok for reply in replies)
    return [reply.text for reply in replies]


def test_greedy_replies_depend_on_their_request_alone(agent):
    requests = [ask(text, seed=seed) for seed, text in enumerate(TEXTS + ["Tom has 1.", "apples " * 9])]
    one_by_one = [texts(agent.respond([request]))[0] for request in requests]
    assert texts(agent.respond(requests)) == one_by_one
    assert texts(agent.respond(requests[::-1])) == one_by_one[::-1]
    assert texts(agent.respond([ask(TEXTS[0], seed=77)])) == one_by_one[:1]
    assert len(set(one_by_one)) > 1


def test_sampled_replies_follow_the_seed(agent):
    def sampled(seed):
        return texts(agent.respond([ask(text, seed, temperature=1.0) for text in TEXTS]))

    assert sampled(1) == sampled(1) != sampled(2)
    mixed = texts(agent.respond([ask(text, seed, temperature=1.0) for seed in (2, 1) for text in TEXTS]))
    assert mixed == sampled(2) + sampled(1)
    # Whatever else is asked, and wherever the request stands.
    one_by_one = [texts(agent.respond([ask(text, 1, temperature=1.0)]))[0] for text in TEXTS]
    assert one_by_one == sampled(1)


def test_each_request_keeps_its_settings(agent, tokenizer):
    short, long = agent.respond([ask(TEXTS[0], max_tokens=2), ask(TEXTS[0], max_tokens=12)])
    assert long.text.startswith(short.text) and len(tokenizer.encode(short.text)) < len(tokenizer.encode(long.text))


def test_prompts_too_long_are_failed_calls_and_do_not_affect_the_others(agent, tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    replies = LedgeredAgent(agent, ledger).respond([ask("Tom"), ask("apples " * 200)])
    assert [reply.ok for reply in replies] == [True, False]
    assert replies[1].error.startswith("prompt: expected at most 84 tokens, to leave 12 free, got 2")
    assert ledger.counts() == {"tiny": {"answer": {"replies": 1, "failures": 1}}}


def test_fingerprint_follows_weights_and_tokenizer(agent, tokenizer):
    same = LocalAgent(model(tokenizer), tokenizer, "renamed")
    assert same.fingerprint == agent.fingerprint
    changed = model(tokenizer)
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1e-3
    assert LocalAgent(changed, tokenizer, "tiny").fingerprint != agent.fingerprint
    other = train_tokenizer([*TEXTS, "oranges and pears"], vocab_size=300, atoms=CHAT_ATOMS)
    assert LocalAgent(model(tokenizer), other, "tiny").fingerprint != agent.fingerprint


def test_user_turn_continues_where_the_conversation_format_places_it(agent, tokenizer):
    turns = (Message("user", "Tom has 12."), Message("assistant", "7"))
    prompt = encode_opening(tokenizer, turns)
    full = encode_conversation(tokenizer, [*turns, Message("user", "How?"), Message("assistant", "12-5=7")])
    assert full.tokens.tolist()[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("USER:")
    (reply,) = agent.respond([Request("user", turns, max_tokens=12)])
    assert reply.ok and "ASSISTANT:" not in reply.text
    with pytest.raises(ValueError, match="task 'user': expected a conversation that ends with an assistant turn"):
        agent.respond([Request("user", turns[:1])])


def test_make_agent_loads_a_directory(agent, tokenizer, tmp_path):
    path = tmp_path / "run" / "sft" / "model"
    save_model(agent.model, tokenizer, path)
    loaded = make_agent(path)
    assert loaded.name == "run/sft/model" and loaded.fingerprint == agent.fingerprint
    assert loaded.respond([ask(TEXTS[0])]) == agent.respond([ask(TEXTS[0])])


def test_make_agent_refuses_a_reward_model(tokenizer, tmp_path):
    save_model(ScoringModel(model(tokenizer).config, outputs=1), tokenizer, tmp_path / "reward")
    with pytest.raises(ValueError, match="reward: expected a language model, got a reward model"):
        make_agent(tmp_path / "reward")
