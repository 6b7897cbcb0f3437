"""Options of the recipes that ask agents."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.ranges import Checked, Count, PositiveShare, Share
from wizard_engine.runtime.stage import INCIDENTAL

from .calls import JUDGE_TOKENS
from .endpoint_options import PREFIX, parse_spec, replying_spec
from .estimate import StandInCast, shown_estimate
from .missing import MAX_MISSING
from .prices import Price, read_prices, unmatched
from .prompts import use_folder
from .registry import Cast

A = TypeVar("A", bound="CallOptions")


class AgentSpecs:
    """Base of options that name agents: of their specs, a stage's identity has what changes replies."""

    def in_identity(self, text: str) -> str:
        """A text as it stands in the identity, see `stage.identity`."""
        return replying_spec(text)


@dataclass(frozen=True, kw_only=True)
class CallOptions(AgentSpecs, Checked):
    """What every recipe lets its user say about calls to agents."""

    chat_format: ChatFormatChoice = "auto"
    """Of local models: auto is a directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a
    .jinja file."""
    top_p: PositiveShare[float] = 1.0
    """Share of the probability that tokens of all replies are drawn from."""
    max_missing: Share[float] = field(default=MAX_MISSING, metadata=INCIDENTAL)
    """Largest share of a task's calls, 0 to 1, that may give nothing; above it the stage ends with an error. Below 1 it
    ends at once where none of an agent's first 30 replies to a task can be read."""
    ledger: Path | None = field(default=None, metadata=INCIDENTAL)
    """File of all calls, which stages may share; default: OUT/ledger.sqlite."""
    prompt_folder: Path | None = None
    """Folder with your own prompt files: one such as judge.txt replaces the built-in one of the same name."""
    prices: Path | None = field(default=None, metadata=INCIDENTAL)
    """JSON file {"MODEL": {"in": 2.5, "out": 10}}: prices of a million tokens, for cost and budgets of endpoints."""
    estimate: bool = field(default=False, metadata=INCIDENTAL)
    """Make no call: say how many the stage needs, with tokens, cost and hours, and end."""
    batch_size: Count[int] = field(default=256, metadata=INCIDENTAL)
    """Conversations that a model of this machine generates together, on each rank."""
    device: str = field(default="auto", metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)


@dataclass(frozen=True, kw_only=True)
class AgentOptions(CallOptions):
    """The options of a recipe that has a judge."""

    judge_max_tokens: Count[int] = JUDGE_TOKENS
    """Longest verdict of a judge with its explanation, tokens."""


def estimated(cfg: A, work: Callable[[A, StandInCast], object], *, answer_tokens: int = 0) -> dict[str, Any]:
    """The estimate of a stage with options `cfg`; also printed.

    Args:
        work: the stage, given its options with another `out`, which is removed afterwards, and its agents.
        answer_tokens: usual length of an answer; 0 for a common one.
    """
    use_folder(cfg.prompt_folder)
    prices = _prices(cfg, is_shown=True)
    usual = {"answer_tokens": answer_tokens} if answer_tokens else {}
    cast = StandInCast(_ledger(cfg.out, cfg), prices, **usual)
    try:
        with tempfile.TemporaryDirectory(prefix="wizard-estimate-") as folder:
            work(replace(cfg, out=Path(folder), quiet=True, estimate=False), cast)
        estimate = cast.estimate()
    finally:
        cast.close()
    print(shown_estimate(estimate))
    return estimate


def open_cast(out: Path, cfg: CallOptions, runtime: Runtime) -> Cast:
    """Agents with the ledger of the options, by default OUT/ledger.sqlite.

    Raises:
        ValueError: prices that cannot be read, or a folder of prompts that does not fit.
    """
    use_folder(cfg.prompt_folder)
    prices = _prices(cfg, is_shown=runtime.is_main)
    options = {"batch_size": cfg.batch_size, "quiet": cfg.quiet, "prices": prices, "chat_format": cfg.chat_format}
    options |= {"max_missing": cfg.max_missing}
    return Cast(_ledger(out, cfg), runtime, **options)


def _prices(cfg: CallOptions, *, is_shown: bool) -> dict[str, Price]:
    """The prices of the options; a line on stderr says which of them fit no agent, and which agents have none."""
    if cfg.prices is None:
        return {}
    prices = read_prices(cfg.prices)
    parsed = [parse_spec(spec) for spec in _endpoints(cfg)]
    own = {model: options.price for model, _, options in sorted(parsed, key=lambda item: item[2].price.tokens_out)}
    line = unmatched(prices, own)
    if line and is_shown:
        print(line, file=sys.stderr, flush=True)
    return prices


def _endpoints(value: Any) -> Iterator[str]:
    """The specs of endpoints in options, those of `NAME=SPEC` included."""
    if is_dataclass(value):
        for option in fields(value):
            yield from _endpoints(getattr(value, option.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _endpoints(item)
    elif isinstance(value, str):
        name, sign, rest = value.partition("=")
        spec = rest if sign and rest.startswith(PREFIX) and not name.startswith(PREFIX) else value
        yield from [spec] if spec.startswith(PREFIX) else []


def _ledger(out: Path, cfg: CallOptions) -> Path:
    return cfg.ledger or out / "ledger.sqlite"
