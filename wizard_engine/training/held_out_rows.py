"""Kinds of held-out rows: supervised samples, preference pairs, instruction rankings, labelled steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from wizard_engine.data.chat import Sample
from wizard_engine.data.samples import Pair
from wizard_engine.generation import divided_logprobs, gather_rows, rank_groups
from wizard_engine.loss import pair_losses
from wizard_engine.model import ScoringModel, Transformer
from wizard_engine.parallel import Mesh
from wizard_engine.rl.rewards import score_tokens

from .held_out import Columns, Measure, placements

LabelledSteps = tuple[Sample, list[int], tuple[int, ...]]
"""Sample, index of the last token of each step, label of each step (-1, 0, 1)."""


def divided_scores(
    model: ScoringModel,
    samples: Sequence[Sample],
    pick: Callable[[int, torch.Tensor], Sequence[float]],
    mesh: Mesh,
    *,
    width: int,
    capacity: int,
    desc: str,
) -> np.ndarray:
    """(N, width) fp64 numbers that `pick` takes from the scores (n, outputs) of each sample's tokens.

    Args:
        pick: of the sample's index and scores.   capacity, desc: as of `divided_logprobs`.
    """
    groups = rank_groups([len(sample.tokens) for sample in samples], capacity, mesh)
    scored = score_tokens(model, samples, groups=groups, desc=desc)
    values = np.zeros((len(samples), width))
    for index in (index for group in groups for index in group):
        values[index] = pick(index, scored[index])
    return gather_rows(values, groups, mesh)


def _supervised(samples: Iterable[Sample]) -> np.ndarray:
    """(N,) fp64 supervised tokens."""
    return np.array([float(sample.weights[1:].sum(dtype=np.float64)) for sample in samples])


@dataclass(frozen=True)
class SupervisedRows:
    """Loss per supervised token."""

    rows: Sequence[Sample]
    capacity: int
    units: ClassVar[dict[str, str]] = {"loss": "nats a token"}

    def samples(self) -> Iterable[Sample]:
        """All that the model reads."""
        return self.rows

    def sizes(self) -> Columns:
        """Supervised tokens."""
        return {"tokens": _supervised(self.rows)}

    def score(self, model: Transformer, mesh: Mesh, desc: str) -> Columns:
        """Log-probability of each row's supervised tokens."""
        return {"logprob": divided_logprobs(model, self.rows, mesh, capacity=self.capacity, desc=desc)}

    def measures(self, now: Columns, first: Columns) -> dict[str, Measure]:
        """The loss as a ratio: nats of all rows over their tokens."""
        return {"loss": Measure(-now["logprob"], _supervised(self.rows))}


@dataclass(frozen=True)
class PreferenceRows:
    """Implicit rewards of both answers against the model before the first step, and their log-probabilities.

    The options are those of the loss; `per_token`: its log-probabilities are per token.
    """

    rows: Sequence[Pair]
    capacity: int
    beta: float
    variant: str
    label_smoothing: float
    per_token: bool
    units: ClassVar[dict[str, str]] = {"accuracy": "", "margin": "", "loss": "", "preferred": ""}

    def samples(self) -> Iterable[Sample]:
        """The chosen answers, then the rejected ones."""
        return [pair.chosen for pair in self.rows] + [pair.rejected for pair in self.rows]

    def _tokens(self) -> np.ndarray:
        """(2, N) answer tokens."""
        return np.maximum(_supervised(self.samples()), 1.0).reshape(2, -1)

    def sizes(self) -> Columns:
        """Answer tokens of both."""
        chosen, rejected = self._tokens()
        return {"tokens": chosen + rejected, "chosen_tokens": chosen, "rejected_tokens": rejected}

    def score(self, model: Transformer, mesh: Mesh, desc: str) -> Columns:
        """Log-probabilities of both answers, summed."""
        both = divided_logprobs(model, list(self.samples()), mesh, capacity=self.capacity, desc=desc)
        chosen, rejected = both.reshape(2, -1)
        return {"chosen": chosen, "rejected": rejected}

    def measures(self, now: Columns, first: Columns) -> dict[str, Measure]:
        """accuracy and margin of the implicit rewards, loss, and `preferred`: chosen likelier per token. Ties half."""
        tokens = self._tokens()
        both, start = (np.stack((columns["chosen"], columns["rejected"])) for columns in (now, first))
        chosen, rejected = self.beta * (both - start) / (tokens if self.per_token else 1.0)
        losses = pair_losses(
            torch.from_numpy(chosen - rejected),
            beta=self.beta,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
        )
        per_token = both / tokens
        return {
            "accuracy": Measure(_wins(chosen, rejected)),
            "margin": Measure(chosen - rejected),
            "loss": Measure(losses.numpy()),
            "preferred": Measure(_wins(*per_token)),
        }


@dataclass(frozen=True)
class RankingRows:
    """Pairs of instructions: how often the better one has the higher score."""

    rows: Sequence[Pair]
    capacity: int
    units: ClassVar[dict[str, str]] = {"accuracy": ""}

    def samples(self) -> Iterable[Sample]:
        """The better ones, then the worse ones."""
        return [pair.chosen for pair in self.rows] + [pair.rejected for pair in self.rows]

    def sizes(self) -> Columns:
        """Tokens of both."""
        return {"tokens": np.array([float(len(p.chosen.tokens) + len(p.rejected.tokens)) for p in self.rows])}

    def score(self, model: ScoringModel, mesh: Mesh, desc: str) -> Columns:
        """Scores of both."""
        options: dict[str, Any] = {"width": 1, "capacity": self.capacity, "desc": desc}
        values = divided_scores(model, list(self.samples()), lambda _, scores: [float(scores[-1, 0])], mesh, **options)
        chosen, rejected = values.reshape(2, -1)
        return {"chosen": chosen, "rejected": rejected}

    def measures(self, now: Columns, first: Columns) -> dict[str, Measure]:
        """Ranking accuracy; ties half."""
        return {"accuracy": Measure(_wins(now["chosen"], now["rejected"]))}


@dataclass(frozen=True)
class StepRows:
    """Answers with labelled steps: steps labelled right, and how well the lowest step score finds the wrong answers."""

    rows: Sequence[LabelledSteps]
    capacity: int
    units: ClassVar[dict[str, str]] = {"accuracy": "", "answer_auc": ""}

    def samples(self) -> Iterable[Sample]:
        """The answers."""
        return [sample for sample, _, _ in self.rows]

    def sizes(self) -> Columns:
        """Tokens, steps, and whether one of them is wrong."""
        return {
            "tokens": np.array([float(len(sample.tokens)) for sample, _, _ in self.rows]),
            "steps": np.array([float(len(labels)) for _, _, labels in self.rows]),
            "has_wrong_step": np.array([-1 in labels for _, _, labels in self.rows]),
        }

    def score(self, model: ScoringModel, mesh: Mesh, desc: str) -> Columns:
        """Steps labelled right, and the lowest probability that a step is not wrong."""

        def pick(index: int, scores: torch.Tensor) -> list[float]:
            return list(step_values(scores, *self.rows[index][1:]))

        options: dict[str, Any] = {"width": 2, "capacity": self.capacity, "desc": desc}
        correct, lowest = divided_scores(model, list(self.samples()), pick, mesh, **options).T
        return {"correct": correct, "lowest": lowest}

    def measures(self, now: Columns, first: Columns) -> dict[str, Measure]:
        """accuracy as a ratio over the steps of all answers, and the area under the curve."""
        sizes = self.sizes()
        return {
            "accuracy": Measure(now["correct"], sizes["steps"]),
            "answer_auc": placements(now["lowest"], ~sizes["has_wrong_step"]),
        }


def step_values(scores: torch.Tensor, ends: Sequence[int], labels: Sequence[int]) -> tuple[float, float]:
    """How many steps of an answer are labelled right, and the lowest probability that a step is not wrong.

    Args:
        scores: (n, 3) logits at the answer's tokens.   ends: index of the last token of each step.
    """
    probabilities = scores[list(ends)].softmax(-1)
    correct = (probabilities.argmax(-1) - 1 == torch.tensor(labels)).sum()
    return float(correct), float((1 - probabilities[:, 0]).min())


def _wins(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """(N,) 1 where the first is larger, 0.5 at a tie."""
    return (better > worse) + 0.5 * (better == worse)
