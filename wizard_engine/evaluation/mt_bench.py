"""The MT-Bench protocol: two-turn questions in categories, each turn rated from 1 to 10 by a judge.

Each model answers turn 1, then turn 2 with its own first answer in the conversation. Each turn is rated in a separate
call; that of turn 2 shows turn 1 as history. The judge sees the reference answers of a question, if there are any.
Failed calls, answers that did not come, cut and unreadable ratings are counted as errors and do not enter the means;
every mean states its number of ratings and of missing ones. No question waits for another one. Source: FastChat's
llm_judge; its files of questions and references are read unchanged. The field `reference` inside its question file is
not shown to the judge, as in FastChat.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wizard_engine.agents.calls import JUDGE_TOKENS, AnyAgent, Calls, Limits
from wizard_engine.agents.missing import Missing
from wizard_engine.agents.prompts import criteria_of, dialogue
from wizard_engine.agents.protocol import Reply, Request
from wizard_engine.agents.replies import scores_of
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.records import Message

from .battles import error_kind, judge_error
from .questions import WRONG_REFERENCES, Question

Conversation = tuple[Message, ...]
AnswerFn = Callable[[list[Conversation], float], list[str | Missing]]
# (conversation that ends with a user turn, temperature, id of the question) -> answer
Answering = Callable[[Conversation, float, str], Awaitable[str | Missing]]
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


@dataclass(frozen=True)
class TurnRating:
    """Rating of one turn; if the score is None, `error` is the reason."""

    question: str
    category: str
    turn: int
    repeat: int
    score: float | None
    error: str | None = None


@dataclass(frozen=True)
class Mean:
    """Mean of the readable ratings, 95 % interval over questions, numbers of present and missing ratings."""

    score: float | None
    ci95: tuple[float, float] | None
    rated: int
    missing: int


@dataclass(frozen=True)
class MTBench:
    """Result: means overall, by turn and by category.

    `call_errors` and `parse_errors` count ratings that the judge did not give, `unanswered` those of turns without an
    answer; `missing` says the reasons: "judge: length", "judge: unreadable", "answer: content_filter".
    `score_missing_as_1` is the overall mean with each missing rating counted as the lowest, 1.
    """

    model: str
    overall: Mean
    turns: tuple[Mean, Mean]
    categories: dict[str, Mean]
    call_errors: int
    parse_errors: int
    score_missing_as_1: float
    judge: str
    fingerprint: str
    seed: int
    notes: tuple[str, ...] = ()
    unanswered: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    ratings: tuple[TurnRating, ...] = field(default=(), repr=False)
    answers: tuple[tuple[str | Missing, str | Missing], ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The result without the single ratings and answers."""
        return {name: value for name, value in vars(self).items() if name not in ("ratings", "answers")}


class Bench:
    """Answers and ratings of questions, each question by itself: see `mt_bench`.

    Args:
        judge: answers the task "rate", at temperature 0.   calls: with the limit of a rating.
        answering: gives a turn; None where all answers are given.
    Raises:
        ValueError: no questions, or fewer than one repeat.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        judge: AnyAgent,
        calls: Calls,
        *,
        answering: Answering | None = None,
        seed: int = 0,
        repeats: int = 1,
        temperatures: Mapping[str, float] = TEMPERATURES,
        default_temperature: float = 0.0,
    ) -> None:
        if not questions:
            raise ValueError("questions: expected at least one, got none; give a file with questions")
        if repeats < 1:
            raise ValueError(f"repeats: expected at least 1, got {repeats}; leave it out for one rating per turn")
        self.questions, self.judge, self.calls, self.answering = questions, judge, calls, answering
        self.seed, self.repeats = seed, repeats
        self.heat = [temperatures.get(question.category, default_temperature) for question in questions]
        self.answers: list[tuple[str | Missing, str | Missing]] = [("", "")] * len(questions)
        self.ratings: list[list[TurnRating]] = [[] for _ in questions]

    async def run(self, desc: str, agents: Sequence[AnyAgent]) -> None:
        """Answer and rate all questions.

        Args:
            agents: that are asked.
        """
        width, answers = 2 * self.repeats, 0 if self.answering is None else 2
        stage = {"desc": desc, "total": len(self.questions), "width": width, "calls": width + answers, "agents": agents}
        await self.calls.scheduler.rows(range(len(self.questions)), self.play, lambda place, done: None, **stage)

    async def play(self, place: int) -> None:
        """Answer one question; each turn is rated as soon as it is there."""
        question = self.questions[place]
        opened = (Message("user", question.turns[0]),)
        async with asyncio.TaskGroup() as group:
            first = await self._answer(opened, place)
            ratings = [group.create_task(self._rate(place, 1, repeat, (first,))) for repeat in range(self.repeats)]
            pair = (first, await self._second(opened, first, place))
            ratings += [group.create_task(self._rate(place, 2, repeat, pair)) for repeat in range(self.repeats)]
        self.answers[place], self.ratings[place] = pair, [rating.result() for rating in ratings]

    async def _answer(self, conversation: Conversation, place: int) -> str | Missing:
        if self.answering is None:
            return self.answers[place][0]
        return await self.answering(conversation, self.heat[place], self.questions[place].id)

    async def _second(self, opened: Conversation, first: str | Missing, place: int) -> str | Missing:
        if self.answering is None:
            return self.answers[place][1]
        if isinstance(first, Missing):
            return first
        followed = (*opened, Message("assistant", first), Message("user", self.questions[place].turns[1]))
        return await self._answer(followed, place)

    async def _rate(self, place: int, turn: int, repeat: int, answers: tuple[str | Missing, ...]) -> TurnRating:
        question = self.questions[place]
        missing = next((answer.reason for answer in answers if isinstance(answer, Missing)), None)
        if missing is not None:
            return TurnRating(question.id, question.category, turn, repeat, None, f"answer: {missing}")
        fields = _fields(question, answers, turn)
        options = {"read": _read_one, "row": question.id}
        scores, reply = await self.calls.explained(self.judge, "rate", fields, self.seed + repeat, **options)
        score, error = _rated(scores, reply)
        return TurnRating(question.id, question.category, turn, repeat, score, error)

    def result(self, name: str) -> MTBench:
        """The means of all ratings."""
        ratings = [rating for of_question in self.ratings for rating in of_question]
        return _summarise(ratings, self.answers, self.judge, name, self.seed, _notes(self.questions))


def mt_bench(
    answer_fn: AnswerFn,
    questions: Sequence[Question],
    *,
    judge: AnyAgent,
    name: str = "model",
    seed: int = 0,
    repeats: int = 1,
    temperatures: Mapping[str, float] = TEMPERATURES,
    default_temperature: float = 0.0,
    max_tokens: int = JUDGE_TOKENS,
    scheduler: Scheduler | None = None,
) -> MTBench:
    """Rates a model on two-turn questions.

    Args:
        answer_fn: (conversations that end with a user turn, temperature) -> an answer each, or Missing. A question
            without a first answer is not asked on.
        questions: at least one; anything with id, category, turns and references.
        judge: answers the task "rate", at temperature 0.
        repeats: ratings of each turn, with different seeds; the means are over all of them.
        temperatures: by category; other categories use `default_temperature`.
        max_tokens: longest rating with its explanation.
        scheduler: of the calls; default: one without a ledger.
    Raises:
        ValueError: no questions, fewer than one repeat, or answers of another number than the conversations.
    """
    scheduler = scheduler or Scheduler(quiet=True)
    calls = Calls(scheduler, limits=Limits(judge=max_tokens))
    model = _FunctionAgent(answer_fn, name)

    async def answering(conversation: Conversation, temperature: float, row: str) -> str | Missing:
        reply = await scheduler.ask(model, Request("answer", conversation, seed, temperature, row=row))
        return reply.text if reply.ok else Missing(reply.error)

    settings = {"temperatures": temperatures, "default_temperature": default_temperature}
    bench = Bench(questions, judge, calls, answering=answering, seed=seed, repeats=repeats, **settings)
    scheduler.run(bench.run("questions", [model, judge]))
    return bench.result(name)


class _FunctionAgent:
    """An answer function as an agent. Nobody knows when such a function changes, so no ledger serves its answers."""

    def __init__(self, answer_fn: AnswerFn, name: str) -> None:
        self.answer_fn, self.name, self.fingerprint = answer_fn, name, f"function/{secrets.token_hex(16)}"

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in order; one call of the function per temperature."""
        replies: list[Reply | None] = [None] * len(requests)
        for temperature in sorted({request.temperature for request in requests}):
            chosen = [index for index, request in enumerate(requests) if request.temperature == temperature]
            texts = self.answer_fn([requests[index].messages for index in chosen], temperature)
            if len(texts) != len(chosen):
                raise ValueError(f"answer_fn: expected {len(chosen)} answers, got {len(texts)}; return one each")
            for index, text in zip(chosen, texts):
                replies[index] = Reply("", text.reason) if isinstance(text, Missing) else Reply(text)
        return replies


def rate(
    questions: Sequence[Question],
    answers: Sequence[tuple[str | Missing, str | Missing]],
    *,
    judge: AnyAgent,
    name: str = "model",
    seed: int = 0,
    repeats: int = 1,
    max_tokens: int = JUDGE_TOKENS,
    scheduler: Scheduler | None = None,
) -> MTBench:
    """Rates given answers, a pair (turn 1, turn 2) per question; see `mt_bench`.

    Raises:
        ValueError: no questions, another number of answers, or fewer than one repeat.
    """
    if not questions or len(answers) != len(questions):
        raise ValueError(
            f"answers: expected a pair for each of {len(questions)} questions, got {len(answers)}; give both"
        )
    scheduler = scheduler or Scheduler(quiet=True)
    bench = Bench(questions, judge, Calls(scheduler, limits=Limits(judge=max_tokens)), seed=seed, repeats=repeats)
    bench.answers = list(answers)
    scheduler.run(bench.run("ratings", [judge]))
    return bench.result(name)


def _fields(question: Question, answers: Sequence[str], turn: int) -> dict[str, str]:
    """Of the rating of one turn; turn 2 shows turn 1 as history, and the references of both turns."""
    history = () if turn == 1 else (Message("user", question.turns[0]), Message("assistant", answers[0]))
    fields = {"history": dialogue(history), "instruction": question.turns[turn - 1]}
    fields |= {"reference": shown_references(question, turn)}
    criteria = criteria_of({"category": question.category})
    return fields | {"answer": answers[turn - 1], "criteria": criteria}


def shown_references(question: Question, turn: int) -> str:
    """What the judge of a turn, 1 or 2, sees of a question's references; "" for none."""
    references = question.references[:turn]
    numbered = (f"Turn {place}: {text}" for place, text in enumerate(references, start=1))
    return "\n\n".join(numbered) if turn == 2 else "".join(references)


def _read_one(text: str) -> tuple[float, ...] | None:
    return scores_of(text, 1)


def _rated(scores: tuple[float, ...] | None, reply: Reply) -> tuple[float | None, str | None]:
    return (scores[0], None) if scores else (None, judge_error(reply, "no [[x]] from 1 to 10"))


def read_rating(reply: Reply) -> tuple[float | None, str | None]:
    """(score, None), or (None, reason): the last `[[x]]` of the reply, x from 1 to 10."""
    return _rated(None if reply.reason else _read_one(reply.text), reply)


def _notes(questions: Sequence[Question]) -> tuple[str, ...]:
    wrong = [question.id for question in questions if question.references and question.id in WRONG_REFERENCES]
    if not wrong:
        return ()
    return (f"{len(wrong)} published reference answers are known to be wrong in a turn: {', '.join(wrong)}",)


def _summarise(
    ratings: Sequence[TurnRating],
    answers: Sequence[tuple[str | Missing, str | Missing]],
    judge: AnyAgent,
    name: str,
    seed: int,
    notes: tuple[str, ...],
) -> MTBench:
    errors = [rating.error for rating in ratings if rating.error is not None]
    unanswered = sum(error.startswith("answer: ") for error in errors)
    unreadable = sum(error_kind(error) == "judge: unreadable" for error in errors)
    categories = dict.fromkeys(rating.category for rating in ratings)
    return MTBench(
        model=name,
        overall=mean_rating(ratings, seed),
        turns=tuple(mean_rating([r for r in ratings if r.turn == turn], seed) for turn in (1, 2)),
        categories={c: mean_rating([r for r in ratings if r.category == c], seed) for c in categories},
        call_errors=len(errors) - unanswered - unreadable,
        parse_errors=unreadable,
        unanswered=unanswered,
        missing=dict(Counter(map(error_kind, errors)).most_common()),
        score_missing_as_1=sum(1.0 if r.score is None else r.score for r in ratings) / len(ratings),
        judge=judge.name,
        fingerprint=judge.fingerprint,
        seed=seed,
        notes=notes,
        ratings=tuple(ratings),
        answers=tuple(answers),
    )


def mean_rating(ratings: Sequence[TurnRating], seed: int, resamples: int = 1000) -> Mean:
    """Mean of the readable ratings with a bootstrap interval over questions."""
    by_question: dict[str, list[float]] = {}
    for rating in ratings:
        if rating.score is not None:
            by_question.setdefault(rating.question, []).append(rating.score)
    rated = sum(map(len, by_question.values()))
    if not rated:
        return Mean(None, None, 0, len(ratings))
    sums = np.array([sum(scores) for scores in by_question.values()])
    sizes = np.array([len(scores) for scores in by_question.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975]).tolist()
    return Mean(float(sums.sum() / rated), (low, high), rated, len(ratings) - rated)
