"""Option groups of online reinforcement learning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wizard_engine.runtime.ranges import AtLeastOne, Checked, Count, LearningRate, NonNegative, Positive, Share, ranged
from wizard_engine.runtime.stage import INCIDENTAL

from .rewards import ALL_FACTORS, FACTORS, MODELS

Clip = ranged(above=0, below=1)
DualClip = ranged(above=1)
PositiveTemperature = ranged(above=0, high=100)


@dataclass(frozen=True)
class RolloutOptions(Checked):
    """Number and length of the sampled answers, and the layout of the sampler."""

    steps: Count[int] = 100
    """Number of rollouts; each is followed by at least one update."""
    prompts_per_step: Count[int] = 48
    """Prompts of a rollout over all ranks."""
    samples_per_prompt: Count[int] = 4
    """Answers to each prompt."""
    max_new_tokens: Count[int] = 96
    """Longest answer, tokens."""
    temperature: PositiveTemperature[float] = 1.0
    tp: Count[int] = field(default=1, metadata=INCIDENTAL)
    """Tensor-parallel ranks of the sampler; each group of them holds the whole policy."""
    batch_size: Count[int] = field(default=128, metadata=INCIDENTAL)
    """Answers that a rank samples concurrently, at most."""
    cache_tokens: Count[int | None] = field(default=None, metadata=INCIDENTAL)
    """Capacity of a rank's KV cache while sampling, tokens; default: enough for the answers that it samples
    concurrently, each with the longest prompt."""
    replay_routing: bool = True
    """Mixtures of experts: train each token with the experts that the sampler used for it."""


@dataclass(frozen=True)
class PPOOptions(Checked):
    """Advantages, the clipped loss, and the updates of a rollout."""

    advantages: Literal["critic", "rloo", "grpo"] = "critic"
    """Baseline of the rewards: a critic (PPO), the mean of the other answers to the prompt (RLOO), or the mean of all
    answers with a division by their standard deviation (GRPO). GRPO cancels the instruction factor; the recipe refuses
    the combination."""
    group_baseline: bool = True
    """With a critic: subtract the mean reward of the other answers to the prompt from each answer's reward."""
    epochs: Count[int] = 1
    """Passes over each rollout."""
    minibatches: Count[int] = 1
    """Updates per pass."""
    clip: Clip[float] = 0.2
    """Half width of the ratio's interval."""
    dual_clip: DualClip[float | None] = None
    """Bound on the loss of tokens with a negative advantage, in advantages, > 1; none by default."""
    normalisation: Literal["token", "sequence"] = "token"
    """Equal weights for all answer tokens, or for all answers."""
    importance_limit: NonNegative[float] = 0.01
    """Largest difference of a token's log-probability between trainer and sampler, nats. Beyond it the ratio uses the
    trainer's log-probability, and the token weighs trainer over sampler, at most --ppo.importance-cap."""
    importance_cap: AtLeastOne[float] = 2.0
    entropy: NonNegative[float] = 0.0
    """Coefficient of the entropy bonus, per token."""
    gamma: Share[float] = 1.0
    """Discount of later rewards."""
    lam: Share[float] = 0.95
    """Lambda of generalised advantage estimation."""


@dataclass(frozen=True)
class CriticOptions(Checked):
    """The critic: its start, learning rate and loss."""

    model: Path | None = None
    """Model directory with the initial body of the critic; default: the process reward model's, else the policy's."""
    lr: LearningRate[float] = 1e-6
    """Peak learning rate."""
    warmup_steps: NonNegative[int] = 0
    """Number of first rollouts that train only the critic."""
    value_clip: Positive[float] = 0.2
    """Half width of the interval around the former value."""


@dataclass(frozen=True)
class KLOptions(Checked):
    """Divergence of the policy from the reference."""

    coefficient: NonNegative[float] = 0.05
    """Of k1 = log policy - log reference in the reward, per token."""
    loss_coefficient: NonNegative[float] = 0.0
    """Of --kl.estimator as a term of the loss, per token."""
    estimator: Literal["k1", "k2", "k3"] = "k3"


@dataclass(frozen=True)
class RewardOptions(Checked):
    """Reward models and the factors of the reward."""

    instruction_model: Path | None = None
    """Instruction reward model, a directory of recipes/reward.py; the factor instruction needs it."""
    process_model: Path | None = None
    """Process reward model, a directory of recipes/reward.py; the factor process needs it."""
    preference_model: Path | None = None
    """Preference reward model, a directory of recipes/reward.py; the factor preference needs it."""
    factors: tuple[str, ...] = FACTORS
    """Factors of the reward, multiplied: instruction, process, preference, checked. preference is the probability that
    the answer is preferred to the row's own. checked is 1 where it claims the number of the row's own, else 0."""
    neutral: Share[float] = 0.5
    """Process score of a neutral step, 0 to 1."""
    no_eos_penalty: NonNegative[float] = 0.5
    """Subtracted from the reward of an answer without an end token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.factors if name not in ALL_FACTORS]
        if unknown or not self.factors:
            raise ValueError(f"reward.factors: expected some of {', '.join(ALL_FACTORS)}, got {unknown or 'none'}")
        for name in MODELS:
            if getattr(self, f"{name}_model") is None and name in self.factors:
                raise ValueError(
                    f"reward.{name}_model: expected a directory of recipes/reward.py with the factor {name}, got none; "
                    f"give --reward.{name}-model, or leave {name} out of --reward.factors"
                )


@dataclass(frozen=True)
class PTXOptions(Checked):
    """Supervised loss beside PPO (PPO-ptx)."""

    coefficient: NonNegative[float] = 0.0
    """Weight of the supervised loss on the rows' own answers in every update; 0 skips it."""
    rows: Count[int] = 32
    """Rows of that loss per update over all ranks."""
