"""The files of prompts: a header that is not sent, and the text of a prompt with its fields.

A file `TASK.txt` is

    task: judge
    required: instruction, answer_a, answer_b      fields that every prompt has
    optional: history, criteria, reference         fields whose section is left out where they are blank
    reader: read_scores                            the reader of replies, of `agents.replies`
    reply: [[7]] [[4.5]]                           a reply in the form that the text asks for; \\n is a line end
    ---
    what is asked for ...

    #Instruction#:
    {instruction}

    #Assessment#:

Each field is a line `{name}` of its own under a heading line; `{name:numbered}` numbers the lines of its content, `Step
1: ...`. A file `TASK.FIELD.txt`, or `FIELD.txt` for all tasks, lists the values that a field takes, each with its
meaning; lines that begin with a blank go on with it.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

TASKS = (
    "evolve",
    "compare",
    "diagnose",
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
_FIELD_LINE = re.compile(r"^\{(\w+)(:numbered)?\}$", re.MULTILINE)
_HEADING_LINE = re.compile(r"#[^#\n]+#:")
_HEADER_KEYS = ("task", "required", "optional", "reader", "reply")
_OTHERS = ("initial_method", "whole_prompt")


@dataclass(frozen=True)
class Section:
    """One field of a prompt: `intro` is what stands before its content, the heading line last."""

    name: str
    intro: str
    is_optional: bool = False
    is_numbered: bool = False


@dataclass(frozen=True)
class Template:
    """A prompt: the text before its sections, the sections, and the line after the last one.

    Attributes:
        choices: for a field with a fixed set of values, the text written for each value.
        header: what the file says of itself.
    """

    task: str
    opening: str
    sections: tuple[Section, ...]
    closing: str
    choices: dict[str, dict[str, str]]
    header: dict[str, str]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields, in the order of their sections."""
        return tuple(section.name for section in self.sections)

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the fields that every prompt has."""
        return tuple(section.name for section in self.sections if not section.is_optional)


@dataclass
class _Folder:
    """The folder whose files replace the built-in ones."""

    path: Path | None = field(default=None)


_FOLDER = _Folder()


def use_folder(path: Path | str | None) -> None:
    """Makes the prompt files of a folder replace the built-in ones of the same names; None for the built-in ones.

    A file needs no header; one that is there says nothing else than that of the built-in file.

    Raises:
        ValueError: no such folder, a file of another name, or one whose fields are not those of the file it replaces.
    """
    _FOLDER.path = None
    _forget()
    if path is None:
        return
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"prompts: expected a folder, got {path}; give one with files such as judge.txt")
    known = {file.name for file in resources.files("wizard_engine.agents").joinpath("prompts").iterdir()}
    names = sorted(file.name for file in path.glob("*.txt"))
    for name in [name for name in names if name not in known] or ([] if names else [""]):
        raise ValueError(
            f"{path / name}: expected a prompt file such as {', '.join(sorted(known)[:4])}, got none of these names; "
            "rename it to the file that it shall replace"
        )
    _FOLDER.path = path
    try:
        for task in TASKS:
            load_template(task)
    except ValueError:
        _FOLDER.path = None
        _forget()
        raise


def _forget() -> None:
    load_template.cache_clear()
    read_text.cache_clear()


@cache
def load_template(task: str) -> Template:
    """The template of a task, read once.

    Raises:
        ValueError: no such task, or a file of the user's folder that does not fit.
    """
    if task not in TASKS:
        raise ValueError(f"prompt task: expected one of {', '.join(TASKS)}, got {task!r}; choose one of them")
    builtin = _split(_builtin(task), f"{task}.txt", None)
    file = _replacing(task)
    template = builtin if file is None else _split(_read(file), str(file), builtin)
    choices = {name: found for name in template.fields if (found := _choices(task, name)) is not None}
    return Template(task, template.opening, template.sections, template.closing, choices, builtin.header)


@cache
def read_text(name: str) -> str:
    """The text of the file `NAME.txt` without its closing line break; that of the user's folder where it has one."""
    file = _replacing(name)
    return _builtin(name) if file is None else _read(file)


def _builtin(name: str) -> str:
    return _builtin_file(name).read_text(encoding="utf-8").rstrip("\n")


def _builtin_file(name: str):
    return resources.files("wizard_engine.agents").joinpath("prompts", f"{name}.txt")


def _replacing(name: str) -> Path | None:
    file = _FOLDER.path / f"{name}.txt" if _FOLDER.path is not None else None
    return file if file is not None and file.is_file() else None


def _read(file: Path) -> str:
    try:
        return "\n".join(file.read_text(encoding="utf-8").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got byte {error.start} that is none; save it as UTF-8") from error


def _split(text: str, where: str, builtin: Template | None) -> Template:
    """A template without its choices; what the header leaves open comes from the built-in one."""
    head, mark, body = text.partition("\n---\n")
    if not mark and builtin is None:
        raise ValueError(f"{where}: expected a header that ends with a line ---, got none; write one")
    header = _header(head, where) if mark else {}
    if builtin is not None:
        header = _same_header(header, builtin.header, where)
    required, optional = (tuple(filter(None, re.split(r",\s*", header[key]))) for key in ("required", "optional"))
    pieces = _FIELD_LINE.split(body if mark else text)
    names = pieces[1::3]
    _check_fields(names, required + optional, where)
    opening, _, first = pieces[0].rstrip("\n").rpartition("\n")
    intros = [first, *(piece.strip("\n") for piece in pieces[3:-1:3])]
    for name, intro in zip(names, intros):
        if not _HEADING_LINE.fullmatch(intro.rpartition("\n")[2]):
            raise ValueError(
                f"{where}: field {name}: expected a heading line such as #Text#: before it, got {intro[-40:]!r}"
            )
    if len(set(intros)) < len(intros):
        raise ValueError(f"{where}: expected headings that differ, got one twice; rename it")
    sections = tuple(
        Section(name, intro, name in optional, bool(numbered))
        for name, intro, numbered in zip(names, intros, pieces[2::3])
    )
    closing = pieces[-1].strip("\n")
    if not closing:
        raise ValueError(f"{where}: expected a line after the last field, such as #Reply#:, got none; add one")
    return Template(header["task"], opening.strip("\n"), sections, closing, {}, header)


def _header(text: str, where: str) -> dict[str, str]:
    pairs = [line.partition(":") for line in text.split("\n")]
    header = {key.strip(): value.strip() for key, _, value in pairs}
    if tuple(header) != _HEADER_KEYS:
        raise ValueError(f"{where}: header: expected the lines {', '.join(_HEADER_KEYS)}, got {', '.join(header)}")
    return header


def _same_header(header: dict[str, str], builtin: dict[str, str], where: str) -> dict[str, str]:
    for key in ("task", "required", "optional", "reader") if header else ():
        if sorted(re.split(r",\s*", header[key])) != sorted(re.split(r",\s*", builtin[key])):
            raise ValueError(
                f"{where}: {key}: expected {builtin[key] or 'nothing'}, got {header[key] or 'nothing'}; "
                "write what the built-in file says, or leave the header out"
            )
    return builtin


def _check_fields(names: list[str], expected: tuple[str, ...], where: str) -> None:
    for name in expected:
        if names.count(name) != 1:
            got = "none" if name not in names else str(names.count(name))
            raise ValueError(
                f"{where}: field {name}: expected one line {{{name}}} under a heading line, got {got}; "
                f"the fields are {', '.join(expected)}"
            )
    for name in names:
        if name not in expected:
            raise ValueError(f"{where}: field {name}: expected one of {', '.join(expected)}, got another; remove it")


def _choices(task: str, name: str) -> dict[str, str] | None:
    """The values of a field, each with its text, or None where the field takes any text."""
    for file in (f"{task}.{name}", name):
        if file not in _OTHERS and _builtin_file(file).is_file():
            choices = _read_choices(read_text(file))
            builtin = _read_choices(_builtin(file))
            missing = [value for value in builtin if value not in choices]
            if missing:
                raise ValueError(
                    f"{_replacing(file)}: expected a line for each of {', '.join(builtin)}, got none for "
                    f"{', '.join(missing)}; add `{missing[0]}: ...`"
                )
            return choices
    return None


def _read_choices(text: str) -> dict[str, str]:
    choices: dict[str, str] = {}
    name = ""
    for line in text.split("\n"):
        if line[:1].isspace() and name:
            choices[name] += f"\n{line.strip()}"
        elif line.strip():
            name = line.partition(":")[0]
            choices[name] = line
    return choices
