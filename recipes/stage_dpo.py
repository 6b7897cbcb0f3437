"""Stage-DPO: preference slices in an order, each stage with its own reference; a model directory out.

    python recipes/stage_dpo.py --model DIR --data pairs.jsonl --slices 2 --reference previous --out runs/dpo

The WizardLM-2 text says only that preference data are split into slices and the model improves stage by stage; the
order and the reference rule are options here. Reference log-probabilities are computed once per stage and cached under
a key of everything they depend on; drift to the reference of the stage and to the initial model are both logged.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kernels.backend import to_device
from wizard_engine import runtime
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.samples import Pair, answer_pair, check_rows, read_pairs
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import dpo_loss
from wizard_engine.model import Routes, Transformer
from wizard_engine.model.loading import language_model, write_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh
from wizard_engine.planning.presets import presets
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.ranges import AtLeastTwo, Count, NonNegative, Positive, Seed, ranged
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.training import audit
from wizard_engine.training.held_out import HeldOut, HeldOutOptions, finish_held_out, open_held_out
from wizard_engine.training.held_out_rows import PreferenceRows
from wizard_engine.training.options import Training, sample_limit
from wizard_engine.training.preference_slices import order_slices
from wizard_engine.training.reference_logprobs import ReferenceCache
from wizard_engine.training.run import Run

Smoothing = ranged(0, below=0.5)


@dataclass(frozen=True)
class Config(HeldOutOptions):
    """Direct preference optimisation in stages."""

    data: tuple[Path, ...]
    """Preference rows: JSONL, or ShareGPT with chosen and rejected."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory: stage_N/, model/."""
    model: str = "demo"
    """Model directory to start from, or a preset's name (random weights, needs --tokenizer)."""
    tokenizer: Path | None = None
    slices: Count[int] = 1
    """Stages that the pairs are split into."""
    order: Literal["random", "easy_first", "hard_first", "by_gap"] = "easy_first"
    """Order of the slices: by length of the chosen answer, or by the judge's score gap (largest first)."""
    reference: Literal["previous", "initial"] = "previous"
    """Reference of stage i: the model of stage i - 1, or the initial model throughout."""
    cumulative: bool = False
    """Stage i trains on slices 1 to i instead of slice i alone."""
    beta: Positive[float] = 0.3
    variant: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """Form of the loss; sigmoid with label smoothing is cDPO."""
    label_smoothing: Smoothing[float] = 0.0
    """Probability that a label is flipped; not with ipo."""
    length_normalised: bool = False
    """Log-probabilities per token instead of per answer; wants a much larger beta. IPO always normalises."""
    nll: NonNegative[float] = 0.0
    """Weight of the chosen answers' negative log-likelihood per token."""
    max_length: AtLeastTwo[int | None] = None
    """Longest sample, tokens; default: the model's context. Both sides of a pair have to fit one packed row."""
    chat_format: ChatFormatChoice = "auto"
    """To train in: auto is the format that this project trained the model in, else Vicuna v1.1; or vicuna, chatml,
    template (the model's own, which must mark its answers), or a .jinja file."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read or learned from: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    training: Training = field(default_factory=lambda: Training(lr=5e-7))
    mesh: MeshOptions = field(default_factory=MeshOptions, metadata=INCIDENTAL)
    sharding: Sharding = field(default_factory=Sharding)
    seed: Seed[int] = 0
    device: str = field(default="auto", metadata=INCIDENTAL)
    audit: bool = field(default=True, metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    quiet: bool = field(default=False, metadata=INCIDENTAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing: expected 0 with --variant ipo, got {self.label_smoothing:g}")


def main(cfg: Config) -> dict:
    """Train all stages; returns what stage.json records."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, "stage_dpo", rt)
    if stage.done:
        return stage.result()
    model, tokenizer = language_model(
        cfg.model, cfg.tokenizer, seed=cfg.seed, device=rt.device, mesh=mesh, sharding=cfg.sharding
    )
    use_chat_format(
        tokenizer,
        cfg.chat_format,
        training=True,
        needs_marks=True,
        vocab_size=model.config.vocab_size,
    )
    limit = sample_limit(cfg.max_length, model.config, cfg.training)
    pairs, rejected = _read(cfg, tokenizer, cfg.data, limit, "rejects.jsonl")
    check_rows(rt, "stage_dpo", (side for pair in pairs for side in (pair.chosen, pair.rejected)))
    slices = order_slices(pairs, cfg.slices, cfg.order, cfg.seed)
    cache = ReferenceCache(cfg.out / "reference", tokenizer.fingerprint, _normalises(cfg), quiet=cfg.quiet)
    initial = cache.logprobs(model, pairs)
    if cfg.audit:
        audit.check_preference(model, pairs, initial, beta=cfg.beta, quiet=cfg.quiet or not rt.is_main)

    def read_held_out() -> tuple[PreferenceRows, int]:
        rows, unusable = _read(cfg, tokenizer, cfg.held_out, limit, "held_out_rejects.jsonl")
        loss = cfg.beta, cfg.variant, cfg.label_smoothing, _normalises(cfg)
        return PreferenceRows(rows, cfg.training.pack_tokens, *loss), unusable

    held_out = open_held_out(cfg, stage, rt, mesh, model, read_held_out)
    results = []
    for index in range(cfg.slices):
        rows = [i for indices in slices[: index + 1] for i in indices] if cfg.cumulative else slices[index]
        if held_out is not None:
            held_out.steps_before = sum(done["steps"] for done in results)
        stage_pairs = [pairs[i] for i in rows]
        results.append(_train_stage(cfg, rt, model, stage_pairs, cache, initial[rows], index, held_out))
    measured, files = finish_held_out(held_out, sum(done["steps"] for done in results))
    write_model(rt, model, tokenizer, cfg.out / "model")
    result = {"stages": results, "pairs": len(pairs), "rejected": rejected}
    return finish_stage(stage, rt, result | measured, [cfg.out / "model", *files])


def _read(
    cfg: Config, tokenizer: Tokenizer, paths: tuple[Path, ...], limit: int, rejects: str
) -> tuple[list[Pair], int]:
    """Pairs of row files, and how many rows were rejected."""
    return read_pairs(
        paths,
        lambda row: answer_pair(tokenizer, row, limit, cfg.training.pack_tokens),
        on_error=cfg.on_error,
        unknown_fields=cfg.unknown_fields,
        rejects=cfg.out / rejects,
        quiet=cfg.quiet,
    )


def _train_stage(
    cfg: Config,
    rt: Runtime,
    model: Transformer,
    pairs: list[Pair],
    cache: ReferenceCache,
    initial: torch.Tensor,
    index: int,
    held_out: HeldOut | None,
) -> dict:
    """One pass over a slice; `initial` are the (N, 2) log-probabilities under the initial model."""
    reference = initial if cfg.reference == "initial" or index == 0 else cache.logprobs(model, pairs)
    name, out = f"stage_dpo {index + 1}/{cfg.slices}", cfg.out / f"stage_{index + 1}"
    lengths = [pair.length for pair in pairs]
    run = Run(
        cfg.training,
        rt,
        model,
        lengths,
        out,
        seed=cfg.seed + index,
        name=name,
        quiet=cfg.quiet,
        documents=[pair.documents for pair in pairs],
        held_out=held_out,
        shown=("loss", "accuracy", "margin"),
    )
    for packs in run.steps():
        train_step(cfg, run, model, pairs, packs, reference, initial)
    return run.result() | {"pairs": len(pairs)}


def _normalises(cfg: Config) -> bool:
    """Whether log-probabilities are taken per token."""
    return cfg.length_normalised or cfg.variant == "ipo"


def train_step(
    cfg: Config,
    run: Run,
    model: Transformer,
    pairs: list[Pair],
    packs: list[np.ndarray],
    reference: torch.Tensor,
    initial: torch.Tensor,
) -> None:
    """One optimizer step on this rank's packs of pairs.

    Args:
        packs: indices of pairs.   reference, initial: (N, 2) log-probabilities of the pairs' two answers under the
            reference of the stage and under the initial model.
    """
    device = run.runtime.device
    num_pairs = int(run.totals(sum(len(pack) for pack in packs))[0])
    chosen_tokens = sum(pairs[i].chosen.weights.sum() for pack in packs for i in pack)
    num_chosen = run.totals(float(chosen_tokens))[0]
    for pack in run.lockstep(packs):
        batch = collate([pairs[i].chosen for i in pack] + [pairs[i].rejected for i in pack]).to(device)
        rows = torch.as_tensor(pack, dtype=torch.int64)
        ref, first = (to_device(x[rows], device) for x in (reference, initial))
        routes = Routes()
        loss, metrics, logprob = dpo_loss(
            model(*batch.inputs, routes),
            model.head_weight,
            batch.targets,
            batch.weights,
            batch.cu_seqlens,
            ref.T.flatten(),
            beta=cfg.beta,
            num_pairs=num_pairs,
            variant=cfg.variant,
            label_smoothing=cfg.label_smoothing,
            length_normalised=_normalises(cfg),
            nll=cfg.nll,
            num_chosen_tokens=num_chosen,
            shard=model.shard,
        )
        (loss + run.router.loss(routes)).backward()
        metrics["drift_to_reference"] = ref[:, 0].sum() - metrics["chosen_logprob"]
        metrics["drift_to_initial"] = first[:, 0].sum() - metrics["chosen_logprob"]
        shares = {name: value / num_pairs for name, value in metrics.items() if name != "chosen_nll"}
        shares["chosen_nll"] = metrics["chosen_nll"] / num_chosen
        run.add(loss, batch.tokens.numel(), logprob=logprob, **shares)
    run.update()


if __name__ == "__main__":
    launch(main, Config, presets(Config))
