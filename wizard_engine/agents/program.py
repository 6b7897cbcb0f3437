"""Agents that are programs: one method per task, and refusals that are counted by their reason."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

from . import prompts
from .protocol import Reply, Request

CONVERSATIONS = ("answer", "user")


class Refused(ValueError):
    """A request that a program does not reply to: the reason in a word or two, a colon, and the details."""


class Program:
    """An agent that is a program: one method per task, named after it.

    A method takes the fields of the task's prompt (for "answer" and "user" the conversation's user turns) and a
    generator seeded by the request, and returns the reply's text. It raises Refused where it has none.
    """

    name: str = "program"
    version: ClassVar[int] = 1
    parameters: Mapping[str, object] = {}
    unseeded_fields: Mapping[str, tuple[str, ...]] = {}  # task -> prompt fields that do not enter the generator's seed
    is_instant, converses = True, False  # replies take no time, and a program cannot be asked what it meant

    @cached_property
    def fingerprint(self) -> str:
        """Name, version and parameters; a change of any of them is another agent."""
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.parameters.items()))
        return f"{self.name}/{self.version}({settings})"

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in order; a task the program does not do, or a prompt it cannot read, is a Reply with an error."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        method: Callable[..., str] | None = getattr(self, f"do_{request.task}", None)
        if method is None:
            return Reply("", f"{self.name}: expected another task, got {request.task!r}; ask a program that does it")
        try:
            return Reply(self._text(method, request))
        except Refused as reason:
            return Reply("", f"{reason}")

    def _text(self, method: Callable[..., str], request: Request) -> str:
        if request.task in CONVERSATIONS:
            turns = [message.content for message in request.messages if message.role == "user"]
            self.check(request.task, {}, turns)
            return method(turns, self._generator(request, [message.content for message in request.messages]))
        try:
            fields = prompts.parse(request.task, request.messages[-1].content)
        except ValueError as error:
            raise Refused(f"{self.name}: {error}") from None
        self.check(request.task, fields, ())
        unseeded = self.unseeded_fields.get(request.task, ())
        seeding = [value for name, value in fields.items() if name not in unseeded]
        return method(rng=self._generator(request, seeding), **fields)

    def check(self, task: str, fields: Mapping[str, str], turns: Sequence[str]) -> None:
        """Raises Refused for a request that is none for this program.

        Args:
            fields: of the task's prompt; turns: of the user, in the tasks "answer" and "user".
        """

    def _generator(self, request: Request, texts: Sequence[str]) -> random.Random:
        return random.Random("|".join((self.fingerprint, request.task, str(request.seed), *texts)))
