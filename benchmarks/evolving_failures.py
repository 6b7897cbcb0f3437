"""What each failure measure of automatic Evol-Instruct sees: an evolver with planted faults, in two tables.

    python -m benchmarks.evolving_failures

The evolver works on the embedded world's problems and plants three faults that leave a text in which no string rule
finds anything, and a response that looks as any other one:

    task changed    the last sentence asks for a story instead of a number
    number changed  one number of the original has another value in the evolved problem
    answer leaked   a sentence before the question states the evolved problem's result

It remembers what it planted. Nobody else sees that: detectors, judge (world:judge) and optimizer get texts alone.

The first table says how many planted faults each measure finds under the initial method, and how many sound evolutions
it calls failures. The second one lets the search run under each measure, and counts the faults that the method of its
end leaves, on rows that the search did not see. A rule in the method prevents nine in ten faults of its class.
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from wizard_engine.agents import Request, prompts
from wizard_engine.agents.program import Program
from wizard_engine.agents.replies import REWRITTEN_HEADING, read_evolved
from wizard_engine.data.records import Conversation, conversation
from wizard_engine.synthesis import Optimised, optimise_method
from wizard_engine.synthesis.failure_rate import Measure
from wizard_engine.world.agents import Answerer, with_rule
from wizard_engine.world.corpus import draw, natural_corpus
from wizard_engine.world.evolve import evolve
from wizard_engine.world.parse import is_readable, parse
from wizard_engine.world.problems import LARGEST_OPERAND, Problem
from wizard_engine.world.programs import HABITS, program
from wizard_engine.world.render import render

OPERATORS = ("constraint", "deepen", "steps")
RATE, OBEYED = 0.12, 0.1
POOL, MINIBATCH = 120, 30  # rows beside the development set, and those of them that a step analyses
# Planted fault -> the class that it belongs to, and the rule that prevents it.
FAULTS = {
    "task changed": ("task changed", "keep the task of the given instruction"),
    "number changed": ("facts lost", "keep every number and every name of the given instruction"),
    "answer leaked": ("answer leaked", "do not state the answer in the instruction"),
}
RULE_OF = dict(FAULTS.values())
MEASURES = (
    ("the paper's string rules", "rules", False),
    ("classes, by program", "classes", False),
    ("classes, by program and judge", "classes", True),
)
_SENTENCE_END = re.compile(r"(?<=[.?])\s+")
_LEAKS = {
    "en": ("So the answer is {}.", "That makes {} in the end.", "Note that it is {}.", "Hint: there will be {}."),
    "es": ("Así que la respuesta es {}.", "Eso da {} al final.", "Se sabe que son {}.", "Pista: serán {}."),
}
STORY = "One morning they met at the gate, and the day began well."
_STORIES = {"en": "Write a short story about them.", "es": "Escribe un cuento breve sobre ellos."}


class PlantedEvolver(Program):
    """Evolves problems of the world soundly, but for the planted faults; `planted` is what it did, by its text.

    An instruction meets the same fault under every method without a rule against it.
    """

    name = "planted:evolver"
    unseeded_fields: ClassVar = {"evolve": ("method",)}

    def __init__(self, rates: Mapping[str, float] | None = None) -> None:
        self.rates = dict.fromkeys(FAULTS, RATE) if rates is None else dict(rates)
        self.parameters = self.rates
        self.planted: dict[str, str] = {}

    def do_evolve(self, *, operator: str, method: str, instruction: str, rng: random.Random) -> str:
        """The evolved instruction under the heading that the prompt asks for."""
        natural = draw({**self.rates, "": 1 - sum(self.rates.values())}, rng)
        is_prevented = rng.random() >= OBEYED and natural and FAULTS[natural][1] in method.lower()
        text, fault = evolved(instruction, operator, "" if is_prevented else natural, rng)
        self.planted[text] = fault
        return f"{REWRITTEN_HEADING}\n{text}"


def evolved(instruction: str, operator: str, fault: str, rng: random.Random) -> tuple[str, str]:
    """The evolution of a problem with a fault, and the fault, "" where it could not be planted."""
    problem = parse(instruction)
    source = _renumbered(problem, rng) if fault == "number changed" else problem
    changed = next((new for name in (operator, *OPERATORS) if (new := evolve(source, name, rng))), source)
    text = render(changed, rng)
    *told, question = _SENTENCE_END.split(text)
    if fault == "task changed":
        return " ".join([*told, _STORIES[changed.language]]), fault
    if fault == "answer leaked":
        leak = rng.choice(_LEAKS[changed.language]).format(changed.value)
        return " ".join([*told, leak, question]), fault
    return text, fault if source != problem else ""


def _renumbered(problem: Problem, rng: random.Random) -> Problem:
    """The problem with another number in one of its statements; the same one where none of 50 tries is sound."""
    for _ in range(50):
        statements = list(problem.statements)
        place = rng.randrange(len(statements))
        amount = statements[place].amount
        statements[place] = statements[place]._replace(amount=amount._replace(count=rng.randint(2, LARGEST_OPERAND)))
        changed = problem.changed(statements=tuple(statements))
        if changed.skeleton != problem.skeleton and changed.is_well_formed() and not changed.defect:
            return changed
    return problem


class FluentAnswerer(Answerer):
    """Answers as world:expert does, and writes a story where it is asked for one: it never refuses a text."""

    def __init__(self) -> None:
        super().__init__("planted:answerer", HABITS["world:expert"])

    def check(self, task: str, fields: Mapping[str, str], turns: Sequence[str]) -> None:
        """Any text will do."""

    def do_answer(self, turns: Sequence[str], rng: random.Random) -> str:
        """The solution of the problem without the sentences that are none of it, else a story."""
        known = [sentence for sentence in _SENTENCE_END.split(turns[-1]) if is_readable(sentence)]
        problem = parse(" ".join(known))
        return STORY if problem is None else self.solution(problem, rng)


class PlainOptimizer(Program):
    """Reviews a trajectory by its lines `Check:`, and adds the rule against one of the failures that a review names.

    It has no eyes of its own, so it is as good as the checks: without any it says that no case failed.
    """

    name = "planted:optimizer"

    def do_analyse(self, *, method: str, trajectory: str, rng: random.Random) -> str:
        """A line `Case N: reason` for each case with a check."""
        lines, case = [], ""
        for line in trajectory.split("\n"):
            name, _, rest = line.partition(" ")
            case = rest if name == "Case" else case
            lines += [f"Case {case}: {rest}"] if name == "Check:" else []
        return "\n".join(lines) or "No failed case."

    def do_optimise(self, *, method: str, feedback: str, rng: random.Random) -> str:
        """The method with one more rule, in a fenced block."""
        rules = [rule for kind, rule in RULE_OF.items() if kind in feedback and rule not in method.lower()]
        return f"```\n{with_rule(method, rng.choice(rules) if rules else 'be creative')}\n```"


@dataclass(frozen=True)
class Found:
    """What a measure says of the initial method, and what its search leads to.

    Attributes:
        by_fault: fault -> (planted, found, found under the right class).
        alarms: (sound evolutions, those called failures).
        reported, interval: failure rate of the initial method.   accepted: methods that replaced another one.
        before, after: share of evolutions of unseen rows with a planted fault, under the initial and the last method.
    """

    name: str
    by_fault: dict[str, tuple[int, int, int]]
    alarms: tuple[int, int]
    reported: float
    interval: list[float]
    stopped: str
    accepted: int
    before: float
    after: float
    method: str


def problems(n: int, seed: int) -> list[Conversation]:
    """`n` sound problems of the world's corpus, each once, with its answers as they come: good and bad ones."""
    rows: dict[str, Conversation] = {}
    for row in natural_corpus(6 * n + 200, seed):
        problem = parse(row.instruction)
        if len(row.messages) == 2 and problem is not None and not problem.defect and problem.operations < 5:
            rows.setdefault(problem.key, conversation(row.instruction, row.answer))
    if len(rows) < n:
        raise ValueError(f"rows: expected {n} distinct problems, got {len(rows)}; ask for fewer")
    return list(rows.values())[:n]


def share_planted(rows: Iterable[Conversation], method: str) -> float:
    """Share of the rows that are evolved with a planted fault under a method."""
    evolver, counts = PlantedEvolver(), Counter()
    for number, row in enumerate(rows):
        fields = {"operator": OPERATORS[number % 3], "method": method, "instruction": row.instruction}
        (reply,) = evolver.respond([Request("evolve", prompts.request_messages("evolve", **fields))])
        counts[bool(evolver.planted[read_evolved(reply.text)])] += 1
    return counts[True] / counts.total()


def measured(name: str, measure: Measure, has_judge: bool, *, dev_size: int, seed: int = 0) -> Found:
    """One measure: what it finds on a development set, and what its search leads to."""
    rows = problems(2 * dev_size + POOL, seed)
    searched, unseen = rows[: dev_size + POOL], rows[dev_size + POOL :]
    judge = program("world:judge") if has_judge else None
    settings = {"measure": measure, "judge": judge, "dev_size": dev_size, "seed": seed}
    first, evolver = _search(searched, steps=0, **settings)
    by_fault, alarms = _compared(evolver.planted, first.failures)
    counts = first.history[0]
    result, _ = _search(searched, steps=8, **settings)
    return Found(
        name=name,
        by_fault=by_fault,
        alarms=alarms,
        reported=counts["failure_rate"],
        interval=counts["ci95"],
        stopped=result.stopped,
        accepted=sum(step["accepted"] for step in result.history[1:]),
        before=share_planted(unseen, first.method),
        after=share_planted(unseen, result.method),
        method=result.method,
    )


def _search(rows: Sequence[Conversation], **settings: Any) -> tuple[Optimised, PlantedEvolver]:
    """A search, and the evolver with what it planted."""
    evolver = PlantedEvolver()
    agents = {"evolver": evolver, "optimizer": PlainOptimizer(), "answerer": FluentAnswerer()}
    return optimise_method(rows, **agents, is_whole=True, minibatch=MINIBATCH, operators=OPERATORS, **settings), evolver


def _compared(
    planted: Mapping[str, str], failures: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, tuple[int, int, int]], tuple[int, int]]:
    """What was planted beside what was found: the attributes `by_fault` and `alarms` of Found."""
    kinds: dict[str, set[str]] = {}
    for failure in failures:
        kinds.setdefault(failure["evolved"], set()).add(failure["class"])
    by_fault = {}
    for fault, (kind, _) in FAULTS.items():
        texts = [text for text, what in planted.items() if what == fault]
        by_fault[fault] = (len(texts), sum(t in kinds for t in texts), sum(kind in kinds.get(t, ()) for t in texts))
    sound = [text for text, what in planted.items() if not what]
    return by_fault, (len(sound), sum(text in kinds for text in sound))


def tables(found: Sequence[Found]) -> str:
    """Both tables as Markdown."""
    lines = [
        f"| failure measure | {' | '.join(FAULTS)} | sound ones called failures |",
        "|---" * (len(FAULTS) + 2) + "|",
    ]
    for one in found:
        cells = [f"{hits} of {count} ({right} by class)" for count, hits, right in one.by_fault.values()]
        lines.append(f"| {one.name} | {' | '.join(cells)} | {one.alarms[1]} of {one.alarms[0]} |")
    lines += ["", "| failure measure | rate it reports | methods taken | ends with | faults planted before | after |"]
    lines.append("|---" * 6 + "|")
    for one in found:
        low, high = one.interval
        reported = f"{one.reported:.1%} [{low:.1%}, {high:.1%}]"
        cells = (one.name, reported, one.accepted, one.stopped, f"{one.before:.1%}", f"{one.after:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev-size", type=int, default=300, help="rows of the development set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-method", action="store_true", help="also print the method of each search's end")
    options = parser.parse_args(arguments)
    found = [measured(*one, dev_size=options.dev_size, seed=options.seed) for one in MEASURES]
    print(tables(found))
    for one in found if options.show_method else ():
        print(f"\n{one.name}:\n{one.method}")


if __name__ == "__main__":
    main()
