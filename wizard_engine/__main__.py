"""The engine's commands: plan (what a training run costs), new-run (a run file), ledger (an agent's calls)."""

import difflib
import importlib
import sys

# Command -> modules of its options and of its main function, and its use.
COMMANDS = {
    "plan": ("wizard_engine.planning.planner", "wizard_engine.planning.report", "--preset NAME --gpus N [...]"),
    "new-run": ("wizard_engine.pipeline.new_run", "wizard_engine.pipeline.new_run", "DIR [...]"),
    "ledger": ("wizard_engine.agents.ledger_report", "wizard_engine.agents.ledger_report", "FILE [...]"),
}


def main() -> int:
    """Run a command of the engine; 2 where there is no such command."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        asked = word in ("", "-h", "--help")
        close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.0)
        uses = [f"python -m wizard_engine {name} {options}" for name, (_, _, options) in COMMANDS.items()]
        text = f"usage: {' | '.join(uses)}; plan --help and the others' --help list the options"
        print(
            text if asked else f"wizard_engine: error: expected a command, got {word!r}; the nearest is {close[0]}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    from wizard_engine.runtime.cli import cli

    options, report, _ = COMMANDS[word]
    sys.argv[0] = f"wizard_engine {word}"
    return importlib.import_module(report).main(cli(importlib.import_module(options).Options, args=sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
