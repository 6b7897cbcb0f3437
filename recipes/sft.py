"""Supervised learning: conversations (or plain text) in, a model directory out.

python recipes/sft.py --model DIR --data rows.jsonl --out runs/sft
python recipes/sft.py --model small --tokenizer mistral.model --data gsm8k/train.jsonl --out runs/gsm8k
torchrun --nproc-per-node 2 recipes/sft.py ...
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wizard_engine import runtime
from wizard_engine.data.batch import Batch, collate
from wizard_engine.data.chat import Sample, use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.samples import check_rows, read_samples
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import sft_loss
from wizard_engine.model import Routes, Transformer
from wizard_engine.model.loading import language_model, write_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh
from wizard_engine.planning.presets import presets
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import AtLeastTwo, Seed
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.training import audit
from wizard_engine.training.held_out import HeldOutOptions, finish_held_out, open_held_out
from wizard_engine.training.held_out_rows import SupervisedRows
from wizard_engine.training.options import RUN_LENGTH, Training, sample_limit
from wizard_engine.training.run import Run, num_supervised


@dataclass(frozen=True)
class Config(HeldOutOptions):
    """Supervised learning."""

    data: tuple[Path, ...]
    """Row files in any format of docs/data.md; with --kind text, records with a `text` field."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory: config.json, metrics.jsonl, checkpoints/, model/."""
    model: str = "demo"
    """Model directory to start from, or a preset's name (random weights, needs --tokenizer)."""
    tokenizer: Path | None = None
    """Tokenizer file or directory; default: the model directory's own."""
    kind: Literal["conversation", "text"] = "conversation"
    max_length: AtLeastTwo[int | None] = None
    """Longest sample, tokens; default: the model's context, or what a packed row holds where that is less."""
    truncate: bool = False
    """Cut longer samples at --max-length. An answer that is cut is trained up to there, and not to end there."""
    chat_format: ChatFormatChoice = "auto"
    """To train in: auto is the format that this project trained the model in, else Vicuna v1.1; or vicuna, chatml,
    template (the model's own, which must mark its answers), or a .jinja file."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read or learned from: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    training: Training = field(default_factory=Training)
    mesh: MeshOptions = field(default_factory=MeshOptions, metadata=INCIDENTAL)
    sharding: Sharding = field(default_factory=Sharding)
    seed: Seed[int] = 0
    device: str = field(default="auto", metadata=INCIDENTAL)
    audit: bool = field(default=True, metadata=INCIDENTAL)
    """Check the numerics before the first step and print a table."""
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)


def main(cfg: Config) -> dict:
    """Train; returns what stage.json records."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, "sft", rt, extendable=RUN_LENGTH)
    if stage.done:
        return stage.result()
    model, tokenizer = language_model(
        cfg.model, cfg.tokenizer, seed=cfg.seed, device=rt.device, mesh=mesh, sharding=cfg.sharding
    )
    use_chat_format(
        tokenizer,
        cfg.chat_format,
        training=True,
        needs_marks=cfg.kind == "conversation",
        vocab_size=model.config.vocab_size,
    )
    limit = sample_limit(cfg.max_length, model.config, cfg.training)
    samples, rejected = _read(cfg, tokenizer, cfg.data, limit, "rejects.jsonl")
    check_rows(rt, "sft", samples)
    if cfg.audit:
        audit.check_supervised(model, samples, tokenizer, quiet=cfg.quiet or not rt.is_main)

    def read_held_out() -> tuple[SupervisedRows, int]:
        rows, unusable = _read(cfg, tokenizer, cfg.held_out, limit, "held_out_rejects.jsonl")
        return SupervisedRows(rows, cfg.training.pack_tokens), unusable

    held_out = open_held_out(cfg, stage, rt, mesh, model, read_held_out)
    run = Run(
        cfg.training,
        rt,
        model,
        [len(sample.tokens) - 1 for sample in samples],
        cfg.out,
        seed=cfg.seed,
        name="sft",
        quiet=cfg.quiet,
        saves_last=True,
        held_out=held_out,
    )
    for packs in run.steps():
        train_step(run, model, [collate([samples[i] for i in pack]) for pack in packs])
    result = run.result() | {"samples": len(samples), "rejected": rejected}
    if cfg.truncate:
        cut = [sample.cut for sample in samples if sample.cut]
        result |= {"truncated": len(cut), "truncated_tokens": sum(cut)}
    measured, files = finish_held_out(held_out, run.step)
    write_model(rt, model, tokenizer, cfg.out / "model")
    return finish_stage(stage, rt, result | measured, [cfg.out / "model", *files])


def _read(
    cfg: Config, tokenizer: Tokenizer, paths: tuple[Path, ...], limit: int, rejects: str
) -> tuple[list[Sample], int]:
    """Samples of row files, and how many rows were rejected."""
    return read_samples(
        paths,
        tokenizer,
        kind=cfg.kind,
        max_length=limit,
        on_error=cfg.on_error,
        unknown_fields=cfg.unknown_fields,
        rejects=cfg.out / rejects,
        truncate=cfg.truncate,
        quiet=cfg.quiet,
    )


def train_step(run: Run, model: Transformer, batches: list[Batch]) -> None:
    """One optimizer step on this rank's packed rows, which are still in host memory."""
    num_tokens = run.totals(num_supervised(batches))[0]
    for batch in run.lockstep([batch.to(run.runtime.device) for batch in batches]):
        routes = Routes()
        hidden = model(*batch.inputs, routes)
        loss, _, logprob = sft_loss(
            hidden, model.head_weight, batch.targets, batch.weights, num_tokens=num_tokens, shard=model.shard
        )
        (loss + run.router.loss(routes)).backward()
        run.add(loss, batch.tokens.numel(), logprob=logprob)
    run.update()


if __name__ == "__main__":
    launch(main, Config, presets(Config))
