"""Rewards per token: placement, KL, and the baseline within a prompt."""

import pytest
import torch

from wizard_engine.rl.advantages import token_rewards
from wizard_engine.rl.rewards import AnswerReward
from wizard_engine.rl.trajectories import Rollout


def rollout(lengths: list[int]) -> Rollout:
    behaviour = torch.linspace(-1.0, -0.1, sum(lengths))
    return Rollout([()] * len(lengths), [], [""] * len(lengths), [True] * len(lengths), lengths, behaviour)


def reward(value: float, *, finished: bool = True) -> AnswerReward:
    return AnswerReward(((0, 1),), (value,), 1.0, finished)


def test_token_rewards_put_the_answers_reward_on_its_last_token_and_kl_on_all() -> None:
    drawn = rollout([2, 3])
    reference = drawn.behaviour - 0.5
    values, estimates = token_rewards(
        drawn, [reward(0.8), reward(0.2)], reference, factors=("process",), kl=0.1, no_eos_penalty=0.5
    )
    torch.testing.assert_close(values, torch.tensor([-0.05, 0.75, -0.05, -0.05, 0.15]))
    torch.testing.assert_close(estimates["k1"], torch.full((5,), 0.5))


def test_token_rewards_take_a_penalty_off_answers_that_did_not_end() -> None:
    drawn = rollout([1, 1])
    rewards = [reward(0.9, finished=False), reward(0.9)]
    values, _ = token_rewards(drawn, rewards, drawn.behaviour, factors=("process",), kl=0.0, no_eos_penalty=0.5)
    assert values.tolist() == pytest.approx([-0.5, 0.9])


def test_token_rewards_relative_to_the_other_answers_of_the_prompt() -> None:
    drawn = rollout([1] * 6)
    rewards = [reward(value) for value in (1.0, 0.0, 0.5, 0.2, 0.2, 0.2)]
    values, _ = token_rewards(
        drawn, rewards, drawn.behaviour, factors=("process",), kl=0.0, no_eos_penalty=0.5, group=3
    )
    assert values.tolist() == pytest.approx([0.75, -0.75, 0.0, 0.0, 0.0, 0.0], abs=1e-6)


def test_token_rewards_keep_the_instruction_factor_as_the_prompts_weight() -> None:
    drawn = rollout([1] * 4)
    pairs = [(0.5, 1.0), (0.5, 0.0), (1.0, 1.0), (1.0, 0.0)]
    rewards = [AnswerReward(((0, 1),), (process,), instruction, True) for instruction, process in pairs]
    factors = ("instruction", "process")
    values, _ = token_rewards(drawn, rewards, drawn.behaviour, factors=factors, kl=0.0, no_eos_penalty=0.0, group=2)
    assert values.tolist() == pytest.approx([0.5, -0.5, 1.0, -1.0])
