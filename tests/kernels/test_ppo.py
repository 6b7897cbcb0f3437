"""PPO: terms on numbers worked by hand, and the node from hidden states against float64 eager PyTorch."""

import math

import pytest
import torch
from closeness import check, scaled

from kernels import _linear_logprob_chunks as chunks
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.ppo import PpoFormula, clipped_value_loss, kl_estimates, ppo, token_scale

PLAIN = {
    "clip": (0.2, 0.2),
    "dual_clip": None,
    "reference": None,
    "kl": 0.0,
    "kl_estimator": "k3",
    "entropy": 0.0,
    "sampled": None,
    "importance_cap": 2.0,
}


def valued(ratios, advantages, entropy=None, *, coefficient=0.0, **changes):
    """Loss, metrics and the gradient in the log-probabilities of tokens with these ratios, each weighing 1."""
    logprob = torch.tensor(ratios).log().requires_grad_()
    zeros = torch.zeros(len(ratios))
    formula = PpoFormula(zeros, torch.tensor(advantages), zeros + 1, **{**PLAIN, **changes, "entropy": coefficient})
    loss, metrics = formula.value(logprob, zeros if entropy is None else torch.tensor(entropy), slice(None))
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.item(), {name: value.item() for name, value in metrics.items()}, gradient.tolist()


def test_ratio_is_clipped_on_both_sides():
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1: -1.2 (clipped), 1.5, -0.5, 0.8 (clipped)."""
    loss, metrics, gradient = valued([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx(0.6) and gradient == pytest.approx([0, 1.5, -0.5, 0])
    assert metrics["clip_fraction"] == 2 and metrics["ratio"] == pytest.approx(4)
    assert metrics["approx_kl"] == pytest.approx(2 * (0.5 - math.log(1.5)) + 2 * (-0.5 + math.log(2)), abs=1e-6)


# Catches: the ends of the interval swapped.
def test_interval_may_be_wider_above():
    """Ratios 1.25 and 0.7, advantage 1 and -1, interval 0.8 to 1.3: -1.25 and 0.8 (clipped)."""
    loss, metrics, gradient = valued([1.25, 0.7], [1.0, -1.0], clip=(0.2, 0.3))
    assert loss == pytest.approx(-0.45) and gradient == pytest.approx([-1.25, 0]) and metrics["clip_fraction"] == 1


# Catches: a bound on good tokens too.
def test_dual_clip_bounds_bad_tokens_alone():
    """Ratio 5: advantage -2 gives 10, bounded by 3 * 2 = 6; advantage 2 gives -2.4 as ever; ratio 1.1, -2: 2.2."""
    loss, metrics, gradient = valued([5.0, 5.0, 1.1], [-2.0, 2.0, -2.0], dual_clip=3.0)
    assert loss == pytest.approx(6 - 2.4 + 2.2) and gradient == pytest.approx([0, 0, 2.2])
    assert metrics["dual_clip_fraction"] == 1


def test_importance_weight_is_truncated_and_has_no_gradient():
    """Trainer over sampler 1.5 and 8, cap 2: weights 1.5 and 2 on -1 each."""
    sampled = -torch.tensor([1.5, 8.0]).log()
    loss, metrics, gradient = valued([1.0, 1.0], [1.0, 1.0], sampled=sampled)
    assert loss == pytest.approx(-3.5) and gradient == pytest.approx([-1.5, -2])
    assert metrics["importance"] == pytest.approx(9.5) and metrics["importance_truncated"] == 1


@pytest.mark.parametrize(
    ("name", "value", "grad"),
    [("k1", math.log(2), 1), ("k2", 0.5 * math.log(2) ** 2, math.log(2)), ("k3", math.log(2) - 0.5, 0.5)],
)
def test_divergence_to_the_reference_adds_to_the_loss(name, value, grad):
    """p = 1, r = 1/2: k1 = ln 2, k2 = ln^2 2 / 2, k3 = 1/2 - 1 + ln 2; gradients in log p: 1, ln 2, 1 - r / p."""
    options = {"reference": torch.tensor([0.5]).log(), "kl": 0.1, "kl_estimator": name}
    loss, metrics, gradient = valued([1.0], [0.0], **options)
    assert loss == pytest.approx(0.1 * value) and gradient == pytest.approx([0.1 * grad])
    assert metrics["kl_k1"] == pytest.approx(math.log(2)) and metrics[f"kl_{name}"] == pytest.approx(value)


def test_entropy_is_a_bonus():
    loss, metrics, _ = valued([1.0, 1.0], [0.0, 0.0], [0.5, 1.5], coefficient=0.1)
    assert loss == pytest.approx(-0.2) and metrics["entropy"] == pytest.approx(2)


# Catches: a sum over sequences where the mean belongs.
def test_scale_is_of_tokens_or_of_sequences():
    targets = torch.tensor([3, -1, 0, 2, -1, 1, 5])
    marks = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    targets[6] = -1
    assert token_scale(targets, num_tokens=8).tolist() == [0.125, 0, 0.125, 0.125, 0, 0.125, 0]
    assert token_scale(targets, num_sequences=2, cu_seqlens=marks).tolist() == [0.25, 0, 0.25, 0.25, 0, 0.25, 0]


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    """V 1 (old 0.5, R 2): (0.7 - 2)^2 = 1.69; V 0.6 (0.5, 0): 0.36; V 3 (0, 0.1): 2.9^2 = 8.41 though clipped 0.01."""
    values = torch.tensor([1.0, 0.6, 3.0], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2.0, 0.0, 0.1])
    loss, metrics = clipped_value_loss(values, old, returns, clip=0.2, num_tokens=3)
    assert loss.item() == pytest.approx(10.46 / 6, rel=1e-6)
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0, 0.2, 2.9 / 3])
    assert metrics["value_clip_fraction"].item() == 1
    assert metrics["value_error"].item() == pytest.approx(1 + 0.36 + 8.41, rel=1e-6)
    for bad, message in (
        ({"clip": 0.0}, "clip: expected > 0 and finite, got 0.0"),
        ({"num_tokens": 0}, "num_tokens: expected > 0"),
        ({"returns": torch.zeros(2)}, r"returns: expected \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clipped_value_loss(
                **{"values": values, "old_values": old, "returns": returns, "clip": 0.2, "num_tokens": 3, **bad}
            )


def test_kl_estimates_are_unbiased_and_k3_is_never_negative():
    p, r = (torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2).softmax(-1)
    exact = (p * (p / r).log()).sum().item()
    result = kl_estimates(p.log(), r.log())
    for name in ("k1", "k3"):
        assert (p * result[name]).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (result["k1"] < 0).any() and (result["k3"] >= 0).all()
    assert torch.equal(result["k2"], 0.5 * result["k1"] ** 2)


MARKS = torch.tensor([0, 7, 7, 18, 26], dtype=torch.int32)
TOKENS, WIDTH, VOCAB_SIZE = 29, 6, 13


def drawn(seed=0):
    """Inputs, and what a token needs: NaN where its target is ignored."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"hidden": scaled(TOKENS, WIDTH, seed=seed), "weight": 0.3 * scaled(VOCAB_SIZE, WIDTH, seed=seed + 1)}
    targets = torch.randint(-1, VOCAB_SIZE, (TOKENS,), generator=generator)
    targets[3:5], targets[26:] = -1, -1
    inputs_by_token = {}
    for number, name in enumerate(("behaviour", "advantages", "reference", "sampled")):
        inputs_by_token[name] = torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed + 10 + number))
    near = linear_logprob_reference(*inputs.values(), targets)[0].float()
    for name in ("behaviour", "reference", "sampled"):
        inputs_by_token[name] = near + 0.3 * inputs_by_token[name]
    return inputs, targets, {name: x.masked_fill(targets < 0, math.nan) for name, x in inputs_by_token.items()}


def eager(
    hidden,
    weight,
    targets,
    inputs_by_token,
    *,
    per_sequence,
    kl,
    estimator,
    entropy,
    dual_clip,
    cap,
    temperature,
    first=False,
):
    """Written apart from the engine: token by token, full logits; `first`: temperature before the product."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    before, after = (temperature, 1) if first else (1, temperature)
    logprobs = ((hidden.to(wide) / before) @ weight.to(wide).T / after).log_softmax(-1)
    loss = logprobs.new_zeros(())
    for start, end in zip(MARKS[:-1].tolist(), MARKS[1:].tolist()):
        rows = [i for i in range(start, end) if targets[i] >= 0]
        for i in rows:
            behaviour, advantage, reference, sampled = (x[i].to(wide) for x in inputs_by_token.values())
            logprob = logprobs[i, targets[i]]
            ratio = torch.exp(logprob - behaviour)
            term = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))
            if dual_clip and advantage < 0:
                term = torch.min(term, -dual_clip * advantage)
            if cap:
                term = term * min(torch.exp(behaviour - sampled), torch.tensor(cap, dtype=wide))
            far = logprob - reference
            term = term + kl * {"k1": far, "k2": far**2 / 2, "k3": torch.exp(-far) - 1 + far}[estimator]
            term = term + entropy * (logprobs[i].exp() * logprobs[i]).sum()
            loss = loss + term / ((len(rows) * 9) if per_sequence else 31)
    return loss


@pytest.fixture(params=["one chunk", "chunks"])
def path(request, monkeypatch):
    """All rows in one chunk, and chunks of two rows."""
    if request.param == "chunks":
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 4 * VOCAB_SIZE * 2)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("per_sequence", "kl", "estimator", "entropy", "dual_clip", "cap", "temperature"),
    [
        (False, 0.0, "k3", 0.0, None, None, 1.0),
        (True, 0.3, "k1", 0.0, 1.2, None, 0.7),
        (False, 0.3, "k2", 0.2, None, 1.1, 1.0),
        (True, 0.3, "k3", 0.2, 1.2, 1.1, 1.3),
    ],
)
def test_ppo_equals_eager_with_full_logits(
    path, dtype, per_sequence, kl, estimator, entropy, dual_clip, cap, temperature
):
    inputs, targets, inputs_by_token = drawn()
    options = {"num_sequences": 9, "cu_seqlens": MARKS} if per_sequence else {"num_tokens": 31}

    def node(hidden, weight):
        return (
            ppo(
                hidden,
                weight,
                targets,
                inputs_by_token["behaviour"],
                inputs_by_token["advantages"],
                clip=(0.2, 0.3),
                dual_clip=dual_clip,
                reference=inputs_by_token["reference"],
                kl=kl,
                kl_estimator=estimator,
                entropy=entropy,
                sampled=inputs_by_token["sampled"] if cap else None,
                importance_cap=cap or 2.0,
                temperature=temperature,
                **options,
            ).loss
            + 1.0
        )

    def other(hidden, weight, first=False):
        return (
            eager(
                hidden,
                weight,
                targets,
                inputs_by_token,
                per_sequence=per_sequence,
                kl=kl,
                estimator=estimator,
                entropy=entropy,
                dual_clip=dual_clip,
                cap=cap,
                temperature=temperature,
                first=first,
            )
            + 1.0
        )

    # The loss is one number whose terms, which are of the size of 1, cancel: it is compared at their scale.
    check(node, other, inputs, dtype, also=lambda hidden, weight: other(hidden, weight, first=True))


def test_ppo_on_fresh_samples_has_ratio_1_exactly(path):
    inputs, targets, inputs_by_token = drawn(2)
    hidden, weight = (x.float().requires_grad_() for x in inputs.values())
    advantages = inputs_by_token["advantages"]
    behaviour = linear_logprob(hidden, weight, targets, temperature=0.8)[0].detach()
    out = ppo(hidden, weight, targets, behaviour, advantages, clip=0.2, num_tokens=31, temperature=0.8)
    kept = targets >= 0
    assert torch.equal(out.logprob, behaviour)
    assert out.metrics["ratio"] == kept.sum() and out.metrics["approx_kl"] == 0 and out.metrics["clip_fraction"] == 0
    torch.testing.assert_close(out.loss.detach(), -advantages[kept].sum() / 31)


def test_ppo_metrics_do_not_depend_on_chunks(monkeypatch):
    inputs, targets, inputs_by_token = drawn(5)
    head = [x.float().requires_grad_() for x in inputs.values()]

    def metrics():
        return ppo(
            *head,
            targets,
            inputs_by_token["behaviour"],
            inputs_by_token["advantages"],
            clip=0.1,
            num_tokens=3,
            dual_clip=1.1,
            reference=inputs_by_token["reference"],
            sampled=inputs_by_token["sampled"],
        ).metrics

    whole = metrics()
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 4 * VOCAB_SIZE * 2)
    chunked = metrics()
    assert whole.keys() == chunked.keys() and len(whole) == 10
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, msg=name)
    kept = targets >= 0
    torch.testing.assert_close(whole["entropy"], linear_logprob_reference(*head, targets)[1].sum())
    expected = (inputs_by_token["behaviour"] - inputs_by_token["sampled"]).exp()[kept].sum()
    torch.testing.assert_close(whole["importance"], expected)


def test_ppo_of_ignored_tokens_alone_is_0_with_zero_gradients():
    inputs, targets, inputs_by_token = drawn()
    hidden, weight = (x.float().requires_grad_() for x in inputs.values())
    nothing = torch.full_like(targets, -1)
    out = ppo(
        hidden, weight, nothing, inputs_by_token["behaviour"], inputs_by_token["advantages"], clip=0.2, num_tokens=4
    )
    out.loss.backward()
    assert out.loss == 0 and not hidden.grad.any() and not weight.grad.any()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "clip: expected > 0 and finite, got 0.0"),
        ({"clip": (0.2, -1.0)}, "clip: expected > 0 and finite, got -1.0"),
        ({"dual_clip": 1.0}, "dual_clip: expected > 1 and finite, got 1.0"),
        ({"kl": -0.1}, "kl: expected >= 0 and finite, got -0.1"),
        ({"kl": 0.1}, "reference: expected the reference's log-probabilities where kl > 0, got None"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got k4"),
        ({"entropy": math.inf}, "entropy: expected >= 0 and finite, got inf"),
        ({"importance_cap": 0.0}, "importance_cap: expected > 0 and finite, got 0.0"),
        ({"temperature": 0.0}, "temperature: expected > 0 and finite, got 0.0"),
        ({"num_tokens": None}, "num_tokens, num_sequences: expected one of the two, got None, None"),
        ({"num_sequences": 3}, "num_tokens, num_sequences: expected one of the two, got 31, 3"),
        ({"num_tokens": 0}, "num_tokens: expected > 0 and finite, got 0"),
        ({"num_tokens": None, "num_sequences": 3}, "cu_seqlens: expected the sequences' boundaries"),
        ({"num_tokens": None, "num_sequences": 0, "cu_seqlens": MARKS}, "num_sequences: expected > 0"),
        ({"num_tokens": None, "num_sequences": 3, "cu_seqlens": MARKS + 9}, "cu_seqlens: expected 0 first, got 9"),
        ({"behaviour": torch.zeros(3)}, r"behaviour: expected \(29,\), got \(3,\)"),
        ({"sampled": torch.zeros(3)}, r"sampled: expected \(29,\), got \(3,\)"),
    ],
)
def test_ppo_refuses_what_does_not_fit(changes, message):
    inputs, targets, inputs_by_token = drawn()
    arguments = {
        **{name: x.float() for name, x in inputs.items()},
        "targets": targets,
        "behaviour": inputs_by_token["behaviour"],
        "advantages": inputs_by_token["advantages"],
        "clip": 0.2,
        "num_tokens": 31,
    }
    with pytest.raises(ValueError, match=message):
        ppo(**{**arguments, **changes})
