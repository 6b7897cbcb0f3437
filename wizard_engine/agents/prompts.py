"""Prompt templates that programs can parse, too: `parse` is the exact inverse of `render`.

A template is a file `prompts/TASK.txt`. A field is a line `{name}` of its own under a heading line `#Heading#:`. Lines
of a field's content that look like such a heading get a backslash in front, so no content ends its own section. A line
is what `runtime.text_lines` calls one, and blanks or invisible marks before a heading do not hide it. If a file
`prompts/TASK.FIELD.txt` exists, it lists the names that the field accepts, each with its meaning.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from wizard_engine.data.records import Message
from wizard_engine.runtime.text_lines import LINE_END, LINE_ENDS, LINE_START, one_line

TASKS = (
    "evolve",
    "compare",
    "rewrite",
    "judge",
    "rate",
    "label",
    "rank",
    "suggest",
    "analyse",
    "optimise",
    "tag",
    "user",
)
ROLES = ("system", "user", "assistant")

_FIELD_LINE = re.compile(r"^\{(\w+)\}$", re.MULTILINE)
# Blanks, and marks that take no room, as a model would not see them: a heading behind them looks like one.
_UNSEEN = "[ \\t\\xa0\\xad\\u2000-\\u200f\\u202a-\\u202f\\u2060-\\u2064\\u3000\\ufeff]*"
_HEADING_TEXT = rf"[#＃][^#＃{LINE_ENDS}]+[#＃]{_UNSEEN}[:：]"
_TURN_TEXT = rf"###{_UNSEEN}(?i:System|User|Assistant){_UNSEEN}:?{_UNSEEN}{LINE_END}"
_HEADING = re.compile(rf"{LINE_START}({_UNSEEN})(\\*{_HEADING_TEXT})")
_ESCAPED_HEADING = re.compile(rf"{LINE_START}({_UNSEEN})\\(\\*{_HEADING_TEXT})")
_TURN = re.compile(rf"{LINE_START}({_UNSEEN})(\\*{_TURN_TEXT})")
_ESCAPED_TURN = re.compile(rf"{LINE_START}({_UNSEEN})\\(\\*{_TURN_TEXT})")
_TURN_HEADING = re.compile(r"^### (System|User|Assistant)\n", re.MULTILINE)
_STAGE = re.compile(r"(?m)^(Case (\d+)|Stage \d+: (.*)|Response: (.*))$")


@dataclass(frozen=True)
class Template:
    """A prompt split at its fields: literals[0] field[0] literals[1] ... field[n-1] literals[n].

    Attributes:
        choices: for a field with a fixed set of values, the line written for each value.
    """

    task: str
    literals: tuple[str, ...]
    fields: tuple[str, ...]
    choices: dict[str, dict[str, str]]


def render(task: str, **fields: str) -> str:
    """The prompt of a task: its template with the fields filled in.

    Raises:
        ValueError: unknown task, a field missing or too many, or a value that is not among the field's choices.
    """
    template = load_template(task)
    if set(fields) != set(template.fields):
        raise ValueError(
            f"fields of prompt {task!r}: expected {', '.join(template.fields)}, got {', '.join(sorted(fields))};"
            " give each of them once, blank where there is nothing to say"
        )
    pieces = [template.literals[0]]
    for name, literal in zip(template.fields, template.literals[1:]):
        value = fields[name]
        pieces += (_choice(template, name, value) if name in template.choices else _escape(value), literal)
    return "".join(pieces)


def parse(task: str, text: str) -> dict[str, str]:
    """The fields from which `render(task, ...)` made this text.

    Raises:
        ValueError: unknown task, or a text that the task's template did not make.
    """
    template = load_template(task)
    position = _expect(template, text, 0, 0)
    values = {}
    for index, name in enumerate(template.fields, start=1):
        literal = template.literals[index]
        end = text.find(literal, position) if index < len(template.fields) else len(text) - len(literal)
        if end < position:
            raise _mismatch(template, index)
        values[name] = text[position:end]
        position = _expect(template, text, end, index)
    return {name: _read_value(template, name, value) for name, value in values.items()}


def request_messages(task: str, **fields: str) -> tuple[Message, ...]:
    """The messages of a request: one user turn holding the rendered prompt."""
    return (Message("user", render(task, **fields)),)


@cache
def load_template(task: str) -> Template:
    """The template of a task, read once.

    Raises:
        ValueError: no such task.
    """
    if task not in TASKS:
        raise ValueError(f"prompt task: expected one of {', '.join(TASKS)}, got {task!r}; choose one of them")
    pieces = _FIELD_LINE.split(read_text(task))
    fields = tuple(pieces[1::2])
    choices = {name: _read_choices(task, name) for name in fields if _file(f"{task}.{name}").is_file()}
    return Template(task, tuple(pieces[0::2]), fields, choices)


@cache
def read_text(name: str) -> str:
    """The text of `prompts/NAME.txt` without its closing line break."""
    return _file(name).read_text(encoding="utf-8").rstrip("\n")


def initial_method() -> str:
    """The evolving method that automatic Evol-Instruct starts from."""
    return read_text("initial_method")


def operators(task: str) -> tuple[str, ...]:
    """The operators a task knows, in the order of its prompt file."""
    return tuple(load_template(task).choices["operator"])


def numbered(texts: Sequence[str]) -> str:
    """The texts as lines `1. text`, each flattened to one line (runs of blanks become one)."""
    return "\n".join(f"{number}. {flatten(text)}" for number, text in enumerate(texts, start=1))


def flatten(text: str) -> str:
    """The text on one line: every run of white space becomes one blank."""
    return one_line(text)


def dialogue(messages: Sequence[Message]) -> str:
    """A conversation as text, a heading line `### User` or `### Assistant` before each turn; "" for none."""
    turns = [f"### {role.capitalize()}\n" + _TURN.sub(r"\1\\\2", content) for role, content in messages]
    return "\n\n".join(turns)


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """The messages from which `dialogue` made this text.

    Raises:
        ValueError: a text that `dialogue` did not make.
    """
    if not text:
        return ()
    pieces = _TURN_HEADING.split(text)
    if pieces[0] or len(pieces) < 3:
        raise ValueError(f"dialogue: expected a heading line '### User' first, got {text[:40]!r}; use prompts.dialogue")
    contents = [piece.removesuffix("\n\n") for piece in pieces[2:-1:2]] + [pieces[-1]]
    return tuple(
        Message(role.lower(), _ESCAPED_TURN.sub(r"\1\2", content)) for role, content in zip(pieces[1::2], contents)
    )


def trajectory(cases: Sequence[tuple[Sequence[str], str]]) -> str:
    """Evolving cases as text, each a list of instructions by stage and the response that the last stage received.

    A case reads `Case N` (from 1), `Stage 0: original`, `Stage 1: ...`, `Response: ...`, every entry on one line.
    """
    blocks = []
    for number, (stages, response) in enumerate(cases, start=1):
        lines = [f"Stage {stage}: {flatten(text)}" for stage, text in enumerate(stages)]
        blocks.append("\n".join([f"Case {number}", *lines, f"Response: {flatten(response)}"]))
    return "\n\n".join(blocks)


def parse_trajectory(text: str) -> dict[int, tuple[list[str], str]]:
    """Case number -> (instructions by stage, response), from a text that `trajectory` made."""
    cases: dict[int, tuple[list[str], str]] = {}
    stages: list[str] = []
    for match in _STAGE.finditer(text):
        line, number, stage, response = match.groups()
        if number is not None:
            stages = []
            cases[int(number)] = (stages, "")
        elif line.startswith("Stage"):
            stages.append(stage)
        elif cases:
            last = max(cases)
            cases[last] = (cases[last][0], response)
    return cases


def _file(name: str):
    return resources.files("wizard_engine.agents").joinpath("prompts", f"{name}.txt")


def _read_choices(task: str, field: str) -> dict[str, str]:
    lines = read_text(f"{task}.{field}").splitlines()
    return {line.partition(":")[0]: line for line in lines}


def _choice(template: Template, name: str, value: str) -> str:
    choices = template.choices[name]
    if value not in choices:
        raise ValueError(f"{name} of prompt {template.task!r}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def _read_value(template: Template, name: str, value: str) -> str:
    if name not in template.choices:
        return _ESCAPED_HEADING.sub(r"\1\2", value) if "\\" in value else value
    choice = value.partition(":")[0]
    _choice(template, name, choice)
    return choice


def _escape(value: str) -> str:
    return _HEADING.sub(r"\1\\\2", value) if "#" in value or "＃" in value else value


def _expect(template: Template, text: str, position: int, index: int) -> int:
    """Position after literal `index`, which must stand at `position`."""
    literal = template.literals[index]
    if not text.startswith(literal, position):
        raise _mismatch(template, index)
    return position + len(literal)


def _mismatch(template: Template, index: int) -> ValueError:
    where = "start" if index == 0 else f"text after field {template.fields[index - 1]!r}"
    expected = template.literals[index].strip()[:40]
    return ValueError(
        f"prompt {template.task!r}: expected its {where} to be {expected!r}, got another text;"
        " make it with prompts.render"
    )
