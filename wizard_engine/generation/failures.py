"""Failures of one sequence: it ends with reason "error" and a text, and the others go on.

What is computed for one sequence runs in `each`, `attempt` or `together`. What is computed for a whole step does not.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol


class Fallible(Protocol):
    """What a failure needs of a sequence: why it ended, what failed, and its tokens on their way."""

    reason: str | None
    error: str
    pending: int


class Failures:
    """Runs the work of sequences, and ends those whose work raises.

    Args:
        finish: ends a sequence with a reason.
    Attributes:
        failed: sequences that ended with an error since the last `take`.
    """

    def __init__(self, finish: Callable[[Fallible, str], None]) -> None:
        self._finish = finish
        self.failed: list[Fallible] = []

    def fail(self, sequence: Fallible, error: Exception) -> None:
        """End a sequence with reason "error" and the error's text."""
        sequence.pending = 0
        if sequence.reason is None:
            sequence.error = described(error)
            self.failed.append(sequence)
            self._finish(sequence, "error")

    def take(self) -> list[Fallible]:
        """The sequences that failed since the last call."""
        failed, self.failed = self.failed, []
        return failed

    def each(self, items: Items[tuple], action: Callable[..., object]) -> None:
        """action(*item) for every item, a tuple that begins with a sequence. An exception ends that sequence alone."""
        rest = iter(items)
        while True:
            try:
                for item in rest:
                    action(*item)
                return
            # Whatever one sequence's computation raises is that sequence's error; the loop goes on behind it.
            except Exception as error:
                self.fail(item[0], error)

    def attempt(self, sequence: Fallible, action: Callable[..., Any], *arguments: Any) -> Any:
        """action(*arguments), or None where an exception has ended the sequence."""
        try:
            return action(*arguments)
        # As in `each`.
        except Exception as error:
            self.fail(sequence, error)
            return None

    def together(self, items: list[tuple], action: Callable[[list[tuple]], Any]) -> tuple[list[tuple], Any]:
        """(items, action(items)), without the items for which action([item]) raises: their sequences have failed.

        An exception that no item raises alone is the caller's.
        """
        if not items:
            return items, None
        try:
            return items, action(items)
        # As in `each`, once it is known whose error it is.
        except Exception:
            kept = [item for item in items if self.attempt(item[0], action, [item]) is not None]
            if len(kept) == len(items):
                raise
            return self.together(kept, action)


def described(error: Exception) -> str:
    """The text of an error; of unexpected ones with the type's name."""
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
