"""Every check of the self-audit can fail."""

import numpy as np
import pytest
import torch

from wizard_engine.data.chat import Sample
from wizard_engine.data.chat_format import VICUNA
from wizard_engine.data.samples import Pair
from wizard_engine.generation import sequence_logprobs
from wizard_engine.loss import sft_loss
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.parallel import context
from wizard_engine.training import audit

SUPERVISED = (
    "packed loss = unpacked loss",
    "packed gradient = unpacked gradient",
    "two micro-batches = one batch",
    "gradient of two micro-batches = of one",
)


class Letters:
    eos_id, eos_ids, chat_format = 2, (2,), VICUNA

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids if i != 2)


def model():
    config = ModelConfig(
        vocab_size=31, width=8, layers=2, heads=2, kv_heads=1, head_width=4, ffn_width=12, init_std=0.4
    )
    return Transformer(config, seed=0)


def samples(count=6):
    generator = np.random.default_rng(0)
    rows = []
    for length in generator.integers(4, 12, count):
        weights = np.ones(length, np.float32)
        weights[: length // 2] = 0
        rows.append(Sample(np.append(generator.integers(3, 31, length - 1), 2).astype(np.int32), weights))
    return rows


def verdicts(checks):
    return {check.name: check.passed for check in checks}


def test_audit_passes_a_right_model_and_keeps_its_gradients(capsys):
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    audit.check_supervised(net, samples(), Letters(), quiet=False)
    assert all((p.grad == 3).all() for p in net.parameters())
    table = capsys.readouterr().err
    assert table.count("pass") == 6 and "FAIL" not in table and all(name in table for name in SUPERVISED)
    audit.check_supervised(net, samples(1), Letters(), quiet=True)
    assert capsys.readouterr().err == ""


def test_audit_shows_the_mask():
    sample = Sample(np.array([3, 4, 5, 2, 6, 7, 2]), np.array([0, 0, 1, 1, 0, 1, 1], np.float32))
    assert audit.shown_mask(sample, Letters()) == "de[f</s>]g[h</s>]"


# Catches: a mask cut in the middle of a long question, without the answer that is trained.
def test_mask_of_a_long_sample_has_the_ends_of_every_span():
    tokens = np.array([3] * 400 + [4] * 500 + [2] + [5, 6, 2] * 9, np.int32)
    weights = np.array([0] * 400 + [1] * 501 + [0, 1, 1] * 9, np.float32)
    shown = audit.shown_mask(Sample(tokens, weights), Letters())
    assert shown.startswith("d" * 60 + " ... " + "d" * 60 + "[" + "e" * 60 + " ... ") and "e</s>]f[g</s>]" in shown
    assert shown.endswith(" ... (12 more spans)") and len(shown) < 400


def test_audit_sees_attention_across_sequences(monkeypatch):
    right = context.attention

    def leaking(q, k, v, cu_seqlens, max_seqlen, **options):
        return right(q, k, v, cu_seqlens[[0, -1]], q.shape[0], **options)

    monkeypatch.setattr(context, "attention", leaking)
    assert not any(verdicts(audit.supervised_checks(model(), samples())).values())
    with pytest.raises(ValueError, match="audit: packed loss = unpacked loss: expected an error of at most 2e-05, got"):
        audit.check_supervised(model(), samples(), Letters(), quiet=True)


def test_audit_sees_a_denominator_of_the_micro_batch(monkeypatch):
    def narrow(hidden, weight, targets, weights, num_tokens, shard):
        return sft_loss(hidden, weight, targets, weights, num_tokens=weights.sum())

    monkeypatch.setattr(audit, "sft_loss", narrow)
    assert not any(verdicts(audit.supervised_checks(model(), samples())).values())


def test_audit_sees_a_gradient_that_the_loss_does_not_show(monkeypatch):
    def shrunk(hidden, weight, targets, weights, num_tokens, shard):
        out = sft_loss(hidden, weight, targets, weights, num_tokens=num_tokens)
        return out._replace(loss=out.loss.detach() + (out.loss - out.loss.detach()) / len(weights))

    monkeypatch.setattr(audit, "sft_loss", shrunk)
    passed = verdicts(audit.supervised_checks(model(), samples()))
    assert [passed[name] for name in SUPERVISED] == [True, False, True, False]


def test_audit_sees_an_untrained_end_and_a_trained_start():
    rows = samples()
    rows[2].weights[-1] = 0
    with pytest.raises(ValueError, match=r"audit: every sample trains its closing </s>: .* got 1\.667e-01"):
        audit.check_supervised(model(), rows, Letters(), quiet=True)
    rows = samples()
    rows[1].tokens[-1] = 9
    with pytest.raises(ValueError, match="every sample trains its closing"):
        audit.check_supervised(model(), rows, Letters(), quiet=True)
    rows = samples()
    rows[0].weights[0] = 1
    with pytest.raises(ValueError, match="audit: nothing trains the first token"):
        audit.check_supervised(model(), rows, Letters(), quiet=True)


def preference():
    rows = samples(8)
    pairs = [Pair(*two) for two in zip(rows[::2], rows[1::2])]
    net = model()
    flat = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return net, pairs, torch.tensor(sequence_logprobs(net, flat)).float().view(-1, 2)


def test_audit_of_preferences_passes_and_sees_a_stale_reference(capsys):
    net, pairs, reference = preference()
    audit.check_preference(net, pairs, reference, beta=0.1, quiet=False)
    assert capsys.readouterr().err.count("pass") == 6
    for wrong in (reference + 0.1, reference.flip(1), reference.flip(0)):
        with pytest.raises(ValueError, match="audit: reference log-probabilities = a fresh forward"):
            audit.check_preference(net, pairs, wrong, beta=0.1, quiet=True)


def test_audit_of_preferences_sees_a_wrong_loss(monkeypatch):
    net, pairs, reference = preference()
    right = audit.dpo_loss

    def wrong(hidden, weight, targets, weights, cu_seqlens, reference, **options):
        return right(hidden, weight, targets, weights, cu_seqlens, (-reference[0], reference[1]), **options)

    monkeypatch.setattr(audit, "dpo_loss", wrong)
    with pytest.raises(ValueError, match="audit: DPO loss at policy = reference is ln 2"):
        audit.check_preference(net, pairs, reference, beta=0.1, quiet=True)


def test_audit_of_rollouts_sees_another_sampler_and_nan():
    audit.check_rollout(1e-6, quiet=True)
    for error in (0.01, float("nan")):
        with pytest.raises(ValueError, match="audit: PPO ratio on fresh rollouts is 1"):
            audit.check_rollout(error, quiet=True)
