"""Scoring heads: what the process reward model sees of its own surprise, and what is trained."""

import pytest
import torch

from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, ScoringModel, Transformer, load_model, save_model
from wizard_engine.model.heads import CLIP_NATS, LAGS

CONFIG = ModelConfig(vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=32)


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def scoring(seed: int = 1) -> ScoringModel:
    model = ScoringModel.from_language_model(Transformer(CONFIG, seed=seed), 3, surprise=True)
    torch.nn.init.normal_(model.score[-1].weight)
    return model


def test_surprise_is_the_language_models_log_probability_per_lag() -> None:
    model, inputs = scoring(), packed([5, 12])
    tokens, positions = inputs[:2]
    hidden = model.body(*inputs)
    seen = model._surprises(hidden, tokens, positions, inputs[2])
    logprob = model.body.logits(hidden).log_softmax(-1)
    for place, position in enumerate(positions.tolist()):
        for lag in range(LAGS):
            expected = 0.0
            if position - lag >= 1:
                expected = float(-logprob[place - lag - 1, tokens[place - lag]])
            assert float(seen[place, lag]) == pytest.approx(min(expected, CLIP_NATS), abs=1e-5)
    assert torch.equal(seen[:, 2 * LAGS], seen[:, :LAGS].amax(1))


def test_surprise_of_a_sequence_does_not_depend_on_its_neighbours() -> None:
    model, (tokens, positions, cu_seqlens, longest) = scoring(), packed([5, 12])
    together = model(tokens, positions, cu_seqlens, longest)[5:]
    single = model(tokens[5:], positions[5:], torch.tensor([0, 12], dtype=torch.int32), 12)
    torch.testing.assert_close(together, single)


def test_surprise_freezes_the_body_and_trains_the_head() -> None:
    model = scoring()
    model(*packed([6])).sum().backward()
    assert all(parameter.grad is None for parameter in model.body.parameters())
    assert all(parameter.grad is not None for parameter in model.score.parameters())


@pytest.mark.parametrize(("outputs", "surprise"), [(1, False), (3, False), (3, True)])
def test_scoring_model_survives_the_disk(tmp_path, outputs: int, surprise: bool) -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=300)
    config = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 2, 8, 32)
    model = ScoringModel.from_language_model(Transformer(config, seed=0), outputs, surprise=surprise)
    for parameter in model.score.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tokenizer, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    assert (loaded.outputs, loaded.surprise) == (outputs, surprise)
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_scoring_model_starts_the_same_whatever_was_drawn_before() -> None:
    first = scoring().score[0].weight.clone()
    torch.rand(7)
    assert torch.equal(scoring().score[0].weight, first)
