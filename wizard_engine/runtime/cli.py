"""Command-line options from frozen dataclasses: presets, overrides, and errors that name the nearest option."""

import contextlib
import dataclasses
import difflib
import enum
import io
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from .ranges import RangeError, check_options, checked_later

Config = TypeVar("Config")

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    types.NoneType: "None",
}


def cli(config: type[Config], presets: Mapping[str, Config] | None = None, args: Sequence[str] | None = None) -> Config:
    """Instance of `config` with the values of the command line.

    Every field is an option with its default in --help (the field's docstring is the help text); a field that is itself
    a dataclass gives dotted options such as --data.on-error. `--preset NAME` picks the instance whose values are the
    defaults; without it they are those of the class.

    Args:
        config: a frozen dataclass.
        presets: name -> instance.
        args: the arguments after the program's name; None takes them from the command line.
    Raises:
        SystemExit: code 2 after an error on stderr: unknown option (the nearest is named), unknown preset, bad or
            absent value; or a ValueError of the dataclass itself. Code 0 after --help.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _own_options_first(config)
    default = _take_preset(arguments, dict(presets or {}))
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), checked_later():
            value, unknown = tyro.cli(
                config,
                prog=Path(sys.argv[0]).name,
                description=_description(config, presets),
                args=arguments,
                return_unknown_args=True,
                config=(tyro.conf.EnumChoicesFromValues,),
                **keywords,
            )
    except ValueError as error:
        _fail(str(error))
    except SystemExit:
        # A misspelt required option is also reported as missing: name the misspelt one instead.
        if "Unrecognized options" in printed.getvalue():
            typed = [argument for argument in arguments if argument.startswith("--")]
            unknown = [argument for argument in typed if not _is_option(argument, option_names(config))]
            if unknown:
                _fail(_unknown_message(config, unknown))
        if message := _refusal(config, arguments, printed.getvalue()):
            _fail(message)
        sys.stderr.write(printed.getvalue())
        raise
    if unknown:
        _fail(_unknown_message(config, unknown))
    try:
        check_options(value)
    except RangeError as error:
        typed = dict(zip(_field_paths(config), option_names(config)))
        _fail(f"{typed[error.option]}: {error.reason}")
    return value


def _own_options_first(config: type) -> None:
    """Order the fields as --help shall show them: those that must be given, the class's own, those of its bases."""
    fields = config.__dataclass_fields__
    by_class = [name for base in config.__mro__ for name in vars(base).get("__annotations__", {}) if name in fields]
    absent = dataclasses.MISSING
    required = [name for name in by_class if fields[name].default is fields[name].default_factory is absent]
    config.__dataclass_fields__ = {name: fields[name] for name in dict.fromkeys([*required, *by_class])}


def _take_preset(arguments: list[str], presets: dict[str, Config]) -> Config | None:
    """The instance that --preset names, or None without the option; removes the option from `arguments`."""
    positions = [
        i
        for i, argument in enumerate(arguments)
        if presets and (argument == "--preset" or argument.startswith("--preset="))
    ]
    if not positions:
        return None
    if len(positions) > 1:
        _fail("--preset: expected once, got it twice; keep one")
    at = positions[0]
    option, sign, name = arguments.pop(at).partition("=")
    if not sign:
        name = arguments.pop(at) if at < len(arguments) else ""
    if name not in presets:
        _fail(f"{option}: expected one of {', '.join(presets)}, got {name!r}{_nearest(name, list(presets))}")
    return presets[name]


def _description(config: type, presets: Mapping[str, Any] | None) -> str:
    text = (config.__doc__ or "").strip()
    return text + (f"\n\n--preset NAME picks the defaults: {', '.join(presets)}." if presets else "")


def option_names(config: type, prefix: str = "--") -> list[str]:
    """Every option of a dataclass as the user types it, `--data.on-error` for a nested field."""
    hints, annotated = typing.get_type_hints(config), typing.get_type_hints(config, include_extras=True)
    names = []
    for field in dataclasses.fields(config):
        aliases = [getattr(x, "name", None) for x in getattr(annotated[field.name], "__metadata__", ())]
        name = prefix + next(filter(None, aliases), field.name.replace("_", "-"))
        nested = _nested_dataclass(hints[field.name])
        names += option_names(nested, name + ".") if nested else [name]
    return names


def _field_paths(config: type, prefix: str = "") -> list[str]:
    """The fields of the options, in the order of `option_names`: `data.on_error`."""
    hints, paths = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        nested = _nested_dataclass(hints[field.name])
        paths += _field_paths(nested, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return paths


def _field_hints(config: type) -> list[Any]:
    """The types of the options, in the order of `option_names`."""
    hints, types_in_order = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        nested = _nested_dataclass(hints[field.name])
        types_in_order += _field_hints(nested) if nested else [hints[field.name]]
    return types_in_order


def _is_option(argument: str, names: Sequence[str]) -> bool:
    """Whether an argument is one of the options, also with =VALUE, with underscores, or with the `no-` of a switch."""
    name = argument.partition("=")[0].replace("_", "-")
    return name in (*names, "--help") or name.replace("no-", "", 1) in names


def _nested_dataclass(hint: Any) -> type | None:
    """The dataclass of a type hint, also of an optional one; None for other hints."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _refusal(config: type, arguments: Sequence[str], printed: str) -> str:
    """What tyro printed in a box of several lines, as one line; "" where it is none of the known boxes."""
    if "Missing from" in printed:
        required = re.findall(r"^[│ ] {5}(--[\w.-]*\w)", printed, re.MULTILINE)
        return f"{', '.join(required)}: required, and not given; see --help" if required else ""
    text, kinds = _first_section(printed), dict(zip(option_names(config), _field_hints(config)))
    named = re.search(r"^Error parsing (--[\w.-]+):|argument '(--[\w.-]+)'", text)
    option = named and (named[1] or named[2])
    if option in kinds:
        values = _values_of(option, arguments)
        got = ", ".join(map(repr, values)) if values else "nothing; put it behind the option"
        return f"{option}: expected {_kind(kinds[option])}, got {got}"
    # A ValueError of the dataclass, or of one in it.
    own = re.search(r"^Error parsing ([\w.-]+): (.+)", text)
    return "" if own is None else own[2] if own[1] == config.__name__ else f"{own[1]}: {own[2]}"


def _first_section(printed: str) -> str:
    """The text of a box between its title and its first rule, on one line."""
    words: list[str] = []
    # A value may hold other line ends.
    for line in printed.split("\n")[1:]:
        line = line.strip("│ ")
        if line.strip("─-"):
            words.append(line)
        elif words:
            break
    return " ".join(words)


def _values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """What stands behind the last use of an option."""
    values: list[str] = []
    is_behind = False
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name.replace("_", "-") == option:
            values, is_behind = [value] if sign else [], not sign
        elif argument.startswith("--"):
            is_behind = False
        elif is_behind:
            values.append(argument)
    return values


def _kind(hint: Any) -> str:
    """A type hint in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return f"one of {', '.join(map(str, args or [item.value for item in hint]))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_kind, args))
    if origin in (tuple, list, dict):
        return f"values, each of them {' and '.join(_kind(arg) for arg in dict.fromkeys(args) if arg is not ...)}"
    return KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _unknown_message(config: type, unknown: Sequence[str]) -> str:
    names = [*option_names(config), "--help", "--preset"]
    option = next((argument for argument in unknown if argument.startswith("-")), None)
    if option is None:
        return f"{' '.join(unknown)}: expected options only, got words without an option; see --help"
    typed = option.partition("=")[0]
    return f"{typed}: expected a known option, got an unknown one{_nearest(typed.replace('_', '-'), names)}"


def _nearest(argument: str, names: Sequence[str]) -> str:
    """What to say of a mistyped option: the option of that name in a group, else the most similar one, if any is."""
    in_group = [name for name in names if name.rpartition(".")[2] == argument.lstrip("-")]
    close = in_group[:1] or difflib.get_close_matches(argument, names, n=1)
    return f"; the nearest is {close[0]}" if close else "; see --help"


def _fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
