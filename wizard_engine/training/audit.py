"""Numerical self-audit at the start of a run: a pass / fail table of the invariants that silent bugs break.

A failed check ends the run, because every figure after it would be worthless.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wizard_engine.data.batch import Batch, collate
from wizard_engine.data.chat import Sample
from wizard_engine.data.samples import Pair
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import dpo_loss, sequence_logprobs, sft_loss
from wizard_engine.model import Transformer
from wizard_engine.parallel import Sharded, lockstep, sharded
from wizard_engine.runtime.metrics import Progress, progress
from wizard_engine.runtime.text_lines import printable

TOLERANCE = 2e-5
# Of the sample that shows its mask: spans, and characters of either end of a span.
MASK_SPANS, MASK_END = 8, 60


@dataclass(frozen=True)
class Check:
    """One line of the table: an invariant, its error and the limit of the error."""

    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN never is."""
        return self.error <= self.limit


def report(checks: Sequence[Check], *, quiet: bool) -> None:
    """Print the table on stderr; stop on a failure.

    Raises:
        ValueError: a check failed; names it with its error and limit.
    """
    if not quiet:
        for check in checks:
            verdict = "pass" if check.passed else "FAIL"
            print(
                f"audit  {verdict}  {check.name:<44} {check.error:.1e} <= {check.limit:.0e}  {check.note}",
                file=sys.stderr,
            )
    for check in checks:
        if not check.passed:
            raise ValueError(
                f"audit: {check.name}: expected an error of at most {check.limit:.0e}, got {check.error:.3e}"
            )


def _gradient_and_loss(model: Transformer, groups: Sequence[Sequence[Sample]], bar: Progress) -> tuple[float, Tensor]:
    """Loss of groups of samples with one denominator over all, and the flat gradient; restores the gradients.

    Args:
        bar: counts the groups.
    """
    device = model.embedding.weight.device
    num_tokens = float(sum(sample.weights[1:].sum() for group in groups for sample in group))
    engine = sharded(model)
    if engine is not None and not engine.keeps_gradients:
        return _sharded_gradient_and_loss(model, engine, groups, num_tokens, bar)
    saved = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    value = 0.0
    for group in groups:
        batch = collate(group).to(device)
        hidden = model(*batch.inputs)
        loss = _supervised_loss(model, hidden, batch, num_tokens)
        loss.backward()
        value += float(loss.detach())
        bar.update(1)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for parameter, old in zip(model.parameters(), saved):
        parameter.grad = old
    return value, gradient


def _supervised_loss(model: Transformer, hidden: Tensor, batch: Batch, num_tokens: float) -> Tensor:
    shard = model.shard
    return sft_loss(hidden, model.head_weight, batch.targets, batch.weights, num_tokens=num_tokens, shard=shard).loss


def _sharded_gradient_and_loss(
    model: Transformer, engine: Sharded, groups: Sequence[Sequence[Sample]], num_tokens: float, bar: Progress
) -> tuple[float, Tensor]:
    """Loss and this rank's shard of the gradient of a sharded model; every rank makes the call."""
    engine.zero_grad()
    value = 0.0
    for group in lockstep(groups, model, backward=True):
        batch = collate(group).to(engine.device)
        hidden = model(*batch.inputs)
        loss = _supervised_loss(model, hidden, batch, num_tokens)
        loss.backward()
        value += float(loss.detach())
        bar.update(1)
    engine.finish()
    gradient = engine.gradient()
    engine.zero_grad()
    return value, gradient


def supervised_checks(model: Transformer, samples: Sequence[Sample], *, quiet: bool = True) -> list[Check]:
    """Packed = unpacked, and k micro-batches = one batch, for loss and gradient, on up to eight short samples."""
    few = sorted(samples, key=lambda sample: len(sample.tokens))[: len(samples) // 2 + 1][-8:]
    ways = [few], [[sample] for sample in few], [half for half in (few[::2], few[1::2]) if half]
    with progress(desc="audit", unit="pass", total=sum(map(len, ways)), quiet=quiet) as bar:
        (together, whole), (apart, single), (halves, split) = (_gradient_and_loss(model, way, bar) for way in ways)
    engine = sharded(model)
    norm = Tensor.norm if engine is None or not engine.is_sharded else engine.norm
    scale, limit = max(float(norm(whole)), 1e-12), tolerance(model)
    return [
        Check("packed loss = unpacked loss", abs(together - apart) / max(abs(together), 1e-12), limit),
        Check("packed gradient = unpacked gradient", float(norm(whole - single)) / scale, 50 * limit),
        Check("two micro-batches = one batch", abs(together - halves) / max(abs(together), 1e-12), limit),
        Check("gradient of two micro-batches = of one", float(norm(whole - split)) / scale, 50 * limit),
    ]


def tolerance(model: Transformer) -> float:
    """Relative error that rounding explains; larger for models in 16 bits."""
    return TOLERANCE if model.embedding.weight.dtype.itemsize > 2 else 25 * TOLERANCE


def shown_mask(sample: Sample, tokenizer: Tokenizer) -> str:
    """The sample's text with its trained spans in square brackets, on one line.

    Of a long span its first and last characters are shown, so that the line has the beginning and the end of each.
    """
    is_run_trained, trained = [], False
    runs: list[list[int]] = []
    for token, weight in zip(sample.tokens.tolist(), sample.weights.tolist()):
        if not runs or (weight > 0) != trained:
            runs.append([])
            is_run_trained.append(weight > 0)
            trained = weight > 0
        runs[-1].append(token)
    ends = set(tokenizer.eos_ids)
    closed = [tokenizer.decode(run) + ("</s>" if ends & set(run) else "") for run in runs]
    shown = [_ends(text) for text in closed]
    parts = [f"[{text}]" if on else text for text, on in zip(shown, is_run_trained)]
    more = f" ... ({len(parts) - MASK_SPANS} more spans)" if len(parts) > MASK_SPANS else ""
    return printable("".join(parts[:MASK_SPANS])) + more


def _ends(text: str) -> str:
    """A text without its middle where it is longer than both ends."""
    return text if len(text) <= 2 * MASK_END else f"{text[:MASK_END]} ... {text[-MASK_END:]}"


def _closes(sample: Sample, tokenizer: Tokenizer) -> bool:
    """Whether the last run of trained tokens has the end of the answer: in Vicuna as its last token."""
    trained = sample.weights.nonzero()[0]
    if tokenizer.chat_format.is_vicuna:
        return bool(sample.tokens[trained.max(initial=0)] == tokenizer.eos_id)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    last = trained[breaks[-1] + 1 :] if len(breaks) else trained
    return bool(np.isin(sample.tokens[last], tokenizer.eos_ids).any())


def check_supervised(model: Transformer, samples: Sequence[Sample], tokenizer: Tokenizer, *, quiet: bool) -> None:
    """Audit of supervised training; prints one sample with its mask."""
    # An answer that was cut has no end, and a turn of weight 0 is not trained.
    whole = [s for s in samples if not s.cut]
    open_ends = sum(not _closes(s, tokenizer) for s in whole)
    checks = [Check("every sample trains its closing </s>", open_ends / max(1, len(whole)), 0.0)]
    checks.append(Check("nothing trains the first token", float(sum(s.weights[0] for s in samples)), 0.0))
    if not quiet:
        print(f"audit  mask  {shown_mask(samples[0], tokenizer)}", file=sys.stderr)
    report(checks + supervised_checks(model, samples, quiet=quiet), quiet=quiet)


def check_preference(model: Transformer, pairs: Sequence[Pair], reference: Tensor, *, beta: float, quiet: bool) -> None:
    """Audit of DPO: where policy = reference the loss is ln 2; and the supervised checks on the chosen answers."""
    few = list(pairs[:8])
    batch = collate([p.chosen for p in few] + [p.rejected for p in few]).to(model.embedding.weight.device)
    with torch.no_grad():
        policy = model(*batch.inputs), model.head_weight
        loss, _, logprob = dpo_loss(
            *policy,
            batch.targets,
            batch.weights,
            batch.cu_seqlens,
            policy,
            beta=beta,
            num_pairs=len(few),
            shard=model.shard,
        )
    recorded = reference[: len(few)]
    sums, means = (
        sequence_logprobs(logprob, batch.weights, batch.cu_seqlens, mean=mean).view(2, -1).T.cpu()
        for mean in (False, True)
    )
    apart = min(float((x - recorded).abs().max() / x.abs().max().clamp(min=1.0)) for x in (sums, means))
    checks = [
        Check("DPO loss at policy = reference is ln 2", abs(float(loss) - math.log(2)), 1e-6),
        Check("reference log-probabilities = a fresh forward", apart, tolerance(model)),
    ]
    report(checks + supervised_checks(model, [pair.chosen for pair in few], quiet=quiet), quiet=quiet)


def check_rollout(largest_ratio_error: float, *, quiet: bool, is_wide: bool = True) -> None:
    """Audit of PPO: on fresh rollouts the trainer's log-probabilities are the sampler's, so that the ratio is 1.

    Args:
        is_wide: the policy computes in 32 bits or more. In 16, sampler and trainer differ by rounding, at most
            0.16 nats over 2,700 tokens of the demo's policy. Another template or other weights differ by several nats.
    """
    limit = 1e-3 if is_wide else 0.5
    report([Check("PPO ratio on fresh rollouts is 1 (nats)", largest_ratio_error, limit)], quiet=quiet)
