"""Base of all training runs: models and optimizers, resume, steps, skipped updates, checkpoints."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from wizard_engine import checkpoint
from wizard_engine.checkpoint import Checkpoint, Shard
from wizard_engine.optim import AdamW, cosine_with_warmup
from wizard_engine.parallel import MeshOptions, lockstep, make_mesh, parallelize, sharded, sum_over_rows
from wizard_engine.runtime.metrics import BAR_METRICS, MetricsLogger
from wizard_engine.runtime.process import Interrupted, Runtime, StopRequest, post_position

from .options import Optimisation
from .router_metrics import RouterMeter
from .train_state import checkpoint_shards, restore

T = TypeVar("T")
Work = TypeVar("Work")
# Version of the state in a checkpoint; version 1 had no number.
STATE_VERSION = 2


class BaseRun(Generic[Work]):
    """Models that are trained step by step, with resume and checkpoints.

    A subclass defines `_begin` (the work of a step), has a method that counts and logs a step, and adds its own state
    to the checkpoint (`_state`, `_load_state`, `_groups`). Its constructor calls `_open` last.

    Args:
        modules: name -> model, trained in place, as `parallelize` returned it; a plain one is replicated. The names
            are those of the checkpoint's groups.
        out: run directory (metrics.jsonl, checkpoints/).   name: of the run, in messages and on the progress bar.
    Attributes:
        step: number of finished steps.   total: steps of the whole run.   skipped: updates that were skipped.
        tokens: trained on so far, all ranks.
    """

    # With more epochs the same command goes on from the last step.
    saves_last = False
    # Whether the heartbeat limits the time of a step.
    has_limited_steps = False

    def __init__(
        self, options: Optimisation, runtime: Runtime, modules: Mapping[str, nn.Module], out: Path, *, name: str
    ) -> None:
        self.options, self.runtime, self.device = options, runtime, runtime.device
        self.modules, self.out, self.name = dict(modules), Path(out), name
        for module in self.modules.values():
            if sharded(module) is None:
                parallelize(module, make_mesh(MeshOptions(dp_shard=1), runtime))
        self.mesh = sharded(next(iter(self.modules.values()))).mesh
        self.optimizers = {
            key: AdamW(module, betas=(0.9, options.beta2), weight_decay=options.weight_decay)
            for key, module in self.modules.items()
        }
        self.routers = {key: RouterMeter(module.config, self.mesh) for key, module in self.modules.items()}
        self.saver = checkpoint.Saver(self.out, runtime, keep_last=options.keep_last)
        self.step = self.skipped = self.tokens = 0
        self._logprobs: list[Tensor] = []

    def _open(self, total: int, *, quiet: bool, shown: Sequence[str] = BAR_METRICS) -> None:
        """Continue from the newest checkpoint, and open the log.

        Args:
            total: steps of the whole run.   shown: metrics on the progress bar.
        """
        self.total = total
        self._resume()
        self.logger = MetricsLogger(
            self.out / "metrics.jsonl",
            self.total,
            self.name,
            quiet=quiet or not self.runtime.is_main,
            resume_step=self.step,
            shown=shown,
        )
        self.stop, self._asked_to_stop = StopRequest(), False

    # What a subclass adds

    def _begin(self) -> Work:
        """Start a step; returns the work that `steps` yields."""
        raise NotImplementedError

    def _end(self) -> None:
        """Called after a step is counted."""

    def _state(self) -> dict[str, Any]:
        """JSON object that a checkpoint keeps beside the counters of every run."""
        return {}

    def _load_state(self, state: Mapping[str, Any], saved: Checkpoint) -> None:
        """Restore the object of `_state` and the tensors of `_groups`."""

    def _groups(self) -> dict[str, dict[str, Shard]]:
        """Tensors that a checkpoint keeps beside models and optimizers."""
        return {}

    # Steps

    def steps(self) -> Iterator[Work]:
        """The work of each remaining step; saves and stops on request."""
        while self.step < self.total:
            self._began = time.perf_counter()
            post_position(f"{self.name} step {self.step}", limited=self.has_limited_steps)
            yield self._begin()
            self._end()
            every = self.options.save_every
            if self._asked_to_stop:
                self.save()
                self.finish()
                raise Interrupted(self.step, self.out)
            is_last = self.step == self.total
            if every and (self.saves_last if is_last else self.step % every == 0):
                self.save()
        self.finish()

    def lockstep(self, items: Iterable[T]) -> Iterator[T]:
        """The items, for one forward and backward pass each; ranks of a sharded model make equally many passes."""
        return lockstep(items, *self.modules.values(), backward=True)

    def totals(self, *values: float) -> tuple[float, ...]:
        """Each value of the host, summed over the data-parallel ranks."""
        return tuple(sum_over_rows({str(i): float(x) for i, x in enumerate(values)}, self.mesh).values())

    def learning_rate(self, peak_lr: float) -> float:
        """The schedule's rate in this step."""
        options = self.options
        warmup = max(1, round(options.warmup * self.total))
        return cosine_with_warmup(self.step, peak=peak_lr, warmup=warmup, total=self.total, floor=options.lr_floor)

    def _skip(self, what: str, why: str, unit: str = "step") -> None:
        """Count and report an update that was not made.

        Raises:
            ValueError: there were more of them than the options allow.
        """
        self.skipped += 1
        what = f"{self.name}: step {self.step}: {what}{blame(self._logprobs)}"
        most = self.options.max_skipped
        if self.skipped > most:
            raise ValueError(f"{what}: more than {most} {unit}s {why}; lower --training.lr or look at the rows")
        self.logger.warn(f"[rank {self.runtime.rank}/{self.runtime.world_size}] {what}: the {unit} is skipped")

    # Checkpoints and the end

    def save(self) -> None:
        """Start to write a checkpoint of everything that the next step depends on; every rank makes the call."""
        groups: dict[str, dict[str, Shard]] = {}
        for name, module in self.modules.items():
            groups[name], groups[f"{name}_optimizer"] = checkpoint_shards(module, self.optimizers[name])
        updates = {name: optimizer.count for name, optimizer in self.optimizers.items()}
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "updates": updates,
            **self._state(),
        }
        self.saver.save(self.step, groups | self._groups(), state)

    def _resume(self) -> None:
        with ExitStack() as stack:
            saved = checkpoint.resume(self.out, self.runtime, stack)
            if saved is None:
                return
            state = saved.state
            if state.get("version") != STATE_VERSION:
                raise ValueError(
                    f"{self.out}: expected a checkpoint with a state of version {STATE_VERSION}, got version "
                    f"{state.get('version', 1)}; finish the run with the release that wrote it, or choose another --out"
                )
            self._load_state(state, saved)
            for name, module in self.modules.items():
                restore(saved, name, module, self.optimizers[name], state["updates"][name])
        self.step, self.skipped, self.tokens = state["step"], state["skipped"], state["tokens"]

    def finish(self) -> None:
        """Wait for the last checkpoint, and close; every rank makes the call."""
        post_position(f"{self.name} end")
        self.saver.wait()
        self.close()

    def close(self) -> None:
        """Close the log and restore the signal handlers."""
        self.saver.close()
        self.logger.close()
        self.stop.close()


def blame(logprobs: Sequence[Tensor]) -> str:
    """`, micro-batch 0 token 17: log-probability nan` for the first one of a step that is not finite, or nothing."""
    for number, logprob_T in enumerate(logprobs):
        bad = (~logprob_T.isfinite()).nonzero()
        if bad.numel():
            token = int(bad[0, 0])
            return f", micro-batch {number} token {token}: log-probability {float(logprob_T[token])}"
    return ""
