"""Agents whose replies a test writes down as functions."""

import re

from wizard_engine.agents import Reply, prompts


class Fake:
    """Replies by one function a task; keeps every batch as (task, number of requests) and every request.

    The function gets the request and the fields of its prompt (for "answer" and "user" the conversation); it returns
    the reply's text, or a Reply.
    """

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
            fields = prompts.parse(request.task, request.messages[-1].content)
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
