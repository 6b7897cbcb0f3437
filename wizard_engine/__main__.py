"""python -m wizard_engine plan --preset 8x22b --gpus 128"""

import difflib
import sys

COMMANDS = ("plan",)


def main() -> int:
    """Run a command of the engine; 2 where there is no such command."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        asked = word in ("", "-h", "--help")
        close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.0)
        text = "usage: python -m wizard_engine plan --preset NAME --gpus N [...]; plan --help lists the options"
        print(
            text if asked else f"wizard_engine: error: expected a command, got {word!r}; the nearest is {close[0]}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    from wizard_engine.planning.planner import Options
    from wizard_engine.planning.report import main as plan
    from wizard_engine.runtime.cli import cli

    sys.argv[0] = "wizard_engine plan"
    return plan(cli(Options, args=sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
