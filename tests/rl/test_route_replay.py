"""Samplers record where a mixture sent each token that it read, and trainers replay it."""

from dataclasses import replace

import pytest
import torch

from wizard_engine import world
from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import generate
from wizard_engine.loss import policy_loss
from wizard_engine.model import PRESETS, Routes, Transformer
from wizard_engine.rl.sampler import Sampler
from wizard_engine.rl.trajectories import roll_out

PROMPTS = [[5, 9, 2, 7], [1], [5, 9, 2, 7], [8, 8, 3]]


@pytest.fixture
def model():
    return Transformer(replace(PRESETS["tiny-mixtral"], init_std=0.2), seed=3).eval()


def choices_of(model, tokens):
    """(n, L, A) of a whole forward."""
    routes = Routes()
    length = len(tokens)
    with torch.no_grad():
        model(torch.tensor(tokens), torch.arange(length), torch.tensor([0, length]).int(), length, routes)
    return routes.stacked()


# Catches: rows that are dropped when they are done mixed up; the last token counted; equal prompts given one row.
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_that_was_read_has_its_experts(model, temperature):
    options = {"max_new_tokens": 9, "temperature": temperature, "seed": 1, "batch_size": 5}
    eos = generate(model, PROMPTS * 3, eos_ids=(-1,), **options).tokens[1][3]
    out = generate(model, PROMPTS * 3, eos_ids=(eos,), **options)
    assert out.experts is not None and any(out.finished)
    for prompt, tokens, experts in zip(PROMPTS * 3, out.tokens, out.experts):
        assert experts.dtype == torch.int16 and len(experts) == len(prompt) + len(tokens) - 1
        assert torch.equal(experts.int(), choices_of(model, [*prompt, *tokens[:-1]]))


def test_dense_models_record_nothing():
    dense = Transformer(PRESETS["tiny"], seed=0)
    assert generate(dense, PROMPTS, max_new_tokens=2, eos_ids=(-1,)).experts is None


@pytest.fixture(scope="module")
def tokenizer():
    rows = world.natural_corpus(50, 0)
    return train_tokenizer([m.content for r in rows for m in r.messages], vocab_size=512, atoms=CHAT_ATOMS)


def ratio_error(model, rollout, picked, replayed):
    """Largest difference between the trainer's and the sampler's log-probabilities of answer tokens, nats."""
    device = torch.device("cpu")
    batch = rollout.batch(picked, model.parallel, device)
    routes = rollout.routes(picked, batch, device) if replayed else Routes()
    behaviour = batch.scatter([rollout.split(rollout.behaviour)[i] for i in picked])
    _, _, logprob = policy_loss(
        batch.hidden(model, model(*batch.inputs, routes)),
        model.head_weight,
        batch.targets,
        behaviour,
        torch.ones_like(behaviour),
        clip=0.2,
        num_tokens=float(behaviour.numel()),
    )
    return float(batch.gather(logprob - behaviour).detach().abs().max())


# Catches: experts of another sample, or shifted by a token.
def test_a_trainer_that_replays_has_the_samplers_ratio(tokenizer):
    config = replace(PRESETS["tiny-mixtral"], vocab_size=tokenizer.vocab_size, init_std=0.2)
    model = Transformer(config, seed=1)
    prompts = [(Message("user", text),) for text in ("Sam has 3 pens", "hello", "How many are 2 and 2?")]
    rollout = roll_out(
        Sampler(model, cache_tokens=3200), tokenizer, prompts, samples=2, max_new_tokens=8, temperature=1.0, seed=4
    )
    picked = [5, 0, 3]
    assert ratio_error(model, rollout, picked, True) < 1e-5
    assert ratio_error(model, rollout, picked, False) < 1e-5
    # A sampler that broke its ties the other way: with equal rows in the router, all experts are equally good.
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.weight[:] = block.feed_forward.router.weight[:1]
    rollout = roll_out(
        Sampler(model, cache_tokens=3200), tokenizer, prompts, samples=2, max_new_tokens=8, temperature=1.0, seed=4
    )
    assert all(experts.unique().tolist() == [0, 1] for experts in rollout.experts)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.weight[2:] *= 1 + 1e-6
            block.feed_forward.router.weight[:2] *= 1 - 1e-6
    assert ratio_error(model, rollout, picked, True) < 1e-5
    assert ratio_error(model, rollout, picked, False) > 1e-3
