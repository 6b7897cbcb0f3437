"""Run of online reinforcement learning: rollouts, updates of policy and critic, log."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wizard_engine.checkpoint import Checkpoint, Shard
from wizard_engine.model import ScoringModel, Transformer
from wizard_engine.parallel import pack_over_rows, sharded
from wizard_engine.parallel.reductions import pack
from wizard_engine.rl.advantages import Targets
from wizard_engine.rl.options import CriticOptions, RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import AnswerReward
from wizard_engine.rl.trajectories import Rollout, idle_fraction, step_seed
from wizard_engine.runtime.memory import peak_memory_gib
from wizard_engine.runtime.object_collectives import gather_objects
from wizard_engine.runtime.process import Runtime, return_free_memory

from .base_run import BaseRun
from .options import OnlineTraining

# The loss of a fresh rollout is 0 whatever the policy learns.
SHOWN = ("reward", "kl_k1", "finished", "tokens_per_second")


class OnlineOptions(Protocol):
    """Options of a recipe's configuration that the run reads.

    average_from: fraction of the rollouts after which the policy's weights are averaged; 1: no average.
    """

    out: Path
    training: OnlineTraining
    rollout: RolloutOptions
    critic: CriticOptions
    reward: RewardOptions
    average_from: float
    seed: int
    quiet: bool


class OnlineRun(BaseRun[tuple[int, list[int]]]):
    """Rollout steps of PPO with a policy and maybe a critic: which prompts, the updates, resume, metrics.

    `steps()` yields (step, this rank's prompt indices) of each remaining rollout; `record` ends the step.

    Args:
        critic: None for advantages from the other answers to a prompt.
        num_prompts: prompts to draw from, in seeded epochs.
    Raises:
        ValueError: prompts of a step that the ranks do not divide.
    """

    # A finished run that is to measure other rows trains no rollout again.
    saves_last = True

    def __init__(
        self,
        cfg: OnlineOptions,
        runtime: Runtime,
        policy: Transformer,
        critic: ScoringModel | None,
        *,
        num_prompts: int,
    ) -> None:
        modules = {"policy": policy} | ({} if critic is None else {"critic": critic})
        super().__init__(cfg.training, runtime, modules, cfg.out, name="rleif")
        self.cfg, self.num_prompts, self.data = cfg, num_prompts, self.mesh.data
        prompts = cfg.rollout.prompts_per_step
        if prompts % self.data.size:
            raise ValueError(
                f"prompts_per_step: expected a multiple of {self.data.size} ranks with prompts of their own, got "
                f"{prompts}"
            )
        self.largest_ratio_error = 0.0
        self.average: Tensor | None = None
        self.averaged = 0
        self._clear()
        self._norms: dict[str, float] = {}
        self._open(cfg.rollout.steps, quiet=cfg.quiet, shown=SHOWN)

    def _clear(self) -> None:
        """Forget the step's sums."""
        self._shares: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._differences: list[Tensor] = []
        self._updates = 0

    def _begin(self) -> tuple[int, list[int]]:
        """Number and prompts of a rollout."""
        self._clear()
        return self.step, self._chosen(self.step)

    def _end(self) -> None:
        """Add the step's weights to the average, in the last rollouts."""
        if self.step > self.cfg.average_from * self.total:
            self._add_to_average()

    def _add_to_average(self) -> None:
        """Running mean of the policy's master weights."""
        master = sharded(self.modules["policy"]).master
        if self.average is None:
            self.average = torch.zeros_like(master)
        self.averaged += 1
        self.average.lerp_(master, 1.0 / self.averaged)

    def use_average(self) -> None:
        """Replace the policy's weights by the average, if there is one."""
        if self.averaged:
            engine = sharded(self.modules["policy"])
            engine.master.copy_(self.average)
            engine.publish()

    def _chosen(self, step: int) -> list[int]:
        """Prompts of a step: seeded permutations end to end, this rank's share."""
        size = self.cfg.rollout.prompts_per_step
        positions = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng(step_seed(self.cfg.seed, 1, epoch)).permutation(self.num_prompts)
            for epoch in {i // self.num_prompts for i in positions}
        }
        chosen = [int(orders[i // self.num_prompts][i % self.num_prompts]) for i in positions]
        return chosen[self.data.index :: self.data.size]

    def minibatches(self, epoch: int, count: int) -> list[list[int]]:
        """This rank's answers in each minibatch of a seeded permutation of all ranks' answers of this step."""
        each, ranks = self.cfg.rollout.samples_per_prompt, self.data.size
        size = self.cfg.rollout.prompts_per_step * each
        order = np.random.default_rng(step_seed(self.cfg.seed, self.step, epoch)).permutation(size)
        return [
            [i // each // ranks * each + i % each for i in minibatch.tolist() if i // each % ranks == self.data.index]
            for minibatch in np.array_split(order, count)
        ]

    def zero_grad(self, *, multiple: bool = False) -> None:
        """Clear the gradients of policy and critic; `multiple`: the policy has several backward passes per update."""
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(multiple=multiple and name == "policy")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block as those of a phase of this step, and name it on the bar."""
        self.logger.show_phase(name.replace("_", " "))
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        else:
            return_free_memory()
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

        The host reads the norms once, after both launches: the device skips an update that is not finite.
        """
        critic = self.cfg.critic
        peaks = {"policy": self.options.lr if self.step >= critic.warmup_steps else 0.0, "critic": critic.lr}
        norms: dict[str, Tensor] = {}
        stepped = []
        for name, optimizer in self.optimizers.items():
            optimizer.sharded.finish()
            norms[name] = optimizer.clip(self.options.clip)
            lr = self.learning_rate(peaks[name])
            if lr > 0:
                optimizer.step(lr)
                stepped.append(name)
        self._norms = dict(zip(norms, torch.stack(list(norms.values())).tolist()))
        bad = [name for name, norm in self._norms.items() if not math.isfinite(norm)]
        for name in bad:
            if name in stepped:
                self.optimizers[name].take_back()
        for name in bad:
            self._skip(f"{name}: gradient norm {self._norms[name]}", "were not finite", "update")
        self._updates += 1
        self._logprobs.clear()

    def record(
        self,
        rollout: Rollout,
        rewards: Sequence[AnswerReward],
        kl: dict[str, Tensor],
        values: Tensor | None,
        targets: Targets,
        held_out: Mapping[str, float] | None = None,
    ) -> None:
        """Count and log a rollout: reward and its factors, KL, clipping, entropy, lengths, critic, phases.

        Args:
            held_out: further metrics, which were measured in the phase "held_out"; its time is no training time.
        """
        factors = factor_sums(self.cfg.reward, rewards)
        local: dict[str, Tensor | float] = {
            "answers": len(rewards),
            "tokens": sum(rollout.lengths),
            "finished": sum(rollout.finished),
            **factors,
            "kl_k1": kl["k1"].sum(),
            "kl_k3": kl["k3"].sum(),
        }
        if values is not None:
            returns = torch.cat(targets.returns)
            local |= {"value": values.sum(), "r": returns.sum(), "rr": returns.square().sum()}
            local |= {"ee": (returns - values).square().sum()}
        shares, difference = self._read()
        ranks = gather_objects((difference, self._seconds, rollout.load, list(shares)))
        names = dict.fromkeys(name for *_, names in ranks for name in names)
        local |= {f"share {name}": shares.get(name, 0.0) for name in names}
        sums, routers = self._summed(local)
        shares = {name: sums[f"share {name}"] for name in names}
        difference = max(one[0] for one in ranks)
        self.largest_ratio_error = max(self.largest_ratio_error, difference)
        count, tokens = sums["answers"], sums["tokens"]
        self.tokens += int(tokens)
        seconds = time.perf_counter() - self._began - self._seconds.get("held_out", 0.0)
        metrics = {name: sums[name] / count for name in (*factors, "finished")}
        metrics |= {name: sums[name] / tokens for name in ("kl_k1", "kl_k3")}
        metrics |= {name: value / max(1, self._updates) for name, value in shares.items()}
        if values is not None:
            variance = max(sums["rr"] / tokens - (sums["r"] / tokens) ** 2, 1e-12)
            metrics |= {"value": sums["value"] / tokens, "critic_grad_norm": self._norms["critic"]}
            metrics |= {"explained_variance": 1 - sums["ee"] / tokens / variance}
            metrics |= {f"critic_{name}": value for name, value in routers["critic"].items()}
        # A phase ends, for all, when its slowest rank does.
        metrics |= {f"{name}_seconds": max(one[1].get(name, 0.0) for one in ranks) for name in self._seconds}
        self.step += 1
        loss = metrics.pop("policy_loss")
        self.logger.log(
            step=self.step,
            loss=loss,
            grad_norm=self._norms["policy"],
            lr=self.options.lr,
            tokens=self.tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            length=tokens / count,
            ratio_error=difference,
            tail_idle=idle_fraction([one[2] for one in ranks]),
            peak_memory_gib=peak_memory_gib(self.device),
            **metrics,
            **routers["policy"],
            **(held_out or {}),
        )

    def _read(self) -> tuple[dict[str, float], float]:
        """This rank's shares of the step, and its largest difference of log-probabilities: one transfer."""
        counts = {name: len(values) for name, values in self._shares.items()}
        kept = [*(x for values in self._shares.values() for x in values), *self._differences]
        values = iter(pack(kept, self.device).tolist() if kept else ())
        shares = {name: sum(next(values) for _ in range(count)) for name, count in counts.items()}
        return shares, max([0.0, *values])

    def _summed(self, local: dict[str, Tensor | float]) -> tuple[dict[str, float], dict[str, dict]]:
        """Sums of the rollout over all ranks, and the routers' metrics: one reduction, one transfer."""
        sums_by_router = {name: router.pop_sums() for name, router in self.routers.items()}
        packed = pack_over_rows(
            local, self.mesh, float(self.stop.requested), *(x for xs in sums_by_router.values() for x in xs)
        )
        values = iter(packed.tolist())
        sums = {name: next(values) for name in local}
        self._asked_to_stop = next(values) > 0
        routers = {}
        for name, router_sums in sums_by_router.items():
            count = sum(x.numel() if isinstance(x, Tensor) else 1 for x in router_sums)
            routers[name] = self.routers[name].metrics([next(values) for _ in range(count)])
        return sums, routers

    def result(self) -> dict:
        """Result of the run for the stage's record."""
        return {
            "steps": self.step,
            "answer_tokens": self.tokens,
            "skipped": self.skipped,
            "largest_ratio_error": self.largest_ratio_error,
        }

    def _state(self) -> dict[str, Any]:
        return {"largest_ratio_error": self.largest_ratio_error, "averaged": self.averaged}

    def _load_state(self, state: Mapping[str, Any], saved: Checkpoint) -> None:
        self.largest_ratio_error, self.averaged = state["largest_ratio_error"], state["averaged"]
        if self.averaged:
            policy = sharded(self.modules["policy"])
            self.average = torch.zeros_like(policy.master)
            for name, start, values in policy.shards(self.average):
                saved.read("average", name, policy.shard_specs[name], start, values)

    def _groups(self) -> dict[str, dict[str, Shard]]:
        policy = sharded(self.modules["policy"])
        if not self.averaged or policy.mesh.replicate.index:
            return {}
        return {"average": {n: Shard(policy.shard_specs[n], at, x) for n, at, x in policy.shards(self.average)}}


def factor_sums(options: RewardOptions, rewards: Sequence[AnswerReward]) -> dict[str, float]:
    """Sums over answers of the reward, and of what its models and references say."""
    sums: dict[str, float] = {"reward": sum(r.final(options.factors, options.no_eos_penalty) for r in rewards)}
    if options.instruction_model is not None:
        sums["instruction_factor"] = sum(r.instruction or 0.0 for r in rewards)
    if options.process_model is not None:
        sums["process_factor"] = sum(r.process for r in rewards)
        sums["mean_step_score"] = sum(sum(r.scores) / len(r.scores) for r in rewards if r.scores)
    if options.preference_model is not None:
        sums["preference_factor"] = sum(r.preference for r in rewards)
    if "checked" in options.factors:
        sums["checked"] = sum(r.checked for r in rewards)
    return sums | {"steps_per_answer": sum(len(r.spans) for r in rewards)}
