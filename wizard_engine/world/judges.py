"""Programs that judge: pairs of answers, single answers, steps, and the quality of instructions."""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.data.solution_steps import step_texts

from . import vocabulary as words
from .agents import NUMBERED, WorldProgram, is_of_world
from .evolve import failure_of, is_same
from .parse import parse, parse_turns
from .problems import MAX_OPERATIONS, Problem
from .solve import asks_back, check_answer, claimed_answer, label_steps, states_answer

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
_DIGITS = re.compile(r"\d+")


class Assessment(NamedTuple):
    """A score from 1 to 10 and a clause that says why."""

    score: float
    remark: str


class Judge(WorldProgram):
    """Scores answers from 1 to 10, labels steps, compares instructions and suggests improvements.

    It looks at no criteria, and at the reference of a single answer alone.

    noise: standard deviation of a score; first_bonus: what the answer that stands first gets too much; misread: chance
    of a wrong label for a step.
    """

    unseeded_fields: ClassVar = {
        "judge": ("criteria", "reference"),
        "rate": ("criteria",),
        "label": ("reference",),
        "suggest": ("history", "reference"),
    }

    def __init__(self, name: str = "world:judge", noise: float = 0.5, first_bonus: float = 0.25, misread: float = 0.01):
        self.name, self.noise, self.first_bonus, self.misread = name, noise, first_bonus, misread
        self.parameters = {"noise": noise, "first_bonus": first_bonus, "misread": misread}

    def do_judge(
        self, *, history: str, instruction: str, answer_a: str, answer_b: str, rng: random.Random, **_: str
    ) -> str:
        """An explanation and `[[a]] [[b]]`. Equal answers get equal scores but for the first one's bonus."""
        problem = asked_problem(history, instruction)
        error_a = rng.gauss(0, self.noise)
        error_b = error_a if answer_a == answer_b else rng.gauss(0, self.noise)
        first, second = assess(problem, answer_a), assess(problem, answer_b)
        score_a = on_scale(first.score + error_a + self.first_bonus)
        score_b = on_scale(second.score + error_b)
        return f"Answer A {first.remark} Answer B {second.remark}\n[[{score_a:g}]] [[{score_b:g}]]"

    def do_rate(
        self, *, history: str, instruction: str, reference: str, answer: str, rng: random.Random, **_: str
    ) -> str:
        """An explanation and `[[x]]`; the reference decides where the instruction cannot be read."""
        problem = asked_problem(history, instruction)
        score, remark = assess(problem, answer)
        if problem is None and reference.strip():
            score = 9.0 if claimed_answer(answer) == claimed_answer(reference) else 2.0
        return f"The answer {remark}\n[[{on_scale(score + rng.gauss(0, self.noise)):g}]]"

    def do_label(self, *, instruction: str, answer_steps: str, rng: random.Random, **_: str) -> str:
        """A line with 1, 0 or -1 for each step, almost always the right one; 0 where the instruction cannot be read."""
        problem = parse(instruction)
        steps = [step for step in answer_steps.split("\n") if step.strip()]
        labels = [0] * len(steps) if problem is None else label_steps(problem, steps)
        noisy = [rng.choice((1, 0, -1)) if rng.random() < self.misread else label for label in labels]
        return "\n".join(map(str, noisy))

    def do_compare(self, *, first: str, second: str, rng: random.Random) -> str:
        """`Equal` where the two ask for the same, else `Not Equal`."""
        problem, other = parse(first), parse(second)
        if problem is None or other is None:
            return "Equal" if prompts.flatten(first) == prompts.flatten(second) else "Not Equal"
        return "Equal" if is_same(problem, other) else "Not Equal"

    def do_diagnose(
        self, *, instruction: str, change: str, evolved: str, reference: str, response: str, rng: random.Random
    ) -> str:
        """A JSON object with the failures of an evolved problem (see `diagnosis`)."""
        failures = diagnosis(instruction, change.partition(":")[0], evolved)
        listed = [{"class": name, "reason": reason} for name, reason in failures.items()]
        return json.dumps({"assessment": "It is not sound." if listed else "It is sound.", "failures": listed})

    def do_suggest(self, *, instruction: str, answer: str, better: str, rng: random.Random, **_: str) -> str:
        """One sentence about what the better answer does and the first one does not."""
        problem = parse(instruction)
        if problem is None:
            return "Answer what the instruction asks."
        if problem.defect:
            return "Ask for what the question leaves out."
        if asks_back(answer) or claimed_answer(answer) is None:
            return "Give a number as the answer."
        labels = label_steps(problem, step_texts(answer))
        if -1 in labels:
            return f"Check the arithmetic and the operation of step {labels.index(-1) + 1}."
        if 0 in labels:
            return "Leave out the lines that are no steps."
        return "Write one equation for each step before the answer."


class Ranker(WorldProgram):
    """Scores the quality of instructions from 0 to 10: whether they can be answered at all, then how hard they are."""

    def __init__(self, name: str = "world:ranker", noise: float = 0.3):
        self.name, self.noise, self.parameters = name, noise, {"noise": noise}

    def do_rank(self, *, instructions: str, rng: random.Random) -> str:
        """A line `number: score` for each numbered instruction."""
        lines = []
        for line in instructions.split("\n"):
            match = NUMBERED.match(line)
            if match:
                score = instruction_quality(match[2]) + rng.gauss(0, self.noise)
                lines.append(f"{match[1]}: {min(10.0, max(0.0, score)):.1f}")
        return "\n".join(lines)


# Failure that a reader of the world sees -> its class among those of evolving; a jump is none of them.
CLASS_OF = {
    "same": "not harder",
    "heading": "copied headings",
    "vague": "not answerable",
    "impossible": "contradiction",
    "language": "other language",
}


def diagnosis(before: str, operator: str, after: str) -> dict[str, str]:
    """Class of failure -> reason, of one evolving step, by reading both problems; {} where it is sound.

    Sentences that the world does not know are left out of the problem; one of them with its answer gives it away. What
    asks for no number of things is another task.
    """
    old = parse(before)
    if old is None:
        return {}
    sentences = _SENTENCE_END.split(after.strip())
    unknown = [sentence for sentence in sentences if not is_of_world(sentence)]
    read = " ".join(sentence for sentence in sentences if sentence not in unknown) if unknown else after
    new = parse(read)
    if unknown and new is None:
        return {"task changed": f"it says {unknown[-1][:60]!r}"}
    if any(str(new.value) in _DIGITS.findall(sentence) for sentence in unknown):
        return {"answer leaked": f"it states {new.value}"}
    failure = failure_of(before, old, read, new)
    if failure in CLASS_OF:
        return {CLASS_OF[failure]: failure}
    if new is None or operator == "breadth":
        return {}
    is_named = old.person != words.SOMEONE and old.noun != words.THINGS
    if is_named and (old.person, old.noun) != (new.person, new.noun):
        return {"task changed": "it is about something else"}
    return _lost(old, new)


def _lost(old: Problem, new: Problem) -> dict[str, str]:
    """Statements of the old problem that are gone; a number that became boxes is not."""
    gone = Counter(_amounts(old)) - Counter(_amounts(new))
    boxed = sum(amount.each is not None for _, amount in new.statements)
    boxed -= sum(amount.each is not None for _, amount in old.statements)
    if gone.total() <= max(0, boxed):
        return {}
    return {"facts lost": ", ".join(f"{kind} {total}" for kind, total in gone)}


def _amounts(problem: Problem) -> list[tuple[str, int]]:
    """Kind and number of things of each statement that has one."""
    return [
        (kind, amount.count * (amount.each or 1)) for kind, amount in problem.statements if amount.count is not None
    ]


def asked_problem(history: str, instruction: str) -> Problem | None:
    """The problem that an instruction asks after a history (text of prompts.dialogue), or None."""
    turns: Sequence[str] = ()
    if history.strip():
        try:
            turns = [message.content for message in prompts.parse_dialogue(history) if message.role == "user"]
        except ValueError:
            return parse(instruction)
    return parse_turns([*turns, instruction])


def quality(problem: Problem | None, answer: str) -> float:
    """Quality of an answer on a scale of 1 to 10, without noise (see `assess`)."""
    return assess(problem, answer).score


def assess(problem: Problem | None, answer: str) -> Assessment:
    """Score (1 to 10, without noise) and a clause about an answer.

    Most weight has the right result, then the steps shown, then brevity; a wrong step costs. Where the problem has no
    answer, asking back is best. Of other text only the length is judged.
    """
    if not answer.strip():
        return Assessment(1.0, "is empty.")
    if problem is None:
        return Assessment(2.0 if len(answer) < 20 else 5.0, "is about something else.")
    if problem.defect:
        if asks_back(answer):
            return Assessment(9.0, "asks for what is missing.")
        return Assessment(2.5, "guesses where the question has no answer.")
    steps = step_texts(answer)
    labels = label_steps(problem, steps)
    needed = len(problem.equations())
    shown = min(needed, sum(label == 1 and "=" in step for step, label in zip(steps, labels, strict=True)))
    covered = shown / needed if needed else 1.0
    if not check_answer(problem, answer):
        claims = claimed_answer(answer) is not None
        return Assessment(1.0 + 0.5 * claims + 2.0 * covered, "does not reach the right result.")
    return _right_answer(steps, labels, covered, answer.count(words.META_REMARK))


def _right_answer(steps: Sequence[str], labels: Sequence[int], covered: float, remarks: int) -> Assessment:
    """Assessment of an answer whose result is right; `covered` is the share of the needed equations that it shows."""
    chat, wrong = labels.count(0) + remarks, labels.count(-1)
    brevity = max(-1.0, 1.0 - 0.4 * chat)
    score = 5.5 + 2.5 * covered + 0.5 * states_answer(steps[-1]) + brevity - min(2, wrong)
    if wrong:
        return Assessment(score, f"is right in the end, but step {labels.index(-1) + 1} is not.")
    return Assessment(score, "is right, with remarks that add nothing." if chat else "is right and to the point.")


def on_scale(score: float) -> float:
    """The score rounded to halves within 1 to 10."""
    return min(10.0, max(1.0, round(score * 2) / 2))


def instruction_quality(text: str) -> float:
    """Quality of an instruction from 0 to 10, without noise: definition, precision and integrity, then difficulty."""
    problem = parse(text)
    if problem is None:
        return 1.0
    if problem.defect:
        return 2.0 if problem.is_vague else 2.5
    general = (problem.topic == words.GENERAL) + (problem.person == words.SOMEONE)
    return 4.5 + min(problem.operations, MAX_OPERATIONS) - 0.5 * general
