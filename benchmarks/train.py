"""Supervised training step: this engine, packed, against transformers with fused AdamW, at the same shapes in fp32.

Both variants start from the same weights, see the same sequences and do the same work: batch from samples, forward,
loss, backward, clipping at norm 1, AdamW. `equal lengths` has no padding on either side. `mixed lengths` takes
conversations of the embedded world as they come: packed here, padded on the right there; its rate counts real tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import SEED, SHAPES, build, describe, examples, transformers_twin
from benchmarks.timing import interleave
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample
from wizard_engine.loss import sft_loss
from wizard_engine.model import Transformer
from wizard_engine.optim import AdamW

PEER = "transformers"
SEQUENCES, LENGTH, CONVERSATIONS = 8, 128, 16
LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.01, 1.0


class Ours:
    """The step as recipes/sft.py takes it."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.optimizer = AdamW(model, betas=BETAS, weight_decay=DECAY)

    def backward(self, samples: list[Sample]) -> float:
        """Loss of the samples; their gradients are left in place."""
        self.optimizer.zero_grad()
        batch = collate(samples)
        hidden = self.model(*batch.inputs)
        num_tokens = float(batch.weights.sum())
        loss = sft_loss(hidden, self.model.head_weight, batch.targets, batch.weights, num_tokens=num_tokens).loss
        loss.backward()
        return float(loss.detach())

    def step(self, samples: list[Sample]) -> None:
        """One training step."""
        self.backward(samples)
        self.optimizer.clip(CLIP)
        self.optimizer.step(LR)


class Theirs:
    """The same step with transformers' model and loss and torch's fused AdamW."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        named = [(name, p) for name, p in model.named_parameters()]
        groups = [
            {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8, fused=True)

    def backward(self, samples: list[Sample]) -> float:
        """Loss of the samples; their gradients are left in place."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens, targets, mask = pad(samples)
        out = self.model(input_ids=tokens, attention_mask=mask, labels=targets, shift_labels=targets, use_cache=False)
        out.loss.backward()
        return float(out.loss.detach())

    def step(self, samples: list[Sample]) -> None:
        """One training step."""
        self.backward(samples)
        float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True))
        self.optimizer.step()


def pad(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, M) inputs, (B, M) targets with -100 where nothing is learned, and the mask, None where nothing is padded."""
    lengths = [len(sample.tokens) - 1 for sample in samples]
    longest = max(lengths)
    tokens = np.zeros((len(samples), longest), dtype=np.int64)
    targets = np.full((len(samples), longest), -100, dtype=np.int64)
    for row, (sample, length) in enumerate(zip(samples, lengths)):
        tokens[row, :length] = sample.tokens[:-1]
        targets[row, :length] = np.where(sample.weights[1:] > 0, sample.tokens[1:], -100)
    mask = torch.from_numpy(np.arange(longest) < np.asarray(lengths)[:, None]).long()
    return torch.from_numpy(tokens), torch.from_numpy(targets), None if min(lengths) == longest else mask


def equal_samples(vocab_size: int) -> list[Sample]:
    """Random tokens in sequences of one length, all of them supervised."""
    rng = np.random.default_rng(SEED)
    rows = rng.integers(3, vocab_size, (SEQUENCES, LENGTH + 1), dtype=np.int32)
    weights = np.ones(LENGTH + 1, dtype=np.float32)
    weights[0] = 0.0
    return [Sample(row, weights) for row in rows]


def check_same(ours: Ours, theirs: Theirs, samples: list[Sample]) -> None:
    """AssertionError unless loss and gradient norm agree to 1e-4 of their size."""
    results = [(x.backward(samples), gradient_norm(x.model)) for x in (ours, theirs)]
    for name, mine, other in zip(("loss", "gradient norm"), *results):
        assert abs(mine - other) <= 1e-4 * abs(other), f"{name}: {mine} here, {other} in transformers"


def gradient_norm(model: torch.nn.Module) -> float:
    """Norm of all gradients, accumulated in float64."""
    return float(torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt())


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark, without transformers' where `peer` is off; AssertionError if the losses differ."""
    tokenizer, conversations = examples(CONVERSATIONS)
    rows = []
    for preset in SHAPES[: 1 if quick else None]:
        ours = Ours(build(preset, tokenizer))
        theirs = Theirs(transformers_twin(ours.model, tokenizer)) if peer else None
        for label, samples in (
            (f"equal lengths {SEQUENCES}x{LENGTH}", equal_samples(tokenizer.vocab_size)),
            (f"mixed lengths {_lengths(conversations)}", conversations),
        ):
            if theirs is not None:
                _reset(ours, theirs)
                check_same(ours, theirs, samples)
            rows += _time(f"{describe(preset, ours.model)}  {label}", ours, theirs, samples, preset, quick)
    return rows


def _reset(ours: Ours, theirs: Theirs) -> None:
    """Give the twin this engine's present weights, which training has moved."""
    from wizard_engine.model.hugging_face import published_tensors

    with torch.no_grad():
        state = theirs.model.state_dict()
        for name, tensor in published_tensors(ours.model).items():
            state[name].copy_(tensor)


def _time(shape: str, ours: Ours, theirs: Theirs | None, samples: list[Sample], preset: str, quick: bool) -> list:
    steps = 1 if quick else {"demo": 4, "small": 1}[preset]

    def repeat(step: Callable[[list[Sample]], None]) -> Callable[[], None]:
        return lambda: [step(samples) for _ in range(steps)] and None

    variants = {"wizard_engine": repeat(ours.step)}
    if theirs is not None:
        variants[PEER] = repeat(theirs.step)
    tokens = steps * sum(len(sample.tokens) - 1 for sample in samples)
    return interleave(
        "train step", variants, items=tokens, unit="tokens/s", shape=shape, repeats=3 if quick else 9, peer=PEER
    )


def _lengths(samples: list[Sample]) -> str:
    lengths = [len(sample.tokens) - 1 for sample in samples]
    filled = sum(lengths) / (len(lengths) * max(lengths))
    return f"{len(lengths)}x{min(lengths)}..{max(lengths)} ({1 - filled:.0%} padding in the peer)"
