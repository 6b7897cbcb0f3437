"""Tables of a run file become options of recipes, and options become words of a command line that give them back."""

import dataclasses
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from recipes import accuracy, co_teach, evol_instruct, reward, rleif, sample, self_teach, sft, stage_dpo
from wizard_engine.planning.presets import presets
from wizard_engine.rl.options import RewardOptions
from wizard_engine.runtime.cli import cli
from wizard_engine.runtime.option_tables import command_words, with_table
from wizard_engine.runtime.ranges import Checked, Count, Share


@dataclass(frozen=True)
class Inner(Checked):
    share: Share[float] = 0.5
    flag: bool = True


@dataclass(frozen=True)
class Options(Checked):
    data: tuple[Path, ...]
    out: Path
    name: str | None = None
    kind: Literal["plain", "other"] | Path = "plain"
    steps: Annotated[Count[int | None], tyro.conf.arg(name="limit")] = None
    words: tuple[str, ...] = ("a", "b")
    inner: Inner = field(default_factory=Inner)


GIVEN = Options((Path("a.jsonl"),), Path("out"))


def test_a_table_sets_options_by_their_names_on_the_command_line():
    text = 'limit = 3\nkind = "x.jinja"\nwords = []\nname = "none"\n[inner]\nshare = 1\nflag = false'
    made = with_table(replace(GIVEN, name="x"), tomllib.loads(text), "run.toml: sft")
    assert made == replace(GIVEN, steps=3, kind=Path("x.jinja"), words=(), inner=Inner(1.0, False))
    assert isinstance(made.inner.share, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limt = 3", "run.toml: sft.limt: expected a known option, got an unknown one; the nearest is limit"),
        ("steps = 3", "sft.steps: expected a known option, got an unknown one"),
        ("[inner]\nshar = 1", "sft.inner.shar: expected a known option, got an unknown one; the nearest is share"),
        ("[inner]\nshare = 2", "run.toml: sft.inner.share: expected 0 to 1, got 2"),
        ("limit = 0", "run.toml: sft.limit: expected at least 1, got 0"),
        ("limit = true", 'sft.limit: expected "none" or a whole number, got True'),
        ("limit = 1.5", 'sft.limit: expected "none" or a whole number, got 1.5'),
        ("inner = 3", "sft.inner: expected a table of options, got 3"),
        ("words = [1]", "sft.words: expected a text, got 1"),
        ("[name]\na = 1", "sft.name: expected .* or a text, got"),
    ],
)
def test_wrong_tables_are_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        with_table(GIVEN, tomllib.loads(text), "run.toml: sft")


DATA, OUT = (Path("a.jsonl"), Path("b c.jsonl")), Path("runs/x y")
CONFIGURATIONS = {
    "sft": sft.Config(data=DATA, out=OUT, truncate=True, audit=False, chat_format=Path("x.jinja")),
    "stage_dpo": replace(presets(stage_dpo.Config)["70b-64"], data=DATA, out=OUT, beta=0.1, nll=1e-7),
    "reward": reward.Config(kind="process", data=DATA, out=OUT, surprise=False),
    "rleif": rleif.Config(
        data=DATA, out=OUT, model="m/d", reward=RewardOptions(Path("i"), Path("p"), factors=("process",))
    ),
    "evol_instruct": evol_instruct.Config(
        data=DATA, out=OUT, operators=(), agents=evol_instruct.Agents(evolver="openai:m@http://h/v1#price_in=1")
    ),
    "co_teach": co_teach.Config(data=DATA, out=OUT, agents=co_teach.Agents("m", suggester=None, rivals=("r", "s"))),
    "self_teach": self_teach.Config(data=DATA, out=OUT, agents=self_teach.Agents("m"), keep=1.0),
    "sample": sample.Config(data=DATA, out=OUT, uniform=("topic",), size=30, quiet=True),
    "accuracy": accuracy.Config(model="-m", data=DATA[0], out=OUT, limit=4),
}


# Catches: a group without its prefix, a switch that is off, None, empty and repeated values, numbers in other digits.
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_command_words_give_the_configuration_back(name):
    config = CONFIGURATIONS[name]
    words = command_words(config)
    assert cli(type(config), args=words) == config
    assert not any(word.startswith("--seed") for word in words), "defaults are left out"


def test_options_of_recipes_are_found_by_table():
    config = CONFIGURATIONS["rleif"]
    made = with_table(config, {"training": {"lr": 1e-6, "pack-tokens": 64}, "kl": {"coefficient": 0}}, "f: rleif")
    assert (made.training.lr, made.training.pack_tokens, made.kl.coefficient) == (1e-6, 64, 0.0)
    assert dataclasses.replace(made, training=config.training, kl=config.kl) == config
