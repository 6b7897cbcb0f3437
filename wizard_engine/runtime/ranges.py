"""Ranges of numeric options: said in --help, and checked whenever a configuration is made, also in Python.

An option is written `lr: LearningRate[float] = 2e-5`, `max_steps: Count[int | None] = None`, in a dataclass that
inherits from `Checked`.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")
LARGEST = 2**63 - 1
_later: ContextVar[bool] = ContextVar("_later", default=False)


class RangeError(ValueError):
    """A value outside its range; `option` is the field, `reason` the rest of the message."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option, self.reason = option, reason


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, or above `above`, or below `below`; integers below 2^63."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __str__(self) -> str:
        """The range in words."""
        least, most = (x if math.isfinite(x) else None for x in (self.low, self.high))
        if least is not None and most is not None:
            return f"{least:g} to {most:g}"
        parts = [f"at least {least:g}"] if least is not None else []
        parts += [f"above {self.above:g}"] if math.isfinite(self.above) else []
        parts += [f"below {self.below:g}"] if math.isfinite(self.below) else []
        parts += [f"at most {most:g}"] if most is not None else []
        return ", ".join(parts) or "a finite number"

    def __contains__(self, value: Any) -> bool:
        # Infinity is not below `below`, and a comparison with not-a-number is false.
        return self.low <= value <= self.high and self.above < value < self.below

    def check(self, option: str, value: Any, *, integer: bool) -> None:
        """RangeError unless a value is a number of this range."""
        kind = numbers.Integral if integer else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise RangeError(option, f"expected {'an integer' if integer else 'a number'}, got {_short(value)}")
        if value not in self:
            raise RangeError(option, f"expected {self}, got {_short(value)}")
        if integer and not -LARGEST <= value <= LARGEST:
            raise RangeError(option, f"expected at most {LARGEST}, got {_short(value)}")


def ranged(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf, below: float = math.inf) -> Any:
    """The annotation of a range, to be used with a type: `ranged(0, 1)[float]`."""
    limits = Range(low, high, above, below)
    help_text = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}; range: {limits})")
    return Annotated[T, limits, help_text]


Finite = ranged()
Positive = ranged(above=0)
NonNegative = ranged(0)
AtLeastOne = Count = ranged(1)
AtLeastTwo = ranged(2)
Share = ranged(0, 1)
PositiveShare = ranged(above=0, high=1)
# A share, of which all would leave nothing: a decay, a held-out part.
Fraction = ranged(0, below=1)
LearningRate = ranged(0, 10)
Temperature = ranged(0, 100)
Seed = ranged(0)


class Checked:
    """Base of dataclasses of options: a value outside its range is refused when the object is made."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            RangeError: a value is outside its range.
        """
        if not _later.get():
            _check(self, "")


@contextmanager
def checked_later() -> Iterator[None]:
    """Objects of the block are not checked: the command line does it afterwards, with the names of the options."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def check_options(config: Any, prefix: str = "") -> None:
    """Check a configuration with all its groups.

    Raises:
        RangeError: a value is outside its range; `option` is its path, such as training.lr.
    """
    _check(config, prefix)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_options(value, f"{prefix}{field.name}.")


def _check(config: Any, prefix: str) -> None:
    for name, (limits, integer) in ranges(type(config)).items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple | list) else (value,):
            if item is not None:
                limits.check(prefix + name, item, integer=integer)


@functools.cache
def ranges(config: type) -> dict[str, tuple[Range, bool]]:
    """Field -> its range, and whether it is of integers, for the numeric fields of a dataclass that have one."""
    hints = typing.get_type_hints(config, include_extras=True)
    found = {}
    for field in dataclasses.fields(config):
        limits = next((x for x in getattr(hints[field.name], "__metadata__", ()) if isinstance(x, Range)), None)
        if limits is not None:
            found[field.name] = limits, float not in numeric_types(hints[field.name])
    return found


def numeric_types(hint: Any) -> set[type]:
    """int and float, where a type hint has them: in unions, tuples, lists and values of mappings too."""
    if hint in (int, float):
        return {hint}
    if typing.get_origin(hint) is Annotated:
        return numeric_types(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list, dict):
        return {kind for part in typing.get_args(hint) for kind in numeric_types(part)}
    return set()


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
