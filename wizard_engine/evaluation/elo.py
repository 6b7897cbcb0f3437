"""Elo ratings of models by the Bradley-Terry model, with bootstrap intervals, anchored at one model's rating."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SCALE = 400 / math.log(10)


@dataclass(frozen=True)
class Rating:
    """Rating of a model: median of the bootstrap, its 95 % interval, the estimate on all battles, battles fought."""

    model: str
    elo: float
    low: float
    high: float
    estimate: float
    battles: int


def elo(
    battles: Iterable[tuple[str, str, float | None]],
    *,
    anchor: str,
    anchor_elo: float = 1000.0,
    bootstrap: int = 100,
    prior: float = 0.5,
    seed: int = 0,
) -> list[Rating]:
    """Ratings from battles, the best first.

    P(a beats b) = 1 / (1 + 10^((elo_b - elo_a) / 400)), maximum likelihood, a tie counting as half a win for each.

    Args:
        battles: (a, b, score of a: 1, 0.5 or 0); a score of None (judging failed) does not count. Objects with the
            attributes a, b and score, such as pairwise.Battle, work too.
        anchor: the model whose rating is `anchor_elo`, in every resample.
        bootstrap: resamples of the battles.
        prior: wins added to both models of every pair that met, so that the rating of a model that never lost is
        finite.
    Raises:
        ValueError: no battles, a score out of range, an anchor that did not fight, models not connected to it, or with
            prior 0 a model that won or lost all.
    """
    triples = Counter(triple for triple in map(_triple, battles) if triple[2] is not None)
    models = list(dict.fromkeys(name for a, b, _ in triples for name in (a, b)))
    _check(triples, models, anchor)
    wins = _win_matrix(triples, models, np.fromiter(triples.values(), np.float64))
    estimate = _fit(wins, prior, models.index(anchor), anchor_elo, models)
    counts = np.fromiter(triples.values(), np.float64)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(int(counts.sum()), counts / counts.sum(), size=bootstrap)
    met = wins + wins.T > 0
    least = max(prior, 1e-3)
    resampled = (_win_matrix(triples, models, draw.astype(np.float64)) for draw in draws)
    fitted = [_fit(drawn, least, models.index(anchor), anchor_elo, models, met) for drawn in resampled]
    spread = np.array(fitted) if fitted else estimate[None]
    low, median, high = np.quantile(spread, [0.025, 0.5, 0.975], axis=0)
    fought = (wins + wins.T).sum(axis=1)
    table = [
        Rating(name, float(median[i]), float(low[i]), float(high[i]), float(estimate[i]), round(fought[i]))
        for i, name in enumerate(models)
    ]
    return sorted(table, key=lambda rating: (-rating.elo, rating.model))


def connected(battles: Iterable[tuple[str, str, float | None]], anchor: str) -> set[str]:
    """The models that have met the anchor in a battle with a score, directly or over others; the anchor among them."""
    pairs = {(a, b) for a, b, score in battles if score is not None}
    reached, waiting = {anchor}, [anchor]
    while waiting:
        name = waiting.pop()
        near = {b if a == name else a for a, b in pairs if name in (a, b)} - reached
        reached |= near
        waiting += near
    return reached


def _triple(battle) -> tuple[str, str, float | None]:
    a, b, score = battle if isinstance(battle, tuple) else (battle.a, battle.b, battle.score)
    if a == b or (score is not None and not 0 <= score <= 1):
        raise ValueError(f"battle: expected two models and a score 0 to 1, got {a!r}, {b!r}, {score!r}; correct it")
    return a, b, score


def _check(triples: Counter, models: list[str], anchor: str) -> None:
    if not triples:
        raise ValueError("battles: expected at least one with a score, got none; judge some prompts first")
    if anchor not in models:
        raise ValueError(f"anchor: expected one of {', '.join(models)}, got {anchor!r}; choose one of them")
    reached = connected(triples, anchor)
    if len(reached) < len(models):
        apart = ", ".join(name for name in models if name not in reached)
        raise ValueError(f"battles: expected every model connected to {anchor}, got {apart} apart; let them meet")


def _win_matrix(triples: Counter, models: list[str], counts: np.ndarray) -> np.ndarray:
    """wins[i, j]: how often model i beat model j, ties half."""
    place = {name: index for index, name in enumerate(models)}
    wins = np.zeros((len(models), len(models)))
    for (a, b, score), count in zip(triples, counts):
        wins[place[a], place[b]] += count * score
        wins[place[b], place[a]] += count * (1 - score)
    return wins


def _fit(
    wins: np.ndarray, prior: float, anchor: int, anchor_elo: float, models: list[str], met: np.ndarray | None = None
) -> np.ndarray:
    """Maximum-likelihood ratings by Newton's method on the logits, the anchor held fixed."""
    met = wins + wins.T > 0 if met is None else met
    wins = wins + prior * met
    if prior == 0:
        _check_finite(wins, models)
    games = wins + wins.T
    free = [index for index in range(len(wins)) if index != anchor]
    theta = np.zeros(len(wins))
    for _ in range(100):
        expected = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
        gradient = (wins - games * expected).sum(axis=1)
        weight = games * expected * expected.T
        hessian = np.diag(weight.sum(axis=1)) - weight
        step = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        theta[free] += np.clip(step, -2, 2)
        if np.abs(step).max(initial=0) < 1e-10:
            break
    return anchor_elo + SCALE * theta


def _check_finite(wins: np.ndarray, models: list[str]) -> None:
    """Raises ValueError if some models won every battle against the others: then no finite ratings exist."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in models:
        reach = reach | (reach.astype(np.int64) @ reach.astype(np.int64) > 0)
    if not reach.all():
        name = models[int(np.argmin(reach.sum(axis=1)))]
        raise ValueError(f"battles: expected wins on both sides, got none against the others for {name}; use prior > 0")
