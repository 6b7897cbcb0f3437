"""What tokens cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wizard_engine.data.text_files import read_json
from wizard_engine.runtime.text_lines import one_line, printable

MILLION = 1_000_000


@dataclass(frozen=True)
class Price:
    """Of a million tokens of prompts and of replies, in any one currency."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def of(self, tokens_in: int, tokens_out: int) -> float:
        """Cost of so many tokens."""
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / MILLION


def read_prices(path: Path | str) -> dict[str, Price]:
    """Prices by model's name from a JSON file `{"MODEL": {"in": 2.5, "out": 10}}`, per million tokens.

    Raises:
        ValueError: another form, or a price that is no number or out of range; names file, model and field.
    """
    form = '{"MODEL": {"in": 2.5, "out": 10}}'
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(
            f"{path}: prices: expected a JSON file {form}, got {error.strerror or error}; correct --prices"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object {{"MODEL": {{"in": 2.5, "out": 10}}}}, got another JSON value')
    return {model: _price(f"{path}: {model[:60]!r}", entry) for model, entry in content.items()}


def unmatched(prices: Mapping[str, Price], own: Mapping[str, Price]) -> str:
    """A line on prices that no agent uses, and on models without a price; "" where all fit.

    Args:
        prices: of a file, by model.   own: what the agents' specs themselves give, by model.
    """
    unused = sorted(set(prices) - set(own))
    free = sorted(model for model in set(own) - set(prices) if own[model] == Price())
    lines = [f"no agent has the model {_named(unused)}"] if unused else []
    lines += [f"no price is given for {_named(free)}, which counts as free"] if free else []
    return printable(f"prices: {'; '.join(lines)}") if lines else ""


def _named(models: list[str]) -> str:
    more = f" and {len(models) - 8} more" if len(models) > 8 else ""
    return ", ".join(one_line(model)[:60] for model in models[:8]) + more


def _price(where: str, entry: object) -> Price:
    if not isinstance(entry, dict) or set(entry) != {"in", "out"}:
        raise ValueError(f'{where}: expected {{"in": price, "out": price}} per million tokens, got {str(entry)[:60]}')
    for name, value in entry.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MILLION:
            raise ValueError(f"{where}: {name}: expected a price from 0 to {MILLION}, got {str(value)[:40]!r}")
    return Price(float(entry["in"]), float(entry["out"]))
