"""The MT-Bench protocol: two-turn questions in categories, each turn rated from 1 to 10 by a judge.

Each model answers turn 1, then turn 2 with its own first answer in the conversation. Each turn is rated in a separate
call; that of turn 2 shows turn 1 as history. The judge sees the reference answers of a question, if there are any.
Failed calls, answers that did not come, cut and unreadable ratings are counted as errors and do not enter the means;
every mean states its number of ratings and of missing ones. Source: FastChat's llm_judge; its files of questions and
references are read unchanged. The field `reference` inside its question file is not shown to the judge, as in FastChat.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wizard_engine.agents.missing import Missing
from wizard_engine.agents.prompts import criteria_of, dialogue, request_messages
from wizard_engine.agents.protocol import Agent, Reply, Request
from wizard_engine.agents.replies import read_scores
from wizard_engine.data.records import Message

from .pairwise import JUDGE_TOKENS, error_kind, judge_error
from .questions import WRONG_REFERENCES, Question

AnswerFn = Callable[[list[tuple[Message, ...]], float], list[str | Missing]]
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


def mt_bench(
    answer_fn: AnswerFn,
    questions: Sequence[Question],
    *,
    judge: Agent,
    name: str = "model",
    seed: int = 0,
    repeats: int = 1,
    temperatures: Mapping[str, float] = TEMPERATURES,
    default_temperature: float = 0.0,
    max_tokens: int = JUDGE_TOKENS,
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
    Raises:
        ValueError: no questions, fewer than one repeat, or answers of another number than the conversations.
    """
    if not questions:
        raise ValueError("questions: expected at least one, got none; give a file with questions")
    heat = [temperatures.get(question.category, default_temperature) for question in questions]
    opened = [(Message("user", question.turns[0]),) for question in questions]
    first = _answers(answer_fn, opened, heat)
    followed = [
        None
        if isinstance(answer, Missing)
        else (*turn, Message("assistant", answer), Message("user", question.turns[1]))
        for turn, answer, question in zip(opened, first, questions)
    ]
    second = [
        before if isinstance(before, Missing) else answer
        for before, answer in zip(first, _answers(answer_fn, followed, heat))
    ]
    answers = list(zip(first, second))
    return rate(questions, answers, judge=judge, name=name, seed=seed, repeats=repeats, max_tokens=max_tokens)


def _answers(
    answer_fn: AnswerFn, conversations: Sequence[tuple[Message, ...] | None], heat: Sequence[float]
) -> list[str | Missing]:
    """Answers in order, "" for no conversation; one call of answer_fn per temperature."""
    answers: list[str | Missing] = [""] * len(conversations)
    asked = [index for index, conversation in enumerate(conversations) if conversation is not None]
    for temperature in sorted({heat[index] for index in asked}):
        chosen = [index for index in asked if heat[index] == temperature]
        texts = answer_fn([conversations[index] for index in chosen], temperature)
        if len(texts) != len(chosen):
            raise ValueError(f"answer_fn: expected {len(chosen)} answers, got {len(texts)}; return one each")
        for index, answer in zip(chosen, texts):
            answers[index] = answer
    return answers


def rate(
    questions: Sequence[Question],
    answers: Sequence[tuple[str | Missing, str | Missing]],
    *,
    judge: Agent,
    name: str = "model",
    seed: int = 0,
    repeats: int = 1,
    max_tokens: int = JUDGE_TOKENS,
) -> MTBench:
    """Rates given answers, a pair (turn 1, turn 2) per question; see `mt_bench`.

    Raises:
        ValueError: no questions, another number of answers, or fewer than one repeat.
    """
    if not questions or len(answers) != len(questions):
        raise ValueError(
            f"answers: expected a pair for each of {len(questions)} questions, got {len(answers)}; give both"
        )
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}; leave it out for one rating per turn")
    plan = [(index, turn, repeat) for index in range(len(questions)) for turn in (1, 2) for repeat in range(repeats)]
    asked = [item for item in plan if not any(isinstance(x, Missing) for x in answers[item[0]][: item[1]])]
    requests = [_request(questions[i], answers[i], turn, seed + repeat, max_tokens) for i, turn, repeat in asked]
    replies = dict(zip(asked, judge.respond(requests) if requests else []))
    ratings = []
    for index, turn, repeat in plan:
        reply = replies.get((index, turn, repeat))
        missing = next((x.reason for x in answers[index][:turn] if isinstance(x, Missing)), "")
        score, error = (None, f"answer: {missing}") if reply is None else read_rating(reply)
        ratings.append(TurnRating(questions[index].id, questions[index].category, turn, repeat, score, error))
    return _summarise(ratings, answers, judge, name, seed, _notes(questions))


def _request(question: Question, answers: tuple[str, str], turn: int, seed: int, max_tokens: int) -> Request:
    """The rating of one turn; turn 2 shows turn 1 as history, and the references of both turns."""
    history = () if turn == 1 else (Message("user", question.turns[0]), Message("assistant", answers[0]))
    references = question.references[:turn]
    numbered = (f"Turn {place}: {text}" for place, text in enumerate(references, start=1))
    reference = "\n\n".join(numbered) if turn == 2 else "".join(references)
    fields = {"history": dialogue(history), "instruction": question.turns[turn - 1], "reference": reference}
    fields["criteria"] = criteria_of({"category": question.category})
    messages = request_messages("rate", **fields, answer=answers[turn - 1])
    return Request("rate", messages, seed=seed, max_tokens=max_tokens)


def read_rating(reply: Reply) -> tuple[float | None, str | None]:
    """(score, None), or (None, reason): the last `[[x]]` of the reply, x from 1 to 10."""
    scores = None if reply.reason else read_scores(reply.text, 1)
    return (scores[0], None) if scores else (None, judge_error(reply, "no [[x]] from 1 to 10"))


def _notes(questions: Sequence[Question]) -> tuple[str, ...]:
    wrong = [question.id for question in questions if question.references and question.id in WRONG_REFERENCES]
    if not wrong:
        return ()
    return (f"{len(wrong)} published reference answers are known to be wrong in a turn: {', '.join(wrong)}",)


def _summarise(
    ratings: Sequence[TurnRating],
    answers: Sequence[tuple[str | Missing, str | Missing]],
    judge: Agent,
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
