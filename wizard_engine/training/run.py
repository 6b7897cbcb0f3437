"""The run that every training loop shares: its steps, resume, one update, its log line, checkpoints, stopping."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from wizard_engine import checkpoint
from wizard_engine.data.loader import Loader
from wizard_engine.optim import AdamW, cosine_with_warmup
from wizard_engine.parallel import (
    MeshOptions,
    lockstep,
    make_mesh,
    pack_over_rows,
    parallelize,
    sharded,
    sum_over_rows,
)
from wizard_engine.planning.flops import flops_per_token
from wizard_engine.planning.rates import peak_flops
from wizard_engine.runtime.memory import peak_memory_gib
from wizard_engine.runtime.metrics import MetricsLogger
from wizard_engine.runtime.object_collectives import check_same, with_names_of_all_ranks
from wizard_engine.runtime.process import Interrupted, Runtime, StopRequest, mark

from .loss_spikes import Spikes
from .options import Training
from .router_metrics import RouterMeter
from .train_state import parts_of, restore

T = TypeVar("T")


class Run:
    """One training run: iterate `steps()`; per micro-batch call `backward` on the loss and `add`, then `update` once.

    Args:
        options: see Training.   out: run directory (metrics.jsonl, checkpoints/).
        model: trained in place, as `parallelize` gave it; a plain one becomes a copy per rank.
        lengths: tokens of each row, for packing.   seed: order of the data.
    Raises:
        ValueError: no rows, rows that fit no pack, ranks with other rows, or a checkpoint of other rows or another
            model.
    """

    def __init__(
        self, options: Training, runtime: Runtime, model: nn.Module, lengths: Sequence[int], out: Path, *,
        seed: int, name: str, quiet: bool = False,
    ) -> None:  # fmt: skip
        self.options, self.runtime, self.model, self.out, self.name = options, runtime, model, Path(out), name
        if sharded(model) is None:
            parallelize(model, make_mesh(MeshOptions(dp_shard=1), runtime))
        self.sharded = sharded(model)
        data = self.sharded.mesh.data
        self.loader = Loader(
            np.asarray(lengths, dtype=np.int64), capacity=options.pack_tokens, packs_per_step=options.packs_per_step,
            seed=seed, epochs=options.epochs, rank=data.index, world_size=data.size,
        )  # fmt: skip
        self.total = min(self.loader.steps, options.max_steps or self.loader.steps)
        if self.total < 1:
            raise ValueError(f"{name}: expected rows for at least one step, got {len(lengths)} rows")
        check_same(runtime, f"{name}: rows and their order", self.loader.state()["order"])
        self.lengths, self.router = np.asarray(lengths), RouterMeter(model.config, self.sharded.mesh)
        self.optimizer = AdamW(model, betas=(0.9, options.beta2), weight_decay=options.weight_decay)
        self.spikes = Spikes(options.spike)
        self.saver = checkpoint.Saver(self.out, runtime, keep_last=options.keep_last)
        self.step, self.skipped, self.tokens = 0, 0, 0
        self._names: tuple[str, ...] = ()
        self._agreed = False
        self._clear()
        self._resume()
        self.logger = MetricsLogger(
            self.out / "metrics.jsonl", self.total, name, quiet=quiet or not runtime.is_main, resume_step=self.step
        )
        self.stop, self._asked_to_stop = StopRequest(), False
        self._started, self._waiting = time.perf_counter(), 0.0

    def _resume(self) -> None:
        with ExitStack() as stack:
            found = checkpoint.resume(self.out, self.runtime, stack)
            if found is None:
                return
            state = found.state
            self.loader.load_state(state["loader"])
            restore(found, "model", self.model, self.optimizer, state["updates"])
        self.step, self.skipped, self.tokens = state["step"], state["skipped"], state["tokens"]
        self.spikes.losses.extend(state["losses"])

    def lockstep(self, items: Iterable[T]) -> Iterator[T]:
        """The items, a forward and a backward each; of a divided model, ranks with fewer keep the others' pace."""
        return lockstep(items, self.model, backward=True)

    def steps(self) -> Iterator[list[np.ndarray]]:
        """This rank's packs of each remaining step, as arrays of row indices; saves and stops on request."""
        packs_of_steps = iter(self.loader)
        while self.step < self.total:
            began = time.perf_counter()
            mark(f"{self.name} step {self.step}", limited=True)
            packs = next(packs_of_steps)
            self._waiting = time.perf_counter() - began
            self._began = began
            self.optimizer.zero_grad()
            self._clear()
            self.router.start(int(sum(self.lengths[pack].sum() for pack in packs)))
            yield packs
            every = self.options.save_every
            if self._asked_to_stop:
                self.save()
                self.finish()
                raise Interrupted(self.step, self.out)
            if every and self.step % every == 0 and self.step < self.total:
                self.save()
        self.finish()

    def finish(self) -> None:
        """Wait for the last checkpoint, and close; every rank makes the call."""
        mark(f"{self.name} end")
        self.saver.wait()
        self.close()

    def close(self) -> None:
        """Close the log and give the signals back."""
        self.saver.close()
        self.logger.close()
        self.stop.close()

    def total_over_ranks(self, **numbers: float) -> dict[str, float]:
        """Each number summed over the ranks with rows of their own."""
        return sum_over_rows(numbers, self.sharded.mesh)

    def _clear(self) -> None:
        """Forget the step's sums."""
        self._sums: dict[str, Tensor | float] = {"loss": 0.0, "tokens": 0}
        self._logprobs: list[Tensor] = []

    def add(self, loss: Tensor, tokens: int, *, logprob: Tensor | None = None, **metrics: Tensor | float) -> None:
        """Add one micro-batch to the step.

        Args:
            loss: this rank's share of the step's loss (its sum over ranks and micro-batches is the loss).
            tokens: tokens of the micro-batch.   logprob: (T,) log-probabilities that the loss is made of, to name the
                token that makes it not finite.   metrics: this rank's share of further numbers.
        """
        for name, value in {"loss": loss.detach(), "tokens": tokens, **metrics}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if logprob is not None:
            self._logprobs.append(logprob)

    def update(self) -> None:
        """Reduce, clip, step and log what was added.

        The host reads the step's numbers once, behind the optimizer's launch: a step that is not finite is skipped on
        the device. Where spikes are skipped it reads them before, for they depend on the losses so far.
        """
        self.sharded.finish()
        lr = cosine_with_warmup(
            self.step, peak=self.options.lr, warmup=max(1, round(self.options.warmup * self.total)), total=self.total,
            floor=self.options.lr_floor,
        )  # fmt: skip
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
            self._skip(loss, norm, "were not finite")
        elif is_spike:
            self._skip(loss, norm, "were spikes")
        self._record(sums, lr)

    def _summed(self) -> Tensor:
        """(N,) fp64 sums over ranks: loss, tokens, metrics, whether to stop, the routers' numbers."""
        metrics = self._complete({name: x for name, x in self._sums.items() if name not in ("loss", "tokens")})
        rows = {"loss": self._sums["loss"], "tokens": self._sums["tokens"], **metrics}
        return pack_over_rows(rows, self.sharded.mesh, float(self.stop.requested), *self.router.take())

    def _complete(self, own: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
        """Metrics by the names that the ranks agreed on in the first update; 0 where this rank has no rows."""
        if not self._agreed:
            self._names, self._agreed = tuple(with_names_of_all_ranks(own)), True
        assert own.keys() <= set(self._names), "a metric that the first update did not have"
        return {name: own.get(name, 0.0) for name in self._names}

    def _record(self, sums: list[float], lr: float) -> None:
        """Count and log a step: its norm, then what `_summed` gave."""
        norm, loss, tokens, *rest = sums
        count = len(self._names)
        self._asked_to_stop = rest[count] > 0
        self.step += 1
        self.tokens += int(tokens)
        numbers = {"loss": loss, "tokens": tokens} | dict(zip(self._names, rest))
        self._log(numbers, self.router.metrics(rest[count + 1 :]), norm, lr)

    def _skip(self, loss: float, norm: float, why: str) -> None:
        self.skipped += 1
        what = f"{self.name}: step {self.step}: loss {loss}, gradient norm {norm}{blame(self._logprobs)}"
        if self.skipped > self.options.max_skipped:
            raise ValueError(
                f"{what}: more than {self.options.max_skipped} steps {why}; lower --training.lr or look at the rows"
            )
        self.logger.warn(f"[rank {self.runtime.rank}/{self.runtime.world_size}] {what}: the step is skipped")

    def _log(self, numbers: dict[str, float], router: dict[str, float | list[float]], norm: float, lr: float) -> None:
        seconds = time.perf_counter() - self._began
        tokens = numbers.pop("tokens")
        rate = tokens / seconds
        world = self.runtime.world_size
        config = self.model.config
        used = 3 * flops_per_token(config, self.options.pack_tokens) * rate / world
        self.logger.log(
            step=self.step, loss=numbers.pop("loss"), grad_norm=norm, lr=lr, tokens=self.tokens,
            tokens_per_second=rate, tokens_per_second_per_device=rate / world,
            mfu=used / peak_flops(self.runtime.device), wait_seconds=self._waiting, skipped=self.skipped,
            peak_memory_gib=peak_memory_gib(self.runtime.device), **numbers, **router,
        )  # fmt: skip

    def result(self) -> dict:
        """What a stage records of the run."""
        return {"steps": self.step, "tokens": self.tokens, "skipped": self.skipped}

    def save(self) -> None:
        """Start to write a checkpoint of everything that the next step depends on; every rank makes the call."""
        weights, moments = parts_of(self.model, self.optimizer)
        state = {
            "step": self.step, "skipped": self.skipped, "tokens": self.tokens, "loader": self.loader.state(),
            "updates": self.optimizer.count, "losses": list(self.spikes.losses),
        }  # fmt: skip
        self.saver.save(self.step, {"model": weights, "model_optimizer": moments}, state)


def blame(logprobs: Sequence[Tensor]) -> str:
    """`, micro-batch 0 token 17: log-probability nan` for the first one of a step that is not finite, or nothing."""
    for number, logprob_T in enumerate(logprobs):
        bad = (~logprob_T.isfinite()).nonzero()
        if bad.numel():
            token = int(bad[0, 0])
            return f", micro-batch {number} token {token}: log-probability {float(logprob_T[token])}"
    return ""


def _is_finite(sums: Sequence[float]) -> bool:
    """Whether norm and loss, the first two, are."""
    return math.isfinite(sums[0]) and math.isfinite(sums[1])


def num_supervised(batches: Iterable) -> float:
    """Sum of the loss weights of batches, which are in host memory still: on a device, each would be waited for."""
    return float(sum(float(batch.weights.sum()) for batch in batches))
