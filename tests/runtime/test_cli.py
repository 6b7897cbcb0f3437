"""Command lines: presets, overrides, nested options, errors."""

import contextlib
import enum
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wizard_engine.runtime import cli
from wizard_engine.runtime.launch import launch


class Order(enum.Enum):
    RANDOM = "random"
    EASY = "easy"


@dataclass(frozen=True)
class Data:
    on_error: str = "raise"
    """What to do with a bad row."""
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.on_error:
            raise ValueError("on_error: expected a word, got none; choose raise or skip")


@dataclass(frozen=True)
class Options:
    """A recipe."""

    data: Data = field(default_factory=Data)
    lr: float = 1e-3
    """Peak learning rate."""
    order: Order = Order.RANDOM
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}; choose one")


PRESETS = {"small": Options(lr=0.5), "large": Options(lr=0.25, data=Data("skip"))}


def test_cli_without_arguments_gives_the_defaults():
    assert cli.cli(Options, args=[]) == Options()


def test_cli_preset_is_the_default_and_options_override_it():
    got = cli.cli(Options, PRESETS, ["--preset", "large", "--max-steps", "7", "--data.files", "a", "b"])
    assert got == Options(lr=0.25, data=Data("skip", (Path("a"), Path("b"))), max_steps=7)
    assert cli.cli(Options, PRESETS, ["--lr=0.125", "--preset=small"]) == Options(lr=0.125)


@pytest.mark.parametrize(
    "arguments",
    [["--data.on-eror", "skip"], ["--data.on_eror=skip"], ["--lr", "1", "--data.onerror=skip"], ["--on-error", "skip"]],
)
def test_cli_unknown_option_exits_2_and_names_the_nearest(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.cli(Options, PRESETS, arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "nearest is --data.on-error" in error


@dataclass(frozen=True)
class Required:
    """A recipe with an option that has no default, and one that is typed under another name."""

    model: Path
    n: Annotated[int, tyro.conf.arg(name="limit")] = 3
    stats: bool = False


# Catches: a misspelt required option reported as missing alone; an option's own name taken for the typed one.
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--modle", "x"], "--modle: expected a known option, got an unknown one; the nearest is --model"),
        (["--limt", "3", "--no-stats"], "--limt: expected a known option, got an unknown one; the nearest is --limit"),
        (["--limit", "3"], "--model: required, and not given; see --help"),
        (["--model"], "--model: expected a path, got nothing; put it behind the option"),
    ],
)
def test_cli_misspelt_option_is_named_where_another_is_missing(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.cli(Required, args=arguments)
    assert stopped.value.code == 2 and text in capsys.readouterr().err
    assert cli.cli(Required, args=["--model", "x", "--limit", "5"]) == Required(Path("x"), 5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preset", "smal"], "nearest is small"),
        (["--preset"], "expected one of small, large"),
        (["--preset", "small", "--preset", "large"], "expected once"),
        (["stray"], "stray"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--lr"], "--lr: expected a number, got nothing; put it behind the option"),
        (["--order", "hard"], "--order: expected one of random, easy, got 'hard'"),
        (["--max-steps", "2.5"], "--max-steps: expected a whole number or None, got '2.5'"),
        (
            ["--lr", "3", "--max_steps=no", "--data.files", "a"],
            "--max-steps: expected a whole number or None, got 'no'",
        ),
        (["--lr=-1"], "error: lr: expected a positive number, got -1.0; choose one"),
        (["--data.on-error="], "error: data: on_error: expected a word, got none; choose raise or skip"),
    ],
)
def test_cli_bad_arguments_exit_2_and_say_why(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.cli(Options, PRESETS, arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@dataclass(frozen=True)
class Kinds:
    """Options of every kind."""

    n: int = 1
    x: float | None = None
    mode: Literal["a", "b"] = "a"
    shape: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    names: dict[str, float] = field(default_factory=dict)
    nested: Data = field(default_factory=Data)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return text == "None"
    return True


# Catches: tyro's boxes of several lines, and a control in the value that begins a line.
@settings(max_examples=50, deadline=None)
@given(option=st.sampled_from(["--n", "--x", "--mode", "--shape", "--betas", "--names"]), text=st.text(min_size=1))
def test_cli_value_of_a_wrong_kind_is_one_line_with_option_expected_and_got(option, text):
    assume(not text.startswith("-") and not is_number(text) and text not in ("a", "b"))
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as stopped:
        cli.cli(Kinds, args=[option, text])
    assert stopped.value.code == 2
    assert re.fullmatch(rf".*: error: {option}: expected .*, got {re.escape(repr(text))}\n", printed.getvalue())


def test_cli_help_shows_defaults_help_texts_and_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.cli(Options, PRESETS, ["--preset", "small", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in ("Peak learning rate. (default: 0.5)", "--data.on-error", "small, large", "{random,easy}"):
        assert expected in text


def test_option_names_are_the_ones_that_are_typed():
    assert cli.option_names(Options) == ["--data.on-error", "--data.files", "--lr", "--order", "--max-steps"]


def test_import_refuses_a_foreign_kernels_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(Path.cwd())!r}); import wizard_engine"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: kernels: expected this project's package" in done.stderr and "pip uninstall" in done.stderr


def test_version_is_that_of_the_package():
    import tomllib

    import wizard_engine

    root = Path(wizard_engine.__file__).parents[1]
    assert wizard_engine.__version__ == tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What recipes share."""

    seed: int = 0
    out: str


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    """A recipe."""

    steps: int = 1
    data: str


def test_help_shows_what_must_be_given_then_a_recipes_own_options(capsys):
    assert cli.option_names(Own) == ["--seed", "--out", "--steps", "--data"]
    assert cli.cli(Own, args=["--data", "d", "--out", "o", "--seed", "3"]) == Own(data="d", out="o", seed=3)
    assert cli.option_names(Own) == ["--data", "--out", "--steps", "--seed"]


def test_help_that_nobody_reads_ends_quietly(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help"])
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            launch(lambda cfg: None, Options)
    assert ended.value.code == 0
    assert capfd.readouterr().err == ""
