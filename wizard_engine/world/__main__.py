"""Prints a few problems with answers in every style, a chain of evolved problems, and a judged pair."""

import argparse
import random
from collections.abc import Iterator, Sequence

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Request

from . import vocabulary as words
from .corpus import SPANISH
from .evolve import OPERATORS, evolve
from .problems import Problem, random_problem
from .programs import program
from .render import render
from .solve import STYLES, label_steps, solve


def problem_lines(rng: random.Random) -> Iterator[str]:
    """A problem, its attributes and an answer in each style with the labels of its steps."""
    language = "es" if rng.random() < 2 * SPANISH else "en"
    topic = rng.choice(words.TOPIC_NAMES)
    problem = random_problem(rng, operations=rng.randint(1, 4), language=language, topic=topic)
    yield f"{render(problem, rng)}\n  [{problem.topic}, {problem.skill}, {problem.operations} operations]"
    for style in STYLES:
        steps = solve(problem, style, rng).split("\n")
        labelled = [
            f"{step} ({label:+d})" if label else step for step, label in zip(steps, label_steps(problem, steps))
        ]
        yield f"  {style:9} {' | '.join(labelled)}"
    yield ""


def evolved_lines(rng: random.Random) -> Iterator[str]:
    """One problem evolved by every operator in turn."""
    problem: Problem = random_problem(rng, operations=1)
    yield f"{'seed':10} {render(problem, rng)}"
    for operator in OPERATORS:
        changed = evolve(problem, operator, rng)
        yield f"{operator:10} {'nothing to change' if changed is None else render(changed, rng)}"
        problem = changed or problem
    yield ""


def judged_lines(rng: random.Random) -> Iterator[str]:
    """Two answers to one problem, judged in both orders."""
    problem = random_problem(rng, operations=2)
    instruction, answers = render(problem, rng), [solve(problem, style, rng) for style in ("rambling", "careless")]
    yield instruction
    for first, second in (answers, answers[::-1]):
        messages = prompts.request_messages(
            "judge", history="", instruction=instruction, answer_a=first, answer_b=second
        )
        (reply,) = program("world:judge").respond([Request("judge", messages)])
        yield f"  A: {first!r}\n  B: {second!r}\n  {reply.text}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `--show N` problems, `--seed`."""
    parser = argparse.ArgumentParser(prog="python -m wizard_engine.world", description=__doc__)
    parser.add_argument("--show", type=int, default=5, help="number of problems (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default 0)")
    options = parser.parse_args(arguments)
    rng = random.Random(f"show:{options.seed}")
    for _ in range(options.show):
        print("\n".join(problem_lines(rng)))
    print("\n".join([*evolved_lines(rng), *judged_lines(rng)]))


if __name__ == "__main__":
    main()
