"""RLEIF: PPO on a product of rewards, of instructions, steps and answers; a model directory out.

    python recipes/rleif.py --model DIR --reward.instruction-model DIR --reward.process-model DIR --data rows.jsonl \
        --out runs/rleif
    python recipes/rleif.py --model DIR --reward.factors checked --data rows.jsonl --held-out others.jsonl \
        --out runs/rleif

reward = instruction factor x minimum over the steps of the process factor, each in [0, 1], on the answer's last token,
minus --kl.coefficient x k1 on every token. The instruction factor depends on the prompt alone, so a critic, not a
group's own mean and deviation, has to be the baseline: scaling within a group of answers to one prompt would cancel it.
The factor `preference` is the probability that the answer is preferred to the row's own, beside these two or in place
of one: `--reward.factors instruction preference`.
The factor `checked` is 1 where an answer claims the number of the row's own answer: alone, it needs no reward model.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kernels.linear_logprob import linear_logprob
from wizard_engine import runtime
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_conversation, encode_prompt, use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.packing import bin_members, pack
from wizard_engine.data.records import Conversation, Message
from wizard_engine.data.samples import encode_all, fitting_prompt, read_conversations
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.evaluation.accuracy import MOSTLY, check_reference
from wizard_engine.generation.allowed_ids import allowed_ids
from wizard_engine.loss import policy_loss, sft_loss, value_loss
from wizard_engine.model import Routes, ScoringModel, Transformer
from wizard_engine.model.loading import language_model, scoring_start, write_model
from wizard_engine.parallel import Mesh, MeshOptions, Sharding, lockstep, make_mesh, sharded
from wizard_engine.rl import held_out
from wizard_engine.rl.advantages import Targets, advantages_of_groups, make_targets, old_logprobs, token_rewards
from wizard_engine.rl.answer_batches import answer_runs
from wizard_engine.rl.companions import FrozenModels
from wizard_engine.rl.held_out import HeldOut, PromptRows
from wizard_engine.rl.memory import Memory, memory_of, run_shape
from wizard_engine.rl.options import CriticOptions, KLOptions, PPOOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import (
    AnswerReward,
    InstructionReward,
    PreferenceReward,
    ProcessReward,
    Reference,
    score_answers,
)
from wizard_engine.rl.sampler import Sampler, sampled_at_once
from wizard_engine.rl.trajectories import Rollout, answer_logprobs, answer_values, roll_out, step_seed
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, NonNegative, Seed, Share
from wizard_engine.runtime.stage import INCIDENTAL, MEASURED, finish_stage, open_stage
from wizard_engine.training import audit
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining
from wizard_engine.training.run import num_supervised

PAGE_TOKENS = 64


@dataclass(frozen=True)
class Config(Checked):
    """Reinforcement learning from reward models of instructions, steps and answers, or from checked answers."""

    data: tuple[Path, ...]
    """Conversation rows; each row's turns up to its last question are a prompt."""
    out: Path = field(metadata=INCIDENTAL)
    """Run directory: metrics.jsonl, checkpoints/, model/."""
    model: str
    """Policy and reference to start from."""
    reward: RewardOptions
    chat_format: ChatFormatChoice = "auto"
    """To train in: auto is the format that this project trained the model in, else Vicuna v1.1; or vicuna, chatml,
    template (the model's own, which must mark its answers), or a .jinja file."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read or does not fit: stop, or count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    training: OnlineTraining = field(default_factory=OnlineTraining)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)
    critic: CriticOptions = field(default_factory=CriticOptions)
    kl: KLOptions = field(default_factory=KLOptions)
    ptx: PTXOptions = field(default_factory=PTXOptions)
    average_from: Share[float] = 1.0
    """Share of the rollouts after which the policy's weights are averaged; the average is saved. 1: no average."""
    held_out: tuple[Path, ...] = field(default=(), metadata=MEASURED)
    """Conversation rows to measure on before the first rollout and after the last: one sampled answer to each. A
    finished run measures them without training again."""
    eval_every: NonNegative[int] = field(default=0, metadata=INCIDENTAL)
    """Rollouts between two measurements on --held-out; 0: only before the first and after the last."""
    mesh: MeshOptions = field(default_factory=MeshOptions, metadata=INCIDENTAL)
    sharding: Sharding = field(default_factory=Sharding)
    seed: Seed[int] = 0
    device: str = field(default="auto", metadata=INCIDENTAL)
    audit: bool = field(default=True, metadata=INCIDENTAL)
    """Check in the first rollout that trainer and sampler agree."""
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    """Replace the results of another configuration in OUT."""
    quiet: bool = field(default=False, metadata=INCIDENTAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic.warmup_steps > self.rollout.steps:
            raise ValueError(
                f"critic.warmup_steps: expected at most rollout.steps={self.rollout.steps}, got "
                f"{self.critic.warmup_steps}"
            )
        advantages = self.ppo.advantages
        if advantages != "critic" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.samples_per_prompt: expected at least 2 with --ppo.advantages {advantages}, got 1"
            )
        if advantages == "grpo" and "instruction" in self.reward.factors:
            raise ValueError(
                "ppo.advantages: expected critic or rloo with the instruction factor, got grpo; the factor is the same "
                "for all answers to a prompt, and their standard deviation cancels it; or choose --reward.factors "
                "process"
            )
        if self.eval_every and not self.held_out:
            raise ValueError(
                f"eval_every: expected --held-out with it, got {self.eval_every} alone; give a file of rows"
            )


def main(cfg: Config) -> dict:
    """Train; returns what stage.json records."""
    rt = runtime.start(cfg.device, timeout_seconds=cfg.mesh.timeout_seconds)
    mesh = make_mesh(cfg.mesh, rt)
    stage = open_stage(cfg, "rleif", rt)
    if stage.done:
        return stage.result()
    is_shown = rt.is_main and not cfg.quiet
    setup, rejected = _loaded(cfg, rt, mesh, is_shown)
    if is_shown:
        print(memory(cfg, setup, mesh), file=sys.stderr)
    # The policy is still the one that the run starts from, whatever checkpoint it goes on from.
    measured = held_out_of(cfg, mesh, setup)
    measured.before(stage, rt)
    run = OnlineRun(cfg, rt, setup.policy, setup.critic, num_prompts=len(setup.prompts))
    for step, chosen in run.steps():
        train_step(cfg, run, setup, step, chosen, measured)
        if step == 0 and cfg.audit:
            is_wide = setup.policy.embedding.weight.dtype.itemsize > 2
            audit.check_rollout(run.largest_ratio_error, quiet=not is_shown, is_wide=is_wide)
    run.use_average()
    write_model(rt, setup.policy, setup.tokenizer, cfg.out / "model")
    result = run.result() | ({"rejected": rejected} if rejected else {})
    outputs = [cfg.out / "model"]
    if cfg.held_out:
        result |= {"held_out": measured.after(rt)}
        outputs.append(measured.file)
        if is_shown:
            print(held_out.shown(result["held_out"]))
    return finish_stage(stage, rt, result, outputs)


def _loaded(cfg: Config, rt: runtime.Runtime, mesh: Mesh, is_shown: bool) -> tuple["Setup", int]:
    """Models and rows, and how many rows were rejected."""

    def say(what: str, source: Any) -> None:
        if is_shown:
            print(f"rleif: load {what} {source}", file=sys.stderr)

    divided = {"mesh": mesh, "sharding": cfg.sharding}
    say("policy", cfg.model)
    policy, tokenizer = language_model(cfg.model, None, seed=cfg.seed, device=rt.device, **divided)
    use_chat_format(
        tokenizer,
        cfg.chat_format,
        training=True,
        needs_marks=cfg.ptx.coefficient > 0,
        vocab_size=policy.config.vocab_size,
    )
    frozen, critic = FrozenModels(mesh, cfg.sharding), None
    say("reference", cfg.model)
    reference = frozen.reference(Path(cfg.model))
    instruction, process, preference = _reward_models(cfg, frozen, say)
    if cfg.ppo.advantages == "critic":
        start = str(cfg.critic.model or cfg.reward.process_model or cfg.model)
        say("critic", start)
        critic, _ = scoring_start(start, None, 1, seed=0, **divided)
    read = partial(_asked, cfg, tokenizer, policy, preference)
    asked, rows, rejected = read(cfg.data, cfg.out / "rejects.jsonl", compares=False)
    supervised = _supervised(cfg, tokenizer, policy, rows) if cfg.ptx.coefficient else []
    others = PromptRows()
    if cfg.held_out:
        others, _, _ = read(cfg.held_out, cfg.out / "rejects_held_out.jsonl", compares=True)
    sampler = sampler_of(cfg, tokenizer, policy, asked.prompts + others.prompts, rt)
    return Setup(
        tokenizer,
        policy,
        reference,
        critic,
        instruction,
        process,
        sampler,
        asked.prompts,
        supervised,
        asked.references,
        others,
        frozen.bodies,
        preference,
        asked.own,
    ), rejected


def _reward_models(
    cfg: Config, frozen: FrozenModels, say: Callable[[str, Any], None]
) -> tuple[InstructionReward | None, ProcessReward | None, PreferenceReward | None]:
    """The reward models that the run names."""
    reward, capacity = cfg.reward, cfg.training.pack_tokens
    instruction = process = preference = None
    if reward.instruction_model is not None:
        say("instruction reward model", reward.instruction_model)
        instruction = frozen.instruction_reward(reward.instruction_model, capacity=capacity)
    if reward.process_model is not None:
        say("process reward model", reward.process_model)
        process = frozen.process_reward(reward.process_model, neutral=reward.neutral, capacity=capacity)
    if reward.preference_model is not None:
        say("preference reward model", reward.preference_model)
        preference = frozen.preference_reward(reward.preference_model, capacity=capacity)
    return instruction, process, preference


def _asked(
    cfg: Config,
    tokenizer: Tokenizer,
    policy: Transformer,
    preference: PreferenceReward | None,
    paths: tuple[Path, ...],
    rejects: Path,
    *,
    compares: bool,
) -> tuple[PromptRows, list, int]:
    """Prompts of row files, the rows, and how many were rejected.

    Args:
        preference: compares answers with the rows' own, which it must be able to read.
        compares: keep the rows' own answers as references, where nine in ten are readable. The factor `checked` refuses
            rows without a readable one.
    """
    room, is_checked = policy.config.max_positions - cfg.rollout.max_new_tokens, "checked" in cfg.reward.factors
    rows, unread = read_conversations(paths, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields, rejects=rejects)

    def ask(located: tuple[str, Conversation]) -> tuple[str, tuple[Message, ...], Reference | None, str]:
        where, row = located
        prompt = fitting_prompt(tokenizer, row, room)
        if preference is not None:
            preference.check(prompt, row.answer)
        if is_checked:
            check_reference(row.answer)
        reference = Reference.of(row.answer) if compares or is_checked else None
        return where, prompt, reference if reference is not None and reference.is_readable else None, row.answer

    located = [(where, (where, row)) for where, row in rows]
    asked, refused = encode_all(located, ask, cfg.on_error, rejects, quiet=cfg.quiet)
    wheres, prompts, references, own = map(list, zip(*asked))
    references = references if is_checked else comparable(references)
    return PromptRows(wheres, prompts, references, own if preference is not None else []), rows, unread + refused


def comparable(references: list[Reference | None]) -> list[Reference | None]:
    """The references; none at all where they are of rows of any kind, of which some happen to end in a number."""
    readable = sum(reference is not None for reference in references)
    return references if readable >= MOSTLY * len(references) else [None] * len(references)


@dataclass
class Setup:
    """What a step of RLEIF works with.

    instruction, process, preference: None where no model is given.   prompts: to draw from.   supervised: samples of
    the rows' own answers, where --ptx.coefficient asks for them.   references: to check the answers to each prompt.
    others: held-out rows.   frozen: bodies of the models that are not trained, each once.
    own: the row's own answer to each prompt, where there is a preference model.
    """

    tokenizer: Tokenizer
    policy: Transformer
    reference: Transformer
    critic: ScoringModel | None
    instruction: InstructionReward | None
    process: ProcessReward | None
    sampler: Sampler
    prompts: list[tuple[Message, ...]]
    supervised: list[Sample]
    references: list[Reference | None] = field(default_factory=list)
    others: PromptRows = field(default_factory=PromptRows)
    frozen: list[Transformer] = field(default_factory=list)
    preference: PreferenceReward | None = None
    own: list[str] = field(default_factory=list)

    def score(
        self, rollout: Rollout, references: Sequence[Reference | None] | None, own: Sequence[str]
    ) -> list[AnswerReward]:
        """Reward of each answer of a rollout, given the reference of each, and the row's own answer."""
        return score_answers(
            rollout.prompts,
            rollout.texts,
            rollout.finished,
            instruction=self.instruction,
            process=self.process,
            references=references,
            preference=self.preference,
            own=own,
        )


def held_out_of(cfg: Config, mesh: Mesh, setup: Setup) -> HeldOut:
    """What measures the policy on the held-out rows."""
    return HeldOut(
        setup.others,
        cfg.out,
        sampler=setup.sampler,
        tokenizer=setup.tokenizer,
        score=setup.score,
        reward=cfg.reward,
        has_process=setup.process is not None,
        options=cfg.rollout,
        data=mesh.data,
        seed=step_seed(cfg.seed, 0, 0, 3),
        every=cfg.eval_every,
        measures_last=cfg.average_from == 1,
        quiet=cfg.quiet,
    )


def train_step(
    cfg: Config, run: OnlineRun, setup: Setup, step: int, chosen: list[int], measured: HeldOut | None = None
) -> Rollout:
    """One rollout and its updates: weights to the sampler, answers to the chosen prompts, rewards, losses."""
    capacity = cfg.training.pack_tokens
    with run.phase("hand_over"):
        setup.sampler.sync_weights()
    with run.phase("generate"):
        rollout = roll_out(
            setup.sampler,
            setup.tokenizer,
            [setup.prompts[i] for i in chosen],
            samples=cfg.rollout.samples_per_prompt,
            temperature=cfg.rollout.temperature,
            max_new_tokens=cfg.rollout.max_new_tokens,
            seed=step_seed(cfg.seed, step),
            first=run.data.index,
            stride=run.data.size,
        )
    with run.phase("hand_over"):
        setup.sampler.release()
    with run.phase("score"):
        each = cfg.rollout.samples_per_prompt
        references = [setup.references[i] for i in chosen for _ in range(each)] if setup.references else None
        own = [setup.own[i] for i in chosen for _ in range(each)] if setup.own else []
        rewards = setup.score(rollout, references, own)
        ref_logprobs = answer_logprobs(setup.reference, rollout, temperature=cfg.rollout.temperature, capacity=capacity)
        values = None if setup.critic is None else answer_values(setup.critic, rollout, capacity=capacity)
        multiple_updates = cfg.ppo.epochs * cfg.ppo.minibatches > 1
        policy_logprobs = None
        if multiple_updates:
            policy_logprobs = answer_logprobs(
                setup.policy, rollout, temperature=cfg.rollout.temperature, capacity=capacity
            )
        setup.sampler.check(rollout.weights_checksum)
    targets, kl = _targets(cfg, run, rollout, rewards, ref_logprobs, values, policy_logprobs)
    with run.phase("train"):
        for epoch in range(cfg.ppo.epochs):
            for number, minibatch in enumerate(run.minibatches(epoch, cfg.ppo.minibatches)):
                run.zero_grad(multiple=bool(setup.supervised))
                if setup.supervised:
                    drawn = np.random.default_rng(step_seed(cfg.seed, step, epoch, number, 2))
                    picks = drawn.integers(len(setup.supervised), size=cfg.ptx.rows)[run.data.index :: run.data.size]
                    _add_supervised(cfg, run, setup.policy, [setup.supervised[i] for i in picks])
                _update(
                    cfg, run, setup.policy, setup.critic, rollout, targets, minibatch, is_first=not multiple_updates
                )
    measures: dict[str, float] = {}
    if measured is not None and measured.is_due(step + 1):
        with run.phase("held_out"):
            measures = measured.metrics(step + 1)
    run.record(rollout, rewards, kl, values, targets, measures)
    return rollout


def sampler_of(cfg: Config, tokenizer: Tokenizer, policy: Transformer, prompts: list, rt: runtime.Runtime) -> Sampler:
    """The policy to sample from, with room for what is sampled at once."""
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts) + cfg.rollout.max_new_tokens
    pages = -(-longest // PAGE_TOKENS) + 1
    engine = sharded(policy)
    sequences = sampled_at_once(cfg.rollout, None if engine is None else engine.mesh)
    return Sampler(
        policy,
        rt,
        tp=cfg.rollout.tp,
        max_sequences=sequences,
        cache_tokens=cfg.rollout.cache_tokens or sequences * pages * PAGE_TOKENS,
        allowed_ids=allowed_ids(tokenizer, policy.config.vocab_size),
        longest=longest,
    )


def memory(cfg: Config, setup: Setup, mesh: Mesh) -> Memory:
    """Memory of a rank, from the shapes of the run."""
    shape = run_shape(
        cfg.rollout,
        mesh,
        capacity=cfg.training.pack_tokens,
        minibatches=cfg.ppo.minibatches,
        longest=setup.sampler.longest,
        supervised=(cfg.ptx.rows, max((len(sample.tokens) for sample in setup.supervised), default=0)),
        policy=setup.policy.config,
        critic=None if setup.critic is None else setup.critic.config,
        frozen=[body.config for body in setup.frozen],
        sampler=setup.sampler,
    )
    if setup.own:
        # The rows' own answers are scored too: as many tokens as a pack holds at most.
        shape = replace(shape, scored=max(shape.scored, cfg.training.pack_tokens))
    return memory_of(shape, mesh, cfg.sharding)


def _targets(
    cfg: Config,
    run: OnlineRun,
    rollout: Rollout,
    rewards: list,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor | None,
    policy_logprobs: torch.Tensor | None,
) -> tuple[Targets, dict]:
    """What the losses need of each answer token, and the estimates of the divergence from the reference."""
    is_relative = cfg.ppo.group_baseline and cfg.ppo.advantages == "critic"
    per_token, kl = token_rewards(
        rollout,
        rewards,
        ref_logprobs,
        factors=cfg.reward.factors,
        kl=cfg.kl.coefficient,
        no_eos_penalty=cfg.reward.no_eos_penalty,
        group=cfg.rollout.samples_per_prompt if is_relative else 1,
    )
    options: dict[str, Any] = {}
    if policy_logprobs is not None:
        options["behaviour"] = old_logprobs(policy_logprobs, rollout.behaviour, cfg.ppo.importance_limit)
        run.note_difference(policy_logprobs - rollout.behaviour)
    if cfg.ppo.advantages == "critic":
        options |= {"gamma": cfg.ppo.gamma, "lam": cfg.ppo.lam, "moments": run.totals}
    else:
        group = cfg.rollout.samples_per_prompt
        options["advantages"] = advantages_of_groups(per_token, rollout, group, kind=cfg.ppo.advantages)
    return make_targets(rollout, per_token, values, ref_logprobs, **options), kl


def _supervised(cfg: Config, tokenizer: Tokenizer, policy: Transformer, rows: list) -> list[Sample]:
    """The rows as supervised samples."""
    limit = min(policy.config.max_positions, cfg.training.pack_tokens)

    def encode(row: Conversation) -> Sample:
        return encode_conversation(tokenizer, row.messages, weights=row.weights, max_length=limit)

    return encode_all(rows, encode, cfg.on_error, cfg.out / "rejects_supervised.jsonl", quiet=cfg.quiet)[0]


def supervised_groups(samples: list[Sample], capacity: int) -> list[list[Sample]]:
    """The samples in packs of at most `capacity` tokens; in their order where one pack holds all."""
    bins = pack(np.asarray([len(sample.tokens) - 1 for sample in samples], dtype=np.int64), capacity)
    return [[samples[i] for i in members] for members in bin_members(bins)]


def _add_supervised(cfg: Config, run: OnlineRun, policy: Transformer, samples: list[Sample]) -> None:
    """Add the gradient of the supervised loss, weighted by --ptx.coefficient.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    """
    batches = [collate(group) for group in supervised_groups(samples, cfg.training.pack_tokens)]
    num_tokens = run.totals(num_supervised(batches))[0]
    for batch in lockstep([batch.to(run.device) for batch in batches], policy, backward=True):
        hidden = policy(*batch.inputs)
        out = sft_loss(
            hidden, policy.head_weight, batch.targets, batch.weights, num_tokens=num_tokens, shard=policy.shard
        )
        (cfg.ptx.coefficient * out.loss).backward()
        run.share(ptx_loss=out.loss)


def _update(
    cfg: Config, run: OnlineRun, policy, critic, rollout: Rollout, targets: Targets, rows: list[int], *, is_first: bool
) -> None:
    """One update of policy and critic on some answers of a rollout; `is_first`: of the weights that sampled it."""
    num_tokens, num_answers = run.totals(sum(rollout.lengths[i] for i in rows), len(rows))
    runs = answer_runs(rollout.samples, rollout.prompt_tokens, rows, cfg.training.pack_tokens, policy.parallel)
    batches = [(picked, rollout.batch(picked, policy.parallel, run.device)) for picked in runs]
    for router in run.routers.values():
        router.start(sum(last - first for _, batch in batches for _, first, last in batch.token_ranges))
    per_token = cfg.ppo.normalisation == "token"
    temperature, ppo, kl = cfg.rollout.temperature, cfg.ppo, cfg.kl
    for picked, batch in run.lockstep(batches):
        tokens = targets.for_batch(picked, batch)
        routes = rollout.routes(picked, batch, run.device) if cfg.rollout.replay_routing else Routes()
        hidden = batch.hidden(policy, policy(*batch.inputs, routes))
        if is_first:
            with torch.no_grad():
                logprobs, _ = linear_logprob(
                    hidden.detach(), policy.head_weight, batch.targets, temperature=temperature, shard=policy.shard
                )
            run.note_difference(batch.gather(logprobs - tokens.sampled))
            tokens.behaviour = old_logprobs(logprobs, tokens.sampled, ppo.importance_limit)
        loss, metrics, logprob = policy_loss(
            hidden,
            policy.head_weight,
            batch.targets,
            tokens.behaviour,
            tokens.advantages,
            clip=ppo.clip,
            num_tokens=num_tokens if per_token else None,
            num_sequences=None if per_token else num_answers,
            cu_seqlens=batch.cu_seqlens,
            dual_clip=ppo.dual_clip,
            reference=tokens.reference if kl.loss_coefficient else None,
            kl=kl.loss_coefficient,
            kl_estimator=kl.estimator,
            entropy=ppo.entropy,
            sampled=tokens.sampled,
            importance_cap=ppo.importance_cap,
            temperature=temperature,
            shard=policy.shard,
        )
        (loss + run.routers["policy"].loss(routes)).backward()
        shares = {"policy_loss": loss}
        if critic is not None:
            critic_routes = Routes()
            error, value_metrics = value_loss(
                batch.scores_before(critic(*batch.inputs, critic_routes))[:, 0],
                *(batch.gather(x) for x in (tokens.values, tokens.returns)),
                clip=cfg.critic.value_clip,
                num_tokens=num_tokens,
            )
            (error + run.routers["critic"].loss(critic_routes)).backward()
            metrics, shares = metrics | value_metrics, shares | {"value_loss": error}
        # The rollout's own divergence is logged as kl_k1 and kl_k3.
        metrics = {f"update_{name}" if name.startswith("kl_") else name: value for name, value in metrics.items()}
        run.add(logprob, **shares, **{name: value / num_tokens for name, value in metrics.items()})
    run.update()


if __name__ == "__main__":
    launch(main, Config)
