"""Choice of lessons among lost battles: the weakest skills first."""

import heapq
from array import array
from collections.abc import Sequence
from typing import Any


class Losses(Sequence):
    """For every scene the skill of its row and the points by which ours lost; sixteen bytes a scene."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._skills, self._points = array("q"), array("d")

    def add(self, skill: str, points: float) -> None:
        """One more scene."""
        number = self._numbers.setdefault(skill, len(self._names))
        if number == len(self._names):
            self._names.append(skill)
        self._skills.append(number)
        self._points.append(points)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, scene: int) -> tuple[str, float]:
        return self._names[self._skills[scene]], self._points[scene]


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
    skills: dict[str, _Skill] = {}
    for index, (name, points) in enumerate(losses):
        skill = skills.setdefault(name, _Skill())
        skill.scenes, skill.loss = skill.scenes + 1, skill.loss + points
        if points > threshold:
            skill.candidates.append(index)
    available = sum(len(skill.candidates) for skill in skills.values())
    _share(skills, available if limit is None else min(limit, available))
    chosen = []
    for skill in skills.values():
        # Candidates ascend: of equal losses the earlier stays first.
        ranked = sorted(skill.candidates, key=lambda index: -losses[index][1])
        chosen += ranked[: skill.lessons]
    return sorted(chosen), {name: skills[name].described() for name in sorted(skills)}


class _Skill:
    """Scenes of one skill: their number and summed loss, the indices of candidates, the lessons given to it."""

    def __init__(self) -> None:
        self.scenes, self.loss, self.lessons = 0, 0.0, 0
        self.candidates = array("q")

    def described(self) -> dict[str, Any]:
        return {
            "scenes": self.scenes,
            "mean_loss": self.loss / self.scenes,
            "candidates": len(self.candidates),
            "lessons": self.lessons,
        }


def _share(skills: dict[str, _Skill], seats: int) -> None:
    """Gives every skill its lessons; of equally weak ones the first by name goes first."""
    open_skills = [(-skill.loss / skill.scenes, name) for name, skill in skills.items() if skill.candidates]
    heapq.heapify(open_skills)
    for _ in range(seats):
        _, name = open_skills[0]
        skill = skills[name]
        skill.lessons += 1
        if skill.lessons == len(skill.candidates):
            heapq.heappop(open_skills)
        else:
            heapq.heapreplace(open_skills, (-skill.loss / skill.scenes / (2 * skill.lessons + 1), name))
