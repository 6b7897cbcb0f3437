"""Every command in README, CONTRIBUTING, docs and docstrings: parsed by the real parsers, and run where a page says so.

A command line of a recipe or benchmark runs as `__main__` up to the point at which its options are read. So an option
that was renamed, or is not there, fails here. Commands behind `<!-- run -->` are run to their end.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import get_args_parser

from benchmarks import standin
from recipes import sft

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "sh", "bash", "console")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN_MARK = "<!-- run -->\n"
# Programs whose command lines are not this project's.
OTHERS = ("cd", ".", "git", "ncu", "nsys", "curl", "lm_eval", "pip", "make", "pytest")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class Command(NamedTuple):
    """A command, its page and line, and whether it is to be run to its end."""

    page: str
    line: int
    text: str
    runs: bool = False

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}: {self.text}"


class Parsed(BaseException):
    """Raised in the place of the work that follows the options."""


def commands_of(path: Path) -> Iterator[Command]:
    """Commands of a page: lines of its shell blocks, and code in its text that begins like one."""
    text, page = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    for block in FENCE.finditer(text):
        if block[1] not in SHELL:
            continue
        first = text.count("\n", 0, block.start()) + 2
        is_console = any(line.startswith("$ ") for line in block[2].splitlines())
        is_run = text[: block.start()].endswith(RUN_MARK)
        joined, start = "", first
        for number, line in enumerate(block[2].splitlines(), first):
            if is_console and not joined and not line.startswith("$ "):
                continue
            start = start if joined else number
            joined += line.removeprefix("$ ") if is_console else line
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            for command in joined.split(" && "):
                # A line that only sets a variable says nothing that could be wrong.
                if not all(re.fullmatch(r"\w+=.*", argument) for argument in shlex.split(command, comments=True)):
                    yield Command(page, start, command.strip(), is_run)
            joined = ""
    plain = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for code in re.finditer(r"`((?:python -m |python recipes/|torchrun |make )[^`]*)`", plain):
        yield Command(page, plain.count("\n", 0, code.start()) + 1, code[1])


COMMANDS = [command for path in PAGES for command in commands_of(path)]
PYTHON_COMMANDS = [c for c in COMMANDS if re.match(r"(\w+=\S+ )*(python3?|torchrun|ncu|nsys)\b", c.text)]


def commands_of_docstring(path: Path) -> Iterator[Command]:
    """Commands of a module's docstring: lines that begin like one, up to two spaces or a comment."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for line in re.sub(r"\\\n\s*", "", docstring).splitlines():
        command = re.match(r"\s*((?:\w+=\S+ )*(?:python|torchrun) .*)", line)
        if command:
            yield Command(str(path.relative_to(ROOT)), 1, re.split(r"\s{2,}(?![\s-])|\s#|, python", command[1])[0])


@contextlib.contextmanager
def as_main(arguments: list[str]) -> Iterator[None]:
    """In the block, these arguments are the process's command line."""
    before, main = sys.argv, sys.modules["__main__"]
    sys.argv = arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.argv, sys.modules["__main__"] = before, main


def run_python(arguments: list[str]) -> None:
    """Run `python ARGUMENTS` in this process."""
    if arguments[0] == "-m":
        with as_main(arguments[1:]):
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=False)
    else:
        with as_main(arguments):
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def python_arguments(text: str) -> list[str]:
    """The arguments that Python receives from a python or torchrun command, with or without a profiler in front."""
    arguments = shlex.split(text, comments=True)
    while arguments and re.fullmatch(r"\w+=.*", arguments[0]):
        arguments.pop(0)
    if arguments[0] in ("ncu", "nsys"):
        arguments = arguments[next(i for i, argument in enumerate(arguments) if argument in ("python", "torchrun")) :]
    if arguments[-1] == "...":
        arguments.pop()
    if arguments[0] != "torchrun":
        return arguments[1:]
    if len(arguments) == 1 or not any("recipes/" in argument or argument == "-m" for argument in arguments):
        launcher_options([*arguments[1:], "script.py"])
        return []
    options = launcher_options(arguments[1:])
    return [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]


def launcher_options(arguments: list[str]) -> argparse.Namespace:
    """torchrun's own options among its arguments."""
    options, unknown = get_args_parser().parse_known_args(arguments)
    assert not unknown, f"torchrun: unknown {unknown}"
    return options


@pytest.fixture
def stops_after_options(monkeypatch):
    """Whatever reads a command line raises Parsed once the options are read."""
    cli, parse_args = sft.launch.__globals__["cli"], argparse.ArgumentParser.parse_args

    def read_dataclass(*args, **kwargs):
        cli(*args, **kwargs)
        raise Parsed

    def read_arguments(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    for module in list(sys.modules.values()):
        if getattr(module, "cli", None) is cli:
            monkeypatch.setattr(module, "cli", read_dataclass)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_arguments)
    # gpu-check puts its stand-in in place before it reads the rest.
    monkeypatch.setattr(standin, "install", lambda: None)


def parse(arguments: list[str]) -> None:
    """Let the real parser read the arguments; AssertionError with its message where it refuses them."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_python(arguments)
    except Parsed:
        return
    except SystemExit as end:
        assert end.code in (0, None), errors.getvalue()
        return
    raise AssertionError("expected a command line that is read by cli() or argparse, got none")


def test_page_scan_covers_every_page_with_commands():
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "docs/gpu.md", "docs/getting_started.md", "docs/recipes/rleif.md"} <= pages
    assert len(PYTHON_COMMANDS) > 80


def refused(commands: Iterator[Command]) -> list[str]:
    """Commands that their parsers refuse, and what these say."""
    wrong = []
    for command in commands:
        if "--tokeniser" in command.text:
            continue  # shows what a wrong option gives
        try:
            arguments = python_arguments(command.text)
            if arguments[:1] == ["-c"]:
                compile(arguments[1], command.place, "exec")
            elif arguments[:2] == ["-m", "venv"] or arguments[:2] == ["-m", "pytest"] or not arguments:
                assert all((ROOT / argument).exists() for argument in arguments[2:] if argument.startswith("tests/")), (
                    "no such test"
                )
            elif len(arguments) > 1 or arguments[0].startswith("recipes/"):
                if len(arguments) == 1 or arguments[-1] == arguments[1] == command.text.split()[-1]:
                    arguments = [*arguments, "--help"]  # named without options
                parse(arguments)
        except (AssertionError, SystemExit) as error:
            wrong.append(f"{command.place}\n    {error}")
    return wrong


@pytest.mark.parametrize("page", sorted({command.page for command in PYTHON_COMMANDS}))
def test_options_in_documents_are_those_of_the_parsers(page, stops_after_options):
    wrong = refused(c for c in PYTHON_COMMANDS if c.page == page)
    assert not wrong, "\n".join(wrong)


def test_options_in_docstrings_are_those_of_the_parsers(stops_after_options):
    paths = [
        path for folder in ("recipes", "benchmarks", "wizard_engine") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    commands = [command for path in paths for command in commands_of_docstring(path)]
    assert len(commands) > 60
    wrong = refused(commands)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "arguments", [["recipes/sft.py", "--tokeniser", "x"], ["-m", "benchmarks.tune", "--budge", "3"]]
)
def test_unknown_options_are_detected(arguments, stops_after_options):
    with pytest.raises(AssertionError, match=r"the nearest is --(tokenizer|budget)"):
        parse(arguments)


def test_the_wrong_option_in_readme_prints_what_readme_says(stops_after_options):
    command = next(c for c in COMMANDS if "--tokeniser" in c.text)
    with pytest.raises(AssertionError) as refused:
        parse(python_arguments(command.text))
    assert str(refused.value).splitlines()[0].removeprefix("AssertionError: ") in (ROOT / "README.md").read_text()


def recipe_options(name: str) -> set[str]:
    """Options of a recipe as they are typed."""
    names = sft.launch.__globals__["cli"].__globals__["option_names"]
    return {*names(importlib.import_module(f"recipes.{name}").Config), "--help", "--preset"}


def named_options(path: Path) -> set[str]:
    """Options that a page's text names in code, `--a.b`, without their values."""
    plain = FENCE.sub("", path.read_text(encoding="utf-8"))
    is_command = re.compile(r"(python3?|torchrun|ncu|nsys|pip|env) ").match
    return {
        match[1].rstrip(".")
        for code in re.findall(r"`([^`]+)`", plain)
        if not is_command(code)
        for match in re.finditer(r"(?:^|(?<=\s))(--[a-z][\w.-]*)", code)
    }


def is_option(option: str, known: set[str]) -> bool:
    """Whether it is one of them, their `no-` form, or the beginning of a group."""
    positive = option.replace("--no-", "--").replace(".no-", ".")
    return option in known or positive in known or any(name.startswith(option + ".") for name in known)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/recipes").glob("[!i]*.md")), ids=lambda path: path.stem)
def test_options_in_the_text_of_a_recipes_page_belong_to_the_recipe(path):
    known = recipe_options(path.stem) | {"--tp", "--nproc-per-node"}
    assert [option for option in named_options(path) if not is_option(option, known)] == []


def test_options_in_the_text_of_other_pages_are_some_commands(capsys):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    for arguments in (
        ["-m", "wizard_engine", "plan"],
        ["-m", "wizard_engine", "ledger"],
        ["-m", "wizard_engine", "new-run"],
        ["-m", "benchmarks.train_step"],
    ):
        with contextlib.suppress(SystemExit):
            run_python([*arguments, "--help"])
    known = set(re.findall(r'"(--[a-z][\w-]*)"', sources)) | set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    known = known.union(*(recipe_options(path.stem) for path in (ROOT / "recipes").glob("[!_]*.py")))
    for path in (path for path in PAGES if path.parent.name != "recipes" or path.stem == "index"):
        assert [option for option in named_options(path) if not is_option(option, known)] == [], path


def check_make(arguments: list[str]) -> None:
    """Targets and variables of a make command are the Makefile's; arguments of gpu-check are its parser's."""
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if not sign:
            assert re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE), f"no target {name}"
            continue
        assert f"$({name})" in MAKEFILE, f"no variable {name}"
        if name == "ARGS":
            parse(["-m", "benchmarks.gpu_check", *shlex.split(value)])


def check_other(arguments: list[str]) -> None:
    """A command of another program, as far as it says something of this project."""
    program, *rest = arguments
    assert program in OTHERS, f"expected one of {', '.join(OTHERS)}, got {program}"
    if program == "make":
        check_make(rest)
    elif program == "pip" and "-e" in rest:
        extras = re.fullmatch(r"\.\[(.*)\]", rest[rest.index("-e") + 1])
        assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), f"no such extra in {extras[1]}"
    elif program == "curl":
        json.loads(rest[rest.index("-d") + 1])
    elif program == "pytest":
        assert all((ROOT / argument).exists() for argument in rest if "/" in argument), f"no such test in {rest}"


def test_other_commands_name_what_is_there(stops_after_options):
    wrong = []
    for command in (c for c in COMMANDS if c not in PYTHON_COMMANDS):
        arguments = shlex.split(command.text, comments=True)
        while re.fullmatch(r"\w+=.*", arguments[0]):
            arguments.pop(0)
        try:
            check_other(arguments)
        except (AssertionError, ValueError) as error:
            wrong.append(f"{command.place}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_commands_that_a_page_marks_are_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    marked = [command for command in COMMANDS if command.runs]
    assert len(marked) >= 6
    for command in marked:
        arguments = python_arguments(command.text)
        quiet = [] if "chat.py" in arguments[0] else ["--quiet"]
        try:
            run_python([*arguments, *quiet])
        except SystemExit as end:
            assert end.code in (0, None), f"{command.place}\n{capsys.readouterr().err}"
        out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
        assert out is None or (out / "stage.json").is_file(), f"{command.place}\n{capsys.readouterr().err}"
    assert json.loads((tmp_path / "runs/accuracy/accuracy.json").read_text())["total"] == 20


def test_the_planner_says_what_the_page_says(capsys):
    with pytest.raises(SystemExit) as end:
        run_python(["-m", "wizard_engine", "plan", "--preset", "70b", "--gpus", "32", "--no-simulate"])
    assert end.value.code == 0
    best = next(line for line in capsys.readouterr().out.splitlines() if "recompute=" in line)
    assert "dp_shard=16,tp=2,recompute=selective" in best and "73.2" in best


def test_names_of_the_launcher_are_where_recipes_take_them():
    assert importlib.import_module(sft.launch.__module__).launch is sft.launch
