"""Options of dataclasses out of tables, as a run file has them, and back into the words of a command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .ranges import RangeError

C = TypeVar("C")


def with_table(config: C, table: Mapping[str, Any], where: str) -> C:
    """A configuration with the values of a table, whose keys are the options' names; a table in it is a group.

    Args:
        config: an instance of a dataclass.
        where: the table's place, which errors begin with: "run.toml: sft".
    Raises:
        ValueError: an unknown name (the nearest is named), a value of another kind, or one outside its range.
    """
    hints, names = typing.get_type_hints(type(config)), option_fields(type(config))
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = names.get(key.replace("_", "-"))
        if name is None:
            close = _in_group(config, key) or nearest(key, names)
            raise ValueError(f"{where}.{key}: expected a known option, got an unknown one{close}")
        present = getattr(config, name)
        if dataclasses.is_dataclass(present):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}.{key}: expected a table of options, got {value!r}")
            values[name] = with_table(present, value, f"{where}.{key}")
        else:
            values[name] = convert(hints[name], value, f"{where}.{key}")
    try:
        return dataclasses.replace(config, **values)
    except RangeError as error:
        option = next(option for option, name in names.items() if name == error.option)
        raise ValueError(f"{where}.{option}: {error.reason}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def option_fields(config: type) -> dict[str, str]:
    """Option, as it is typed without the dashes in front, -> field of a dataclass."""
    annotated = typing.get_type_hints(config, include_extras=True)
    names = {}
    for field in dataclasses.fields(config):
        aliases = [getattr(x, "name", None) for x in getattr(annotated[field.name], "__metadata__", ())]
        names[next(filter(None, aliases), field.name.replace("_", "-"))] = field.name
    return names


def _in_group(config: Any, key: str) -> str:
    """What an error says of an option that stands in a group of these options; "" where none has it."""
    for option, name in option_fields(type(config)).items():
        group = getattr(config, name)
        if dataclasses.is_dataclass(group) and key.replace("_", "-") in option_fields(type(group)):
            return f"; the nearest is {option}.{key}"
    return ""


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What an error says of a mistyped word."""
    close = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else f"; expected one of {', '.join(known)}"


def convert(hint: Any, value: Any, where: str) -> Any:
    """A value of a table as the type of a field; "none" is None where the type has it.

    Raises:
        ValueError: of another kind.
    """
    for arm in _arms(hint):
        converted = _as(arm, value, where)
        if converted is not _OTHER:
            return converted
    raise ValueError(f"{where}: expected {' or '.join(map(_kind, _arms(hint)))}, got {value!r}")


_OTHER = object()
# Type -> the types of a table's values that it takes, and their name in errors.
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    Path: ((str, Path), "a path"),
}


def _arms(hint: Any) -> list[Any]:
    """The types of a union, None and closed sets of values first: free text takes every text."""
    arms = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    return sorted(arms, key=lambda arm: (arm is not types.NoneType, typing.get_origin(arm) is not typing.Literal))


def _as(arm: Any, value: Any, where: str) -> Any:
    """A value as a type that is no union, _OTHER where it is of another kind."""
    origin, args = typing.get_origin(arm), typing.get_args(arm)
    if arm is types.NoneType:
        return None if value in ("none", "None") else _OTHER
    if origin is typing.Literal:
        return value if value in args else _OTHER
    if origin in (tuple, list):
        items = value if isinstance(value, list | tuple) else [value]
        kinds = [args[0]] * len(items) if args[-1] is ... or origin is list else args
        if len(kinds) != len(items):
            raise ValueError(f"{where}: expected {len(kinds)} values, got {len(items)}")
        return origin(convert(kind, item, where) for kind, item in zip(kinds, items, strict=True))
    taken = _PLAIN.get(arm, ((), ""))[0]
    if not isinstance(value, taken) or (isinstance(value, bool) and arm is not bool):
        return _OTHER
    return arm(value)


def _kind(arm: Any) -> str:
    origin, args = typing.get_origin(arm), typing.get_args(arm)
    if arm is types.NoneType:
        return '"none"'
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (tuple, list):
        return f"a list, each value {' or '.join(map(_kind, _arms(args[0])))}"
    return _PLAIN[arm][1] if arm in _PLAIN else getattr(arm, "__name__", str(arm))


def command_words(config: Any) -> list[str]:
    """The words that `cli` makes this configuration of: every option that is not the default of its class."""
    return _words(config, _defaults(type(config)), "")


def _words(config: Any, defaults: Mapping[str, Any], prefix: str) -> list[str]:
    words = []
    for option, name in option_fields(type(config)).items():
        value, default = getattr(config, name), defaults.get(name, _OTHER)
        if dataclasses.is_dataclass(value):
            known = _defaults(type(value)) if default is _OTHER else _values(default)
            words += _words(value, known, f"{prefix}{option}.")
        elif default is _OTHER or value != default:
            words += _option(prefix, option, value)
    return words


def _option(prefix: str, option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{prefix}{'' if value else 'no-'}{option}"]
    if isinstance(value, tuple | list):
        return [f"--{prefix}{option}", *map(_text, value)]
    text = _text(value)
    return [f"--{prefix}{option}={text}"] if text.startswith("-") else [f"--{prefix}{option}", text]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _defaults(config: type) -> dict[str, Any]:
    """Field -> default of a dataclass, without those that must be given."""
    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
