"""One battle: two models' answers to one prompt, judged unlabelled and in both orders by one judge or several."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wizard_engine.agents.calls import AnyAgent, Calls
from wizard_engine.agents.missing import Missing
from wizard_engine.agents.prompts import dialogue
from wizard_engine.agents.protocol import Reply
from wizard_engine.agents.replies import read_scores
from wizard_engine.data.records import Message

TIE_MARGIN = 0.1
Prompt = str | Sequence[Message]
# (score of a, score of b) in the games of one battle; None for a game without a verdict.
Games = tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Battle:
    """One prompt of a comparison: score 1 if a won, 0 if b won, 0.5 for a tie; None if judging failed.

    Attributes:
        prompt: number of the prompt.
        games: (score of a, score of b) in each of the two games; of several judges the mean over those that gave both
            scores. None where there is no verdict.
        a_first: whether a's answer was first in the first game.
        errors: why a judge gave no verdict on a game.
        judges: the games of each judge, where there are several.
    """

    a: str
    b: str
    prompt: int
    score: float | None
    games: Games
    a_first: bool
    errors: tuple[str, ...] = ()
    judges: tuple[Games, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The battle as a JSON object; without `judges` where there is one."""
        return {name: value for name, value in vars(self).items() if name != "judges" or value}


def battle_of(line: dict[str, Any]) -> Battle:
    """The battle of which `to_json` made this object."""
    games = {"games": _games_of(line["games"]), "judges": tuple(map(_games_of, line.get("judges", ())))}
    return Battle(**{**line, **games, "errors": tuple(line["errors"])})


def _games_of(games: Sequence[Sequence[float] | None]) -> Games:
    return tuple(game if game is None else (game[0], game[1]) for game in games)


class Outcome(NamedTuple):
    """A battle, and what its statistics need beside it.

    Attributes:
        longer: 1 where a's answer is the longer one, -1 where b's is, 0 for none.
        winners: of the two games: 1 for a, -1 for b, 0 within the margin; empty where one has no verdict.
        reason: why there is no score: "answer: length", "judge: unreadable"; "" where there is one.
        reasons: of each judge, why a verdict of its own is missing, or "".
    """

    battle: Battle
    longer: int
    winners: tuple[int, ...]
    reason: str
    reasons: tuple[str, ...]


class Judging:
    """Judges of battles, asked at once.

    A game is scored by the mean over the judges that gave both scores; a model wins a battle if both games agree.

    Args:
        judges: at least one; answer the task "judge", at temperature 0.
        calls: with the limit of a verdict.
        seed: of the judges' requests.   tie_margin: scores that differ by at most this are a tie.
    """

    def __init__(self, judges: Sequence[AnyAgent], calls: Calls, *, seed: int, tie_margin: float = TIE_MARGIN) -> None:
        self.judges, self.calls, self.seed, self.tie_margin = tuple(judges), calls, seed, tie_margin

    async def battle(
        self,
        names: tuple[str, str],
        place: int,
        prompt: tuple[str, str],
        answers: tuple[Awaitable[str | Missing], Awaitable[str | Missing]],
        a_first: bool,
        row: str = "",
        reference: str = "",
    ) -> Outcome:
        """The battle of two models on a prompt, as soon as both answers are there.

        Args:
            place: number of the prompt.   prompt: see `split_prompt`.   row: id of the prompt.
            reference: answer known to be right, which the judges see; "" for none.
        """
        pair = (await answers[0], await answers[1])
        for answer in pair:
            if isinstance(answer, Missing):
                reason = f"answer: {answer.reason}"
                battle = Battle(*names, place, None, (None, None), a_first, (reason,))
                return Outcome(battle, 0, (), error_kind(reason), ())
        shown = [(pair if is_first else pair[::-1], is_first) for is_first in (a_first, not a_first)]
        asked = (self._verdict(judge, prompt, *order, row, reference) for judge in self.judges for order in shown)
        verdicts = await asyncio.gather(*asked)
        return self._outcome(names, place, pair, a_first, [verdicts[i : i + 2] for i in range(0, len(verdicts), 2)])

    async def _verdict(
        self,
        judge: AnyAgent,
        prompt: tuple[str, str],
        shown: tuple[str, str],
        a_is_first: bool,
        row: str,
        reference: str,
    ) -> tuple[tuple[float, float] | None, str]:
        """(score of a, score of b) or None, and the reason for None."""
        fields = {"history": prompt[0], "instruction": prompt[1], "answer_a": shown[0], "answer_b": shown[1]}
        fields |= {"reference": reference}
        scores, reply = await self.calls.explained(judge, "judge", fields, self.seed, read=_read_pair, row=row)
        if scores is None:
            return None, judge_error(reply, "no two scores [[x]] [[y]] from 1 to 10")
        return (scores if a_is_first else scores[::-1]), ""

    def _outcome(
        self, names: tuple[str, str], place: int, answers: tuple[str, str], a_first: bool, verdicts: Sequence[Sequence]
    ) -> Outcome:
        errors = [[error for _, error in pair if error] for pair in verdicts]
        reasons = tuple(error_kind(of_judge[0]) if of_judge else "" for of_judge in errors)
        by_judge = tuple(tuple(scores for scores, _ in pair) for pair in verdicts)
        games = tuple(_mean_game([of_judge[game] for of_judge in by_judge]) for game in (0, 1))
        winners = () if None in games else tuple(game_winner(game, self.tie_margin) for game in games)
        score = None if not winners else 0.5 + 0.5 * winners[0] if winners[0] == winners[1] else 0.5
        several = len(self.judges) > 1
        said = [
            f"{error} ({judge.name})" if several else error
            for judge, of_judge in zip(self.judges, errors)
            for error in of_judge
        ]
        battle = Battle(*names, place, score, games, a_first, tuple(said), by_judge if several else ())
        gap = len(answers[0]) - len(answers[1])
        reason = "" if winners else next(reason for reason in reasons if reason)
        return Outcome(battle, (gap > 0) - (gap < 0), winners, reason, reasons)


def _read_pair(text: str) -> tuple[float, float] | None:
    return read_scores(text, 2)


def _mean_game(scores: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    given = [pair for pair in scores if pair is not None]
    return (sum(a for a, _ in given) / len(given), sum(b for _, b in given) / len(given)) if given else None


def split_prompt(prompt: Prompt) -> tuple[str, str]:
    """The conversation before the last user turn as text, and that turn."""
    if isinstance(prompt, str):
        return "", prompt
    if not prompt or prompt[-1].role != "user":
        raise ValueError(
            "prompt: expected a conversation that ends with a user turn, got another; remove the last answer"
        )
    return dialogue(prompt[:-1]), prompt[-1].content


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
