"""An agent whose replies are written in a file that a run names: for runs that repeat without a model or an endpoint.

Each line of the file is an object:

    {"task": "evolve", "instruction": "How many ...?", "reply": "How many ... more?"}

`task` is one of the prompts' or "answer" and "user", `instruction` what is asked about (see `asked`), and left out for
a reply to every other request of the task. Lines with the same task and instruction are replies of one request: the
seed chooses among them. A list to rank that has no line of its own is answered from the lines of task "rank" with one
instruction of it and its score as reply.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from wizard_engine.data.text_files import read_data, read_objects
from wizard_engine.runtime.stage import SCRIPTED

from . import prompts
from .missing import NO_SCRIPT
from .program import CONVERSATIONS
from .protocol import Reply, Request

TASKS = (*CONVERSATIONS, *(task for task in prompts.TASKS if task not in CONVERSATIONS))
_FIELDS = ("task", "instruction", "reply")
# The field of a prompt that has the text asked about, where it is not `instruction`.
_ASKED = {"compare": "first", "rank": "instructions", "analyse": "trajectory", "optimise": "feedback"}
# The lines that `prompts.numbered` writes.
_NUMBERED = re.compile(r"^(\d+)\. (.*)$", re.MULTILINE)


class ScriptedAgent:
    """Replies from a file.

    Args:
        path: of the lines.
    Raises:
        ValueError: `path:line: ...` for a file or a line that is none, or `path: ...` without any line.
    """

    is_instant, converses = True, False

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path}:1: file: expected lines of replies, got no such file; correct {SCRIPTED}FILE")
        self.name = SCRIPTED + "/".join(path.parts[-3:])
        self.fingerprint = f"scripted/1({hashlib.sha256(read_data(path)).hexdigest()[:16]})"
        self.replies: dict[tuple[str, str | None], list[str]] = {}
        for place, line in read_objects(path):
            task, instruction, reply = _checked(place, line)
            self.replies.setdefault((task, instruction), []).append(reply)
        if not self.replies:
            raise ValueError(f'{path}:1: file: expected a line {{"task", "instruction", "reply"}}, got none; add some')

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests; one that the file has no line for is a failed call."""
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        text = asked(request)
        choices = self.replies.get((request.task, prompts.flatten(text))) or self.replies.get((request.task, None))
        if choices is not None:
            return Reply(choices[_place(request.seed, len(choices), text)])
        items = _NUMBERED.findall(text) if request.task == "rank" else []
        if not items:
            return self._absent(request, text)
        scores = [self.replies.get(("rank", prompts.flatten(item))) for _, item in items]
        if None in scores:
            return self._absent(request, items[scores.index(None)][1])
        chosen = [given[_place(request.seed, len(given), item)] for given, (_, item) in zip(scores, items)]
        return Reply("\n".join(f"{number}: {score}" for (number, _), score in zip(items, chosen)))

    def _absent(self, request: Request, text: str) -> Reply:
        return Reply("", f"{NO_SCRIPT}: {self.name} has none to {request.task!r} of {text[:60]!r}")


def _place(seed: int, count: int, text: str) -> int:
    """Number of the reply for a seed: small seeds take the replies in turn.

    The seeds of recipes are large, and the same for many rows; there each text has draws of its own.
    """
    turns, place = divmod(seed, count)
    drawn = hashlib.sha256(f"{turns}\0{text}".encode("utf-8", "surrogatepass")).digest() if turns else b"\0"
    return (place + int.from_bytes(drawn)) % count


def asked(request: Request) -> str:
    """The text that a request is about: the last user turn of a conversation, or a field of its prompt.

    That is the instruction, or the first of two to compare, the numbered ones to rank, a trajectory or a review.
    """
    if request.task in CONVERSATIONS:
        return next((message.content for message in reversed(request.messages) if message.role == "user"), "")
    fields = prompts.parse(request.task, request.messages[0].content)
    return fields[_ASKED.get(request.task, "instruction")]


def _checked(place: str, line: Mapping[str, object]) -> tuple[str, str | None, str]:
    """Task, instruction or None, and reply of a line."""
    for name, value in line.items():
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ValueError(f"{place}: {name}: expected one of {', '.join(_FIELDS)}, got another field; {hint}")
        if not isinstance(value, str):
            raise ValueError(f"{place}: {name}: expected a text, got {type(value).__name__} {value!r}; correct it")
    for name in ("task", "reply"):
        if name not in line:
            raise ValueError(f"{place}: {name}: expected a text, got none; add it")
    task, instruction = str(line["task"]), line.get("instruction")
    if task not in TASKS:
        raise ValueError(f"{place}: task: expected one of {', '.join(TASKS)}, got {task!r}; choose one of them")
    return task, None if instruction is None else prompts.flatten(str(instruction)), str(line["reply"])
