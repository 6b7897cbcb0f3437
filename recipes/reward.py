"""Reward models for RLEIF: of instructions and of answers (ranking loss with margin), of steps (a label for each).

    python recipes/reward.py --kind instruction --model DIR --data rankings.jsonl --out runs/irm
    python recipes/reward.py --kind process --model DIR --data steps.jsonl --out runs/prm
    python recipes/reward.py --kind preference --model DIR --data pairs.jsonl --out runs/preference

A ranking row is a preference row with an empty prompt: `chosen` and `rejected` are instructions, `margin` >= 0. A pair
of answers has a prompt; its margin is the row's own, or comes from the gap of its judge's scores.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kernels.backend import to_device
from wizard_engine import runtime
from wizard_engine.data.batch import Batch, collate
from wizard_engine.data.chat import Sample, use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.proportions import wilson_interval
from wizard_engine.data.records import Preference as PreferenceRow
from wizard_engine.data.records import Process as ProcessRow
from wizard_engine.data.samples import Pair, check_rows, encode_all, read_pairs, read_processes
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import process_loss, ranking_loss
from wizard_engine.model import Routes, ScoringModel
from wizard_engine.model.loading import scoring_start, write_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh
from wizard_engine.planning.presets import presets
from wizard_engine.rl.companions import KIND, OUTPUTS
from wizard_engine.rl.rewards import encode_steps, instruction_pair, rated_pair, score_tokens, with_end
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.metrics import progress
from wizard_engine.runtime.ranges import AtLeastTwo, Fraction, Seed
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage
from wizard_engine.training.held_out import HeldOutOptions, finish_held_out, open_held_out
from wizard_engine.training.held_out_rows import LabelledSteps, RankingRows, StepRows, step_values
from wizard_engine.training.options import RUN_LENGTH, Training, sample_limit
from wizard_engine.training.run import Run


@dataclass(frozen=True)
class Config(HeldOutOptions):
    """Instruction, process or preference reward model."""

    kind: Literal["instruction", "process", "preference"]
    """What is scored: an instruction, each step of an answer, or an answer."""
    data: tuple[Path, ...]
    """Ranking rows, process rows (JSONL; GSM8K model solutions are read as they are), or preference rows."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory: model/, metrics.jsonl."""
    model: str = "demo"
    """Model directory whose body is the start, or a preset's name (random weights, needs --tokenizer)."""
    tokenizer: Path | None = None
    surprise: bool = True
    """Process model: let the head see how likely the body itself finds the step's last tokens."""
    held_out_share: Fraction[float] = 0.1
    """Share of the rows of --data that is not trained on, at least one row. It is measured at the end; the scores of
    its instructions calibrate the factor instruction of RLEIF."""
    max_length: AtLeastTwo[int | None] = None
    chat_format: ChatFormatChoice = "auto"
    """To train in: auto is the format that this project trained the model in, else Vicuna v1.1; or vicuna, chatml,
    template (the model's own, which must mark its answers), or a .jinja file."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read or learned from: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    training: Training = field(default_factory=lambda: Training(lr=1e-6))
    mesh: MeshOptions = field(default_factory=MeshOptions, metadata=INCIDENTAL)
    sharding: Sharding = field(default_factory=Sharding)
    seed: Seed[int] = 0
    device: str = field(default="auto", metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    quiet: bool = field(default=False, metadata=INCIDENTAL)


def main(cfg: Config) -> dict:
    """Train; returns what stage.json records, held-out accuracy included."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, f"reward_{cfg.kind}", rt, extendable=RUN_LENGTH)
    if stage.done:
        return stage.result()
    is_process = cfg.kind == "process"
    model, tokenizer = scoring_start(
        cfg.model,
        cfg.tokenizer,
        OUTPUTS[cfg.kind],
        surprise=is_process and cfg.surprise,
        seed=cfg.seed,
        mesh=mesh,
        sharding=cfg.sharding,
    )
    use_chat_format(
        tokenizer,
        cfg.chat_format,
        training=True,
        needs_marks=False,
        vocab_size=model.config.vocab_size,
    )
    kind = {"instruction": Instruction, "process": Process, "preference": Preference}[cfg.kind]()
    limit = sample_limit(cfg.max_length, model.config, cfg.training)
    items, rejected = kind.read(cfg, tokenizer, limit, cfg.data, "rejects.jsonl")
    check_rows(rt, "reward", (sample for item in items for sample in kind.samples(item)))

    def read_held_out() -> tuple[RankingRows | StepRows, int]:
        rows, unusable = kind.read(cfg, tokenizer, limit, cfg.held_out, "held_out_rejects.jsonl")
        return kind.held_out(rows, cfg.training.pack_tokens), unusable

    held_out = open_held_out(cfg, stage, rt, mesh, model, read_held_out)
    train, test = _split(items, cfg.held_out_share, cfg.seed)
    documents = [[len(sample.tokens) - 1 for sample in kind.samples(item)] for item in train]
    run = Run(
        cfg.training,
        rt,
        model,
        [sum(row) for row in documents],
        cfg.out,
        seed=cfg.seed,
        name=f"reward {cfg.kind}",
        quiet=cfg.quiet,
        documents=documents,
        saves_last=True,
        held_out=held_out,
        shown=("loss", "accuracy"),
    )
    for packs in run.steps():
        train_step(run, model, kind, train, packs)
    measured, calibration = kind.measure(model, test, quiet=cfg.quiet)
    counts = {kind.unit: len(train), "rejected": rejected, "held_out_rows": len(test)}
    more, files = finish_held_out(held_out, run.step)
    write_model(rt, model, tokenizer, cfg.out / "model", extra=calibration)
    return finish_stage(stage, rt, run.result() | counts | measured | more, [cfg.out / "model", *files])


def train_step(
    run: Run, model: ScoringModel, kind: "Instruction | Preference | Process", items: list, packs: list[np.ndarray]
) -> None:
    """One optimizer step on this rank's packs (indices of items)."""
    count = int(run.totals(sum(kind.count(items[i]) for pack in packs for i in pack))[0])
    for pack in run.lockstep(packs):
        rows = [items[i] for i in pack]
        batch = kind.batch(rows)
        labels = [to_device(x, run.device) for x in kind.labels(rows, batch)]
        batch = batch.to(run.device)
        routes = Routes()
        loss, correct = kind.loss(model(*batch.inputs, routes), batch, *labels, count)
        (loss + run.router.loss(routes)).backward()
        run.add(loss, batch.tokens.numel(), accuracy=correct / count)
    run.update()


def _split(items: list, fraction: float, seed: int) -> tuple[list, list]:
    """Training and held-out items, at least one of each."""
    if len(items) < 2:
        raise ValueError(f"rows: expected at least two, one of them to measure on, got {len(items)}")
    order = np.random.default_rng(seed).permutation(len(items))
    kept = min(max(1, round(fraction * len(items))), len(items) - 1)
    return [items[i] for i in order[kept:]], [items[i] for i in order[:kept]]


class Instruction:
    """Pairs of instructions, the better one with a margin: a ranking loss over the score at each one's end."""

    unit = "pairs"

    def pair(self, tokenizer: Tokenizer, row: PreferenceRow, limit: int, capacity: int) -> Pair:
        """Both sides of a row in tokens, with its margin."""
        return instruction_pair(tokenizer, row, limit, capacity)

    def read(
        self, cfg: Config, tokenizer: Tokenizer, limit: int, paths: tuple[Path, ...], rejects: str
    ) -> tuple[list[Pair], int]:
        """Pairs of the rows, and how many rows were rejected."""

        return read_pairs(
            paths,
            lambda row: self.pair(tokenizer, row, limit, cfg.training.pack_tokens),
            on_error=cfg.on_error,
            unknown_fields=cfg.unknown_fields,
            rejects=cfg.out / rejects,
            quiet=cfg.quiet,
        )

    def samples(self, pair: Pair) -> tuple[Sample, ...]:
        """What the model reads of a pair."""
        return pair.chosen, pair.rejected

    def count(self, pair: Pair) -> int:
        """Terms of the loss."""
        return 1

    def batch(self, pairs: list[Pair]) -> Batch:
        """The chosen sides, then the rejected ones, in host memory."""
        return collate([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])

    def labels(self, pairs: list[Pair], batch: Batch) -> tuple[torch.Tensor, ...]:
        """(S / 2,) margins."""
        return (torch.tensor([pair.margin for pair in pairs]),)

    def loss(
        self, scores: torch.Tensor, batch: Batch, margin: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss, and how many pairs are in order; scores (T, 1)."""
        better, worse = scores[batch.cu_seqlens[1:].long() - 1, 0].chunk(2)
        return ranking_loss(better, worse, margin, num_pairs=count), (better > worse).sum()

    def held_out(self, pairs: list[Pair], capacity: int) -> RankingRows:
        """The pairs as rows to measure on."""
        return RankingRows([Pair(_without_end(p.chosen), _without_end(p.rejected)) for p in pairs], capacity)

    def measure(self, model: ScoringModel, pairs: list[Pair], *, quiet: bool) -> tuple[dict, dict]:
        """Held-out accuracy with its 95 % interval, and fields of the model's config.json."""
        sides = [[_without_end(side) for side in self.samples(pair)] for pair in pairs]
        bar = progress(sides, desc="own held-out share", unit="pair", quiet=quiet)
        scores = np.asarray([[float(s[-1, 0]) for s in score_tokens(model, pair)] for pair in bar])
        right, count = int((scores[:, 0] > scores[:, 1]).sum()), len(pairs)
        measured = {"held_out_accuracy": right / count, "held_out_ci95": list(wilson_interval(right, count))}
        return measured | self.baselines(pairs), self.fields(scores)

    def baselines(self, pairs: list[Pair]) -> dict[str, float]:
        """What a rule without a model says of the pairs."""
        return {}

    def fields(self, scores: np.ndarray) -> dict[str, float | str]:
        """Of config.json: mean and deviation of the scores (N, 2), which calibrate the factor."""
        pool = scores.ravel()
        return {"wizard_mean": float(pool.mean()), "wizard_std": float(pool.std() + 1e-6)}


class Preference(Instruction):
    """Pairs of answers to a prompt, the better one with a margin: the same loss over the score at each one's end."""

    def pair(self, tokenizer: Tokenizer, row: PreferenceRow, limit: int, capacity: int) -> Pair:
        """Both answers of a row with its prompt, in tokens, with its margin."""
        return rated_pair(tokenizer, row, limit, capacity)

    def baselines(self, pairs: list[Pair]) -> dict[str, float]:
        """How often the longer answer is the chosen one, ties half: what length alone would reach."""
        lengths = np.asarray([[len(side.tokens) for side in self.samples(pair)] for pair in pairs])
        longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
        return {"held_out_length_accuracy": float(0.5 + 0.5 * (longer.mean() - shorter.mean()))}

    def fields(self, scores: np.ndarray) -> dict[str, float | str]:
        """Of config.json: the kind, which has as many outputs as that of instructions."""
        return {KIND: "preference"}


class Process:
    """Answers with a label for each step: cross-entropy over three classes at the end of each step."""

    unit = "rows"

    def read(
        self, cfg: Config, tokenizer: Tokenizer, limit: int, paths: tuple[Path, ...], rejects: str
    ) -> tuple[list[LabelledSteps], int]:
        """Answers with labels, and how many rows were rejected."""

        def encode(row: ProcessRow) -> LabelledSteps:
            sample, ends = encode_steps(tokenizer, row.prompt, row.answer)
            if len(sample.tokens) >= limit:
                raise ValueError(f"steps: expected fewer than {limit} tokens, got {len(sample.tokens)}")
            if len(ends) != len(row.labels):
                raise ValueError(f"steps: expected {len(row.labels)} steps (the labels), found {len(ends)} in the text")
            return with_end(sample), ends, row.labels

        file = cfg.out / rejects
        rows, unread = read_processes(paths, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields, rejects=file)
        items, rejected = encode_all(rows, encode, cfg.on_error, file, quiet=cfg.quiet)
        return items, rejected + unread

    def samples(self, item: LabelledSteps) -> tuple[Sample, ...]:
        """What the model reads of an answer."""
        return item[:1]

    def count(self, item: LabelledSteps) -> int:
        """Terms of the loss."""
        return len(item[2])

    def batch(self, items: list[LabelledSteps]) -> Batch:
        """The answers in host memory."""
        return collate([sample for sample, _, _ in items])

    def labels(self, items: list[LabelledSteps], batch: Batch) -> tuple[torch.Tensor, ...]:
        """Packed positions of the step ends, and their labels, in host memory."""
        starts = batch.cu_seqlens.tolist()
        ends = [starts[n] + end for n, (_, ends, _) in enumerate(items) for end in ends]
        return torch.tensor(ends), torch.tensor([label for _, _, labels in items for label in labels])

    def loss(
        self, scores: torch.Tensor, batch: Batch, ends: torch.Tensor, labels: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss, and how many steps are classed right; scores (T, 3)."""
        scores = scores[ends]
        return process_loss(scores, labels, num_steps=count), (scores.argmax(-1) - 1 == labels).sum()

    def held_out(self, items: list[LabelledSteps], capacity: int) -> StepRows:
        """The answers as rows to measure on."""
        return StepRows([(_without_end(sample), ends, labels) for sample, ends, labels in items], capacity)

    def measure(self, model: ScoringModel, items: list[LabelledSteps], *, quiet: bool) -> tuple[dict, dict]:
        """Held-out accuracy of step labels, and of telling answers without a wrong step from those with one."""
        desc = "" if quiet else "own held-out share"
        scored = score_tokens(model, [_without_end(sample) for sample, _, _ in items], desc=desc)
        num_correct, clean, wrong = 0.0, [], []
        for (_, ends, labels), scores in zip(items, scored):
            correct, lowest = step_values(scores, ends, labels)
            num_correct += correct
            (wrong if -1 in labels else clean).append(lowest)
        pairs = [(c > w) + 0.5 * (c == w) for c in clean for w in wrong]
        return {
            "held_out_accuracy": num_correct / sum(map(self.count, items)),
            "held_out_answer_auc": float(np.mean(pairs)) if pairs else None,
            "share_with_a_wrong_step": len(wrong) / len(items),
        }, {}


def _without_end(sample: Sample) -> Sample:
    """The sample without the token that `with_end` appended."""
    return Sample(sample.tokens[:-1], sample.weights[:-1])


if __name__ == "__main__":
    launch(main, Config, presets(Config))
