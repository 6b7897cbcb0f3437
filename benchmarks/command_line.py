"""Command lines of the benchmarks: argparse whose errors name the nearest option or name, exit status 2."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn


def nearest(word: str, known: Iterable[str]) -> str:
    """`; the nearest is NAME`, or an empty text where nothing is known."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no shortened options and shows its description as it is written."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print the message, for an unknown option with the nearest known one, and exit with status 2."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            typed = unknown[1].partition("=")[0]
            message = f"{typed}: expected a known option, got an unknown one{nearest(typed, options)}"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def names(self, option: str, requested: Sequence[str] | None, known: Sequence[str]) -> list[str]:
        """The names given, all known ones where none is; exits with status 2 at one that is not known."""
        for name in requested or ():
            if name not in known:
                self.error(f"{option}: expected some of {', '.join(known)}, got {name}{nearest(name, known)}")
        return list(requested or known)


def percent(text: str) -> float:
    """The share that `5%` or `0.05` stands for; for `type=` of an option."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, got {text!r}")
    return float(match[1]) / (100 if match[2] else 1)
