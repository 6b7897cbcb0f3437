"""What of an agent's spec belongs to the identity of a stage, and what is said of prices at its start."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes import arena, evol_instruct, mt_bench
from wizard_engine.agents.endpoint_options import replying_spec
from wizard_engine.agents.options import CallOptions, _prices
from wizard_engine.runtime import stage

SPEC = "openai:m@http://127.0.0.1:9/v1"
IDLE = "budget=900,max_cost=2,price_in=1,price_out=2,concurrency=3,timeout=5,retries=1,backoff=0.1,max_wait=9"
IDLE += ",requests_per_minute=7,tokens_per_minute=8,give_up=9,key_env=KEY,token_limit=max_tokens"


def evol(spec):
    agents = evol_instruct.Agents(evolver=spec)
    return stage.identity(evol_instruct.Config(data=(Path("x.jsonl"),), out=Path("o"), agents=agents))[0]


def bench(spec):
    return mt_bench.open_bench(mt_bench.Config(model=spec, judge=spec, out=Path("o"))).config


def battle(spec):
    models = (f"a={spec}", "b=world:expert")
    return arena.open_arena(arena.Config(models=models, judge=(spec,), out=Path("o")), arena.read_models(models)).config


@pytest.mark.parametrize("identity", [evol, bench, battle])
def test_options_that_change_no_reply_are_not_in_the_identity(identity):
    assert identity(f"{SPEC}#{IDLE}") == identity(SPEC)
    for other in ("reasoning_effort=low", "seed=no", 'extra_body={"a": 1}', "extras=error"):
        assert identity(f"{SPEC}#{other}") != identity(SPEC)


def test_the_options_of_a_spec_have_one_order_and_other_specs_stay():
    assert replying_spec(f"{SPEC}#seed=no,budget=1,json=no") == replying_spec(f"{SPEC}/#json=no,seed=0")
    assert replying_spec("world:judge") == "world:judge"
    with pytest.raises(ValueError, match="budgte"):
        replying_spec(f"{SPEC}#budgte=1")


@dataclass(frozen=True, kw_only=True)
class Options(CallOptions):
    models: tuple[str, ...] = ()
    inner: evol_instruct.Agents = field(default_factory=evol_instruct.Agents)


def test_prices_that_fit_no_agent_and_agents_without_a_price_are_named(tmp_path, capsys):
    path = tmp_path / "prices.json"
    path.write_text('{"m": {"in": 1, "out": 2}, "gpt": {"in": 1, "out": 2}}')
    specs = (f"a={SPEC}", "openai:n@http://127.0.0.1:9/v1", "openai:own@http://127.0.0.1:9/v1#price_out=1")
    _prices(Options(prices=path, models=specs), is_shown=True)
    said = capsys.readouterr().err
    assert said == "prices: no agent has the model gpt; no price is given for n, which counts as free\n"
    path.write_text('{"m": {"in": 1, "out": 2}}')
    _prices(Options(prices=path, inner=evol_instruct.Agents(judge=SPEC)), is_shown=True)
    assert capsys.readouterr().err == ""


def test_a_file_of_prices_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: prices: expected a JSON file .*, got No such file"):
        _prices(Options(prices=tmp_path / "none.json"), is_shown=True)
