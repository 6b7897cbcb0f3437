"""The loop of online reinforcement learning: its steps, two optimizers, resume, its log."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from wizard_engine import checkpoint
from wizard_engine.checkpoint import Shard
from wizard_engine.model import ScoringModel, Transformer
from wizard_engine.optim import AdamW, cosine_with_warmup
from wizard_engine.parallel import MeshOptions, lockstep, make_mesh, pack_over_rows, parallelize, sharded, sum_over_rows
from wizard_engine.parallel.reductions import pack
from wizard_engine.rl.advantages import Targets
from wizard_engine.rl.rewards import AnswerReward
from wizard_engine.rl.trajectories import Rollout, idle_share, step_seed
from wizard_engine.runtime.memory import peak_memory_gib
from wizard_engine.runtime.metrics import MetricsLogger
from wizard_engine.runtime.object_collectives import gather_objects
from wizard_engine.runtime.process import Interrupted, Runtime, StopRequest, mark

from .router_metrics import RouterMeter
from .run import blame
from .train_state import parts_of, restore

T = TypeVar("T")
MAX_SKIPPED = 10


class OnlineRun:
    """Rollout steps of PPO with a policy and maybe a critic: which prompts, the updates, resume, metrics.

    Args:
        cfg: configuration of the RLEIF recipe.   critic: None where advantages come from the other answers to a prompt.
        num_prompts: prompts to draw from, in seeded epochs.
    """

    def __init__(
        self, cfg: Any, runtime: Runtime, policy: Transformer, critic: ScoringModel | None, *, num_prompts: int
    ) -> None:
        self.cfg, self.runtime, self.device, self.num_prompts = cfg, runtime, runtime.device, num_prompts
        self.modules: dict[str, Any] = {"policy": policy} | ({} if critic is None else {"critic": critic})
        for module in self.modules.values():
            if sharded(module) is None:
                parallelize(module, make_mesh(MeshOptions(dp_shard=1), runtime))
        self.mesh = sharded(policy).mesh
        self.data = self.mesh.data
        if cfg.prompts_per_step % self.data.size:
            raise ValueError(
                f"prompts_per_step: expected a multiple of {self.data.size} ranks with prompts of their own, got "
                f"{cfg.prompts_per_step}"
            )
        self.saver = checkpoint.Saver(cfg.out, runtime, keep_last=2)
        self.optimizers = {name: AdamW(module, betas=(0.9, 0.95)) for name, module in self.modules.items()}
        self.routers = {name: RouterMeter(module.config, self.mesh) for name, module in self.modules.items()}
        self.step, self.answer_tokens, self.skipped, self.largest_ratio_error = 0, 0, 0, 0.0
        self.average: Tensor | None = None
        self.averaged = 0
        self._resume()
        quiet = cfg.quiet or not runtime.is_main
        self.logger = MetricsLogger(cfg.out / "metrics.jsonl", cfg.steps, "rleif", quiet=quiet, resume_step=self.step)
        self.stop, self._asked_to_stop = StopRequest(), False
        self._shares: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._differences: list[Tensor] = []
        self._updates, self._norms = 0, {}
        self._logprobs: list[Tensor] = []

    def _resume(self) -> None:
        with ExitStack() as stack:
            found = checkpoint.resume(self.cfg.out, self.runtime, stack)
            if found is None:
                return
            state = found.state
            for name, module in self.modules.items():
                restore(found, name, module, self.optimizers[name], state["updates"][name])
            self.averaged = state["averaged"]
            if self.averaged:
                engine = sharded(self.modules["policy"])
                self.average = torch.zeros_like(engine.master)
                for name, start, values in engine.shards(self.average):
                    found.read("average", name, engine.shard_specs[name], start, values)
        self.step, self.answer_tokens, self.skipped = state["step"], state["answer_tokens"], state["skipped"]
        self.largest_ratio_error = state["largest_ratio_error"]

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """(step, this rank's prompt indices) of each remaining rollout; saves and stops on request."""
        while self.step < self.cfg.steps:
            self._began = time.perf_counter()
            self._shares, self._seconds, self._differences, self._updates = {}, {}, [], 0
            mark(f"rleif step {self.step}")
            yield self.step, self._chosen(self.step)
            self.step += 1
            if self.step > self.cfg.average_from * self.cfg.steps:
                self._add_to_average()
            every = self.cfg.save_every
            if self._asked_to_stop or (every and self.step % every == 0 and self.step < self.cfg.steps):
                self._save()
            if self._asked_to_stop:
                self.finish()
                raise Interrupted(self.step, self.cfg.out)
        self.finish()

    def _add_to_average(self) -> None:
        """Running mean of the policy's master weights."""
        master = sharded(self.modules["policy"]).master
        if self.average is None:
            self.average = torch.zeros_like(master)
        self.averaged += 1
        self.average.lerp_(master, 1.0 / self.averaged)

    def take_average(self) -> None:
        """Put the averaged weights into the policy, where any were averaged."""
        if self.averaged:
            engine = sharded(self.modules["policy"])
            engine.master.copy_(self.average)
            engine.publish()

    def lockstep(self, items: Iterable[T]) -> Iterator[T]:
        """Micro-batches that go through policy and critic, forward and backward; ranks keep the same pace."""
        return lockstep(items, *self.modules.values(), backward=True)

    def finish(self) -> None:
        """Wait for the last checkpoint, and close; every rank makes the call."""
        mark("rleif end")
        self.saver.wait()
        self.close()

    def close(self) -> None:
        """Close the log and give the signals back."""
        self.saver.close()
        self.logger.close()
        self.stop.close()

    def _chosen(self, step: int) -> list[int]:
        """Prompts of a step: seeded permutations end to end, this rank's share."""
        size = self.cfg.prompts_per_step
        wanted = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng(step_seed(self.cfg.seed, 1, epoch)).permutation(self.num_prompts)
            for epoch in {i // self.num_prompts for i in wanted}
        }
        chosen = [int(orders[i // self.num_prompts][i % self.num_prompts]) for i in wanted]
        return chosen[self.data.index :: self.data.size]

    def minibatches(self, epoch: int, count: int) -> list[list[int]]:
        """This rank's answers in each part of a seeded permutation of all ranks' answers of this step."""
        each, ranks = self.cfg.samples_per_prompt, self.data.size
        size = self.cfg.prompts_per_step * each
        order = np.random.default_rng(step_seed(self.cfg.seed, self.step, epoch)).permutation(size)
        return [
            [i // each // ranks * each + i % each for i in part.tolist() if i // each % ranks == self.data.index]
            for part in np.array_split(order, count)
        ]

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """Each number of the host summed over the ranks with prompts of their own."""
        return tuple(sum_over_rows({str(i): float(x) for i, x in enumerate(numbers)}, self.mesh).values())

    def zero_grad(self, *, multiple: bool = False) -> None:
        """Clear the gradients of policy and critic; `multiple`: further losses of the policy come before the update."""
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(multiple=multiple and name == "policy")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block as those of a phase of this step."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def note_difference(self, difference: Tensor) -> None:
        """Trainer's minus sampler's log-probabilities of answer tokens (N,), nats."""
        if difference.numel():
            self._differences.append(difference.detach().abs().max())

    def add(self, logprob: Tensor, **shares: Tensor) -> None:
        """Add a micro-batch to an update: its log-probabilities and this rank's share of metrics."""
        self._logprobs.append(logprob)
        self.share(**shares)

    def share(self, **shares: Tensor) -> None:
        """Add this rank's share of metrics that are averaged over the updates of a step; `record` reads them."""
        for name, value in shares.items():
            self._shares.setdefault(name, []).append(value.detach())

    def update(self) -> None:
        """Reduce, clip and step both optimizers; the policy waits during the critic's warm-up.

        The host reads the norms once, behind both launches: an update that is not finite is skipped on the device.
        """
        cfg = self.cfg
        peaks = {"policy": cfg.lr if self.step >= cfg.critic_warmup else 0.0, "critic": cfg.critic_lr}
        norms: dict[str, Tensor] = {}
        stepped = []
        for name, optimizer in self.optimizers.items():
            optimizer.sharded.finish()
            norms[name] = optimizer.clip(cfg.max_grad_norm)
            lr = cosine_with_warmup(
                self.step, peak=peaks[name], warmup=max(1, round(cfg.warmup * cfg.steps)), total=cfg.steps,
                floor=cfg.lr_floor,
            )  # fmt: skip
            if lr > 0:
                optimizer.step(lr)
                stepped.append(name)
        self._norms = dict(zip(norms, torch.stack(list(norms.values())).tolist()))
        bad = [name for name, norm in self._norms.items() if not math.isfinite(norm)]
        for name in bad:
            if name in stepped:
                self.optimizers[name].take_back()
        for name in bad:
            self._skip(name, self._norms[name])
        self._updates += 1
        self._logprobs.clear()

    def _skip(self, name: str, norm: float) -> None:
        self.skipped += 1
        what = f"rleif: step {self.step}: {name}: gradient norm {norm}{blame(self._logprobs)}"
        if self.skipped > MAX_SKIPPED:
            raise ValueError(f"{what}: more than {MAX_SKIPPED} updates were not finite; lower --lr or look at the rows")
        self.logger.warn(f"[rank {self.runtime.rank}/{self.runtime.world_size}] {what}: the update is skipped")

    def record(
        self, rollout: Rollout, rewards: Sequence[AnswerReward], kl: dict[str, Tensor], values: Tensor | None,
        targets: Targets,
    ) -> None:  # fmt: skip
        """Log one rollout: reward and its factors, KL, clipping, entropy, lengths, critic, seconds of each phase."""
        own: dict[str, Tensor | float] = {
            "answers": len(rewards), "tokens": sum(rollout.lengths), "finished": sum(rollout.finished),
            "reward": sum(r.total(self.cfg.factors) for r in rewards),
            "instruction_factor": sum(r.instruction for r in rewards),
            "process_factor": sum(r.process for r in rewards),
            "mean_step_score": sum(sum(r.scores) / len(r.scores) for r in rewards if r.scores),
            "steps_per_answer": sum(len(r.scores) for r in rewards),
            "kl_k1": kl["k1"].sum(), "kl_k3": kl["k3"].sum(),
        }  # fmt: skip
        if values is not None:
            returns = torch.cat(targets.returns)
            own |= {"value": values.sum(), "r": returns.sum(), "rr": returns.square().sum()}
            own |= {"ee": (returns - values).square().sum()}
        shares, difference = self._read()
        ranks = gather_objects((difference, self._seconds, rollout.load, list(shares)))
        names = dict.fromkeys(name for *_, names in ranks for name in names)
        own |= {f"share {name}": shares.get(name, 0.0) for name in names}
        sums, routers = self._summed(own)
        shares = {name: sums[f"share {name}"] for name in names}
        difference = max(one[0] for one in ranks)
        self.largest_ratio_error = max(self.largest_ratio_error, difference)
        count, tokens = sums["answers"], sums["tokens"]
        self.answer_tokens += int(tokens)
        seconds = time.perf_counter() - self._began
        per_answer = ("reward", "instruction_factor", "process_factor", "mean_step_score", "steps_per_answer")
        numbers = {name: sums[name] / count for name in (*per_answer, "finished")}
        numbers |= {name: sums[name] / tokens for name in ("kl_k1", "kl_k3")}
        numbers |= {name: value / max(1, self._updates) for name, value in shares.items()}
        if values is not None:
            variance = max(sums["rr"] / tokens - (sums["r"] / tokens) ** 2, 1e-12)
            numbers |= {"value": sums["value"] / tokens, "critic_grad_norm": self._norms["critic"]}
            numbers |= {"explained_variance": 1 - sums["ee"] / tokens / variance}
            numbers |= {f"critic_{name}": value for name, value in routers["critic"].items()}
        # A phase ends, for all, when its slowest rank does.
        numbers |= {f"{name}_seconds": max(one[1].get(name, 0.0) for one in ranks) for name in self._seconds}
        loss = numbers.pop("policy_loss")
        self.logger.log(
            step=self.step + 1, loss=loss, grad_norm=self._norms["policy"], lr=self.cfg.lr, tokens=self.answer_tokens,
            tokens_per_second=tokens / seconds, seconds=seconds, length=tokens / count,
            ratio_error=difference, tail_idle=idle_share([one[2] for one in ranks]),
            peak_memory_gib=peak_memory_gib(self.device), **numbers, **routers["policy"],
        )  # fmt: skip

    def _read(self) -> tuple[dict[str, float], float]:
        """This rank's shares of the step, and its largest difference of log-probabilities: one transfer."""
        counts = {name: len(values) for name, values in self._shares.items()}
        kept = [*(x for values in self._shares.values() for x in values), *self._differences]
        numbers = iter(pack(kept, self.device).tolist() if kept else ())
        shares = {name: sum(next(numbers) for _ in range(count)) for name, count in counts.items()}
        return shares, max([0.0, *numbers])

    def _summed(self, own: dict[str, Tensor | float]) -> tuple[dict[str, float], dict[str, dict]]:
        """Numbers of the rollout over all ranks, and the routers' metrics: one reduction, one transfer."""
        taken = {name: router.take() for name, router in self.routers.items()}
        packed = pack_over_rows(own, self.mesh, float(self.stop.requested), *(x for xs in taken.values() for x in xs))
        values = iter(packed.tolist())
        sums = {name: next(values) for name in own}
        self._asked_to_stop = next(values) > 0
        routers = {}
        for name, numbers in taken.items():
            count = sum(x.numel() if isinstance(x, Tensor) else 1 for x in numbers)
            routers[name] = self.routers[name].metrics([next(values) for _ in range(count)])
        return sums, routers

    def result(self) -> dict:
        """What a stage records of the run."""
        return {"steps": self.step, "answer_tokens": self.answer_tokens, "skipped": self.skipped,
                "largest_ratio_error": self.largest_ratio_error}  # fmt: skip

    def _save(self) -> None:
        groups: dict[str, dict[str, Shard]] = {}
        for name, module in self.modules.items():
            groups[name], groups[f"{name}_optimizer"] = parts_of(module, self.optimizers[name])
        policy = sharded(self.modules["policy"])
        if self.averaged and not policy.mesh.replicate.index:
            groups["average"] = {n: Shard(policy.shard_specs[n], at, x) for n, at, x in policy.shards(self.average)}
        state = {
            "step": self.step, "answer_tokens": self.answer_tokens, "skipped": self.skipped,
            "largest_ratio_error": self.largest_ratio_error, "averaged": self.averaged,
            "updates": {name: optimizer.count for name, optimizer in self.optimizers.items()},
        }  # fmt: skip
        self.saver.save(self.step, groups, state)
