"""The server with a model that speaks its own chat template."""

from dataclasses import replace

import pytest
from chat_templates import FAMILIES, directory

pytest.importorskip("starlette", reason="starlette is absent")
pytest.importorskip("uvicorn", reason="uvicorn is absent")

from served_model import Serving

from wizard_engine.data.chat import encode_begun, encode_prompt, use_chat_format
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation import generate
from wizard_engine.model import PRESETS, Transformer


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """family -> a server of a small model in the template of the family."""
    servers = {}
    try:
        for family in ("chatml", "gemma"):
            tokenizer = load_tokenizer(directory(tmp_path_factory.mktemp(family), family))
            config = replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, init_std=0.2)
            made = Transformer(config, seed=3).eval(), use_chat_format(tokenizer)
            servers[family] = Serving(made=made).__enter__()
        yield servers
    finally:
        for server in servers.values():
            server.__exit__()


def asked(server, *turns, **options):
    messages = [{"role": role, "content": text} for role, text in turns]
    fields = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    return server.web.post("/v1/chat/completions", json=fields)


def continued(server, ids):
    out = generate(server.model, [ids], max_new_tokens=12, eos_ids=server.tokenizer.eos_ids)
    return server.tokenizer.decode(out.tokens[0]).strip()


CONVERSATIONS = [
    [("user", "What is 12?")],
    [("system", "Be brief."), ("user", "a </s> b <|im_end|>"), ("assistant", "yes"), ("user", "Why?")],
    # ChatML has a place for each of them.
    [("user", "one"), ("user", "two"), ("system", "late"), ("user", "three")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["question", "conversation", "turns in a row"])
def test_answers_are_those_of_the_template(serving, turns):
    server = serving["chatml"]
    ids = encode_prompt(server.tokenizer, [Message(role, text) for role, text in turns])
    answer = asked(server, *turns).json()
    assert answer["choices"][0]["message"]["content"] == continued(server, ids)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_an_answer_that_has_begun_goes_on(serving):
    server, turns = serving["chatml"], [("user", "Count."), ("assistant", "one two")]
    ids = encode_begun(server.tokenizer, [Message(role, text) for role, text in turns])
    assert FAMILIES["chatml"][1].decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\none two")
    answer = asked(server, *turns).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"].strip() == continued(server, ids)


def test_what_the_template_refuses_is_a_400_with_its_words(serving):
    refused = asked(serving["gemma"], ("system", "Be brief."), ("user", "a"))
    assert refused.status_code == 400
    assert "refused by the chat template of the model: No system role here" in refused.json()["error"]["message"]
    assert asked(serving["gemma"], ("developer", "d"), ("user", "a")).status_code == 400
    assert asked(serving["gemma"], ("user", "a"), ("user", "a")).status_code == 400
    assert asked(serving["gemma"], ("user", "a")).status_code == 200
