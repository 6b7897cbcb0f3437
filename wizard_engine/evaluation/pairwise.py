"""Blind pairwise preference: two models' answers to the same prompts, judged unlabelled and in both orders.

The answer shown first is drawn per prompt, and the second game swaps the two. A model wins a prompt only if both games
agree. Failed calls, cut and unreadable verdicts, and prompts that one of the two did not answer are counted as errors
with their reasons, never as ties and never as a loss.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from wizard_engine.agents.missing import Missing
from wizard_engine.agents.prompts import dialogue, request_messages
from wizard_engine.agents.protocol import Agent, Reply, Request
from wizard_engine.agents.replies import read_scores
from wizard_engine.data.records import Message

from .accuracy import wilson_interval

TIE_MARGIN = 0.1
JUDGE_TOKENS = 1024
BOOTSTRAP = 2000
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Battle:
    """One prompt of a comparison: score 1 if a won, 0 if b won, 0.5 for a tie; None if judging failed.

    Attributes:
        prompt: number of the prompt.
        games: (score of a, score of b) in each of the two games; None for an unreadable verdict.
        a_first: whether a's answer was first in the first game.
        errors: why a game has no verdict.
    """

    a: str
    b: str
    prompt: int
    score: float | None
    games: tuple[tuple[float, float] | None, ...]
    a_first: bool
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairwise:
    """Result of a comparison of a with b.

    Attributes:
        wins, losses, ties: prompts that a won, lost, or neither; errors: prompts without two readable verdicts.
        missing: reason -> prompts, for the errors: "answer: length", "judge: status 400", "judge: unreadable".
        win_rate: wins / (wins + losses), ties removed; None if all are ties. ci95: its bootstrap interval
            (Wilson's if all decided prompts have the same winner).
        win_rate_with_ties: (wins + ties/2) / (wins + losses + ties). ci95_with_ties: its bootstrap interval.
        flips: prompts whose two games have different winners. first_wins: fraction of decided games won by the answer
            shown first; far from 0.5 the judge is biased by position. longer_wins: fraction of decided prompts won by
            the longer answer.
        judge, fingerprint, seed: values that reproduce the comparison.
    """

    a: str
    b: str
    wins: int
    losses: int
    ties: int
    errors: int
    win_rate: float | None
    ci95: tuple[float, float] | None
    win_rate_with_ties: float | None
    ci95_with_ties: tuple[float, float] | None
    flips: int
    first_wins: float | None
    longer_wins: float | None
    judge: str
    fingerprint: str
    seed: int
    missing: dict[str, int] = field(default_factory=dict)
    battles: tuple[Battle, ...] = field(repr=False, default=())

    def to_json(self) -> dict[str, Any]:
        """The result without its battles."""
        return {name: value for name, value in vars(self).items() if name != "battles"}


def pairwise(
    answers_a: Sequence[str | Missing],
    answers_b: Sequence[str | Missing],
    prompts: Sequence[Prompt],
    *,
    judge: Agent,
    name_a: str = "a",
    name_b: str = "b",
    seed: int = 0,
    tie_margin: float = TIE_MARGIN,
    max_tokens: int = JUDGE_TOKENS,
) -> Pairwise:
    """Comparison of two models' answers by a judge that sees neither names nor sources.

    Args:
        answers_a, answers_b: an answer per prompt; one that is Missing is not judged.
        prompts: instructions, or conversations that end with a user turn.
        judge: answers the task "judge"; asked twice per prompt in one batch, at temperature 0.
        seed: of the order of the sources, of the judge's requests, and of the bootstrap over prompts.
        tie_margin: scores that differ by at most this are a tie.
        max_tokens: longest verdict with its explanation.
    Raises:
        ValueError: no prompts, or another number of answers than of prompts.
    """
    if not prompts or not len(answers_a) == len(answers_b) == len(prompts):
        raise ValueError(
            f"answers: expected one per prompt from both models and at least one prompt, got {len(answers_a)} and "
            f"{len(answers_b)} for {len(prompts)} prompts; give both for the same prompts"
        )
    order = random.Random(f"order:{seed}")
    a_first = [order.random() < 0.5 for _ in prompts]
    requests = []
    unanswered = [next((x.reason for x in pair if isinstance(x, Missing)), None) for pair in zip(answers_a, answers_b)]
    for prompt, a, b, first, missing in zip(prompts, answers_a, answers_b, a_first, unanswered):
        shown = (a, b) if first else (b, a)
        if missing is None:
            requests += [_request(prompt, *order, seed, max_tokens) for order in (shown, shown[::-1])]
    replies = iter(judge.respond(requests) if requests else [])
    battles = []
    for index, (first, missing) in enumerate(zip(a_first, unanswered)):
        if missing is not None:
            battles.append(Battle(name_a, name_b, index, None, (None, None), first, (f"answer: {missing}",)))
            continue
        games, errors = _read_games([next(replies), next(replies)], first)
        battles.append(Battle(name_a, name_b, index, _score(games, tie_margin), games, first, errors))
    return _summarise(battles, answers_a, answers_b, judge, seed, tie_margin)


def _request(prompt: Prompt, first: str, second: str, seed: int, max_tokens: int) -> Request:
    history, instruction = split_prompt(prompt)
    fields = {"history": history, "instruction": instruction, "answer_a": first, "answer_b": second}
    return Request("judge", request_messages("judge", **fields), seed=seed, max_tokens=max_tokens)


def split_prompt(prompt: Prompt) -> tuple[str, str]:
    """The conversation before the last user turn as text, and that turn."""
    if isinstance(prompt, str):
        return "", prompt
    if not prompt or prompt[-1].role != "user":
        raise ValueError(
            "prompt: expected a conversation that ends with a user turn, got another; remove the last answer"
        )
    return dialogue(prompt[:-1]), prompt[-1].content


def _read_games(replies: Sequence, a_first: bool) -> tuple[tuple[tuple[float, float] | None, ...], tuple[str, ...]]:
    """(score of a, score of b) of both games; the second showed the answers in the other order."""
    games, errors = [], []
    for reply, first in zip(replies, (a_first, not a_first)):
        scores = None if reply.reason else read_scores(reply.text, 2)
        if scores is None:
            errors.append(judge_error(reply, "no two scores [[x]] [[y]] from 1 to 10"))
        games.append(scores if scores is None or first else scores[::-1])
    return tuple(games), tuple(errors)


def judge_error(reply: Reply, expected: str) -> str:
    """Why a judge's reply is no verdict, its kind first: "judge: length: ...", "judge: unreadable: ..."."""
    if reply.is_cut:
        return f"judge: length: the verdict was cut at its limit, after {reply.text[-60:]!r}; raise the limit"
    return (
        f"judge: {reply.error}" if reply.error is not None else f"judge: unreadable: {expected} in {reply.text[-60:]!r}"
    )


def error_kind(error: str) -> str:
    """The first two parts of an error, which can be counted: "judge: length", "answer: status 400"."""
    who, _, rest = error.partition(": ")
    return f"{who}: {rest.partition(': ')[0][:40]}"


def game_winner(scores: tuple[float, float], tie_margin: float) -> int:
    """1 if the first score is higher, -1 if the second is, 0 within the margin."""
    difference = scores[0] - scores[1]
    return 0 if abs(difference) <= tie_margin else 1 if difference > 0 else -1


def _score(games: Sequence[tuple[float, float] | None], tie_margin: float) -> float | None:
    if None in games:
        return None
    first, second = (game_winner(game, tie_margin) for game in games)
    return 0.5 + 0.5 * first if first == second else 0.5


def _summarise(
    battles: Sequence[Battle],
    answers_a: Sequence[str | Missing],
    answers_b: Sequence[str | Missing],
    judge: Agent,
    seed: int,
    margin: float,
) -> Pairwise:
    scores = [battle.score for battle in battles]
    wins, losses, ties = (scores.count(value) for value in (1.0, 0.0, 0.5))
    judged = [battle for battle in battles if battle.score is not None]
    winners = [[game_winner(game, margin) for game in battle.games] for battle in judged]
    shown_first = [
        winner == (1 if battle.a_first == (place == 0) else -1)
        for battle, pair in zip(judged, winners)
        for place, winner in enumerate(pair)
        if winner
    ]
    lengths = [len(answers_a[b.prompt]) - len(answers_b[b.prompt]) for b in judged]
    longer = [(gap > 0) == (b.score == 1) for b, gap in zip(judged, lengths) if b.score != 0.5 and gap]
    without, with_ties = bootstrap_rates(wins, losses, ties, seed=seed)
    return Pairwise(
        a=battles[0].a,
        b=battles[0].b,
        wins=wins,
        losses=losses,
        ties=ties,
        errors=len(battles) - len(judged),
        win_rate=wins / (wins + losses) if wins + losses else None,
        ci95=without,
        win_rate_with_ties=(wins + ties / 2) / len(judged) if judged else None,
        ci95_with_ties=with_ties,
        flips=sum(pair[0] * pair[1] < 0 for pair in winners),
        first_wins=_mean(shown_first),
        longer_wins=_mean(longer),
        judge=judge.name,
        fingerprint=judge.fingerprint,
        seed=seed,
        missing=dict(Counter(error_kind(battle.errors[0]) for battle in battles if battle.errors).most_common()),
        battles=tuple(battles),
    )


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def bootstrap_rates(
    wins: int, losses: int, ties: int, *, seed: int, resamples: int = BOOTSTRAP
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """95 % intervals of the win rate without and with ties, by resampling prompts; None without a decided prompt.

    A prompt has one of three outcomes, so resampling prompts is drawing the three counts from a multinomial. If all
    decided prompts have the same winner, the resamples do not vary, and Wilson's interval is used without ties.
    """
    total = wins + losses + ties
    if not total:
        return None, None
    shares = np.array([wins, losses, ties]) / total
    won, lost, tied = np.random.default_rng(seed).multinomial(total, shares, size=resamples).T
    decided = won + lost > 0
    with_ties = _interval((won + tied / 2) / total)
    if not wins or not losses:
        return (wilson_interval(wins, wins + losses) if wins + losses else None), with_ties
    return _interval(won[decided] / (won + lost)[decided]), with_ties


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high


def all_pairs(
    answers: Mapping[str, Sequence[str | Missing]],
    prompts: Sequence[Prompt],
    *,
    judge: Agent,
    seed: int = 0,
    baseline: str | None = None,
    max_tokens: int = JUDGE_TOKENS,
    progress: Callable[[str], None] | None = None,
) -> list[Pairwise]:
    """Comparisons of every two models, or of each model with `baseline`; the later model of a pair is a.

    Args:
        answers: model -> an answer per prompt; at least two models.   max_tokens: longest verdict.
        progress: called with a line of text after each comparison.
    Raises:
        ValueError: fewer than two models, or a baseline that is not among them.
    """
    if len(answers) < 2:
        raise ValueError(f"models: expected at least two, got {len(answers)}; name another one")
    if baseline is not None and baseline not in answers:
        raise ValueError(f"baseline: expected one of {', '.join(answers)}, got {baseline!r}; choose one of them")
    pairs = [(name, baseline) for name in answers if name != baseline] if baseline else []
    results = []
    for a, b in pairs or [(later, earlier) for earlier, later in combinations(answers, 2)]:
        settings = {"name_a": a, "name_b": b, "seed": seed, "max_tokens": max_tokens}
        result = pairwise(answers[a], answers[b], prompts, judge=judge, **settings)
        results.append(result)
        if progress is not None:
            progress(f"{a} : {b}  {result.wins} : {result.losses}, {result.ties} ties, {result.errors} errors")
    return results
