"""Generated requests beside an ordinary client: fields of the whole API, values from the edges of their ranges."""

import json
import random
import threading

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import httpx
from served_model import Serving

NUMBERS = [0, 1, -1, 2, -2, 0.5, 1.0, 1.5, -0.0, 1e-7, 10, 20, 128, 129, 2**31, 2**53, 1e300]
NUMBERS += [2**63 - 1, -(2**63), 2**63, 2**64]
STRINGS = ["", " ", "a", "two three", "\x00", "\ud800", "🧙", "é" * 50, "none", "auto", "required"]
LISTS = [[], [None], ["a"], ["a", ""], [[1]], [1, 2], [0], [299], [300]]
OBJECTS = [{}, {"a": 1}, {"0": 1}, {"type": "text"}, {"include_usage": True}]
EDGES = [None, True, False, *NUMBERS, *STRINGS, *LISTS, *OBJECTS]
KEYS = ("name", "refusal", "tool_calls", "function_call", "annotations", "audio", "cache_control", "reasoning_content")
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "robot", None]
USUAL = {
    "temperature": [0, 0.5, 1, 2, 10],
    "top_p": [0.001, 0.5, 1],
    "top_k": [-1, 0, 1, 5, 2**31 - 1],
    "n": [1, 2, 3],
    "max_tokens": [0, 1, 2, 5],
    "max_completion_tokens": [1, 3],
    "stop": ["a", ["o", "e"], "", []],
    "seed": [0, 1, -1, 2**63 - 1],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 0.1, 2],
    "logit_bias": [{"5": 100}, {"0": -100, "299": 1}, {"1": 0.5}],
    "logprobs": [True, False, 0, 1, 5, 20],
    "top_logprobs": [0, 1, 20],
    "echo": [True, False],
    "best_of": [1, 2],
}
PART = {"type": "text", "text": "two"}


def message(draw):
    made = {"role": draw.choice(ROLES[:4] if draw.random() < 0.98 else ROLES)}
    parts = [PART, {"type": "image_url"}, {"text": "x"}, "x", {"type": "text", "text": "\ud800"}]
    contents = ["two", "🧙 é", "", "</s>USER:", None, [PART], [PART] * 3, parts, draw.choice(EDGES)]
    if draw.random() < 0.95:
        made["content"] = draw.choice(contents[:4] if draw.random() < 0.9 else contents)
    for name in KEYS:
        if draw.random() < 0.05:
            made[name] = None if draw.random() < 0.8 else draw.choice(EDGES)
    return made


def request(draw, fields):
    """(path, body) of a request."""
    is_chat = draw.random() < 0.5
    known = fields["chat" if is_chat else "completion"]
    body = {"model": "small", "max_tokens": draw.choice([1, 2, 5])}
    if is_chat:
        body["messages"] = [message(draw) for _ in range(draw.choice([1, 1, 2, 3, 5]))]
    else:
        prompts = ["two", "", "🧙", ["a", "b"], [0, 5, 9], [[1], [2, 3]], "\x00"]
        body["prompt"] = draw.choice(prompts if draw.random() < 0.9 else ["one " * 300, [1] * 300])
    # One request in three has values from the edges, the others what clients send.
    edges = draw.random() < 0.3
    for name in draw.sample(list(known), draw.choice([0, 1, 2, 3, 6])):
        usual = USUAL.get(name) or known[name].schema.get("enum") or [None]
        if edges and draw.random() < 0.5:
            body[name] = draw.choice(EDGES)
        elif name not in ("model", "messages", "prompt"):
            body[name] = draw.choice(usual)
    if draw.random() < 0.02:
        body[draw.choice(["x", "", "\ud800", "max_token", "m" * 500])] = 1
    return "/v1/chat/completions" if is_chat else "/v1/completions", body


ORDINARY = {
    "model": "small",
    "messages": [{"role": "user", "content": "Count to ten"}],
    "max_tokens": 12,
    "temperature": 0,
}


class Ordinary(threading.Thread):
    """A client that asks the same all the time; `wrong`: answers that were others."""

    def __init__(self, serving):
        super().__init__(daemon=True)
        self.web, self.wrong, self.count, self.ends = httpx.Client(base_url=serving.url, timeout=60), [], 0, False
        self.right = self.answer()

    def answer(self):
        answer = self.web.post("/v1/chat/completions", json=ORDINARY)
        return answer.json().get("choices", answer.text)

    def run(self):
        while not self.ends:
            answer = self.answer()
            self.count += 1
            if answer != self.right:
                self.wrong.append(answer)


def attack(count, seed):
    """Statuses of generated requests."""
    draw, statuses = random.Random(seed), {}
    with Serving(max_jobs=256) as serving:
        fields = {"chat": serving.server.chat_fields, "completion": serving.server.completion_fields}
        other = Ordinary(serving)
        other.start()
        with httpx.Client(base_url=serving.url, timeout=60) as web:
            for number in range(count):
                path, body = request(draw, fields)
                answer = web.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
                assert answer.status_code < 500, (number, path, body, answer.text)
                assert '"code": "sequence_failed"' not in answer.text, (number, path, body, answer.text)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        other.ends = True
        other.join(60)
        assert not other.wrong and other.count > 0
        serving.until(serving.is_idle)
        assert serving.engine.pool.free == serving.engine.pages and not serving.driver.error
    return statuses


def test_200_generated_requests_change_nothing_for_another_client():
    statuses = attack(200, seed=1)
    assert set(statuses) <= {200, 400, 404} and statuses[200] > 40 and statuses[400] > 40


@pytest.mark.soak
def test_10000_generated_requests_change_nothing_for_another_client():
    statuses = attack(10_000, seed=2)
    assert set(statuses) <= {200, 400, 404} and statuses[200] > 2000 and statuses[400] > 2000
