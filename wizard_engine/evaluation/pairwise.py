"""Blind pairwise preference: two models' answers to the same prompts, judged unlabelled and in both orders.

The answer shown first is drawn per prompt, and the second game swaps the two. A model wins a prompt only if both games
agree. Failed calls, cut and unreadable verdicts, and prompts that one of the two did not answer are counted as errors
with their reasons, never as ties and never as a loss.

Prompts are judged in any order, many at once. The battles are on disk, in order; memory holds a few bytes of each.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from wizard_engine.agents.aids import aids
from wizard_engine.agents.calls import JUDGE_TOKENS, AnyAgent, Calls, Limits
from wizard_engine.agents.missing import Missing, Reasons
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.proportions import wilson_interval
from wizard_engine.data.records import Message
from wizard_engine.runtime.spill import Spill

from .battles import TIE_MARGIN, Battle, Judging, Outcome, Prompt, battle_of, split_prompt

BOOTSTRAP = 2000
_SCORES = (0.0, 0.5, 1.0, None)
_MISSING = _SCORES.index(None)


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
        judges: where there are several: name -> reason -> prompts that the judge gave no two verdicts on. `missing`
            then counts the prompts that no judge gave a verdict on.
        battles: by prompt, read from disk.
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
    judges: dict[str, dict[str, int]] = field(default_factory=dict)
    battles: Sequence[Battle] = field(repr=False, default=())
    scores: Sequence[float | None] = field(repr=False, default=())

    def to_json(self) -> dict[str, Any]:
        """The result without its battles; without `judges` where there is one."""
        left_out = {"battles", "scores"} | (set() if self.judges else {"judges"})
        return {name: value for name, value in vars(self).items() if name not in left_out}


class Battles(Sequence[Battle]):
    """The battles of one comparison, read from the file of all of them."""

    def __init__(self, spill: Spill[Battle], start: int, count: int) -> None:
        self._spill, self._start, self._count = spill, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place):
        """One battle, or a list of them for a slice."""
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(f"battles: expected a place below {self._count}, got {place}")
        return self._spill[self._start + place % self._count]


class Scores(Sequence[float | None]):
    """The scores of one comparison by prompt, a byte each."""

    def __init__(self, count: int) -> None:
        self.codes = bytearray([_MISSING]) * count

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, place):
        """One score, or a list of them for a slice."""
        codes = self.codes[place]
        return [_SCORES[code] for code in codes] if isinstance(place, slice) else _SCORES[codes]

    def __iter__(self) -> Iterator[float | None]:
        return (_SCORES[code] for code in self.codes)


class Tally:
    """What is counted of the battles of one pair of models, in any order of the prompts."""

    def __init__(self, a: str, b: str, prompts: int, judges: int) -> None:
        self.a, self.b, self.scores = a, b, Scores(prompts)
        self.missing, self.by_judge = Reasons(), [Reasons() for _ in range(judges)]
        self.flips = 0
        # [won by the answer shown first, decided games], [won by the longer answer, decided prompts]
        self.first, self.longer = [0, 0], [0, 0]

    def add(self, outcome: Outcome) -> None:
        """Count one battle."""
        battle = outcome.battle
        for reasons, reason in zip(self.by_judge, outcome.reasons):
            if reason:
                reasons.add(reason, battle.prompt)
        if battle.score is None:
            self.missing.add(outcome.reason, battle.prompt)
            return
        self.scores.codes[battle.prompt] = _SCORES.index(battle.score)
        self.flips += outcome.winners[0] * outcome.winners[1] < 0
        for game, winner in enumerate(outcome.winners):
            if winner:
                self.first[0] += winner == (1 if battle.a_first == (game == 0) else -1)
                self.first[1] += 1
        if battle.score != 0.5 and outcome.longer:
            self.longer[0] += (outcome.longer > 0) == (battle.score == 1)
            self.longer[1] += 1

    def result(self, judges: Sequence[AnyAgent], seed: int, battles: Sequence[Battle]) -> Pairwise:
        """The comparison of all battles."""
        losses, ties, wins, errors = (self.scores.codes.count(code) for code in range(len(_SCORES)))
        judged = wins + losses + ties
        without, with_ties = bootstrap_rates(wins, losses, ties, seed=seed)
        return Pairwise(
            a=self.a,
            b=self.b,
            wins=wins,
            losses=losses,
            ties=ties,
            errors=errors,
            win_rate=wins / (wins + losses) if wins + losses else None,
            ci95=without,
            win_rate_with_ties=(wins + ties / 2) / judged if judged else None,
            ci95_with_ties=with_ties,
            flips=self.flips,
            first_wins=_share(*self.first),
            longer_wins=_share(*self.longer),
            judge=", ".join(judge.name for judge in judges),
            fingerprint=", ".join(judge.fingerprint for judge in judges),
            seed=seed,
            missing=self.missing.ranked(),
            judges=self._judges(judges),
            battles=battles,
            scores=self.scores,
        )

    def _judges(self, judges: Sequence[AnyAgent]) -> dict[str, dict[str, int]]:
        if len(judges) == 1:
            return {}
        return {judge.name: reasons.ranked() for judge, reasons in zip(judges, self.by_judge)}


class Tournament:
    """Comparisons of pairs of models, prompt by prompt in any order.

    Args:
        pairs: (a, b) each.   prompts: number of them.
        folder: of the temporary file that holds the battles (see runtime.spill).
    Raises:
        ValueError: no judge, or several of the same name.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], prompts: int, judging: Judging, *, folder: Path | None = None
    ) -> None:
        names = [judge.name for judge in judging.judges]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"judge: expected different judges, got {', '.join(names) or 'none'}; name each once")
        self.pairs, self.judging, self.prompts = list(pairs), judging, prompts
        order = random.Random(f"order:{judging.seed}")
        self.a_first = bytes(order.random() < 0.5 for _ in range(prompts))
        self.tallies = [Tally(a, b, prompts, len(names)) for a, b in pairs]
        self.battles: Spill[Battle] = Spill(folder, dump=Battle.to_json, load=battle_of)

    @property
    def width(self) -> int:
        """Verdicts on one prompt, which are asked for at once."""
        return 2 * len(self.pairs) * len(self.judging.judges)

    async def play(
        self,
        place: int,
        prompt: Prompt,
        answers: Mapping[str, Awaitable[str | Missing]],
        row: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> list[Outcome]:
        """The battles of all pairs on one prompt, each as soon as its two answers are there.

        Args:
            attributes: of the row: they choose the judges' criteria, and may hold a reference.
        """
        text, first = split_prompt(prompt), bool(self.a_first[place])
        told = aids(attributes, (Message("user", prompt),) if isinstance(prompt, str) else prompt)
        async with asyncio.TaskGroup() as group:
            played = [
                group.create_task(self.judging.battle((a, b), place, text, (answers[a], answers[b]), first, row, told))
                for a, b in self.pairs
            ]
        return [battle.result() for battle in played]

    def add(self, place: int, outcomes: Sequence[Outcome]) -> None:
        """Count the battles on one prompt, and write them."""
        for pair, (tally, outcome) in enumerate(zip(self.tallies, outcomes)):
            tally.add(outcome)
            self.battles.put(pair * self.prompts + place, outcome.battle)

    def results(self) -> list[Pairwise]:
        """The comparisons, in the order of the pairs."""
        of_pair = (Battles(self.battles, pair * self.prompts, self.prompts) for pair in range(len(self.pairs)))
        judging = self.judging
        return [tally.result(judging.judges, judging.seed, own) for tally, own in zip(self.tallies, of_pair)]


def scored(results: Iterable[Pairwise]) -> Iterator[tuple[str, str, float | None]]:
    """(a, b, score of a) of every battle, as `elo` takes them; from memory."""
    for result in results:
        yield from ((result.a, result.b, score) for score in result.scores)


def model_pairs(models: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
    """Every two models, or each model and `baseline`; the later model of a pair is a.

    Raises:
        ValueError: fewer than two models, or a baseline that is not among them.
    """
    if len(models) < 2:
        raise ValueError(f"models: expected at least two, got {len(models)}; name another one")
    if baseline is not None and baseline not in models:
        raise ValueError(f"baseline: expected one of {', '.join(models)}, got {baseline!r}; choose one of them")
    if baseline is not None:
        return [(name, baseline) for name in models if name != baseline]
    return [(later, earlier) for earlier, later in combinations(models, 2)]


def pairwise(
    answers_a: Sequence[str | Missing],
    answers_b: Sequence[str | Missing],
    prompts: Sequence[Prompt],
    *,
    judge: AnyAgent | Sequence[AnyAgent],
    name_a: str = "a",
    name_b: str = "b",
    seed: int = 0,
    tie_margin: float = TIE_MARGIN,
    max_tokens: int = JUDGE_TOKENS,
    scheduler: Scheduler | None = None,
    attributes: Sequence[Mapping[str, Any]] | None = None,
) -> Pairwise:
    """Comparison of two models' answers by a judge that sees neither names nor sources.

    Args:
        answers_a, answers_b: an answer per prompt; one that is Missing is not judged.
        prompts: instructions, or conversations that end with a user turn.
        judge: answers the task "judge"; asked twice per prompt, at temperature 0. Of several the mean scores count.
        seed: of the order of the sources, of the judge's requests, and of the bootstrap over prompts.
        tie_margin: scores that differ by at most this are a tie.
        max_tokens: longest verdict with its explanation.
        scheduler: of the calls; default: one without a ledger.
        attributes: of each prompt's row: a category or skill chooses the criteria, a reference is shown.
    Raises:
        ValueError: no prompts, another number of answers or attributes than of prompts, or two equal names.
    """
    if not prompts or not len(answers_a) == len(answers_b) == len(prompts):
        raise ValueError(
            f"answers: expected one per prompt from both models and at least one prompt, got {len(answers_a)} and "
            f"{len(answers_b)} for {len(prompts)} prompts; give both for the same prompts"
        )
    if name_a == name_b:
        raise ValueError(f"names: expected two different ones, got {name_a!r} twice; leave them out for a and b")
    answers = {name_a: answers_a, name_b: answers_b}
    settings = {"judge": judge, "seed": seed, "tie_margin": tie_margin, "max_tokens": max_tokens}
    settings["attributes"] = attributes
    return _compared(answers, [(name_a, name_b)], prompts, scheduler=scheduler, **settings)[0]


def all_pairs(
    answers: Mapping[str, Sequence[str | Missing]],
    prompts: Sequence[Prompt],
    *,
    judge: AnyAgent | Sequence[AnyAgent],
    seed: int = 0,
    baseline: str | None = None,
    max_tokens: int = JUDGE_TOKENS,
    progress: Callable[[str], None] | None = None,
    scheduler: Scheduler | None = None,
    attributes: Sequence[Mapping[str, Any]] | None = None,
) -> list[Pairwise]:
    """Comparisons of every two models, or of each model with `baseline`; the later model of a pair is a.

    Args:
        answers: model -> an answer per prompt; at least two models.   max_tokens: longest verdict.
        progress: called with a line of text for each comparison.
        judge, scheduler, attributes: as for `pairwise`.
    Raises:
        ValueError: fewer than two models, a baseline that is not among them, no prompts, or another number of answers
            or attributes.
    """
    pairs = model_pairs(list(answers), baseline)
    for name, texts in answers.items():
        if not prompts or len(texts) != len(prompts):
            raise ValueError(
                f"answers of {name}: expected one per prompt and at least one prompt, got {len(texts)} for "
                f"{len(prompts)} prompts; give all for the same prompts"
            )
    settings = {"judge": judge, "seed": seed, "tie_margin": TIE_MARGIN, "max_tokens": max_tokens}
    settings["attributes"] = attributes
    results = _compared(answers, pairs, prompts, scheduler=scheduler, **settings)
    for r in results if progress is not None else []:
        progress(f"{r.a} : {r.b}  {r.wins} : {r.losses}, {r.ties} ties, {r.errors} errors")
    return results


def _compared(
    answers: Mapping[str, Sequence[str | Missing]],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Prompt],
    *,
    judge: AnyAgent | Sequence[AnyAgent],
    seed: int,
    tie_margin: float,
    max_tokens: int,
    scheduler: Scheduler | None,
    attributes: Sequence[Mapping[str, Any]] | None,
) -> list[Pairwise]:
    """Comparisons of given answers."""
    if attributes is not None and len(attributes) != len(prompts):
        raise ValueError(
            f"attributes: expected those of {len(prompts)} prompts, got {len(attributes)}; give them for each, in order"
        )
    judges = tuple(judge) if isinstance(judge, Sequence) else (judge,)
    scheduler = scheduler or Scheduler(quiet=True)
    calls = Calls(scheduler, limits=Limits(judge=max_tokens))
    tournament = Tournament(pairs, len(prompts), Judging(judges, calls, seed=seed, tie_margin=tie_margin))

    async def work(item: tuple[int, Prompt]) -> list[Outcome]:
        place, prompt = item
        said = {name: given(texts[place]) for name, texts in answers.items()}
        return await tournament.play(place, prompt, said, attributes=attributes[place] if attributes else None)

    width = tournament.width
    stage = {"desc": "battles", "total": len(prompts), "width": width, "calls": width, "agents": judges}
    scheduler.run(scheduler.rows(enumerate(prompts), work, tournament.add, **stage))
    return tournament.results()


def given(answer: str | Missing) -> Awaitable[str | Missing]:
    """An answer that is there."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(answer)
    return future


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


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
