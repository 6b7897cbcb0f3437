"""Calls that gave nothing: missing, counted with their reasons, and too many of them end a stage."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wizard_engine.runtime.text_lines import one_line, printable

MAX_MISSING = 0.05
NO_REFERENCE, UNREADABLE_REFERENCE = "no reference", "unreadable reference"
NO_SCRIPT, NOT_OF_WORLD = "no scripted reply", "not of this world"
# What helps against a reason.
_ADVICE = {
    NO_REFERENCE: "give rows with the attribute reference, or --references answers where their own answers are right",
    UNREADABLE_REFERENCE: "name a model directory or an endpoint for rows whose answers are no number",
    NO_SCRIPT: "add lines for these rows to the file of replies",
    NOT_OF_WORLD: "name a reference: or scripted: agent, a model directory or an endpoint in place of the world: agent",
}


@dataclass(frozen=True)
class Missing:
    """An answer that did not come, and why in a word or two: "length", "content_filter", "status 400"."""

    reason: str


class TooManyMissing(ValueError):
    """More is missing than may be; `reasons` says how much for which reason."""

    def __init__(self, message: str, reasons: Mapping[str, int]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class Reasons:
    """Counts of reasons that come in any order of their places; their order is that of the places."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def add(self, reason: str, place: int) -> None:
        """One more, at a place."""
        self._counts[reason] += 1
        self._first[reason] = min(place, self._first.get(reason, place))

    def total(self) -> int:
        """Of all reasons."""
        return self._counts.total()

    def ranked(self) -> dict[str, int]:
        """Reason -> number, the most frequent first, and of equals the one that stands first."""
        order = sorted(self._counts, key=lambda reason: (-self._counts[reason], self._first[reason]))
        return {reason: self._counts[reason] for reason in order}


def count_reasons(answers: Iterable[object]) -> dict[str, int]:
    """Reason -> number of the answers that are Missing, the most frequent first."""
    return dict(Counter(answer.reason for answer in answers if isinstance(answer, Missing)).most_common())


def shown_reasons(reasons: Mapping[str, int]) -> str:
    """Reasons with their numbers as text: `length 12, status 400 1`."""
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{printable(one_line(reason))} {count}" for reason, count in ranked)


def check_share(value: float) -> None:
    """Raises ValueError for a largest share of missing replies outside 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"max_missing: expected a share from 0 to 1, got {value}; give 0.05 for five in a hundred")


def check_missing(what: str, reasons: Mapping[str, int], asked: int, most: float, advice: str = "") -> None:
    """Raises TooManyMissing where more than the share `most` of what was asked is missing.

    Args:
        what: was asked for, such as "answers of m".   reasons: reason -> how many are missing.
        advice: what helps against "length".
    """
    missing = sum(reasons.values())
    if not asked or missing <= most * asked:
        return
    helps = _ADVICE | ({"length": advice} if advice else {})
    longer = "".join(f"{text}, or " for reason, text in helps.items() if reason in reasons)
    message = (
        f"{what}: expected at most {100 * most:g} % missing, got {missing} of {asked} ({shown_reasons(reasons)}); "
        f"{longer}mend the cause and give the same command again, or accept the share by --max-missing; "
        "what came is in the ledger"
    )
    raise TooManyMissing(message, reasons)
