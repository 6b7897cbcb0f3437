"""The losses beside liger-kernel's and TRL's published forms of them, where these are installed: equal values.

Differences that are known, and meant:
- both peers average over the pairs or tokens of the batch at hand; here the caller says the step's global count;
- liger's and TRL's `delta` bounds the ratio for both signs of the advantage. Where the advantage is positive the trust
  interval binds first, so that both give the same as `dual_clip`, which is for negative advantages alone;
- liger divides the chosen answers' likelihood by their tokens, as here with num_chosen_tokens; it has no IPO. TRL's IPO
  divides by tokens, as here, but logs rewards of sums where here they are means; neither has cDPO under this name;
- TRL's forms are methods of its trainers, called here on stand-ins, as of TRL 1.16;
- neither has a critic's loss: TRL 1.16 ships no PPO; the surrogate is compared with their GRPO.
"""

import importlib.util
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from kernels.dpo import dpo
from kernels.linear_logprob import linear_logprob
from kernels.ppo import ppo

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel; pip install liger-kernel"
)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl; pip install trl")
ROWS, LENGTH, WIDTH, VOCAB_SIZE, BETA = 6, 9, 12, 31, 0.3


def drawn(seed=0):
    """Hidden states (ROWS, LENGTH, WIDTH), a head and another, targets with -100 where nothing is learned."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = torch.randn(2, ROWS, LENGTH, WIDTH, generator=generator)
    weight, ref_weight = torch.randn(2, VOCAB_SIZE, WIDTH, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    for row, (prompt, end) in enumerate([(2, 9), (0, 5), (3, 4), (1, 8), (4, 9), (2, 6)]):
        targets[row, :prompt], targets[row, end:] = -100, -100
    return hidden, weight, ref_hidden, ref_weight, targets


def packed(hidden, targets):
    """The rows end to end: hidden states, targets with -1, weights, cu_seqlens."""
    flat = targets.flatten()
    marks = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    return hidden.reshape(-1, WIDTH), flat.clamp(min=-1), (flat >= 0).float(), marks


def both(hidden, weight):
    """Two pairs of leaves of the same values."""
    return [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)]


def same(ours, theirs, mine, twins):
    """Equal losses and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=1e-6)
    for result, expected in zip(torch.autograd.grad(ours, mine), torch.autograd.grad(theirs, twins)):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def our_dpo(hidden, weight, ref_hidden, ref_weight, targets, **options):
    """The loss of this project on the padded rows, each row a sequence."""
    flat, kept, weights, marks = packed(hidden, targets)
    reference = ref_hidden.reshape(-1, WIDTH), ref_weight
    return dpo(flat, weight, kept, weights, marks, reference, beta=BETA, num_pairs=ROWS // 2, **options)


@needs_liger
@pytest.mark.parametrize(
    ("variant", "smoothing", "mean", "nll"),
    [
        ("sigmoid", 0.0, False, 0.0),
        ("sigmoid", 0.0, True, 0.0),
        ("robust", 0.2, False, 0.0),
        ("sigmoid", 0.0, False, 0.7),
    ],
)
def test_dpo_equals_liger(variant, smoothing, mean, nll):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight, ref_hidden, ref_weight, targets = drawn()
    mine, twins = both(hidden, weight)
    peer = LigerFusedLinearDPOLoss(
        beta=BETA,
        alpha=nll,
        compute_nll_loss=nll > 0,
        compiled=False,
        average_log_prob=mean,
        loss_type=variant,
        label_smoothing=smoothing,
    )
    theirs, _ = peer(twins[1], twins[0], targets, ref_input=ref_hidden, ref_weight=ref_weight)
    chosen = int((targets[: ROWS // 2] >= 0).sum())
    ours = our_dpo(
        *mine,
        ref_hidden,
        ref_weight,
        targets,
        variant=variant,
        label_smoothing=smoothing,
        length_normalised=mean,
        nll=nll,
        num_chosen_tokens=chosen,
    )
    same(ours.loss, theirs, mine, twins)


def trl_model(head):
    """A stand-in for a model of TRL's: its fused head's outputs from full logits."""
    hidden, weight = head

    def call(**inputs):
        labels = inputs["labels"][:, 1:]
        logits = hidden[:, :-1] @ weight.T
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return SimpleNamespace(
            log_probs=chosen, entropy=entropy, mean_logits=logits.mean(-1), is_top1=logits.argmax(-1) == labels
        )

    return call


@needs_trl
@pytest.mark.parametrize(
    ("loss_type", "variant", "smoothing"), [("sigmoid", "sigmoid", 0.0), ("robust", "robust", 0.2), ("ipo", "ipo", 0.0)]
)
def test_dpo_equals_trl(loss_type, variant, smoothing):
    from trl import DPOTrainer

    if not hasattr(DPOTrainer, "_compute_loss"):
        pytest.skip("this TRL has no DPOTrainer._compute_loss")
    hidden, weight, ref_hidden, ref_weight, targets = drawn(1)
    mine, twins = both(hidden, weight)
    same_device = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=trl_model((ref_hidden, ref_weight)),
        accelerator=same_device,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        beta=BETA,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        use_weighting=False,
        _tp_size=1,
        args=MagicMock(gradient_checkpointing=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        is_vision_dataset=False,
    )
    # TRL shifts: the target of position i stands at i + 1.
    ids = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=-100)
    inputs = {
        "input_ids": ids.clamp(min=0),
        "attention_mask": torch.ones_like(ids),
        "completion_mask": (ids >= 0).long(),
    }
    theirs = DPOTrainer._compute_loss(trainer, trl_model(twins), inputs, False)
    shortened = targets.clone()
    shortened[:, -1] = -100
    ours = our_dpo(*mine, ref_hidden, ref_weight, shortened, variant=variant, label_smoothing=smoothing)
    same(ours.loss, theirs, mine, twins)
    if variant == "ipo":
        return
    result = {name: values[0] for name, values in trainer._metrics["train"].items() if name.startswith("rewards")}
    means = {name: float(value) / (ROWS // 2) for name, value in ours.metrics.items()}
    assert result["rewards/chosen"] == pytest.approx(means["chosen_reward"], rel=1e-5)
    assert result["rewards/margins"] == pytest.approx(means["margin"], rel=1e-5)
    assert result["rewards/accuracies"] == pytest.approx(means["accuracy"])


def rollout(hidden, weight, targets, seed=3):
    """Old, reference and sampler's log-probabilities near the policy's, and an advantage per row."""
    generator = torch.Generator().manual_seed(seed)
    flat, kept, _, _ = packed(hidden, targets)
    near = linear_logprob(flat, weight, kept)[0].view(ROWS, LENGTH)
    old, reference, sampled = near + 0.5 * torch.randn(3, ROWS, LENGTH, generator=generator)
    return old, reference, sampled, torch.randn(ROWS, generator=generator)


OBJECTIVES = [
    ("bnpo", None, 0.0, False),
    ("grpo", 1.5, 0.1, False),
    ("bnpo", 1.5, 0.1, True),
    ("grpo", None, 0.1, True),
]


def our_ppo(head, targets, drawn_before, kind, delta, kl, weighted, cap=1.2):
    """The clipped surrogate on the padded rows, each row a sequence with one advantage."""
    old, reference, sampled, advantages = drawn_before
    flat, kept, _, marks = packed(head[0], targets)
    over = {"num_tokens": int((kept >= 0).sum())} if kind == "bnpo" else {"num_sequences": ROWS, "cu_seqlens": marks}
    return ppo(
        flat,
        head[1],
        kept,
        old.flatten(),
        advantages.repeat_interleave(LENGTH),
        clip=(0.2, 0.3),
        dual_clip=delta,
        reference=reference.flatten(),
        kl=kl,
        sampled=sampled.flatten() if weighted else None,
        importance_cap=cap,
        **over,
    )


@needs_liger
@pytest.mark.parametrize(("kind", "delta", "kl", "weighted"), OBJECTIVES)
def test_ppo_equals_liger_grpo(kind, delta, kl, weighted):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight, _, _, targets = drawn(2)
    before = rollout(hidden, weight, targets)
    old, reference, sampled, advantages = before
    mine, twins = both(hidden, weight)
    peer = LigerFusedLinearGRPOLoss(
        beta=kl, compiled=False, use_ref_model=kl > 0, epsilon_low=0.2, epsilon_high=0.3, loss_type=kind, delta=delta
    )
    theirs, _ = peer(
        twins[0],
        twins[1],
        targets.clamp(min=0),
        (targets >= 0).float(),
        advantages,
        ref_per_token_logps=reference if kl else None,
        old_per_token_logps=old,
        vllm_is_ratio=(old - sampled).exp().clamp(max=1.2) if weighted else None,
    )
    same(our_ppo(mine, targets, before, kind, delta, kl, weighted).loss, theirs, mine, twins)


@needs_trl
@pytest.mark.parametrize(("kind", "delta", "kl", "weighted"), OBJECTIVES)
def test_ppo_equals_trl_grpo(kind, delta, kl, weighted):
    from trl import GRPOTrainer

    if not hasattr(GRPOTrainer, "_compute_loss"):
        pytest.skip("this TRL has no GRPOTrainer._compute_loss")
    hidden, weight, _, _, targets = drawn(2)
    before = rollout(hidden, weight, targets)
    old, reference, sampled, advantages = before
    mine, twins = both(hidden, weight)
    kept = (targets >= 0).float()
    logits = twins[0] @ twins[1].T
    logprob = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    trainer = MagicMock()
    trainer.configure_mock(
        beta=kl,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=0.3,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=weighted,
        vllm_importance_sampling_correction=weighted,
        aux_loss_enabled=False,
        tools=None,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )
    trainer.args.delta, trainer.args.use_bias_correction_kl = delta, False
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._get_per_token_logps_and_entropies.return_value = (logprob, torch.zeros_like(logprob), None)
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
        "completion_ids": targets.clamp(min=0),
        "completion_mask": kept,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": (old - sampled).exp().clamp(max=1.2),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    same(our_ppo(mine, targets, before, kind, delta, kl, weighted).loss, theirs, mine, twins)
