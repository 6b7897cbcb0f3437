"""The command `python -m wizard_engine ledger FILE`: what was asked and said, what it took, what cannot be read."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from wizard_engine.runtime.files import replacing
from wizard_engine.runtime.text_lines import printable

from . import prompts, replies
from .ledger import Call, Ledger

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Options:
    """The calls of a ledger: one line each, then their numbers by agent and task. Reads while a run writes."""

    file: Positional[Path]
    """The ledger, or the directory of a run with one."""
    agent: str | None = None
    """Of this agent alone."""
    task: str | None = None
    """Of this task alone: answer, judge, evolve and so on."""
    row: str | None = None
    """For the row with this id alone."""
    unreadable: bool = False
    """Those alone whose reply does not say what its task asked for."""
    failures: bool = False
    """Failed calls in the place of replies."""
    export: Path | None = None
    """Write the calls to this file as JSON lines, in the place of showing them."""
    forget: bool = False
    """Remove the replies, so that they are asked for again."""

    def check(self) -> None:
        """Raises ValueError for options that do not fit together."""
        if self.failures and (self.forget or self.unreadable):
            other = "--forget" if self.forget else "--unreadable"
            raise ValueError(f"{other}: expected replies, got --failures beside it; give one of them")
        if self.forget and not (self.agent or self.task or self.row or self.unreadable):
            raise ValueError("--forget: expected --agent, --task, --row or --unreadable beside it, got none of them")
        if self.export is not None and self.export.resolve() == self.path.resolve():
            raise ValueError("--export: expected another file, got the ledger itself; give another path")

    @property
    def path(self) -> Path:
        """Of the ledger's file."""
        return self.file / "ledger.sqlite" if self.file.is_dir() else self.file

    @property
    def selection(self) -> dict[str, str | None]:
        """What Ledger.calls takes."""
        return {"agent": self.agent, "task": self.task, "row": self.row}


def is_readable(call: Call) -> bool:
    """Whether a reply says what its task asked for."""
    read, request = getattr(replies, "read_reply", None), call.request
    if read is None or request.task not in prompts.TASKS or request.task == "user":
        return bool(call.text.strip())
    try:
        fields = prompts.parse(request.task, request.messages[0].content)
    except ValueError:
        # Asked with a prompt of another version, which cannot say what was expected.
        return bool(call.text.strip())
    return read(request.task, call.text, fields) is not None


class Totals:
    """Numbers of calls by agent and task."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}

    def add(self, call: Call, *, is_read: bool) -> None:
        """Count a call."""
        counts = self.counts.setdefault((call.agent, call.request.task), Counter())
        counts["replies" if call.reply.ok else "failed"] += 1
        counts["cut"] += call.reply.is_cut
        counts["unreadable"] += not is_read
        counts["tokens_in"] += call.reply.tokens_in
        counts["tokens_out"] += call.reply.tokens_out
        counts["milliseconds"] += round(1000 * call.reply.seconds)

    def lines(self) -> Iterator[str]:
        """One of every agent and task."""
        for (agent, task), counts in sorted(self.counts.items()):
            mean = counts["milliseconds"] / max(1, counts["replies"]) / 1000
            yield (
                f"{printable(agent)}  {printable(task)}  {counts['replies']} replies, {counts['cut']} cut, "
                f"{counts['unreadable']} unreadable, {counts['failed']} failed, tokens {counts['tokens_in']} in "
                f"{counts['tokens_out']} out, {mean:.2f} s a call"
            )


def shown(call: Call) -> str:
    """A call in one line."""
    request, reply = call.request, call.reply
    end, text = (reply.finish, reply.text) if reply.ok else ("failed", reply.error)
    start = printable(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")
    names = "  ".join(printable(name) or "-" for name in (call.agent, request.task, request.row, end))
    return f"{call.key.hex()[:12]}  {names}  {reply.tokens_in}+{reply.tokens_out} tokens  {start}"


def exported(call: Call) -> dict[str, Any]:
    """A call as JSON object."""
    request, reply = call.request, call.reply
    return {
        "key": call.key.hex(),
        "agent": call.agent,
        "fingerprint": call.fingerprint,
        **{name: getattr(request, name) for name in ("task", "row", "seed", "temperature", "top_p", "max_tokens")},
        "schema": request.schema,
        "messages": [message._asdict() for message in request.messages],
        **{name: getattr(reply, name) for name in ("text", "error", "finish", "reasoning", "tokens_in", "tokens_out")},
        "seconds": reply.seconds,
    }


def selected(ledger: Ledger, options: Options) -> Iterator[tuple[Call, bool]]:
    """The calls that the options name, and whether each can be read."""
    if options.failures:
        yield from ((call, True) for call in ledger.failures(**options.selection))
        return
    for call in ledger.calls(**options.selection):
        is_read = is_readable(call)
        if not (options.unreadable and is_read):
            yield call, is_read


def nothing_chosen(ledger: Ledger, options: Options) -> str:
    """A line that says that no call is of this kind, and which agents and tasks there are."""
    names = [name for name in ("unreadable", "failures") if getattr(options, name)]
    names += [f"{name}={value}" for name, value in options.selection.items() if value is not None]
    agents = [f"{printable(agent)} ({printable(', '.join(tasks))})" for agent, tasks in ledger.counts().items()]
    return f"no call of {printable(', '.join(names)) or 'any kind'}; the ledger holds {', '.join(agents) or 'none'}"


def run(options: Options) -> None:
    """Show, write or remove the calls.

    Raises:
        ValueError: options that do not fit together, no ledger at this path, or a damaged one.
        OSError: a file that cannot be written.
    """
    options.check()
    if not options.path.is_file():
        raise ValueError(f"ledger {options.path}: expected a file, got none; give the ledger.sqlite of a run")
    totals, keys = Totals(), []
    ledger = Ledger(options.path, read_only=True)
    try:
        with nullcontext() if options.export is None else replacing(options.export) as file:
            for call, is_read in selected(ledger, options):
                totals.add(call, is_read=is_read)
                if file is not None:
                    file.write((json.dumps(exported(call), ensure_ascii=False) + "\n").encode())
                else:
                    print(shown(call))
                if options.forget:
                    keys.append(call.key)
        if not (options.failures or options.unreadable):
            for call in ledger.failures(**options.selection):
                totals.add(call, is_read=True)
        if not totals.counts:
            print(nothing_chosen(ledger, options))
    finally:
        ledger.close()
    for line in totals.lines():
        print(line)
    if options.forget:
        writer = Ledger(options.path)
        print(f"{writer.forget(keys)} replies removed; the same command of the recipe asks for them again")
        writer.close()


def main(options: Options) -> int:
    """Run the command; 1 after an error in one line."""
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"ledger: error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0
