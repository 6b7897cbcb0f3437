"""A checkpoint as an agent: prompts, seeds, failures, identity."""

import hashlib

import pytest
import torch
from asking import responses
from chat_templates import FAMILIES, directory

from wizard_engine.agents import Ledger, Request, make_agent
from wizard_engine.agents.local import LocalAgent
from wizard_engine.data.chat import CHAT_ATOMS, encode_conversation, encode_opening, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer
from wizard_engine.model import ModelConfig, ScoringModel, Transformer, save_model

TEXTS = ["Tom has 12 apples. He gives away 5.", "How many apples does Tom have now?", "12-5=7 The answer is 7."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, atoms=CHAT_ATOMS)


def model(tokenizer, seed=0, max_positions=96):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn_width=32,
        max_positions=max_positions, init_std=0.5,
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
    replies = responses(agent, [ask("Tom"), ask("apples " * 200)], ledger)
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


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Directories of models that speak the templates of other families."""
    root = tmp_path_factory.mktemp("others")
    for family in ("chatml", "gemma"):
        tokenizer = load_tokenizer(directory(root / f"{family}-tokenizer", family))
        save_model(model(tokenizer, max_positions=256), tokenizer, root / family)
    return root


def test_a_model_is_asked_in_its_own_template(others):
    agent = make_agent(others / "chatml")
    turns = (Message("user", "Tom has 12."), Message("assistant", "7"), Message("user", "How?"))
    prompts = []
    agent._refusal = lambda prompt, request: prompts.append(prompt) or LocalAgent._refusal(agent, prompt, request)
    requests = [Request("answer", turns, max_tokens=4), Request("user", turns[:2], max_tokens=4)]
    assert all(reply.ok for reply in agent.respond(requests))
    backend = FAMILIES["chatml"][1]
    texts = [backend.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    talk = (
        "<|im_start|>system\nYou answer questions.<|im_end|>\n<|im_start|>user\nTom has 12.<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\n"
    )
    assert texts == [talk + "How?<|im_end|>\n<|im_start|>assistant\n", talk]


def test_an_answer_stops_where_the_template_ends_a_turn(others):
    agent = make_agent(others / "gemma")
    # The files list <eos> alone: <end_of_turn> follows from the template.
    ends = [FAMILIES["gemma"][1].token_to_id(token) for token in ("<eos>", "<end_of_turn>")]
    assert list(agent._sampling([1], ask("a")).eos_ids) == ends == list(agent.tokenizer.eos_ids)
    assert agent.tokenizer.decode([*agent.tokenizer.encode("a"), ends[1]]) == "a"


def test_a_conversation_that_the_template_refuses_is_a_failed_call(others):
    agent = make_agent(others / "gemma")
    refused = Request("answer", (Message("system", "Be brief."), Message("user", "a")), max_tokens=4)
    replies = agent.respond([refused, ask("a", max_tokens=4)])
    assert [reply.ok for reply in replies] == [False, True]
    assert replies[0].error.startswith("chat template: messages: refused by the chat template of the model: No system")
    assert replies[0].reason == "chat template"


# Catches: a ledger that serves the replies of one format for another, or whose keys change for Vicuna.
def test_fingerprint_follows_the_chat_format(others, agent):
    prints = [make_agent(others / "chatml", chat_format=choice).fingerprint for choice in ("auto", "vicuna", "chatml")]
    assert len(set(prints)) == 3 and make_agent(others / "chatml").fingerprint == prints[0]
    digest = hashlib.sha256(f"vicuna-v1.1/2\0{agent.tokenizer.fingerprint}\0{agent.model.config}".encode())
    for name, tensor in sorted(agent.model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
    assert agent.fingerprint == digest.hexdigest()[:16]


def test_vicuna_is_asked_of_another_model_by_choice(others):
    agent = make_agent(others / "chatml", chat_format="vicuna")
    text = FAMILIES["chatml"][1].decode(agent._prompt(ask("Tom")), skip_special_tokens=False)
    assert text.endswith("USER: Tom ASSISTANT:") and "im_start|>user" not in text
    assert encode_prompt(agent.tokenizer, ask("Tom").messages) == agent._prompt(ask("Tom"))


def test_a_generation_that_nobody_waits_for_ends(agent, monkeypatch):
    from wizard_engine.agents import local

    steps = []

    def continued(engine, prompts, samplings, on_finished):
        for step in range(1000):
            steps.append(step)
            if step == 3:
                agent.stop()
            on_finished(0)

    monkeypatch.setattr(local, "continued", continued)
    with pytest.raises(ValueError, match="agent tiny: the generation was ended"):
        agent.respond([ask("Tom")])
    assert len(steps) == 4
    monkeypatch.undo()
    assert agent.respond([ask("Tom")])[0].ok
