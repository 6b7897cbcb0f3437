"""Reward models for RLEIF: the instruction model (ranking loss with margin) and the process model (a label per step).

    python recipes/reward.py --kind instruction --model DIR --data rankings.jsonl --out runs/irm
    python recipes/reward.py --kind process --model DIR --data steps.jsonl --out runs/prm

A ranking row is a preference row with an empty prompt: `chosen` and `rejected` are instructions, `margin` >= 0.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kernels.backend import to_device
from wizard_engine import runtime
from wizard_engine.data.batch import Batch, collate
from wizard_engine.data.samples import Pair, check_rows, encode_all, fitting_pair, read_pairs, read_processes
from wizard_engine.loss import process_loss, ranking_loss
from wizard_engine.model import Routes, ScoringModel
from wizard_engine.model.loading import scoring_start, write_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh
from wizard_engine.planning.presets import presets
from wizard_engine.rl.rewards import encode_instruction, encode_steps, score_tokens, with_end
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.stage import finish_stage, open_stage
from wizard_engine.training.options import Training, sample_limit
from wizard_engine.training.run import Run


@dataclass(frozen=True)
class Config:
    """Instruction or process reward model."""

    kind: Literal["instruction", "process"]
    data: tuple[Path, ...]
    """Ranking rows, or process rows (JSONL; GSM8K model solutions are read as they are)."""
    out: Path
    """Run directory: model/, metrics.jsonl."""
    model: str = "demo"
    """Model directory whose body is the start, or a preset's name (random weights, needs --tokenizer)."""
    tokenizer: Path | None = None
    surprise: bool = True
    """Process model: let the head see how likely the body itself finds the step's last tokens."""
    held_out: float = 0.1
    """Share of the rows kept for measuring."""
    max_length: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    training: Training = field(default_factory=lambda: Training(lr=1e-6))
    mesh: MeshOptions = field(default_factory=MeshOptions)
    sharding: Sharding = field(default_factory=Sharding)
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False


def main(cfg: Config) -> dict:
    """Train; returns what stage.json records, held-out accuracy included."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, f"reward_{cfg.kind}", rt)
    if stage.done:
        return stage.result()
    is_process = cfg.kind == "process"
    model, tokenizer = scoring_start(
        cfg.model, cfg.tokenizer, 3 if is_process else 1, surprise=is_process and cfg.surprise, seed=cfg.seed,
        mesh=mesh, sharding=cfg.sharding,
    )  # fmt: skip
    limit = sample_limit(cfg.max_length, model.config, cfg.training)
    result, extra = (_process if is_process else _instruction)(cfg, rt, model, tokenizer, limit)
    write_model(rt, model, tokenizer, cfg.out / "model", extra=extra)
    return finish_stage(stage, rt, result, [cfg.out / "model"])


def _split(items: list, share: float, seed: int) -> tuple[list, list]:
    """Training and held-out items, at least one of each."""
    if len(items) < 2:
        raise ValueError(f"rows: expected at least two, one of them to measure on, got {len(items)}")
    order = np.random.default_rng(seed).permutation(len(items))
    kept = min(max(1, round(share * len(items))), len(items) - 1)
    return [items[i] for i in order[kept:]], [items[i] for i in order[:kept]]


def _instruction(cfg: Config, rt: Runtime, model: ScoringModel, tokenizer, limit: int) -> tuple[dict, dict]:
    def encode(row) -> Pair:
        sides = [encode_instruction(tokenizer, text) for text in (row.chosen, row.rejected)]
        longest = max(len(side.tokens) for side in sides)
        if longest >= limit:
            raise ValueError(f"instruction: expected fewer than {limit} tokens, got {longest}")
        pair = Pair(with_end(sides[0]), with_end(sides[1]), float(row.attributes.get("margin", 0.0)))
        return fitting_pair(pair, cfg.training.pack_tokens)

    rejects = cfg.out / "rejects.jsonl"
    pairs, rejected = read_pairs(cfg.data, encode, on_error=cfg.on_error, rejects=rejects, quiet=cfg.quiet)
    check_rows(rt, "reward", (side for pair in pairs for side in (pair.chosen, pair.rejected)))
    train, test = _split(pairs, cfg.held_out, cfg.seed)
    lengths = [pair.length for pair in train]
    run = Run(cfg.training, rt, model, lengths, cfg.out, seed=cfg.seed, name="reward instruction", quiet=cfg.quiet)
    for packs in run.steps():
        instruction_step(run, model, train, packs)
    sides = [[_cut(side) for side in (pair.chosen, pair.rejected)] for pair in test]
    scores = [[float(s[-1, 0]) for s in score_tokens(model, pair)] for pair in sides]
    pool = np.asarray(scores).ravel()
    result = run.result() | {
        "pairs": len(train), "rejected": rejected, "held_out": len(test),
        "held_out_accuracy": float(np.mean([better > worse for better, worse in scores])),
    }  # fmt: skip
    return result, {"wizard_mean": float(pool.mean()), "wizard_std": float(pool.std() + 1e-6)}


def instruction_step(run: Run, model: ScoringModel, pairs: list[Pair], packs: list[np.ndarray]) -> None:
    """One optimizer step of the instruction model on this rank's packs (indices of pairs)."""
    device = run.runtime.device
    num_pairs = int(run.total_over_ranks(n=sum(len(pack) for pack in packs))["n"])
    for pack in run.lockstep(packs):
        batch = collate([pairs[i].chosen for i in pack] + [pairs[i].rejected for i in pack]).to(device)
        routes = Routes()
        better, worse = _last_scores(model, batch, routes).chunk(2)
        margin = to_device(torch.tensor([pairs[i].margin for i in pack]), device)
        loss = ranking_loss(better, worse, margin, num_pairs=num_pairs)
        (loss + run.router.loss(routes)).backward()
        run.add(loss, batch.tokens.numel(), accuracy=(better > worse).sum() / num_pairs)
    run.update()


def _cut(sample):
    """The sample without the token that `with_end` appended."""
    return type(sample)(sample.tokens[:-1], sample.weights[:-1])


def _last_scores(model: ScoringModel, batch: Batch, routes: Routes) -> torch.Tensor:
    """(S,) score at the last position of each packed sequence."""
    return model(*batch.inputs, routes)[batch.cu_seqlens[1:].long() - 1, 0]


def _process(cfg: Config, rt: Runtime, model: ScoringModel, tokenizer, limit: int) -> tuple[dict, dict]:
    def encode(row):
        sample, ends = encode_steps(tokenizer, row.prompt, row.answer)
        if len(sample.tokens) >= limit:
            raise ValueError(f"steps: expected fewer than {limit} tokens, got {len(sample.tokens)}")
        if len(ends) != len(row.labels):
            raise ValueError(f"steps: expected {len(row.labels)} steps (the labels), found {len(ends)} in the text")
        return with_end(sample), ends, row.labels

    rejects = cfg.out / "rejects.jsonl"
    rows, unread = read_processes(cfg.data, on_error=cfg.on_error, rejects=rejects)
    items, rejected = encode_all(rows, encode, cfg.on_error, rejects, quiet=cfg.quiet)
    check_rows(rt, "reward", (sample for sample, _, _ in items))
    train, test = _split(items, cfg.held_out, cfg.seed)
    lengths = [len(sample.tokens) - 1 for sample, _, _ in train]
    run = Run(cfg.training, rt, model, lengths, cfg.out, seed=cfg.seed, name="reward process", quiet=cfg.quiet)
    for packs in run.steps():
        num_steps = int(run.total_over_ranks(n=sum(len(train[i][2]) for pack in packs for i in pack))["n"])
        for pack in run.lockstep(packs):
            batch = collate([train[i][0] for i in pack])
            ends, labels = (to_device(x, rt.device) for x in _labelled(train, pack, batch))
            batch = batch.to(rt.device)
            routes = Routes()
            scores = model(*batch.inputs, routes)[ends]
            loss = process_loss(scores, labels, num_steps=num_steps)
            (loss + run.router.loss(routes)).backward()
            run.add(loss, batch.tokens.numel(), accuracy=(scores.argmax(-1) - 1 == labels).sum() / num_steps)
        run.update()
    result = run.result() | {"rows": len(train), "rejected": rejected + unread, "held_out": len(test)}
    return result | _process_accuracy(model, test), {}


def _labelled(items: list, pack, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed positions of the step ends of a pack's rows, and their labels, all in host memory."""
    starts = batch.cu_seqlens.tolist()
    ends = [starts[n] + end for n, i in enumerate(pack) for end in items[i][1]]
    labels = [label for i in pack for label in items[i][2]]
    return torch.tensor(ends), torch.tensor(labels)


def _process_accuracy(model: ScoringModel, items: list) -> dict:
    """Held-out accuracy of step labels, and of telling answers without a wrong step from those with one."""
    scored = score_tokens(model, [_cut(sample) for sample, _, _ in items])
    steps, clean, wrong = [], [], []
    for (_, ends, labels), scores in zip(items, scored):
        own = scores[ends].softmax(-1)
        steps += (own.argmax(-1) - 1 == torch.tensor(labels)).tolist()
        (wrong if -1 in labels else clean).append(float((1 - own[:, 0]).min()))
    pairs = [(c > w) + 0.5 * (c == w) for c in clean for w in wrong]
    return {
        "held_out_accuracy": float(np.mean(steps)),
        "held_out_answer_auc": float(np.mean(pairs)) if pairs else None,
        "share_with_a_wrong_step": len(wrong) / len(items),
    }


if __name__ == "__main__":
    launch(main, Config, presets(Config))
