"""What tokens cost: read from a file, refused where they are no numbers."""

import json

import pytest

from wizard_engine.agents import Cast
from wizard_engine.agents.prices import Price, read_prices
from wizard_engine.runtime.process import Runtime


def test_prices_are_per_million_tokens(tmp_path):
    (tmp_path / "p.json").write_text('{"m": {"in": 2.5, "out": 10}, "n": {"in": 0, "out": 0}}')
    prices = read_prices(tmp_path / "p.json")
    assert prices == {"m": Price(2.5, 10.0), "n": Price()} and prices["m"].of(2_000_000, 100_000) == 6.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object"),
        ('{"m": 3}', r"'m': expected {\"in\": price, \"out\": price} per million tokens, got 3"),
        ('{"m": {"in": 1}}', "'m': expected"),
        ('{"m": {"in": 1, "out": 2, "cached": 3}}', "'m': expected"),
        ('{"m": {"in": "2.5", "out": 1}}', "'m': in: expected a price from 0 to 1000000, got '2.5'"),
        ('{"m": {"in": true, "out": 1}}', "'m': in: expected a price"),
        ('{"m": {"in": 1, "out": -1}}', "'m': out: expected a price from 0 to 1000000, got '-1'"),
        ('{"m": {"in": NaN, "out": 1}}', "p.json"),
        ('{"m": {"in": Infinity, "out": 1}}', "p.json"),
        (f'{{"m": {{"in": 1{"0" * 400}, "out": 1}}}}', "'m': in: expected a price"),
        ('{"m": ', "p.json"),
        ("\ud800", "p.json"),
    ],
)
def test_prices_that_are_no_numbers_are_named(tmp_path, content, message):
    (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        read_prices(tmp_path / "p.json")
    assert "p.json" in str(caught.value)


# Catches: a budget in money that a price of the file cannot serve, or one that nothing says the price of.
def test_a_budget_in_money_takes_its_price_from_spec_or_file(tmp_path):
    pytest.importorskip("openai")
    spec = "openai:m@http://127.0.0.1:1/v1#max_cost=3"
    prices = {"m": Price(1, 2)}
    cast = Cast(tmp_path / "l.sqlite", Runtime(), prices=prices)
    assert cast.agent(spec).price == Price(1, 2)
    assert cast.agent(f"{spec},price_in=5").price == Price(5, 0)
    with pytest.raises(ValueError, match=r"agent n@127\.0\.0\.1:1: max_cost: expected what tokens cost beside it"):
        cast.agent(spec.replace("openai:m", "openai:n"))
    cast.close()
    assert json.dumps(sorted(prices)) == '["m"]'
