"""Run of supervised training: packs of rows, one update a step, its log line."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wizard_engine.checkpoint import Checkpoint
from wizard_engine.data.loader import Loader
from wizard_engine.model import ScoringModel
from wizard_engine.parallel import pack_over_rows, sharded
from wizard_engine.planning.flops import step_flops_per_token
from wizard_engine.planning.rates import peak_flops
from wizard_engine.runtime.memory import peak_memory_gib
from wizard_engine.runtime.metrics import BAR_METRICS
from wizard_engine.runtime.object_collectives import check_same, with_names_of_all_ranks
from wizard_engine.runtime.process import Runtime

from .base_run import BaseRun
from .held_out import HeldOut
from .loss_spikes import Spikes
from .options import Training


class Run(BaseRun[list[np.ndarray]]):
    """One training run: iterate `steps()`; per micro-batch call `backward` on the loss and `add`, then `update` once.

    `steps()` yields this rank's packs of each remaining step, as arrays of row indices.

    Args:
        options: see Training.   out: run directory (metrics.jsonl, checkpoints/).
        model: trained in place, as `parallelize` returned it; a plain one is replicated.
        lengths: tokens of each row, for packing.   seed: order of the data.
        documents: tokens of each document of each row, for MFU; default: a row is one document.
        saves_last: write a checkpoint of the last step, from which a run with more epochs goes on.
        held_out: rows to measure on; the values stand in the lines of the steps after which they were measured.
        shown: metrics on the progress bar, before the rates; held-out ones are added.
    Raises:
        ValueError: no rows, rows that fit no pack, ranks with other rows, or a checkpoint of other rows or another
            model.
    """

    has_limited_steps = True

    def __init__(
        self,
        options: Training,
        runtime: Runtime,
        model: nn.Module,
        lengths: Sequence[int],
        out: Path,
        *,
        seed: int,
        name: str,
        quiet: bool = False,
        documents: Sequence[Sequence[int]] | None = None,
        saves_last: bool = False,
        held_out: HeldOut | None = None,
        shown: Sequence[str] = ("loss",),
    ) -> None:
        super().__init__(options, runtime, {"model": model}, out, name=name)
        self.options: Training = options
        self.saves_last, self.held_out = saves_last, held_out
        self.model, self.sharded = model, sharded(model)
        self.router, self.optimizer = self.routers["model"], self.optimizers["model"]
        data = self.mesh.data
        self.loader = Loader(
            np.asarray(lengths, dtype=np.int64),
            capacity=options.pack_tokens,
            packs_per_step=options.packs_per_step,
            seed=seed,
            epochs=options.epochs,
            rank=data.index,
            world_size=data.size,
        )
        total = self._steps_in_all()
        if total < 1:
            raise ValueError(f"{name}: expected rows for at least one step, got {len(lengths)} rows")
        check_same(runtime, f"{name}: rows and their order", self.loader.state()["order"])
        self.lengths = np.asarray(lengths)
        self.row_flops = step_flops(model, [(n,) for n in lengths] if documents is None else documents)
        self.spikes = Spikes(options.spike)
        self._names: tuple[str, ...] = ()
        self._agreed = False
        self._clear()
        held_out_names = () if held_out is None else held_out.names
        self._open(total, quiet=quiet, shown=tuple(dict.fromkeys((*shown, *held_out_names, *BAR_METRICS))))
        if held_out is not None and self.step == 0:
            self.logger.show(held_out.values())
        self._packs = iter(self.loader)

    def _steps_in_all(self) -> int:
        return min(self.loader.steps, self.options.max_steps or self.loader.steps)

    def _begin(self) -> list[np.ndarray]:
        """This rank's packs of a step."""
        began = time.perf_counter()
        packs = next(self._packs)
        self._waiting = time.perf_counter() - began
        self.optimizer.zero_grad()
        self._clear()
        self._flops = float(sum(self.row_flops[pack].sum() for pack in packs))
        self.router.start(int(sum(self.lengths[pack].sum() for pack in packs)))
        return packs

    def _clear(self) -> None:
        """Forget the step's sums."""
        self._sums: dict[str, Tensor | float] = {"loss": 0.0, "tokens": 0}
        self._logprobs = []
        self._flops = 0.0

    def add(self, loss: Tensor, tokens: int, *, logprob: Tensor | None = None, **metrics: Tensor | float) -> None:
        """Add one micro-batch to the step.

        Args:
            loss: this rank's share of the step's loss (its sum over ranks and micro-batches is the loss).
            tokens: tokens of the micro-batch.   logprob: (T,) log-probabilities that the loss is made of, to name the
                token that makes it not finite.   metrics: this rank's share of further metrics.
        """
        for name, value in {"loss": loss.detach(), "tokens": tokens, **metrics}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if logprob is not None:
            self._logprobs.append(logprob)

    def update(self) -> None:
        """Reduce, clip, step and log what was added.

        The host reads the step's sums once, after the optimizer's launch: the device skips a step that is not finite.
        Where spikes are skipped, the host reads them before the launch, because a spike depends on earlier losses.
        """
        self.sharded.finish()
        lr = self.learning_rate(self.options.lr)
        summed = self._summed()
        norm_and_sums = torch.cat([self.optimizer.clip(self.options.clip, summed[0]).reshape(1), summed])
        early = norm_and_sums.tolist() if self.options.spike > 0 else None
        is_spike = early is not None and _is_finite(early) and self.spikes.is_spike(early[1])
        if not is_spike:
            self.optimizer.step(lr)
        sums = norm_and_sums.tolist() if early is None else early
        norm, loss = sums[:2]
        if not _is_finite(sums):
            self.optimizer.take_back()
            self._skip(f"loss {loss}, gradient norm {norm}", "were not finite")
        elif is_spike:
            self._skip(f"loss {loss}, gradient norm {norm}", "were spikes")
        self._record(sums, lr)

    def _summed(self) -> Tensor:
        """(N,) fp64 sums over ranks: loss, tokens, FLOPs, metrics, whether to stop, the routers' sums."""
        metrics = self._complete({name: x for name, x in self._sums.items() if name not in ("loss", "tokens")})
        sums = {"loss": self._sums["loss"], "tokens": self._sums["tokens"], "flops": self._flops, **metrics}
        return pack_over_rows(sums, self.mesh, float(self.stop.requested), *self.router.pop_sums())

    def _complete(self, metrics: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
        """Metrics by the names that the ranks agreed on in the first update; 0 where this rank has no rows."""
        if not self._agreed:
            self._names, self._agreed = tuple(with_names_of_all_ranks(metrics)), True
        assert metrics.keys() <= set(self._names), "a metric that the first update did not have"
        return {name: metrics.get(name, 0.0) for name in self._names}

    def _record(self, sums: list[float], lr: float) -> None:
        """Count and log a step: its norm, then what `_summed` gave."""
        norm, loss, tokens, flops, *rest = sums
        count = len(self._names)
        self._asked_to_stop = rest[count] > 0
        self.step += 1
        self.tokens += int(tokens)
        metrics = {"loss": loss, "tokens": tokens, "flops": flops} | dict(zip(self._names, rest))
        self._log(metrics, self.router.metrics(rest[count + 1 :]), norm, lr)

    def _log(self, metrics: dict[str, float], router: dict[str, float | list[float]], norm: float, lr: float) -> None:
        seconds = time.perf_counter() - self._began
        world = self.runtime.world_size
        rate = metrics.pop("tokens") / seconds
        work = metrics.pop("flops") / seconds / world
        held_out = {}
        if self.held_out is not None:
            held_out = self.held_out.after_step(self.step, is_last=self.step == self.total)
        self.logger.log(
            step=self.step,
            loss=metrics.pop("loss"),
            grad_norm=norm,
            lr=lr,
            tokens=self.tokens,
            tokens_per_second=rate,
            tokens_per_second_per_device=rate / world,
            mfu=work / peak_flops(self.device),
            wait_seconds=self._waiting,
            skipped=self.skipped,
            peak_memory_gib=peak_memory_gib(self.device),
            **metrics,
            **router,
            **held_out,
        )

    def result(self) -> dict:
        """Result of the run for the stage's record."""
        return {"steps": self.step, "tokens": self.tokens, "skipped": self.skipped}

    def _state(self) -> dict[str, Any]:
        return {"loader": self.loader.state(), "losses": list(self.spikes.losses)}

    def _load_state(self, state: Mapping[str, Any], saved: Checkpoint) -> None:
        self.loader.load_state(state["loader"])
        # A run that was given more epochs goes on from the end of its last pack, not of its last step.
        self.total = self._steps_in_all()
        self.spikes.losses.extend(state["losses"])


def step_flops(model: nn.Module, documents: Sequence[Sequence[int]]) -> np.ndarray:
    """(N,) fp64 operations of a training step over each row: every document of it attends to itself alone.

    Args:
        model: frozen parts of it have no gradients.
        documents: tokens of each document of each row; one without tokens costs nothing.
    """
    layers, head = passes(model)
    lengths = {int(n) for row in documents for n in row if n}
    options = {"layer_passes": layers, "head_passes": head}
    cost = {n: n * step_flops_per_token(model.config, n, **options) for n in lengths}
    return np.array([sum(cost.get(int(n), 0.0) for n in row) for row in documents], dtype=np.float64)


def passes(model: nn.Module) -> tuple[float, float]:
    """Passes of a training step over a layer, mean of all layers, and over the output head.

    A part that is trained takes three: forward, gradient of its input, gradient of its weights. A frozen one takes two
    where something before it is trained, else the forward alone. A scoring model has the output head of its body only
    where it reads surprises, without gradients; its own small head is not counted.
    """
    body = model.body if isinstance(model, ScoringModel) else model
    is_reached = any(parameter.requires_grad for parameter in body.embedding.parameters())
    counts = []
    for block in body.blocks:
        trains = any(parameter.requires_grad for parameter in block.parameters())
        is_reached |= trains
        counts.append(1 + trains + is_reached)
    mean = sum(counts) / len(counts)
    if isinstance(model, ScoringModel):
        return mean, float(model.surprise)
    trains = body.head_weight.requires_grad
    return mean, float(1 + trains + (is_reached or trains))


def _is_finite(sums: Sequence[float]) -> bool:
    """Whether norm and loss, the first two, are."""
    return math.isfinite(sums[0]) and math.isfinite(sums[1])


def num_supervised(batches: Iterable) -> float:
    """Sum of the loss weights of batches in host memory; on a device each would synchronise."""
    return float(sum(float(batch.weights.sum()) for batch in batches))
