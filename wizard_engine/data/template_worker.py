"""Renders chat templates in a process with bounds on time and memory: a template is somebody else's program.

Run by path, and not as a module, so that it starts in a tenth of a second: it imports jinja2 and the standard library
alone. A request is a line of JSON, and so is its answer; see `template_renderer.py`. What templates may use is what
transformers gives them: `raise_exception`, `strftime_now`, `tojson`, `break` and `continue`, `{% generation %}`.
"""

import json
import resource
import signal
import sys
import time
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Of the whole process, and of one rendering in seconds of work. The second ends what does not heed the first, one long
# operation; where the machine is busy, a part of the work is enough after some seconds on the clock.
MEMORY_BYTES = 768 << 20
SECONDS, HARD_SECONDS = 0.5, 0.8
CLOCK_SECONDS, LEAST_SECONDS = 1.5, 0.1
MAX_CHARACTERS = 8 << 20

_SPANS: ContextVar[tuple[list[str], list[tuple[int, str]]]] = ContextVar("spans")


class Refused(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


class TookTooLong(BaseException):
    """The time of a rendering is over. No template can catch it."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` around what the model writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """The block as a call, which gives its own text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text = caller()
        pieces, spans = _SPANS.get()
        spans.append((sum(map(len, pieces)), text))
        return text


class TemplateDict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **named: Any) -> dict:
        """A new dict."""
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        values = dict(*args[1:], **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: expected a name without _ in front, got {name!r}")


def _refuse(message: Any) -> None:
    raise Refused(str(message))


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(16)
def compiled(template: str) -> jinja2.Template:
    """The template, compiled."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Text of a template, and the spans (start, end) of its generation blocks.

    Raises:
        ValueError: a generation block stands where its place in the text cannot be told.
    """
    pieces: list[str] = []
    spans: list[tuple[int, str]] = []
    _SPANS.set((pieces, spans))
    size = 0
    for piece in compiled(template).generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise MemoryError
    text = "".join(pieces)
    if any(text[start : start + len(inner)] != inner for start, inner in spans):
        raise ValueError("a generation block inside a macro, a set block or a filter; move it out")
    return {"text": text, "spans": [(start, start + len(inner)) for start, inner in spans]}


def answer(request: dict[str, Any]) -> bytes:
    """A line of JSON: the rendering that a request asks for, or why there is none."""
    try:
        return _line(render(request["template"], request["variables"]))
    except Refused as error:
        return _line({"refused": str(error)})
    except jinja2.TemplateSyntaxError as error:
        return _line({"failed": f"line {error.lineno}: {error.message}"})
    except MemoryError:
        return _line({"failed": f"more than {MEMORY_BYTES >> 20} MiB of memory or {MAX_CHARACTERS} characters"})
    except RecursionError:
        return _line({"failed": "blocks or macros nested too deeply"})
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        return _line({"failed": f"{type(error).__name__}: {error}"})
    except (RuntimeError, AssertionError, NameError, SyntaxError) as error:
        return _line({"failed": f"{type(error).__name__}: {error}"})


def _line(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


def _within_time(request: dict[str, Any]) -> bytes:
    """The answer to a request; a rendering that does not heed the first timers ends this process by the last."""
    began = time.process_time()

    def stop(number: int, _: Any) -> None:
        if number == signal.SIGPROF or time.process_time() - began > LEAST_SECONDS:
            raise TookTooLong

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, HARD_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS, CLOCK_SECONDS / 8)
        try:
            return answer(request)
        finally:
            for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF, signal.ITIMER_VIRTUAL):
                signal.setitimer(timer, 0)
    except TookTooLong:
        return _line({"failed": f"more than {SECONDS:g} s of work"})


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        out.write(_within_time(json.loads(line)))
        out.flush()


if __name__ == "__main__":
    main()
