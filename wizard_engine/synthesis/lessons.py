"""Choice of lessons among lost battles: the weakest skills first."""

from collections.abc import Sequence
from typing import Any


def choose_lessons(
    losses: Sequence[tuple[str, float]], threshold: float, limit: int | None
) -> tuple[list[int], dict[str, dict[str, float]]]:
    """Indices of the lessons, ascending, and a table of the skills.

    A loss above the threshold is a candidate. With a limit below their number, each lesson in turn goes to the skill
    with the largest w / (2k + 1), where w is the skill's mean loss over all its scenes (0 where ours did not lose) and
    k the lessons it already has (the Sainte-Lague rule): quotas are proportional to weakness, however frequent a skill
    is. A skill without further candidates is skipped. Within a skill the largest losses come first.

    Args:
        losses: for every scene the skill of its row and the points by which ours lost, 0 if it did not.
        threshold: points.
        limit: most lessons; None for all candidates.
    Returns:
        indices into losses; skill -> scenes, mean_loss, candidates, lessons.
    """
    skills: dict[str, list[int]] = {}
    for index, (skill, _) in enumerate(losses):
        skills.setdefault(skill, []).append(index)
    weakness = {name: sum(losses[i][1] for i in indices) / len(indices) for name, indices in skills.items()}
    candidates = {
        name: sorted((i for i in indices if losses[i][1] > threshold), key=lambda i: (-losses[i][1], i))
        for name, indices in skills.items()
    }
    available = sum(map(len, candidates.values()))
    quotas = _quotas(weakness, candidates, available if limit is None else min(limit, available))
    chosen = sorted(i for name, ranked in candidates.items() for i in ranked[: quotas[name]])
    return chosen, {name: _line(skills, weakness, candidates, quotas, name) for name in sorted(skills)}


def _quotas(weakness: dict[str, float], candidates: dict[str, list[int]], seats: int) -> dict[str, int]:
    quotas = dict.fromkeys(sorted(weakness), 0)
    for _ in range(seats):
        open_skills = [name for name in quotas if quotas[name] < len(candidates[name])]
        quotas[max(open_skills, key=lambda name: weakness[name] / (2 * quotas[name] + 1))] += 1
    return quotas


def _line(skills, weakness, candidates, quotas, name: str) -> dict[str, Any]:
    return {
        "scenes": len(skills[name]),
        "mean_loss": weakness[name],
        "candidates": len(candidates[name]),
        "lessons": quotas[name],
    }
