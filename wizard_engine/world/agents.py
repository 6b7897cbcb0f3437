"""Programs in the role of external models: they answer, rewrite, evolve and optimise behind the agent protocol.

They are programs, not language models. They read the request's text with prompts.parse and the world's parser, and make
errors at stated rates, seeded by the request.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from wizard_engine.agents import prompts
from wizard_engine.agents.missing import NOT_OF_WORLD
from wizard_engine.agents.program import Program, Refused
from wizard_engine.agents.replies import REWRITTEN_HEADING
from wizard_engine.data.solution_steps import step_texts

from . import vocabulary as words
from .corpus import follow_up
from .evolve import FAILURE_RATES, HEADINGS, NUMBERED, RULES, evolved_text, failure_of
from .parse import is_readable, parse, parse_turns
from .problems import Equation, Problem, Quantity, random_problem
from .render import render
from .solve import asks_back, careless_trace, check_answer, label_steps, rambling, solve, terse, written, wrong_solution


class WorldProgram(Program):
    """A program that refuses requests about rows that are not of the world."""

    def check(self, task: str, fields: Mapping[str, str], turns: Sequence[str]) -> None:
        """Raises Refused where no instruction of the row that is asked about is of the world (see `is_of_world`)."""
        texts = [turns[-1]] if turns else asked_texts(task, fields)
        if texts and not any(map(is_of_world, texts)):
            raise Refused(f"{NOT_OF_WORLD}: {self.name} reads the word problems of the demo, not {texts[0][:60]!r}")


def is_of_world(instruction: str) -> bool:
    """Whether an instruction is a problem of the world, or a broken one: nothing but sentences of its templates.

    Broken ones are a follow-up without its problem, contradicting sentences, or a heading left from a prompt.
    """
    if parse(instruction) is not None:
        return True
    heading = next((heading for heading in HEADINGS if instruction.startswith(heading)), "")
    return is_readable(instruction.removeprefix(heading))


def asked_texts(task: str, fields: Mapping[str, str]) -> list[str]:
    """The instructions of the row that a prompt is about, without evolutions of it; none for a method alone."""
    if task == "compare":
        return [fields["first"]]
    if task == "rank":
        return [match[2] for line in fields["instructions"].split("\n") if (match := NUMBERED.match(line))]
    if task == "analyse":
        return [stages[0] for stages, _ in prompts.parse_trajectory(fields["trajectory"]).values() if stages]
    return [fields["instruction"]] if "instruction" in fields else []


@dataclass(frozen=True)
class Habits:
    """How an answering program errs.

    slip: chance of one arithmetic slip; mistake: chance of a wrong operation; asks: chance of asking back where a
    problem has no answer; repairs: chance that a rewrite is a fresh answer (else unchanged or with a remark);
    form: "steps", "terse" or "chat".
    """

    slip: float
    mistake: float
    asks: float
    repairs: float
    form: str = "steps"


class Answerer(WorldProgram):
    """A program that answers and rewrites with given habits; it looks at no history or reference of a rewrite."""

    unseeded_fields: ClassVar = {"rewrite": ("history", "reference")}

    def __init__(self, name: str, habits: Habits):
        self.name, self.habits, self.parameters = name, habits, asdict(habits)

    def do_answer(self, turns: Sequence[str], rng: random.Random) -> str:
        """An answer to the last turn of the conversation."""
        problem = parse_turns(turns)
        return words.ASK_BACK["en"] if problem is None else self.solution(problem, rng)

    def do_rewrite(
        self, *, operator: str, suggestion: str, instruction: str, answer: str, rng: random.Random, **_: str
    ) -> str:
        """The answer rewritten; sometimes unchanged, sometimes with a remark about itself."""
        problem = parse(instruction)
        if problem is None:
            return answer
        repairs = self.habits.repairs + (1 - self.habits.repairs) / 2 * bool(suggestion.strip())
        chance = rng.random()
        if chance > repairs + (1 - repairs) / 2:
            return answer
        if operator == "relevance" and check_answer(problem, answer) and not problem.defect:
            better = without_chat(problem, answer)
        else:
            better = self.solution(problem, rng)
        return better if chance < repairs else f"{words.META_REMARK}\n{better}"

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """An answer in the program's form, with its slips and mistakes."""
        if problem.defect:
            return solve(problem) if rng.random() < self.habits.asks else self._guess(problem, rng)
        chance = rng.random()
        if chance < self.habits.mistake:
            return wrong_solution(problem, rng)
        is_slip = chance < self.habits.mistake + self.habits.slip
        return self._formed(problem, careless_trace(problem, rng) if is_slip else problem.equations(), rng)

    def _formed(self, problem: Problem, equations: Sequence[Equation], rng: random.Random) -> str:
        if self.habits.form == "chat":
            return rambling(problem, equations, rng)
        if self.habits.form == "terse":
            return terse(problem, equations[-1].result if equations else problem.value, rng)
        return written(problem, equations)

    def _guess(self, problem: Problem, rng: random.Random) -> str:
        """An answer to a problem without one: missing numbers are invented, impossible results stay."""
        statements = tuple(
            statement._replace(amount=Quantity(rng.randint(2, 9), statement.amount.each))
            if statement.amount.count is None
            else statement
            for statement in problem.statements
        )
        guessed = problem.changed(statements=statements)
        equations = guessed.equations()
        return self._formed(guessed, equations, rng) if equations else f"{statements[0].amount.count}."


def without_chat(problem: Problem, answer: str) -> str:
    """The answer's lines that are steps of the solution, right or wrong."""
    steps = step_texts(answer)
    kept = [step for step, label in zip(steps, label_steps(problem, steps), strict=True) if label != 0]
    return "\n".join(kept) or answer


class Evolver(WorldProgram):
    """Evolves instructions with the failures that its method leaves, and plays the user of a conversation.

    An instruction meets the same failure under every method without a rule against it.
    """

    unseeded_fields: ClassVar = {"evolve": ("method",)}

    def __init__(self, name: str = "world:evolver", rates: Mapping[str, float] = FAILURE_RATES):
        self.name, self.rates, self.parameters = name, dict(rates), dict(rates)

    def do_evolve(self, *, operator: str, method: str, instruction: str, rng: random.Random) -> str:
        """The evolved instruction under the heading that the prompt asks for; text it cannot read stays as it is."""
        text = evolved_text(instruction, operator, rng, method=method, rates=self.rates)
        return f"{REWRITTEN_HEADING}\n{text}"

    def do_user(self, turns: Sequence[str], rng: random.Random) -> str:
        """A next user turn: the last problem with one number changed, else a new problem."""
        problem = parse_turns(turns)
        changed = follow_up(problem, rng, held_out=False) if problem is not None and not problem.defect else None
        if changed is not None:
            return changed[1]
        topic = rng.choice(words.TOPIC_NAMES) if problem is None else problem.topic
        language = "en" if problem is None else problem.language
        return render(random_problem(rng, operations=rng.randint(1, 3), language=language, topic=topic), rng)


REASONS = {
    "same": "not evolved, nothing was added",
    "heading": "a heading of the prompt was copied",
    "vague": "unclear, the question cannot be answered",
    "impossible": "wrong arithmetic, a number below zero, above 49 or a fraction",
    "language": "the language changed",
    "jump": "jump in complexity, too many changes at once",
}
USELESS_RULES = ("be creative", "write an interesting story", "think about the task before writing")


class Optimizer(WorldProgram):
    """Finds the failed cases of a trajectory, and adds a rule against one of the reported failures to the method.

    misses: chance of overlooking a failed case; useless, repeated: chances of adding a rule that does nothing, or one
    that the method has already.
    """

    def __init__(
        self, name: str = "world:optimizer", misses: float = 0.15, useless: float = 0.15, repeated: float = 0.1
    ):
        self.name, self.misses, self.useless, self.repeated = name, misses, useless, repeated
        self.parameters = {"misses": misses, "useless": useless, "repeated": repeated}

    def do_analyse(self, *, method: str, trajectory: str, rng: random.Random) -> str:
        """A line `Case N: reason` for each failed case that is noticed."""
        lines = []
        for number, (stages, response) in prompts.parse_trajectory(trajectory).items():
            failure = case_failure(stages, response)
            if failure and rng.random() >= self.misses:
                lines.append(f"Case {number}: {REASONS[failure]}")
        return "\n".join(lines) or "No failed case."

    def do_optimise(self, *, method: str, feedback: str, rng: random.Random) -> str:
        """The method with one more rule, in a fenced block."""
        text = method.lower()
        counts = Counter({kind: feedback.count(reason) for kind, reason in REASONS.items() if reason in feedback})
        kinds = [kind for kind in counts if RULES[kind] not in text]
        present = [rule for rule in RULES.values() if rule in text]
        chance = rng.random()
        if present and chance < self.repeated:
            rule = rng.choice(present)
        elif not kinds or chance < self.repeated + self.useless:
            rule = rng.choice(USELESS_RULES)
        else:
            rule = RULES[rng.choices(kinds, [counts[kind] for kind in kinds])[0]]
        return f"```\n{with_rule(method, rule)}\n```"


def with_rule(method: str, rule: str) -> str:
    """The method with one more line; in a whole prompt behind its last numbered one."""
    if not prompts.is_whole_prompt(method):
        lines = [line for line in (method.strip() or prompts.initial_method()).splitlines() if line.strip()]
        return "\n".join([*lines, f"{len(lines) + 1}. {rule.capitalize()}."])
    lines = method.splitlines()
    places = [place for place, line in enumerate(lines) if NUMBERED.match(line)]
    last = places[-1] if places else -1
    return "\n".join([*lines[: last + 1], f"{len(places) + 1}. {rule.capitalize()}.", *lines[last + 1 :]])


def case_failure(stages: Sequence[str], response: str) -> str:
    """The first failure class in the stages of one case; "vague" where only the response asks back; "" for none."""
    problems = [parse(stage) for stage in stages]
    for index in range(1, len(stages)):
        failure = failure_of(stages[index - 1], problems[index - 1], stages[index], problems[index])
        if failure:
            return failure
    return "vague" if asks_back(response) else ""
