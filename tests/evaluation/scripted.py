"""Rivals and judges that reply at any time and in any order, with replies that depend on the request alone."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable

from wizard_engine.agents import Reply, Request, prompts


def draw(*parts: object) -> float:
    """A number from 0 to 1, a hash of the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:6], "big") / 2**48


class Late:
    """An agent whose replies take a number of turns of the event loop that depends on the request.

    Args:
        say: request -> reply, or its text.   turns: the most turns.   salt: other latencies.
    """

    concurrency, ended = 64, ""

    def __init__(
        self,
        name: str,
        say: Callable[[Request], Reply | str],
        *,
        turns: int = 0,
        salt: str = "",
        converses: bool = True,
    ) -> None:
        self.name, self.fingerprint, self.say, self.turns, self.salt = name, f"{name}/1", say, turns, salt
        self.converses, self.calls = converses, 0

    async def reply(self, request: Request) -> Reply:
        """The reply, late."""
        self.calls += 1
        for _ in range(int((self.turns + 1) * draw(self.salt, self.name, request.messages[-1].content))):
            await asyncio.sleep(0)
        said = self.say(request)
        return Reply(said) if isinstance(said, str) else said

    async def aclose(self) -> None:
        """There are no connections."""


def fields_of(request: Request) -> dict[str, str]:
    """Of the prompt that a request began with."""
    return prompts.parse(request.task, request.messages[0].content)


def rival(name: str, **options) -> Late:
    """Answers with a quality from 1 to 10, which depends on its name and the question."""

    def say(request: Request) -> str:
        question = request.messages[-1].content
        quality = 1 + round(9 * draw(name, question), 1)
        return f"{name} says {question!r}: quality {quality:g}" + "." * int(20 * draw(question, name))

    return Late(name, say, **options)


def qualities(request: Request) -> tuple[float, ...]:
    """Of the answers that a judge is shown, in that order."""
    fields = fields_of(request)
    names = ("answer_a", "answer_b") if request.task == "judge" else ("answer",)
    return tuple(float(re.search(r"quality ([\d.]*\d)", fields[name])[1]) for name in names)


def verdict(request: Request) -> str:
    """The qualities as a judge writes them."""
    return "Seen. " + " ".join(f"[[{quality:g}]]" for quality in qualities(request))


def judge(name: str = "judge", say: Callable[[Request], Reply | str] = verdict, **options) -> Late:
    """Scores answers by the quality that stands in them."""
    return Late(name, say, **options)
