"""Preference rows from judged matches, with counts of the dropped ones."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wizard_engine.data.records import Conversation, Preference, Row
from wizard_engine.data.rows import row_from_line, row_to_line
from wizard_engine.runtime.spill import Spill

from .judging import Match, Verdict

# Attributes that hold for any answer to the same instruction; the others describe the text of the row.
INSTRUCTION_ATTRIBUTES = ("source", "topic", "language", "skill", "difficulty", "evolutions", "reference")


def row_spill(folder: Path | None) -> Spill[Row]:
    """A temporary file of rows."""
    return Spill(folder, dump=row_to_line, load=row_from_line)


class Joined(Sequence):
    """The items of two sequences, one behind the other, read when they are taken."""

    def __init__(self, first: Sequence, second: Sequence) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, place: int) -> Any:
        return self.first[place] if place < len(self.first) else self.second[place - len(self.first)]


def instruction_attributes(row: Conversation) -> dict[str, Any]:
    """The attributes of a row that hold for any answer to its instruction."""
    return {name: row.attributes[name] for name in INSTRUCTION_ATTRIBUTES if name in row.attributes}


class Pairs:
    """Collects preference rows.

    Args:
        min_gap: the averaged scores of the two answers of a pair must differ by more, points.
        folder: of the temporary file that keeps the rows (see runtime.spill).

    Attributes:
        rows: the pairs kept, each with "gap", "chosen_score" and "rejected_score" among its attributes.
        dropped: reason -> number: "identical" (the same text but for blanks), "no margin" (gap too small), "flipped"
            (the judge's two orders name different winners), "repeated" (the same pair again), "not judged".
    """

    def __init__(self, min_gap: float, folder: Path | None = None) -> None:
        if min_gap < 0:
            raise ValueError(f"min_gap: expected 0 or more, got {min_gap}; give points of score")
        self.min_gap = min_gap
        self.rows: Spill[Preference] = row_spill(folder)
        self.dropped: Counter[str] = Counter()
        self._seen: set[int] = set()

    def add(
        self, match: Match, verdict: Verdict | None, attributes: dict[str, Any], lineage: dict[str, Any]
    ) -> Preference | None:
        """The match as a preference row with these attributes, or None if it is dropped."""
        reason = self._fault(match, verdict)
        if reason is None:
            pair = self._pair(match, verdict, attributes, lineage)
            if int(pair.id, 16) not in self._seen:
                self._seen.add(int(pair.id, 16))
                self.rows.append(pair)
                return pair
            reason = "repeated"
        self.dropped[reason] += 1
        return None

    def statistics(self) -> dict[str, int]:
        """kept, and every reason for dropping with its number."""
        return {"kept": len(self.rows), **dict(sorted(self.dropped.items()))}

    def _fault(self, match: Match, verdict: Verdict | None) -> str | None:
        if verdict is None:
            return "not judged"
        if match.first.split() == match.second.split():
            return "identical"
        if verdict.is_flipped:
            return "flipped"
        return None if abs(verdict.gap) > self.min_gap else "no margin"

    def _pair(self, match: Match, verdict: Verdict, attributes: dict, lineage: dict) -> Preference:
        answers, scores = (match.first, match.second), verdict.scores
        if verdict.gap < 0:
            answers, scores = answers[::-1], scores[::-1]
        judged = {"gap": abs(verdict.gap), "chosen_score": scores[0], "rejected_score": scores[1]}
        return Preference(tuple(match.prompt), *answers, attributes | judged, lineage)
