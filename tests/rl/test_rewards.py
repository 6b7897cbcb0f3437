"""Advantages, step ends, rewards, and the fields of a rollout."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from wizard_engine.data.chat import CHAT_ATOMS, Sample, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.solution_steps import split_steps
from wizard_engine.data.tokenizer import load_tokenizer, train_tokenizer
from wizard_engine.evaluation.accuracy import accuracy
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.parallel.context import SINGLE_DEVICE
from wizard_engine.rl import advantages, rewards, trajectories
from wizard_engine.rl.rewards import (
    ALL_FACTORS,
    AnswerReward,
    InstructionReward,
    PreferenceReward,
    ProcessReward,
    Reference,
    encode_steps,
    score_answers,
)
from wizard_engine.rl.sampler import Sampler

ASK = (Message("user", "How many apples are left?"),)


def reward(scores=(0.9, 0.4), instruction=0.5, finished=True):
    return AnswerReward(tuple((i, i + 1) for i in range(len(scores))), tuple(scores), instruction, finished)


def test_answer_reward_is_the_product_with_the_minimum_over_steps():
    assert reward().process == 0.4 and reward().total() == pytest.approx(0.2)
    assert reward().total(("instruction",)) == 0.5 and reward().total(("process",)) == 0.4
    assert reward(scores=(0.2, 0.9)).process == 0.2


@pytest.mark.parametrize("lost", [{"finished": False}, {"scores": ()}])
def test_answer_reward_is_zero_for_a_truncated_answer_or_one_without_steps(lost):
    for factors in (("instruction", "process"), ("instruction",), ("process",)):
        assert reward(**lost).total(factors) == 0.0
    assert reward(**lost).process == 0.0


def test_checked_factor_is_alone_or_times_the_others():
    right, wrong = (dataclasses.replace(reward(), is_right=x) for x in (True, False))
    assert right.total(("checked",)) == 1.0 and wrong.total(("checked",)) == 0.0 == reward().total(("checked",))
    assert right.total(("instruction", "process", "checked")) == right.total() and wrong.total(ALL_FACTORS) == 0.0
    unfinished = dataclasses.replace(right, finished=False)
    assert unfinished.checked == unfinished.total(("checked",)) == 0.0
    # Without a process model an answer has steps, but no scores.
    assert dataclasses.replace(right, scores=(), instruction=None).total(("checked",)) == 1.0


def test_preference_factor_is_alone_or_times_the_others():
    preferred = dataclasses.replace(reward(), preferred=0.25)
    assert preferred.total(("preference",)) == 0.25 and preferred.total() == reward().total()
    assert preferred.total(("instruction", "preference")) == 0.5 * 0.25
    assert preferred.total(("instruction", "process", "preference")) == pytest.approx(0.5 * 0.4 * 0.25)
    unfinished = dataclasses.replace(preferred, finished=False)
    assert unfinished.preference == unfinished.total(("preference",)) == 0.0 == reward().preference


@pytest.mark.parametrize(
    ("reference", "answer", "is_right"),
    [
        ("So 3 + 4 = <<3+4=7>>7\n#### 7", "3 + 4 = 7. The answer is 7.", True),
        ("#### 1,080", "It is 1080 in total", True),
        ("#### 7", "The answer is 8.", False),
        ("#### 7", "I cannot say.", False),
        ("The answer is 50%.", "The answer is 0.5", True),
    ],
)
def test_checked_answers_are_read_as_accuracy_reads_them(reference, answer, is_right):
    (only,) = score_answers(
        [ASK], [answer], [True], instruction=None, process=None, references=[Reference.of(reference)]
    )
    assert only.is_right is is_right and only.instruction is None and only.scores == () and only.spans
    assert accuracy([answer], [reference]).correct == is_right
    (without,) = score_answers([ASK], [answer], [True], instruction=None, process=None)
    assert without.is_right is None and not Reference.of("no number").is_readable


ANSWERS = [
    "12-5=7\nThe answer is 7.",
    "First 3 + 4 = 7. Then 7 * 2 = 14. The answer is 14.",
    "12-5=7",
    "One line.\n\n  indented line \nThe answer is 1.",
    "Größe: 3 m²\n苹果还剩七个。\nThe answer is 7.",
    "苹果还剩七个。答案是7。",
]


@pytest.fixture(params=["json", "sentencepiece"])
def tokenizer(request):
    if request.param == "json":
        return train_tokenizer([*ANSWERS[:3], ASK[0].content], vocab_size=400, atoms=CHAT_ATOMS)
    files = sorted((request.getfixturevalue("shared_data") / "tokenizer").glob("*.model"))
    if not files:
        pytest.skip("no SentencePiece model among the real data")
    return load_tokenizer(files[0])


@pytest.mark.parametrize("answer", ANSWERS)
def test_step_ends_are_the_last_tokens_of_the_steps(tokenizer, answer):
    sample, ends = encode_steps(tokenizer, ASK, answer)
    spans = split_steps(answer)
    start = len(encode_prompt(tokenizer, ASK))
    assert len(ends) == len(spans) and ends == sorted(set(ends)) and sample.tokens[-1] == tokenizer.eos_id
    assert np.flatnonzero(sample.weights).tolist() == ends
    ids = sample.tokens.tolist()
    for end, (_, stop) in zip(ends, spans):
        with_it, without = (tokenizer.decode(ids[start:k]).lstrip(" ") for k in (end + 1, end))
        assert with_it.startswith(answer[:stop]) and not without.startswith(answer[:stop])


def scoring(tokenizer, outputs, seed=0):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_width=8,
        ffn_width=16,
        init_std=0.5,
    )
    model = ScoringModel.from_language_model(Transformer(config, seed=seed), outputs)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model


def test_score_tokens_score_every_token_in_any_company():
    tokenizer = train_tokenizer(ANSWERS, vocab_size=400)
    model = scoring(tokenizer, 3)
    samples = [Sample(np.arange(n, dtype=np.int32) + 3, np.ones(n, np.float32)) for n in (5, 1, 9, 3)]
    all_scores = rewards.score_tokens(model, samples, capacity=8)
    assert [tuple(scores.shape) for scores in all_scores] == [(5, 3), (1, 3), (9, 3), (3, 3)]
    for sample, scores in zip(samples, all_scores):
        n = len(sample.tokens)
        marks = torch.tensor([0, n], dtype=torch.int32)
        with torch.no_grad():
            single = model(torch.from_numpy(sample.tokens).long(), torch.arange(n), marks, n)
        torch.testing.assert_close(scores, single, rtol=1e-4, atol=1e-5)


def test_score_answers_joins_factors_and_steps():
    tokenizer = train_tokenizer([*ANSWERS, ASK[0].content], vocab_size=400, atoms=CHAT_ATOMS)
    irm, prm = scoring(tokenizer, 1), scoring(tokenizer, 3, seed=1)
    instruction = InstructionReward(irm, tokenizer, mean=0.3, std=2.0)
    process = ProcessReward(prm, tokenizer, neutral=0.25)
    other = (Message("user", "Count."), Message("assistant", "1"), Message("user", "Go on."))
    asked, answers = [ASK, other, ASK, ASK], [ANSWERS[0], ANSWERS[1], "  ", ANSWERS[2]]
    answer_rewards = score_answers(asked, answers, [True, True, True, False], instruction=instruction, process=process)
    assert [len(r.scores) for r in answer_rewards] == [2, 3, 0, 1] and [r.finished for r in answer_rewards] == [
        True,
        True,
        True,
        False,
    ]
    assert answer_rewards[0].spans == ((0, 6), (7, 23)) and answer_rewards[2].total() == answer_rewards[3].total() == 0
    raw = instruction.raw(["Go on."])[0]
    assert answer_rewards[1].instruction == pytest.approx(1 / (1 + math.exp(-(raw - 0.3) / 2.0)))
    sample, ends = encode_steps(tokenizer, ASK, ANSWERS[0])
    probability = rewards.score_tokens(prm, [sample])[0][ends].softmax(-1)
    assert answer_rewards[0].scores == pytest.approx((probability[:, 2] + 0.25 * probability[:, 1]).tolist())
    assert answer_rewards[0].total() == pytest.approx(answer_rewards[0].instruction * min(answer_rewards[0].scores))


# Catches: a reference of another prompt, the two scores exchanged, a difference that is divided or not bounded.
def test_preference_factor_is_the_probability_against_the_own_answer():
    tokenizer = train_tokenizer([*ANSWERS, ASK[0].content], vocab_size=400, atoms=CHAT_ATOMS)
    preference = PreferenceReward(scoring(tokenizer, 1), tokenizer, capacity=64)
    other = (Message("user", "Count."), Message("assistant", "1"), Message("user", "Go on."))
    prompts, answers = [ASK, other, ASK, ASK, other], [ANSWERS[0], ANSWERS[1], "  ", ANSWERS[3], ANSWERS[2]]
    own = [ANSWERS[3], ANSWERS[2], ANSWERS[3], ANSWERS[3], ANSWERS[2]]
    factors = preference(prompts, answers, own)
    for index in (0, 1):
        (score,) = preference.raw([prompts[index]], [answers[index]])
        (reference,) = preference.raw([prompts[index]], [own[index]])
        assert abs(score - reference) > 0.1
        assert factors[index] == pytest.approx(1 / (1 + math.exp(reference - score)), abs=1e-5)
    assert factors[2] == 0.0 and factors[3:] == pytest.approx([0.5, 0.5], abs=1e-5)
    with torch.no_grad():
        preference.model.score.weight *= 1e6
    assert set(preference(prompts[:2], answers[:2], own[:2])) <= {0.0, 1.0}
    both = score_answers(
        prompts[:2], answers[:2], [True, False], instruction=None, process=None, preference=preference, own=own[:2]
    )
    assert [r.preferred for r in both] == preference(prompts[:2], answers[:2], own[:2]) and both[1].preference == 0


def test_preference_model_scores_the_end_of_an_answer():
    tokenizer = train_tokenizer([*ANSWERS, ASK[0].content], vocab_size=400, atoms=CHAT_ATOMS)
    model = scoring(tokenizer, 1)
    sample, count = rewards.encode_rated(tokenizer, ASK, ANSWERS[0])
    assert count == len(encode_prompt(tokenizer, ASK)) and sample.tokens[-1] == tokenizer.eos_id
    assert np.flatnonzero(sample.weights).tolist() == [len(sample.tokens) - 1]
    expected = float(rewards.score_tokens(model, [sample])[0][-1, 0])
    assert PreferenceReward(model, tokenizer).raw([ASK], [ANSWERS[0]]) == pytest.approx([expected], abs=1e-5)


def rollout(lengths, behaviour):
    samples = [Sample(np.arange(n + 2, dtype=np.int32), np.ones(n + 2, np.float32)) for n in lengths]
    return trajectories.Rollout(
        [ASK] * len(lengths), samples, [""] * len(lengths), [True] * len(lengths), lengths, torch.tensor(behaviour)
    )


def test_token_rewards_pay_at_the_end_and_take_kl_off_every_token():
    """k1 = behaviour - reference = 1, -1, 2; an open answer pays the penalty instead of its reward."""
    token_rewards, estimates = advantages.token_rewards(
        rollout([2, 1], [-1.0, -2.0, -1.0]),
        [reward(), reward(finished=False)],
        torch.tensor([-2.0, -1.0, -3.0]),
        factors=("instruction", "process"),
        kl=0.1,
        no_eos_penalty=0.5,
    )
    assert token_rewards.tolist() == pytest.approx([-0.1, 0.1 + 0.2, -0.2 - 0.5])
    assert estimates["k1"].tolist() == [1.0, -1.0, 2.0]


def test_make_targets_whitens_with_the_moments_of_all_ranks():
    drawn = rollout([2, 1], [0.0, 0.0, 0.0])
    token_rewards, values = torch.tensor([0.0, 1.0, 3.0]), torch.zeros(3)

    def moments(total, squares, count):
        return total + 4.0, squares + 16.0, count + 1

    reference = torch.tensor([-1.0, -2.0, -3.0])
    targets = advantages.make_targets(drawn, token_rewards, values, reference, gamma=1.0, lam=1.0, moments=moments)
    mean, std = 9 / 4, (27 / 4 - (9 / 4) ** 2) ** 0.5
    assert torch.cat(targets.advantages).tolist() == pytest.approx([(x - mean) / std for x in (1, 1, 3)])
    assert torch.cat(targets.returns).tolist() == [1.0, 1.0, 3.0] and [len(x) for x in targets.values] == [2, 1]
    reordered = targets.for_batch([1, 0], drawn.batch([1, 0], SINGLE_DEVICE, torch.device("cpu")))
    assert reordered.reference.tolist() == [-3, -1, -2] and reordered.returns.tolist() == [3, 1, 1]
    assert torch.equal(reordered.behaviour, reordered.sampled)
    behaviour = torch.tensor([-0.5, -0.25, -0.125])
    targets = advantages.make_targets(
        drawn, token_rewards, values, reference, gamma=1.0, lam=1.0, moments=moments, behaviour=behaviour
    )
    assert torch.equal(torch.cat(targets.behaviour), behaviour) and torch.equal(
        torch.cat(targets.sampled), drawn.behaviour
    )


def test_rollout_and_its_logprobs_and_values_line_up():
    tokenizer = train_tokenizer([*ANSWERS, ASK[0].content], vocab_size=400, atoms=CHAT_ATOMS)
    critic = scoring(tokenizer, 1)
    policy = critic.body
    sampler = Sampler(policy, cache_tokens=1600)
    sampler.sync_weights()
    drawn = trajectories.roll_out(
        sampler, tokenizer, [ASK, (Message("user", "Go."),)], samples=3, max_new_tokens=6, temperature=0.8, seed=1
    )
    assert len(drawn.samples) == 6 and drawn.prompts[0] == drawn.prompts[2] == ASK != drawn.prompts[3]
    assert sum(drawn.lengths) == drawn.behaviour.numel() and len({s.tokens.tobytes() for s in drawn.samples}) > 3
    sampler.check(drawn.weights_checksum)
    again = trajectories.answer_logprobs(policy, drawn, temperature=0.8)
    torch.testing.assert_close(again, drawn.behaviour, rtol=0, atol=2e-5)
    values = drawn.split(trajectories.answer_values(critic, drawn))
    scores = rewards.score_tokens(critic, drawn.samples)
    for value, score, length in zip(values, scores, drawn.lengths):
        torch.testing.assert_close(value, score[len(score) - length - 1 : -1, 0], rtol=0, atol=2e-5)
        assert len(value) == length
