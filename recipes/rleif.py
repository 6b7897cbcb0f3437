"""RLEIF: PPO on the product of an instruction reward and a process reward; a model directory out.

    python recipes/rleif.py --model DIR --instruction-model DIR --process-model DIR --data rows.jsonl --out runs/rleif

reward = instruction factor x minimum over the steps of the process factor, each in [0, 1], on the answer's last token,
minus kl x k1 on every token. The instruction factor depends on the prompt alone, so a critic, not a group's own mean
and deviation, has to be the baseline: scaling within a group of answers to one prompt would cancel it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from wizard_engine import audit, runtime
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_conversation
from wizard_engine.data.records import Conversation, read_located
from wizard_engine.data.samples import encode_all, fitting_prompt
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import policy_loss, sft_loss, value_loss
from wizard_engine.model import Routes, Transformer
from wizard_engine.online import OnlineRun
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, paced
from wizard_engine.recipe import (
    finish_stage,
    instruction_reward,
    language_model,
    launch,
    open_stage,
    process_reward,
    scoring_start,
    write_model,
)
from wizard_engine.rollout.rewards import FACTORS, score_answers
from wizard_engine.rollout.scoring import packed_groups
from wizard_engine.rollout.trajectories import (
    answer_logprobs,
    answer_values,
    make_targets,
    roll_out,
    step_seed,
    token_rewards,
)


@dataclass(frozen=True)
class Config:
    """Reinforcement learning from the instruction and process reward models."""

    data: tuple[Path, ...]
    """Conversation rows; each row's turns up to its last question are a prompt."""
    out: Path
    """Run directory: metrics.jsonl, checkpoints/, model/."""
    model: str
    """Policy and reference to start from."""
    instruction_model: Path
    process_model: Path
    critic: Path | None = None
    """Model directory whose body the critic starts from; default: the process model's."""
    factors: tuple[str, ...] = FACTORS
    """Factors of the reward: instruction, process."""
    neutral: float = 0.5
    """Process score of a neutral step, 0 to 1."""
    steps: int = 100
    """Rollouts, each followed by one update or more."""
    prompts_per_step: int = 48
    """Prompts of a rollout over all ranks."""
    samples_per_prompt: int = 4
    max_new_tokens: int = 96
    """Longest answer, tokens."""
    group_baseline: bool = True
    """Take each answer's reward relative to the mean of the other answers to its prompt; the critic adds the rest."""
    temperature: float = 1.0
    epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Updates per pass."""
    lr: float = 1e-7
    critic_lr: float = 1e-6
    critic_warmup: int = 0
    """First rollouts that train the critic alone."""
    warmup: float = 0.05
    lr_floor: float = 0.1
    average_from: float = 1.0
    """Share of the rollouts after which the policy's weights are averaged; the average is saved. 1: no average."""
    clip: float = 0.2
    """Half width of the ratio's interval."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, in advantages, > 1; none by default."""
    normalisation: Literal["token", "sequence"] = "token"
    """Every answer token weighs the same, or every answer."""
    value_clip: float = 0.2
    kl: float = 0.05
    """Coefficient of k1 = log policy - log reference in the reward, per token."""
    kl_loss: float = 0.0
    """Coefficient of --kl-estimator as a term of the loss, with a gradient, per token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_cap: float | None = None
    """Take the ratio to the trainer's own log-probabilities at the rollout, and weigh each token by trainer over
    sampler, at most this; by default the sampler's log-probabilities are taken as the trainer's."""
    entropy: float = 0.0
    """Coefficient of the entropy bonus, per token."""
    ptx: float = 0.0
    """Weight of the supervised loss on the rows' own answers in every update (PPO-ptx); 0 leaves it out."""
    ptx_rows: int = 32
    """Rows of that loss per update over all ranks."""
    gamma: float = 1.0
    lam: float = 0.95
    replay_routing: bool = True
    """Mixtures of experts: train each token with the experts that the sampler sent it to."""
    no_eos_penalty: float = 0.5
    """Taken off the reward of an answer that did not close itself."""
    max_grad_norm: float = 1.0
    pack_tokens: int = 8192
    """Tokens of one packed forward and backward."""
    save_every: int = 50
    """Rollouts between checkpoints; 0 keeps none."""
    mesh: MeshOptions = field(default_factory=MeshOptions)
    sharding: Sharding = field(default_factory=Sharding)
    seed: int = 0
    device: str = "auto"
    audit: bool = True
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.factors if name not in FACTORS]
        if unknown or not self.factors:
            raise ValueError(f"factors: expected some of {', '.join(FACTORS)}, got {unknown or 'none'}")


def main(cfg: Config) -> dict:
    """Train; returns what stage.json records."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, "rleif", rt)
    if stage.done:
        return stage.result()
    divided = {"mesh": mesh, "sharding": cfg.sharding}
    policy, tokenizer = language_model(cfg.model, None, seed=cfg.seed, device=rt.device, **divided)
    reference, _ = language_model(cfg.model, None, seed=cfg.seed, device=rt.device, **divided, frozen=True)
    irm = instruction_reward(cfg.instruction_model, **divided)
    prm = process_reward(cfg.process_model, **divided, neutral=cfg.neutral)
    critic, _ = scoring_start(str(cfg.critic or cfg.process_model), None, 1, seed=0, **divided)
    room = policy.config.max_positions - cfg.max_new_tokens
    rows, _ = read_located(cfg.data, kind="conversation")
    prompts, _ = encode_all(rows, lambda row: fitting_prompt(tokenizer, row, room), "raise", cfg.out / "rejects.jsonl")
    supervised = _supervised(cfg, tokenizer, policy, rows) if cfg.ptx else []
    run = OnlineRun(cfg, rt, policy, critic, num_prompts=len(prompts))
    for step, chosen in run.steps():
        rollout = roll_out(
            policy, tokenizer, [prompts[i] for i in chosen], samples=cfg.samples_per_prompt,
            temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=step_seed(cfg.seed, step),
            first=mesh.data.index, stride=mesh.data.size,
        )  # fmt: skip
        rewards = score_answers(rollout.prompts, rollout.texts, rollout.finished, instruction=irm, process=prm)
        fixed = answer_logprobs(reference, rollout, temperature=cfg.temperature)
        values = answer_values(critic, rollout)
        per_token, kl = token_rewards(
            rollout,
            rewards,
            fixed,
            factors=cfg.factors,
            kl=cfg.kl,
            no_eos_penalty=cfg.no_eos_penalty,
            group=cfg.samples_per_prompt if cfg.group_baseline else 1,
        )
        own = None if cfg.importance_cap is None else answer_logprobs(policy, rollout, temperature=cfg.temperature)
        targets = make_targets(
            rollout, per_token, values, fixed, gamma=cfg.gamma, lam=cfg.lam, moments=run.totals, own=own
        )  # fmt: skip
        for epoch in range(cfg.epochs):
            for number, minibatch in enumerate(run.minibatches(epoch, cfg.minibatches)):
                run.zero_grad()
                if supervised:
                    drawn = np.random.default_rng(step_seed(cfg.seed, step, epoch, number, 2))
                    picks = drawn.integers(len(supervised), size=cfg.ptx_rows)[mesh.data.index :: mesh.data.size]
                    _add_supervised(cfg, run, policy, [supervised[i] for i in picks])
                _update(cfg, run, policy, critic, rollout, targets, minibatch)
        run.record(rollout, rewards, kl, values, targets)
        if step == 0 and cfg.audit:
            is_wide = policy.embedding.weight.dtype.itemsize > 2
            audit.check_rollout(run.largest_ratio_error, quiet=cfg.quiet or not rt.is_main, is_wide=is_wide)
    run.take_average()
    write_model(rt, policy, tokenizer, cfg.out / "model")
    return finish_stage(stage, rt, run.result(), [cfg.out / "model"])


def _supervised(cfg: Config, tokenizer: Tokenizer, policy: Transformer, rows: list) -> list[Sample]:
    """The rows as supervised samples."""
    limit = min(policy.config.max_positions, cfg.pack_tokens)

    def encode(row: Conversation) -> Sample:
        return encode_conversation(tokenizer, row.messages, max_length=limit)

    return encode_all(rows, encode, "raise", cfg.out / "rejects.jsonl")[0]


def _add_supervised(cfg: Config, run: OnlineRun, policy: Transformer, samples: list[Sample]) -> None:
    """Add the gradient of the supervised loss, weighted by ptx (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""
    batches = [collate(samples).to(run.device)] if samples else []
    num_tokens = run.totals(sum(float(batch.weights.sum()) for batch in batches))[0]
    for batch in paced(batches, policy, backward=True):
        hidden = policy(*batch.inputs)
        out = sft_loss(
            hidden, policy.head_weight, batch.targets, batch.weights, num_tokens=num_tokens, shard=policy.shard
        )  # fmt: skip
        (cfg.ptx * out.loss).backward()
        run.share(ptx_loss=out.loss)


def _update(cfg: Config, run: OnlineRun, policy, critic, rollout, targets, rows: list[int]) -> None:
    """One update of policy and critic on some answers of a rollout."""
    num_tokens, num_answers = run.totals(sum(rollout.lengths[i] for i in rows), len(rows))
    for router in run.routers.values():
        router.start(sum(len(rollout.samples[i].tokens) - 1 for i in rows))
    per_token = cfg.normalisation == "token"
    for group in run.paced(packed_groups([len(rollout.samples[i].tokens) for i in rows], cfg.pack_tokens)):
        picked = [rows[i] for i in group]
        batch = collate([rollout.samples[i] for i in picked]).to(run.device)
        answer = batch.weights > 0
        own = targets.of(picked, answer)
        routes = rollout.routes(picked, run.device) if cfg.replay_routing else Routes()
        critic_routes = Routes()
        loss, metrics, logprob = policy_loss(
            policy(*batch.inputs, routes), policy.head_weight, torch.where(answer, batch.targets, -1), own.behaviour,
            own.advantages, clip=cfg.clip, num_tokens=num_tokens if per_token else None,
            num_sequences=None if per_token else num_answers, cu_seqlens=batch.cu_seqlens, dual_clip=cfg.dual_clip,
            reference=own.reference if cfg.kl_loss else None, kl=cfg.kl_loss, kl_estimator=cfg.kl_estimator,
            entropy=cfg.entropy, sampled=own.sampled if cfg.importance_cap else None,
            importance_cap=cfg.importance_cap or 1.0, temperature=cfg.temperature, shard=policy.shard,
        )  # fmt: skip
        (loss + run.routers["policy"].loss(routes)).backward()
        error, value_metrics = value_loss(
            critic(*batch.inputs, critic_routes)[answer][:, 0], own.values[answer], own.returns[answer],
            clip=cfg.value_clip, num_tokens=num_tokens,
        )  # fmt: skip
        (error + run.routers["critic"].loss(critic_routes)).backward()
        # The rollout's own divergence is logged as kl_k1 and kl_k3.
        metrics = {f"update_{name}" if name.startswith("kl_") else name: value for name, value in metrics.items()}
        shares = {name: value / num_tokens for name, value in (metrics | value_metrics).items()}
        run.add(logprob, (logprob - own.behaviour)[answer], policy_loss=loss, value_loss=error, **shares)
    run.update()


if __name__ == "__main__":
    launch(main, Config)
