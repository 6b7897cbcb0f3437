"""Agents whose replies a test writes down as functions."""

import dataclasses
import re
from types import SimpleNamespace

from wizard_engine.agents import Reply, prompts
from wizard_engine.runtime.spill import Spill


def listed(result):
    """A result of a stage with lists for what it keeps on disk."""
    if isinstance(result, Spill):
        return list(result)
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return SimpleNamespace(**{k: list(v) if isinstance(v, Spill) else v for k, v in values.items()})


class Fake:
    """Replies by one function a task; keeps every batch as (task, number of requests) and every request.

    The function gets the request and the fields of its prompt (for "answer" and "user" the conversation); it returns
    the reply's text, or a Reply. It is not asked again for what cannot be read, unless `converses` is set.
    """

    converses = False

    def __init__(self, name="fake", **tasks):
        self.name, self.fingerprint, self.tasks = name, f"{name}/1", tasks
        self.batches, self.requests = [], []

    def respond(self, requests):
        self.batches.append((requests[0].task, len(requests)))
        self.requests += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        if request.task in ("answer", "user"):
            said = self.tasks[request.task](request, request.messages)
        else:
            fields = prompts.parse(request.task, request.messages[0].content)
            said = self.tasks[request.task](request, fields)
        return said if isinstance(said, Reply) else Reply(said)

    def asked(self, task):
        """Requests of a task, in order."""
        return [request for request in self.requests if request.task == task]


FAILED = Reply("", error="timed out")


def answer_quality(text):
    """Score that an answer such as `fine q7.5` carries; 1 without one."""
    qualities = re.findall(r"q(\d+(?:\.\d+)?)", text)
    return float(qualities[-1]) if qualities else 1.0


def honest_judge(bias=0.0):
    """A judge that reads the scores off the answers and adds `bias` to the one that stands first."""

    def judge(request, fields):
        a, b = answer_quality(fields["answer_a"]) + bias, answer_quality(fields["answer_b"])
        return f"A is worth {a}, B {b}. [[{min(a, 10)}]] [[{b}]]"

    return Fake(
        "judge",
        judge=judge,
        rate=lambda request, fields: f"[[{answer_quality(fields['answer'])}]]",
        compare=lambda request, fields: "Not Equal",
    )


def answerer(name, rule):
    """An agent that answers the last user turn by a rule of its text and the request."""
    return Fake(name, answer=lambda request, messages: rule(messages[-1].content, request))
