"""What clients send: the server's own answers, fields without an effect, and what is refused with its reason."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
from served_model import Serving  # noqa: E402

from wizard_engine.data.chat import encode_answer, encode_prompt  # noqa: E402
from wizard_engine.data.records import Message  # noqa: E402
from wizard_engine.serving.conversation import encode_request, turns  # noqa: E402
from wizard_engine.serving.protocol import RequestError, chat_fields, checked, wrong  # noqa: E402

ASK = [{"role": "user", "content": "What is two?"}]
CHAT = {"model": "small", "messages": ASK, "max_tokens": 4, "seed": 1}
TEXT = {"model": "small", "prompt": "two", "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def serving():
    with Serving() as server:
        yield server
        server.until(server.is_idle)


@pytest.fixture(scope="module")
def client(serving):
    return openai.OpenAI(base_url=serving.url + "/v1", api_key="x", max_retries=0)


def post(serving, body, path="/v1/chat/completions"):
    return serving.web.post(path, json=body)


# Catches: fields of the server's own message that it does not take back.
@pytest.mark.parametrize("form", ["object", "model_dump", "set", "raw"])
def test_a_conversation_goes_on_with_the_message_that_came_back(serving, client, form):
    messages = list(ASK)
    for _ in range(3):
        if form == "raw":
            message = post(serving, CHAT | {"messages": messages}).json()["choices"][0]["message"]
        else:
            message = client.chat.completions.create(**CHAT | {"messages": messages}).choices[0].message
            forms = {"object": lambda m: m, "model_dump": lambda m: m.model_dump()}
            message = forms.get(form, lambda m: m.model_dump(exclude_unset=True))(message)
        messages += [message, {"role": "user", "content": "And again?"}]
    assert len(messages) == 7


def test_a_conversation_goes_on_with_what_was_streamed(client):
    message = {"role": None, "content": "", "refusal": None}
    for chunk in client.chat.completions.create(**CHAT, stream=True):
        delta = chunk.choices[0].delta.model_dump()
        message |= {key: delta[key] for key in ("role", "refusal") if delta[key]}
        message["content"] += delta["content"] or ""
    again = [*ASK, message, {"role": "user", "content": "again"}]
    assert client.chat.completions.create(**CHAT | {"messages": again}).choices


NEUTRAL = {
    "tool_choice": ["none", "auto", None],
    "tools": [[], None],
    "functions": [[], None],
    "function_call": ["none", None],
    "parallel_tool_calls": [True, False, None],
    "best_of": [1, None],
    "top_k": [-1, 0, None],
    "cache_control": [{"type": "ephemeral"}, None],
    "presence_penalty": [0, 0.0, None],
    "frequency_penalty": [0, 0.0, None],
    "logit_bias": [{}, None],
    "user": ["me", None],
    "metadata": [{"a": "b"}, {}, None],
    "service_tier": ["auto", "default", None],
    "store": [False, True, None],
    "response_format": [{"type": "text"}, None],
    "modalities": [["text"], None],
    "audio": [None],
    "prediction": [None],
    "reasoning_effort": [None],
    "stop": [None, [], ""],
    "stream_options": [None, {}, {"include_usage": None}],
    "max_completion_tokens": [4, None],
    "logprobs": [False, None],
    "n": [1, None],
    "min_p": [0, 0.0],
    "priority": [0],
    "prompt_logprobs": [None],
    "early_stopping": [False],
    "repetition_penalty": [1, 1.0],
    "prompt_cache_key": ["key"],
    "safety_identifier": ["someone"],
    "echo": [False],
}


def test_fields_without_an_effect_change_nothing(serving):
    right = post(serving, CHAT).json()["choices"]
    right_text = post(serving, TEXT, "/v1/completions").json()["choices"]
    for name, values in NEUTRAL.items():
        for value in values:
            answer = post(serving, CHAT | {name: value})
            assert answer.status_code == 200 and answer.json()["choices"] == right, (name, value, answer.text)
            if name in serving.server.completion_fields:
                answer = post(serving, TEXT | {name: value}, "/v1/completions")
                assert answer.status_code == 200 and answer.json()["choices"] == right_text, (name, value, answer.text)


def test_every_field_of_the_official_client_is_known():
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    fields = chat_fields(10, 4)
    names = [name for name in chat.CompletionCreateParamsBase.__annotations__ if name not in fields]
    assert not names
    with Serving() as serving:
        known = serving.server.completion_fields
        assert not [name for name in completion.CompletionCreateParamsBase.__annotations__ if name not in known]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED = {"role": "tool", "tool_call_id": "1", "content": "x"}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"tools": [TOOL]}, "tools", "has no tools"),
        ({"tool_choice": "required"}, "tool_choice", "has no tools"),
        ({"functions": [TOOL["function"]]}, "functions", "has no tools"),
        ({"messages": [*ASK, CALLING]}, "messages[1].tool_calls", "no tools"),
        ({"messages": [*ASK, CALLED]}, "messages[1].role", "has no tools"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "images"),
        ({"messages": [{"role": "user", "content": [AUDIO]}]}, "messages[0].content[0].type", "audio"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected string or array"),
        ({"modalities": ["text", "audio"]}, "modalities", "audio"),
        ({"audio": {"voice": "x"}}, "audio", "audio"),
        ({"best_of": 3}, "best_of", "expected 1 or n"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "expected token ids 0 to"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "expected token ids 0 to"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "expected -100 to 100"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "expected -2 to 2"),
        ({"top_k": -2}, "top_k", "expected -1"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not served"),
        ({"min_p": 0.1}, "min_p", "does not sample that way"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "expected the last role user"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"\ud800": 1}, None, "unknown field"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(serving, changes, param, reason):
    body = json.dumps(CHAT | changes).encode()
    answer = serving.web.post("/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and reason in error["message"], answer.text
    assert param is None or error["param"] == param


# Catches: all entries of a large object sorted, to name a few of them.
def test_the_cost_of_a_refusal_does_not_grow_with_the_value():
    compared = []

    class Key(str):
        def __lt__(self, other):
            compared.append(other)
            return str.__lt__(self, other)

    error = wrong("logit_bias", "few entries", [{Key(i): i for i in range(1000)}])
    assert error.message.startswith("logit_bias: expected few entries, got [{'0': 0, '1': 1") and len(compared) < 20


def test_penalties_and_biases_reach_the_engine(serving, monkeypatch):
    seen, add = [], serving.engine.add
    monkeypatch.setattr(serving.engine, "add", lambda prompt, how, n: seen.append(how) or add(prompt, how, n=n))
    fields = {"frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"5": 3, "0": -100, "7": 0}}
    assert post(serving, CHAT | fields).status_code == 200
    assert post(serving, TEXT | fields, "/v1/completions").status_code == 200
    assert len(seen) == 2
    for how in seen:
        assert (how.frequency_penalty, how.presence_penalty) == (0.5, -1.0)
        assert how.logit_bias == ((5, 3.0), (0, -100.0))


# Turns

USER, SYSTEM, ANSWER = ({"role": role, "content": role[0]} for role in ("user", "system", "assistant"))
NO_CONTENT, PARTS = (
    {"role": "assistant", "content": None},
    [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
)


def said(*texts):
    """Turns as `role: text`."""
    return [Message(*text.split(": ", 1)) for text in texts]


@pytest.mark.parametrize(
    ("messages", "right"),
    [
        ([USER, USER], said("user: u\n\nu")),
        ([USER, SYSTEM], said("system: s", "user: u")),
        ([SYSTEM, USER, ANSWER, SYSTEM, USER], said("system: s\n\ns", "user: u", "assistant: a", "user: u")),
        ([USER, SYSTEM, USER], said("system: s", "user: u\n\nu")),
        ([USER, ANSWER, ANSWER, USER], said("user: u", "assistant: a\n\na", "user: u")),
        ([USER, NO_CONTENT, USER], said("user: u", "assistant: ", "user: u")),
        ([{"role": "developer", "content": "d"}, USER], said("system: d", "user: u")),
        ([{"role": "user", "content": PARTS}], said("user: a b")),
    ],
)
def test_messages_become_turns_that_alternate(serving, messages, right):
    checked(CHAT | {"messages": messages}, serving.server.chat_fields)
    assert turns(messages) == right
    assert encode_request(serving.tokenizer, right) == (encode_prompt(serving.tokenizer, right), False)
    assert post(serving, CHAT | {"messages": messages}).status_code == 200


def test_an_assistant_turn_at_the_end_is_continued(serving):
    prompt = encode_prompt(serving.tokenizer, [Message("user", "u")])
    begun = [Message("user", "u"), Message("assistant", "two three")]
    assert encode_request(serving.tokenizer, begun) == (
        prompt + encode_answer(serving.tokenizer, "two three")[:-1],
        True,
    )
    assert encode_request(serving.tokenizer, [begun[0], Message("assistant", "")]) == (prompt, False)
    ask = CHAT | {"messages": [USER, {"role": "assistant", "content": "two three"}], "temperature": 0, "max_tokens": 20}
    content = post(serving, ask).json()["choices"][0]["message"]["content"]
    ids, _ = encode_request(serving.tokenizer, begun)
    text = {"model": "small", "prompt": ids, "max_tokens": 20, "temperature": 0}
    assert content == post(serving, text, "/v1/completions").json()["choices"][0]["text"].rstrip()
    with pytest.raises((RequestError, ValueError)):
        encode_request(serving.tokenizer, [Message("assistant", "alone")])
