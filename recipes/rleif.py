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

from kernels.linear_logprob import linear_logprob
from wizard_engine import runtime
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_conversation, encode_prompt
from wizard_engine.data.records import Conversation, Message, read_located
from wizard_engine.data.samples import encode_all, fitting_prompt
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.loss import policy_loss, sft_loss, value_loss
from wizard_engine.model import Routes, ScoringModel, Transformer
from wizard_engine.model.loading import language_model, scoring_start, write_model
from wizard_engine.parallel import MeshOptions, Sharding, lockstep, make_mesh
from wizard_engine.rl.advantages import Targets, advantages_of_groups, make_targets, token_rewards, trusted
from wizard_engine.rl.answer_batches import answer_runs
from wizard_engine.rl.rewards import (
    FACTORS,
    InstructionReward,
    ProcessReward,
    instruction_reward,
    process_reward,
    score_answers,
)
from wizard_engine.rl.sampler import Sampler
from wizard_engine.rl.trajectories import Rollout, answer_logprobs, answer_values, roll_out, step_seed
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.stage import finish_stage, open_stage
from wizard_engine.training import audit
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.run import num_supervised

PAGE_TOKENS = 64


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
    advantages: Literal["critic", "rloo", "grpo"] = "critic"
    """Baseline of the rewards: a critic (PPO), the mean of the other answers to the prompt (RLOO), or that of all of
    them over their standard deviation (GRPO), which cancels the instruction factor and is refused with it."""
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
    importance_limit: float = 0.01
    """Nats by which trainer and sampler may differ in a token's log-probability; of one beyond, the ratio is taken to
    the trainer's own, and it is weighed by trainer over sampler, at most --importance-cap."""
    importance_cap: float = 2.0
    entropy: float = 0.0
    """Coefficient of the entropy bonus, per token."""
    ptx: float = 0.0
    """Weight of the supervised loss on the rows' own answers in every update (PPO-ptx); 0 leaves it out."""
    ptx_rows: int = 32
    """Rows of that loss per update over all ranks."""
    gamma: float = 1.0
    lam: float = 0.95
    sampler_tp: int = 1
    """Ranks that divide the sampler's matrices and experts; each such group has the whole policy to sample from."""
    batch_size: int = 128
    """Answers that a rank samples at once."""
    cache_tokens: int | None = None
    """Keys and values that a rank keeps while sampling, tokens; default: enough for --batch-size of the longest."""
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
        if self.advantages != "critic" and self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt: expected at least 2 with --advantages {self.advantages}, got 1")
        if self.advantages == "grpo" and "instruction" in self.factors:
            raise ValueError(
                "advantages: expected critic or rloo with the instruction factor, got grpo; the factor is the same for "
                "all answers to a prompt, and their standard deviation cancels it; or choose --factors process"
            )


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
    critic = None
    if cfg.advantages == "critic":
        critic, _ = scoring_start(str(cfg.critic or cfg.process_model), None, 1, seed=0, **divided)
    room = policy.config.max_positions - cfg.max_new_tokens
    rows, _ = read_located(cfg.data, kind="conversation")
    rejects = cfg.out / "rejects.jsonl"
    prompts, _ = encode_all(rows, lambda row: fitting_prompt(tokenizer, row, room), "raise", rejects, quiet=cfg.quiet)
    supervised = _supervised(cfg, tokenizer, policy, rows) if cfg.ptx else []
    run = OnlineRun(cfg, rt, policy, critic, num_prompts=len(prompts))
    sampler = sampler_of(cfg, tokenizer, policy, prompts, rt)
    setup = Setup(tokenizer, policy, reference, critic, irm, prm, sampler, prompts, supervised)
    for step, chosen in run.steps():
        train_step(cfg, run, setup, step, chosen)
        if step == 0 and cfg.audit:
            is_wide = policy.embedding.weight.dtype.itemsize > 2
            audit.check_rollout(run.largest_ratio_error, quiet=cfg.quiet or not rt.is_main, is_wide=is_wide)
    run.take_average()
    write_model(rt, policy, tokenizer, cfg.out / "model")
    return finish_stage(stage, rt, run.result(), [cfg.out / "model"])


@dataclass
class Setup:
    """What a step of RLEIF works with.

    prompts: to draw from.   supervised: samples of the rows' own answers, where --ptx asks for them.
    """

    tokenizer: Tokenizer
    policy: Transformer
    reference: Transformer
    critic: ScoringModel | None
    instruction: InstructionReward
    process: ProcessReward
    sampler: Sampler
    prompts: list[tuple[Message, ...]]
    supervised: list[Sample]


def train_step(cfg: Config, run: OnlineRun, setup: Setup, step: int, chosen: list[int]) -> Rollout:
    """One rollout and its updates: weights to the sampler, answers to the chosen prompts, rewards, losses."""
    with run.phase("hand_over"):
        setup.sampler.take()
    with run.phase("generate"):
        rollout = roll_out(
            setup.sampler, setup.tokenizer, [setup.prompts[i] for i in chosen], samples=cfg.samples_per_prompt,
            temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=step_seed(cfg.seed, step),
            first=run.data.index, stride=run.data.size,
        )  # fmt: skip
    with run.phase("hand_over"):
        setup.sampler.release()
    with run.phase("score"):
        rewards = score_answers(
            rollout.prompts, rollout.texts, rollout.finished, instruction=setup.instruction, process=setup.process
        )
        fixed = answer_logprobs(setup.reference, rollout, temperature=cfg.temperature)
        values = None if setup.critic is None else answer_values(setup.critic, rollout)
        several = cfg.epochs * cfg.minibatches > 1
        own = answer_logprobs(setup.policy, rollout, temperature=cfg.temperature) if several else None
        setup.sampler.check(rollout.stamp)
    targets, kl = _targets(cfg, run, rollout, rewards, fixed, values, own)
    with run.phase("train"):
        for epoch in range(cfg.epochs):
            for number, minibatch in enumerate(run.minibatches(epoch, cfg.minibatches)):
                run.zero_grad(multiple=bool(setup.supervised))
                if setup.supervised:
                    drawn = np.random.default_rng(step_seed(cfg.seed, step, epoch, number, 2))
                    picks = drawn.integers(len(setup.supervised), size=cfg.ptx_rows)[run.data.index :: run.data.size]
                    _add_supervised(cfg, run, setup.policy, [setup.supervised[i] for i in picks])
                _update(cfg, run, setup.policy, setup.critic, rollout, targets, minibatch, is_first=not several)
    run.record(rollout, rewards, kl, values, targets)
    return rollout


def sampler_of(cfg: Config, tokenizer: Tokenizer, policy: Transformer, prompts: list, rt: runtime.Runtime) -> Sampler:
    """The policy to sample from, with room for what is sampled at once."""
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts) + cfg.max_new_tokens
    pages = -(-longest // PAGE_TOKENS) + 1
    return Sampler(
        policy, rt, tp=cfg.sampler_tp, max_sequences=cfg.batch_size,
        cache_tokens=cfg.cache_tokens or cfg.batch_size * pages * PAGE_TOKENS,
    )  # fmt: skip


def _targets(
    cfg: Config, run: OnlineRun, rollout: Rollout, rewards: list, fixed: torch.Tensor, values: torch.Tensor | None,
    own: torch.Tensor | None,
) -> tuple[Targets, dict]:  # fmt: skip
    """What the losses need of each answer token, and the estimates of the divergence from the reference."""
    is_relative = cfg.group_baseline and cfg.advantages == "critic"
    per_token, kl = token_rewards(
        rollout, rewards, fixed, factors=cfg.factors, kl=cfg.kl, no_eos_penalty=cfg.no_eos_penalty,
        group=cfg.samples_per_prompt if is_relative else 1,
    )  # fmt: skip
    options = {"own": None if own is None else trusted(own, rollout.behaviour, cfg.importance_limit)}
    if own is not None:
        run.note_difference(own - rollout.behaviour)
    if cfg.advantages == "critic":
        options |= {"gamma": cfg.gamma, "lam": cfg.lam, "moments": run.totals}
    else:
        group = cfg.samples_per_prompt
        options["advantages"] = advantages_of_groups(per_token, rollout, group, kind=cfg.advantages)
    return make_targets(rollout, per_token, values, fixed, **options), kl


def _supervised(cfg: Config, tokenizer: Tokenizer, policy: Transformer, rows: list) -> list[Sample]:
    """The rows as supervised samples."""
    limit = min(policy.config.max_positions, cfg.pack_tokens)

    def encode(row: Conversation) -> Sample:
        return encode_conversation(tokenizer, row.messages, max_length=limit)

    return encode_all(rows, encode, "raise", cfg.out / "rejects.jsonl", quiet=cfg.quiet)[0]


def _add_supervised(cfg: Config, run: OnlineRun, policy: Transformer, samples: list[Sample]) -> None:
    """Add the gradient of the supervised loss, weighted by ptx (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""
    batches = [collate(samples)] if samples else []
    num_tokens = run.totals(num_supervised(batches))[0]
    for batch in lockstep([batch.to(run.device) for batch in batches], policy, backward=True):
        hidden = policy(*batch.inputs)
        out = sft_loss(
            hidden, policy.head_weight, batch.targets, batch.weights, num_tokens=num_tokens, shard=policy.shard
        )  # fmt: skip
        (cfg.ptx * out.loss).backward()
        run.share(ptx_loss=out.loss)


def _update(
    cfg: Config, run: OnlineRun, policy, critic, rollout: Rollout, targets: Targets, rows: list[int], *, is_first: bool
) -> None:
    """One update of policy and critic on some answers of a rollout; `is_first`: of the weights that sampled it."""
    num_tokens, num_answers = run.totals(sum(rollout.lengths[i] for i in rows), len(rows))
    runs = answer_runs(rollout.samples, rollout.prompt_tokens, rows, cfg.pack_tokens, policy.parallel)
    batches = [(picked, rollout.batch(picked, policy.parallel, run.device)) for picked in runs]
    for router in run.routers.values():
        router.start(sum(last - first for _, batch in batches for _, first, last in batch.pieces))
    per_token = cfg.normalisation == "token"
    for picked, batch in run.lockstep(batches):
        own = targets.of(picked, batch)
        routes = rollout.routes(picked, batch, run.device) if cfg.replay_routing else Routes()
        hidden = batch.hidden(policy, policy(*batch.inputs, routes))
        if is_first:
            with torch.no_grad():
                found, _ = linear_logprob(
                    hidden.detach(), policy.head_weight, batch.targets, temperature=cfg.temperature, shard=policy.shard
                )  # fmt: skip
            run.note_difference(batch.of_answers(found - own.sampled))
            own.behaviour = trusted(found, own.sampled, cfg.importance_limit)
        loss, metrics, logprob = policy_loss(
            hidden, policy.head_weight, batch.targets, own.behaviour, own.advantages, clip=cfg.clip,
            num_tokens=num_tokens if per_token else None, num_sequences=None if per_token else num_answers,
            cu_seqlens=batch.cu_seqlens, dual_clip=cfg.dual_clip, reference=own.reference if cfg.kl_loss else None,
            kl=cfg.kl_loss, kl_estimator=cfg.kl_estimator, entropy=cfg.entropy, sampled=own.sampled,
            importance_cap=cfg.importance_cap, temperature=cfg.temperature, shard=policy.shard,
        )  # fmt: skip
        (loss + run.routers["policy"].loss(routes)).backward()
        shares = {"policy_loss": loss}
        if critic is not None:
            critic_routes = Routes()
            error, value_metrics = value_loss(
                batch.before(critic(*batch.inputs, critic_routes))[:, 0],
                *(batch.of_answers(x) for x in (own.values, own.returns)), clip=cfg.value_clip, num_tokens=num_tokens,
            )  # fmt: skip
            (error + run.routers["critic"].loss(critic_routes)).backward()
            metrics, shares = metrics | value_metrics, shares | {"value_loss": error}
        # The rollout's own divergence is logged as kl_k1 and kl_k3.
        metrics = {f"update_{name}" if name.startswith("kl_") else name: value for name, value in metrics.items()}
        run.add(logprob, **shares, **{name: value / num_tokens for name, value in metrics.items()})
    run.update()


if __name__ == "__main__":
    launch(main, Config)
