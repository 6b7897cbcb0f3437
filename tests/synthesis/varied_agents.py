"""An agent whose replies to every task are a function of the request: good, bad, repeated, unreadable and cut ones."""

import asyncio
import hashlib
import random
import re

from fake_agents import FAILED, answer_quality

from wizard_engine.agents import Reply, prompts


def draw(*parts):
    """A number that follows from the parts."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:6], "big")


class Varied:
    """Answers at once, in this process."""

    converses = False

    def __init__(self, name):
        self.name, self.fingerprint, self.requests = name, f"{name}/1", []

    def respond(self, requests):
        return [self.answer_one(request) for request in requests]

    def answer_one(self, request):
        self.requests.append(request)
        content = request.messages[0].content if request.task not in ("answer", "user") else request.messages
        number = draw(self.name, request.task, content, request.seed)
        if number % 23 == 0:
            return FAILED
        if request.task in ("answer", "user"):
            return self._said(request, number)
        said = getattr(self, request.task)(prompts.parse(request.task, content), number // 23)
        return Reply(said)

    def _said(self, request, number):
        if request.task == "user":
            return Reply(f"And then {number % 50}?")
        if number % 11 == 1:
            # The same text is cut for some rows and whole for others.
            return Reply("As we see, q4", finish="length" if number % 2 else "stop")
        return Reply(f"{self.name} says {number % 3} q{1 + number // 5 % 10}\nstep q{1 + number // 7 % 10}")

    def evolve(self, fields, number):
        return f"Shared question {number % 9}" if number % 2 else f"{fields['instruction']} and {number % 1000}"

    def compare(self, fields, number):
        return "Equal" if number % 7 == 0 else "Not Equal"

    def rewrite(self, fields, number):
        return f"{fields['answer']} better q{10 if number % 3 else 1 + number % 10}"

    def judge(self, fields, number):
        a, b = answer_quality(fields["answer_a"]), answer_quality(fields["answer_b"])
        return f"[[{min(10, a + number % 3)}]] [[{b}]]"

    def rate(self, fields, number):
        return "no score" if number % 13 == 0 else f"[[{answer_quality(fields['answer'])}]]"

    def label(self, fields, number):
        lines = [line for line in fields["answer_steps"].splitlines() if line.strip()]
        return "\n".join(str((number + place) % 3 - 1) for place in range(len(lines)))

    def rank(self, fields, number):
        count = len(re.findall(r"(?m)^\d+\. ", fields["instructions"]))
        return "\n".join(f"{place}: {(number + 3 * place) % 11}" for place in range(1, count + 1))

    def suggest(self, fields, number):
        return f"Say more about {number % 5}."

    def analyse(self, fields, number):
        return f"Too short, {number % 4}."

    def optimise(self, fields, number):
        return f"```\nMethod {number % 4}\n```"


class Late(Varied):
    """Answers each request after a random while."""

    concurrency, ended = 16, ""

    def __init__(self, name, seed):
        super().__init__(name)
        self._random = random.Random(f"{name}/{seed}")

    async def reply(self, request):
        for _ in range(self._random.randrange(30)):
            await asyncio.sleep(0)
        return self.answer_one(request)

    async def aclose(self):
        return None
