"""Prompt templates that programs can parse, too: `parse` is the exact inverse of `render`.

The templates are files, see `prompt_files`. Lines of a field's content that look like a heading of a prompt get a
backslash in front, so no content ends its own section. A line is what `runtime.text_lines` calls one, and blanks or
invisible marks before a heading do not hide it. The section of an optional field is left out where the field is blank.
An evolving method that is a whole prompt (see `is_whole_prompt`) takes the place of the template's opening.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from wizard_engine.data.records import Message
from wizard_engine.data.references import reference_of
from wizard_engine.runtime.text_lines import LINE_END, LINE_ENDS, LINE_START, one_line

from .prompt_files import TASKS, Section, Template, load_template, read_text, use_folder

__all__ = ["TASKS", "Section", "Template", "load_template", "read_text", "reference_of", "use_folder"]

# Words of categories and skills that have criteria of their own.
_KINDS = {
    kind: re.compile(rf"\b(?:{words})", re.IGNORECASE)
    for kind, words in {
        "coding": "cod(?:e|ing)\\b|program|debug|sql\\b|software",
        "math": "math|additive|multiplicative|division|arithmetic|algebra|geometry|addition|subtraction"
        "|multiplication|calculus|probability|statistics",
        "agent": "agent|tool|function.call|planning\\b|web.?(?:brows|search)",
        "multilingual": "translat|multilingual",
        "reasoning": "reason|logic|stem\\b|inference|riddle|puzzle",
        "writing": "writ|roleplay|humanities|editing|summari|story|poem|email|essay|brainstorm",
    }.items()
}
ROLES = ("system", "user", "assistant")

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


def render(task: str, **fields: str) -> str:
    """The prompt of a task: its template with the fields filled in, without the sections of optional ones left blank.

    Raises:
        ValueError: unknown task, a required field missing, a field too many, or a value that is not among its choices.
    """
    template = load_template(task)
    if not set(template.required) <= set(fields) <= set(template.fields):
        raise ValueError(
            f"fields of prompt {task!r}: expected {_described(template)}, got {', '.join(sorted(fields))};"
            " give each required one once, blank where there is nothing to say"
        )
    if task == "evolve" and is_whole_prompt(fields.get("method", "")):
        template = _with_opening(template, _escaped(fields["method"]))
    pieces = [template.opening]
    for section in template.sections:
        value = fields.get(section.name, "")
        if value.strip() or not section.is_optional:
            pieces += ("\n\n", section.intro, "\n", _written(template, section, value))
    return "".join([*pieces, "\n\n", template.closing])


def _described(template: Template) -> str:
    optional = [name for name in template.fields if name not in template.required]
    return ", ".join(template.required) + (f" and perhaps {', '.join(optional)}" if optional else "")


def parse(task: str, text: str) -> dict[str, str]:
    """The fields from which `render(task, ...)` made this text; "" for those whose sections were left out.

    Raises:
        ValueError: unknown task, or a text that the task's template did not make.
    """
    template = load_template(task)
    method = _opening_method(template, text) if task == "evolve" else ""
    template = _with_opening(template, _escaped(method)) if method else template
    marks = [f"\n\n{section.intro}\n" for section in template.sections]
    closing = f"\n\n{template.closing}"
    last = len(text) - len(closing)
    if not text.startswith(template.opening):
        raise _mismatch(template, "start", template.opening)
    position = len(template.opening)
    if not text.endswith(closing) or last < position:
        raise _mismatch(template, "end", template.closing)
    values = {}
    for index, section in enumerate(template.sections):
        values[section.name] = ""
        if text.startswith(marks[index], position):
            begin = position + len(marks[index])
            ends = [end for mark in marks[index + 1 :] if (end := text.find(mark, begin)) >= 0]
            position = min(ends, default=last)
            if position < begin:
                raise _mismatch(template, f"text of field {section.name!r}", section.intro)
            values[section.name] = _read_value(template, section, text[begin:position])
        elif not section.is_optional:
            raise _mismatch(template, f"text before field {section.name!r}", section.intro)
    if position != last:
        raise _mismatch(template, "end", template.closing)
    return values | ({"method": method} if method else {})


def request_messages(task: str, **fields: str) -> tuple[Message, ...]:
    """The messages of a request: one user turn holding the rendered prompt."""
    return (Message("user", render(task, **fields)),)


def initial_method() -> str:
    """The evolving method that automatic Evol-Instruct starts from, where the method is a section of the prompt."""
    return read_text("initial_method")


def whole_prompt() -> str:
    """The evolving method that automatic Evol-Instruct starts from, where the method is the whole prompt.

    Source: Zeng et al. 2024, arXiv:2406.00770, the initial evolving method.
    """
    return read_text("whole_prompt")


def is_whole_prompt(method: str) -> bool:
    """Whether an evolving method is a whole prompt: it names the line that the reply has to begin with."""
    return load_template("evolve").closing in method


def _with_opening(template: Template, opening: str) -> Template:
    """The template of an evolving prompt with a method in the place of its opening and no section for it."""
    others = tuple(section for section in template.sections if section.name != "method")
    return replace(template, opening=opening, sections=others)


def _opening_method(template: Template, text: str) -> str:
    """The method in the place of the opening of an evolving prompt, "" where the opening is the template's."""
    first = next(section for section in template.sections if section.name != "method")
    opening, mark, _ = text.partition(f"\n\n{first.intro}\n")
    method = _unescaped(opening)
    return method if mark and opening != template.opening and is_whole_prompt(method) else ""


def operators(task: str) -> tuple[str, ...]:
    """The operators a task knows, in the order of its prompt file."""
    return tuple(load_template(task).choices["operator"])


def criteria_of(attributes: Mapping[str, Any] | None) -> str:
    """The kind of criteria for a row: by its category, else its skill, else its language; "" for general ones."""
    attributes = attributes or {}
    for name in ("category", "skill"):
        value = attributes.get(name)
        words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
        for kind, pattern in _KINDS.items():
            if pattern.search(words):
                return kind
    language = attributes.get("language")
    return "multilingual" if isinstance(language, str) and language not in ("", "en", "und") else ""


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


def trajectory(cases: Sequence[tuple[Sequence[str], str]], checks: Sequence[str] = ()) -> str:
    """Evolving cases as text, each a list of instructions by stage and the response that the last stage received.

    A case reads `Case N` (from 1), `Stage 0: original`, `Stage 1: ...`, `Response: ...`, every entry on one line, and
    `Check: ...` with what was found about it.

    Args:
        checks: of each case, "" where nothing was found; none for no such lines.
    """
    blocks = []
    for number, (stages, response) in enumerate(cases, start=1):
        lines = [f"Stage {stage}: {flatten(text)}" for stage, text in enumerate(stages)]
        lines += [f"Response: {flatten(response)}"]
        lines += [f"Check: {flatten(check)}" for check in checks[number - 1 : number] if check]
        blocks.append("\n".join([f"Case {number}", *lines]))
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


def _written(template: Template, section: Section, value: str) -> str:
    """A field's content as it stands in a prompt."""
    if section.name in template.choices:
        return _choice(template, section.name, value)
    value = _escaped(value)
    return _numbered_steps(value) if section.is_numbered else value


def _escaped(value: str) -> str:
    """The content of a field with a backslash before what looks like a heading."""
    return _HEADING.sub(r"\1\\\2", value) if "#" in value or "＃" in value else value


def _unescaped(value: str) -> str:
    return _ESCAPED_HEADING.sub(r"\1\2", value) if "\\" in value else value


def _choice(template: Template, name: str, value: str) -> str:
    choices = template.choices[name]
    if value not in choices:
        raise ValueError(f"{name} of prompt {template.task!r}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def _read_value(template: Template, section: Section, value: str) -> str:
    if section.name in template.choices:
        choice = value.partition(":")[0]
        if _choice(template, section.name, choice) != value:
            raise _mismatch(template, f"field {section.name!r}", template.choices[section.name][choice])
        return choice
    value = _without_numbers(template, section, value) if section.is_numbered else value
    return _unescaped(value)


def _numbered_steps(text: str) -> str:
    """The text with `Step N: ` before each line that is not blank."""
    number, lines = 0, []
    for line in text.split("\n"):
        number += bool(line.strip())
        lines.append(f"Step {number}: {line}" if line.strip() else line)
    return "\n".join(lines)


def _without_numbers(template: Template, section: Section, text: str) -> str:
    number, lines = 0, []
    for line in text.split("\n"):
        number += bool(line.strip())
        prefix = f"Step {number}: " if line.strip() else ""
        if not line.startswith(prefix):
            raise _mismatch(template, f"field {section.name!r}", prefix)
        lines.append(line[len(prefix) :])
    return "\n".join(lines)


def _mismatch(template: Template, where: str, expected: str) -> ValueError:
    return ValueError(
        f"prompt {template.task!r}: expected its {where} to be {expected.strip()[:40]!r}, got another text;"
        " make it with prompts.render"
    )
