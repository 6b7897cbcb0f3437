"""Options that the training recipes share."""

from dataclasses import dataclass, field

from wizard_engine.model.config import ModelConfig
from wizard_engine.runtime.ranges import Checked, Count, Fraction, LearningRate, NonNegative, Share, ranged
from wizard_engine.runtime.stage import INCIDENTAL

# Options of a run that goes on from its last checkpoint where they are larger.
RUN_LENGTH = ("training.epochs", "training.max_steps")

Epochs = ranged(above=0, high=10_000)


@dataclass(frozen=True)
class Optimisation(Checked):
    """Optimisation options that every training run has."""

    lr: LearningRate[float] = 2e-5
    """Peak learning rate."""
    pack_tokens: Count[int] = 1024
    """Capacity of one packed row (micro-batch), tokens."""
    warmup: Share[float] = 0.05
    """Fraction of the steps with a rising learning rate."""
    lr_floor: Share[float] = 0.05
    """Fraction of the peak learning rate at the end."""
    weight_decay: NonNegative[float] = 0.0
    beta2: Fraction[float] = 0.95
    """Decay rate of the second moment."""
    clip: NonNegative[float] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    save_every: NonNegative[int] = field(default=200, metadata=INCIDENTAL)
    """Steps between checkpoints; a run that more epochs continue writes one at its end too. 0 writes one only when the
    run is asked to stop."""
    keep_last: Count[int] = field(default=2, metadata=INCIDENTAL)
    """Checkpoints kept."""
    max_skipped: NonNegative[int] = 10
    """Updates with a non-finite gradient, or a spike, that may be skipped before the run ends with an error."""


@dataclass(frozen=True)
class Training(Optimisation):
    """Optimisation options of runs over a fixed set of rows."""

    epochs: Epochs[float] = 1.0
    """Passes over the rows; a fraction stops inside a pass."""
    packs_per_step: Count[int] = 1
    """Packed rows of one optimizer step over all ranks; a multiple of the number of ranks."""
    max_steps: Count[int | None] = None
    """Stop after this many optimizer steps."""
    spike: NonNegative[float] = 0.0
    """Skip a step whose loss is this many standard deviations above the mean of the last 128 steps; 0 skips none. 6 is
    usual for large batches; the losses of small ones have long tails. With a value above 0 the host waits for the loss
    before the update."""


@dataclass(frozen=True)
class OnlineTraining(Optimisation):
    """Optimisation options of online reinforcement learning; a step is a rollout with its updates."""

    lr: LearningRate[float] = 1e-7
    """Peak learning rate of the policy."""
    pack_tokens: Count[int] = 8192
    """Capacity of one packed row (micro-batch), tokens."""
    lr_floor: Share[float] = 0.1
    """Fraction of the peak learning rate at the end."""
    save_every: NonNegative[int] = field(default=50, metadata=INCIDENTAL)
    """Steps between checkpoints; 0 writes one only when the run is asked to stop."""


def sample_limit(max_length: int | None, config: ModelConfig, training: Training) -> int:
    """Longest sample, tokens: `max_length` or the context, at most the capacity of a packed row.

    Raises:
        ValueError: `max_length` exceeds the model's context.
    """
    if max_length is not None and not 2 <= max_length <= config.max_positions:
        raise ValueError(f"max_length: expected 2 to {config.max_positions} (the model's context), got {max_length}")
    return min(max_length or config.max_positions, training.pack_tokens + 1)
