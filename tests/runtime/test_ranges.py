"""Every numeric option has a range: said in --help, named in the error, checked in Python and on the command line."""

import dataclasses
import importlib
import math
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from wizard_engine.agents import endpoint
from wizard_engine.planning import planner
from wizard_engine.rl.options import CriticOptions, RewardOptions
from wizard_engine.runtime import cli, ranges
from wizard_engine.runtime.ranges import Checked, Count, Range, RangeError, Share, ranged

NUMBERS = (int, float)


def configurations() -> dict[str, type]:
    """Name -> configuration of every recipe, of the planner and of endpoint specs."""
    found: dict[str, type] = {"plan": planner.Options, "endpoint": endpoint.Options}
    for module in pkgutil.iter_modules(recipes.__path__):
        recipe = importlib.import_module(f"recipes.{module.name}")
        found[module.name] = recipe.Config
    return found


CONFIGURATIONS = configurations()


def groups(config: type) -> Iterator[type]:
    """A configuration and the groups of options in it."""
    yield config
    for hint in typing.get_type_hints(config).values():
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                yield from groups(kind)


CLASSES = {kind.__module__ + "." + kind.__qualname__: kind for c in CONFIGURATIONS.values() for kind in groups(c)}
OPTIONS = [(name, field) for name, kind in sorted(CLASSES.items()) for field in ranges.ranges(kind)]


def example(config: type, **changes: object) -> object:
    """A configuration with its defaults, and something for what has none."""
    hints = typing.get_type_hints(config)
    if config is RewardOptions:
        # Its default factors ask for models.
        changes = {"factors": ("checked",)} | changes
    for field in dataclasses.fields(config):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in changes:
            hint = hints[field.name]
            if dataclasses.is_dataclass(hint):
                changes[field.name] = example(hint)
            elif field.name in ("preset", "kind"):
                changes[field.name] = {"preset": "7b", "kind": "process"}[field.name]
            else:
                changes[field.name] = {int: 1, str: "x", Path: Path("x")}.get(hint, ())
    return config(**changes)


def test_every_recipe_is_looked_at():
    assert {"sft", "rleif", "serve", "stage_dpo", "progressive", "plan", "endpoint"} <= CONFIGURATIONS.keys()
    assert len(CONFIGURATIONS) >= 19 and len(OPTIONS) > 140


@pytest.mark.parametrize("name", CLASSES)
def test_every_numeric_option_has_a_range(name):
    kind = CLASSES[name]
    hints = typing.get_type_hints(kind, include_extras=True)
    numeric = {field.name for field in dataclasses.fields(kind) if ranges.numeric_types(hints[field.name])}
    assert numeric == set(ranges.ranges(kind)), "annotate the field with a range of wizard_engine.runtime.ranges"
    assert not numeric or issubclass(kind, Checked)
    example(kind)


def beyond(limits: Range, integer: bool) -> Iterator[float]:
    """Numbers that a range does not have."""
    if not integer:
        yield from (math.nan, math.inf, -math.inf)
    else:
        yield from (2**63, 10**400, 1.5, True)
    step = 1 if integer else 1e-9
    for bound, sign in ((limits.low, -1), (limits.high, 1)):
        if math.isfinite(bound):
            yield type(step)(bound) + sign * step if integer else math.nextafter(bound, sign * math.inf)
    for bound in (limits.above, limits.below):
        if math.isfinite(bound):
            yield bound


# Catches: a configuration made in Python that is not checked; not-a-number, which no comparison with a bound refuses.
@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_option_beyond_its_range_is_refused_by_name(name, field):
    kind = CLASSES[name]
    limits, integer = ranges.ranges(kind)[field]
    for value in beyond(limits, integer):
        with pytest.raises(RangeError, match=rf"^{field}: expected .*, got "):
            example(kind, **{field: value})


def test_ranges_have_their_words():
    words = {
        "at least 1": Range(1),
        "0 to 1": Range(0, 1),
        "above 0": Range(above=0),
        "above 0, at most 1": Range(high=1, above=0),
        "at least 0, below 1": Range(0, below=1),
        "above 0, below 1": Range(above=0, below=1),
        "a finite number": Range(),
    }
    assert {str(limits): limits for limits in words.values()} == words


@settings(max_examples=50, deadline=None)
@given(st.floats() | st.integers(), st.floats(-10, 10), st.floats(-10, 10), st.booleans(), st.booleans())
def test_range_has_the_finite_numbers_between_its_bounds(value, low, high, low_open, high_open):
    limits = Range(**{"above" if low_open else "low": low, "below" if high_open else "high": high})
    inside = math.isfinite(value) if isinstance(value, float) else True
    inside = inside and (value > low or (value == low and not low_open))
    inside = inside and (value < high or (value == high and not high_open))
    assert (value in limits) == inside


# Options that must stand in an order, or that exclude each other.
@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("sample", {"size": 2, "slices": 3}, "size: expected at least slices=3, a row each, got 2"),
        ("stage_dpo", {"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing: expected 0 with --variant ipo"),
        ("endpoint", {"backoff": 61.0}, "backoff: expected at most max_wait=60 seconds, got 61"),
        (
            "rleif",
            {"critic": CriticOptions(warmup_steps=101)},
            "critic.warmup_steps: expected at most rollout.steps=100, got 101",
        ),
    ],
)
def test_options_that_must_stand_in_an_order_are_refused_together(name, changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        example(CONFIGURATIONS[name], **changes)


@pytest.mark.parametrize(
    "setting", ["timeout=nan", "max_wait=1e999", "concurrency=-1", f"budget={2**63}", "retries=.5"]
)
def test_numbers_of_an_endpoint_are_checked(setting):
    with pytest.raises(ValueError, match=rf"{setting.partition('=')[0]}: expected "):
        endpoint.parse_spec(f"openai:m@http://127.0.0.1:1#{setting}")


@dataclasses.dataclass(frozen=True)
class Group(Checked):
    share: Share[float] = 0.5
    """A part."""
    sizes: Count[tuple[int, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Options(Checked):
    """A recipe with two groups of the same kind."""

    first: Group = dataclasses.field(default_factory=Group)
    second: Group = dataclasses.field(default_factory=Group)
    most: Count[int | None] = None
    port: ranged(0, 65535)[int] = 80


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--second.share", "1.5"], "--second.share: expected 0 to 1, got 1.5"),
        (["--second.share=nan"], "--second.share: expected 0 to 1, got nan"),
        (["--first.share", "-inf"], "--first.share: expected 0 to 1, got -inf"),
        (["--first.sizes", "3", "0"], "--first.sizes: expected at least 1, got 0"),
        (["--most", "0"], "--most: expected at least 1, got 0"),
        (["--most", "9" * 30], f"--most: expected at most {2**63 - 1}, got {'9' * 30}"),
        (["--port", "65536"], "--port: expected 0 to 65535, got 65536"),
    ],
)
def test_command_line_names_the_option_as_it_is_typed(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.cli(Options, args=arguments)
    assert stopped.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "endpoint"])
def test_help_says_the_range_of_every_numeric_option(name, capsys):
    config = CONFIGURATIONS[name]
    with pytest.raises(SystemExit):
        cli.cli(config, args=["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    said = shown.count("range: ")
    numeric = sum(len(ranges.ranges(kind)) for kind in groups(config))
    # The one that has no default says it in its text.
    required = "GPUs in all, at least 1." in shown
    assert said + required == numeric
