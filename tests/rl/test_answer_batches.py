"""Answers whose prompts are read once: the losses, gradients and scores of whole sequences; baselines by hand."""

from dataclasses import replace

import pytest
import torch

from wizard_engine.data.chat import Sample
from wizard_engine.loss import policy_loss
from wizard_engine.model import PRESETS, Routes, ScoringModel, Transformer
from wizard_engine.parallel.context import SINGLE_DEVICE, ParallelContext
from wizard_engine.parallel.mesh import Axis
from wizard_engine.rl.advantages import advantages_of_groups, make_targets, old_logprobs
from wizard_engine.rl.answer_batches import answer_batch, answer_runs
from wizard_engine.rl.rewards import score_answer_tokens, score_tokens
from wizard_engine.rl.trajectories import Rollout, answer_logprobs, idle_fraction

CPU = torch.device("cpu")
CONTEXT_PARALLEL = ParallelContext(cp=Axis(size=2))


def rollout_of(seed=0, vocab_size=512, prompts=3, group=4):
    generator = torch.Generator().manual_seed(seed)
    samples, lengths = [], []
    for p in range(prompts):
        prompt = torch.randint(vocab_size, (3 + 5 * p,), generator=generator)
        for _ in range(group):
            n = int(torch.randint(1, 12, (), generator=generator))
            answer = torch.randint(vocab_size, (n,), generator=generator)
            tokens = torch.cat((prompt, answer))
            weights = torch.cat((torch.zeros(len(prompt)), torch.ones(n)))
            samples.append(Sample(tokens.int().numpy(), weights.numpy()))
            lengths.append(n)
    count = len(samples)
    behaviour = -torch.rand(sum(lengths), generator=generator)
    return Rollout([()] * count, samples, [""] * count, [True] * count, lengths, behaviour)


def loss_and_gradients(model, rollout, parallel, capacity):
    """PPO's loss and gradients over all answers, in runs of a capacity."""
    loss_sum, tokens = 0.0, sum(rollout.lengths)
    targets = make_targets(
        rollout, rollout.behaviour, None, rollout.behaviour - 0.1, advantages=torch.linspace(-1, 1, tokens)
    )
    for run in answer_runs(rollout.samples, rollout.prompt_tokens, range(len(rollout.samples)), capacity, parallel):
        batch = rollout.batch(run, parallel, CPU)
        run_targets = targets.for_batch(run, batch)
        hidden = batch.hidden(model, model(*batch.inputs, Routes()))
        loss, _, _ = policy_loss(
            hidden,
            model.head_weight,
            batch.targets,
            run_targets.behaviour,
            run_targets.advantages,
            clip=0.2,
            num_tokens=tokens,
            reference=run_targets.reference,
            kl=0.1,
            entropy=0.01,
            cu_seqlens=batch.cu_seqlens,
        )
        loss.backward()
        loss_sum += float(loss.detach())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss_sum, grads


# Catches: a prompt's gradient that lacks one of its answers; a first answer token predicted by the wrong row.
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-mixtral"])
@pytest.mark.parametrize("capacity", [1, 40, 10_000])
def test_losses_and_gradients_are_those_of_whole_sequences(name, capacity):
    config = replace(PRESETS[name], window=6 if name == "tiny-mistral" else None, init_std=0.2)
    model, rollout = Transformer(config, seed=2).double(), rollout_of()
    rollout.behaviour = rollout.behaviour.double()
    loss, grads = loss_and_gradients(model, rollout, SINGLE_DEVICE, capacity)
    whole, right = loss_and_gradients(model, rollout, CONTEXT_PARALLEL, 10_000)
    assert loss == pytest.approx(whole, rel=1e-10)
    for key, expected_grad in right.items():
        torch.testing.assert_close(
            grads[key], expected_grad, rtol=0, atol=1e-10 * float(expected_grad.abs().max().clamp(min=1e-3))
        )


@pytest.mark.parametrize("surprise", [False, True])
@pytest.mark.parametrize("capacity", [30, 8192])
def test_scores_of_answer_tokens_are_those_of_whole_sequences(surprise, capacity):
    config = replace(PRESETS["tiny"], init_std=0.2)
    model, rollout = ScoringModel(config, 3, surprise=surprise), rollout_of(1)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    model.body.initialise(4)
    # In float64: processors differ in how far products of other numbers of rows are apart in fp32.
    model.double()
    expected = score_tokens(model, rollout.samples)
    for before in (False, True):
        actual = score_answer_tokens(model, rollout.samples, rollout.prompt_tokens, before=before, capacity=capacity)
        for scores, right, n in zip(actual, expected, rollout.lengths):
            right = right[-n - 1 : -1] if before else right[-n:]
            torch.testing.assert_close(scores, right, rtol=1e-6, atol=1e-6)


def test_logprobs_of_answers_are_those_of_whole_sequences():
    model, rollout = Transformer(replace(PRESETS["tiny"], init_std=0.2), seed=1), rollout_of(2)
    batched = [answer_logprobs(model, rollout, temperature=0.7, capacity=c) for c in (20, 8192)]
    logprobs = []
    for run in range(len(rollout.samples)):
        batch = answer_batch([rollout.samples[run]], [rollout.prompt_tokens[run]], CONTEXT_PARALLEL, CPU)
        logits = model.logits(model(*batch.inputs)) / 0.7
        logprob = logits.log_softmax(-1).gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
        logprobs.append(batch.gather(logprob))
    for x in batched:
        torch.testing.assert_close(x, torch.cat(logprobs), rtol=0, atol=1e-5)


def flat(values, lengths):
    """Rewards that end up as `values` per answer, spread over its tokens."""
    return torch.cat([torch.full((n,), v / n) for v, n in zip(values, lengths)])


def test_baselines_of_a_group_by_hand():
    rollout = rollout_of(3, prompts=2, group=3)
    rewards = flat([1.0, 0.0, 0.5, 2.0, 2.0, 2.0], rollout.lengths)
    rloo = advantages_of_groups(rewards, rollout, 3, kind="rloo")
    expected = [0.75, -0.75, 0.0, 0.0, 0.0, 0.0]
    for piece, value in zip(rollout.split(rloo), expected):
        torch.testing.assert_close(piece, torch.full_like(piece, value), rtol=0, atol=1e-6)
    grpo = advantages_of_groups(rewards, rollout, 3, kind="grpo")
    for piece, value in zip(rollout.split(grpo), [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]):
        torch.testing.assert_close(piece, torch.full_like(piece, value), rtol=0, atol=1e-5)


def test_dividing_by_a_group_s_deviation_cancels_a_factor_of_its_prompt():
    rollout = rollout_of(4, prompts=2, group=3)
    process = [0.9, 0.1, 0.4] * 2
    rewards = flat([p * (0.25 if i < 3 else 1.0) for i, p in enumerate(process)], rollout.lengths)
    means = {}
    for kind in ("rloo", "grpo"):
        firsts = [float(piece[0]) for piece in rollout.split(advantages_of_groups(rewards, rollout, 3, kind=kind))]
        means[kind] = [a / b for a, b in zip(firsts[:3], firsts[3:])]
    assert means["rloo"] == pytest.approx([0.25] * 3, rel=1e-4)
    assert means["grpo"] == pytest.approx([1.0] * 3, rel=1e-4)


def test_ratios_use_the_trainer_s_logprobs_where_the_two_differ():
    trained, sampled = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.005, -2.5, -2.9])
    assert old_logprobs(trained, sampled, 0.01).tolist() == pytest.approx([-1.005, -2.0, -3.0])


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([(10, 40, 4)], 0.0), ([(10, 20, 4)], 0.5), ([(10, 40, 4), (5, 20, 4)], 0.25), ([(0, 0, 0)], 0)],
)
def test_idle_share(loads, expected):
    assert idle_fraction(loads) == pytest.approx(expected)
