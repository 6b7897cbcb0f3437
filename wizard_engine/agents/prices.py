"""What tokens cost."""

from dataclasses import dataclass
from pathlib import Path

from wizard_engine.data.text_files import read_json

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
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object {{"MODEL": {{"in": 2.5, "out": 10}}}}, got another JSON value')
    return {model: _price(f"{path}: {model[:60]!r}", entry) for model, entry in content.items()}


def _price(where: str, entry: object) -> Price:
    if not isinstance(entry, dict) or set(entry) != {"in", "out"}:
        raise ValueError(f'{where}: expected {{"in": price, "out": price}} per million tokens, got {str(entry)[:60]}')
    for name, value in entry.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MILLION:
            raise ValueError(f"{where}: {name}: expected a price from 0 to {MILLION}, got {str(value)[:40]!r}")
    return Price(float(entry["in"]), float(entry["out"]))
