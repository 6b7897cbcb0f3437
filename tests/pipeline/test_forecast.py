"""What a run will take is said before it starts: rows, calls, steps, GPU-hours, disk."""

import dataclasses
import json
from pathlib import Path

import pytest

from recipes import progressive
from wizard_engine.data.records import read_files
from wizard_engine.pipeline.disk import GIB, Disk, disk_bytes, disk_of
from wizard_engine.pipeline.forecast import online_work, row_tokens
from wizard_engine.pipeline.graph import Node
from wizard_engine.pipeline.run_file import read_run_file
from wizard_engine.planning.generation import Answers, Generation
from wizard_engine.training.options import OnlineTraining, Training

RUN = """
out = "{folder}/run"
slices = 2
stages = ["sft", "self_teach", "stage_dpo", "process_reward", "rleif"]
[rows]
data = ["{folder}/rows.jsonl"]
hold-out = 20
pairs = ["{folder}/pairs.jsonl"]
reference-answers = true
[base]
model = "models/seven"
size = "7B"
[agents]
judge = "reference:judge"
labeller = "reference:labeller"
[launch]
processes = 8
[sample]
size = 400
[self_teach]
limit = 60
[rleif]
reward = {{ factors = ["process"] }}
rollout = {{ steps = 3 }}
"""
PARAMETERS = 1000


@pytest.fixture
def forecast(tmp_path):
    """Run -> its forecaster, and stage -> forecast."""
    rows = [{"instruction": f"What is {n} plus {n + 1}?", "output": f"{n} + {n + 1} = {2 * n + 1}"} for n in range(500)]
    pairs = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no, I will not say that"} for n in range(30)]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(change=lambda text: text):
        path = tmp_path / "run.toml"
        path.write_text(change(RUN.format(folder=tmp_path)))
        run = read_run_file(path)
        plan = progressive.plan_of(run)
        forecaster = progressive.forecaster_of(run, plan)
        return forecaster, {one.where: one for one in forecaster.forecast(plan.nodes)}

    return made


# Catches: rows of one's own that are multiplied as if they were drawn from the slice.
def test_rows_of_a_slice_are_scaled_up_and_given_ones_are_not(forecast):
    _, made = forecast()
    # 400 rows in two slices of 200, of which 100 go through the stand-ins.
    assert made["slice_1/rows"].rows == made["slice_1/sft"].rows == 200
    assert made["slice_1/self_teach"].rows == 60
    _, alone = forecast(lambda text: text.replace("pairs =", "# pairs ="))
    assert alone["slice_1/pairs"].rows > 0 and made["slice_1/pairs"].rows == alone["slice_1/pairs"].rows + 30
    assert made["slice_1/process_reward"].rows == 120, "two answers to each of 60 rows"
    assert made["slice_2/rows"].rows > 200, "self-taught rows of the first slice come on top"
    # Three samples and two for the labels; three ratings and two labellings: nobody is paid.
    assert made["slice_1/self_teach"].calls == 0 and made["slice_1/self_teach"].local_calls > 5 * 60


def test_a_preference_model_takes_the_pairs_of_stage_dpo(forecast):
    forecaster, made = forecast(lambda text: text.replace('"process_reward"', '"process_reward", "preference_reward"'))
    stage = made["slice_1/preference_reward"]
    assert stage.rows == made["slice_1/pairs"].rows > 0 and stage.steps > 0
    assert stage.gpu_hours == pytest.approx(stage.tokens / forecaster.plan.tokens_per_second / 3600), "all of it"


def test_rows_that_were_drawn_before_are_counted_whole(forecast, tmp_path):
    forecast()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "before").mkdir()
    (tmp_path / "before/stage.json").write_text('{"stage": "sample"}')
    for t in (1, 2):
        (tmp_path / f"before/slice_{t}.jsonl").write_text("".join(lines[t::2][:240]))
    text = f'[sample]\nuse = "{tmp_path}/before"\n[evol_instruct]\nrounds = 1\n'
    stages = 'stages = ["evol_instruct", "sft"]'
    agents = '[agents]\nevolver = "reference:judge"\nanswerer = "reference:judge"\noptimizer = "none"'
    _, made = forecast(
        lambda run: (
            run.replace("[sample]\nsize = 400\n", text)
            .replace("[agents]", agents)
            .replace('stages = ["sft", "self_teach", "stage_dpo", "process_reward", "rleif"]', stages)
        )
    )
    assert made["slice_1/evol_instruct"].rows == 240 and made["slice_1/evol_instruct"].local_calls >= 3 * 200
    assert 400 < made["slice_1/sft"].rows <= 480 and "sample" not in made


def test_gpu_hours_of_training_answers_and_perplexity_are_the_planners(forecast, tmp_path):
    forecaster, made = forecast()
    rate = forecaster.plan.tokens_per_second * 3600
    rows, _ = read_files([tmp_path / "rows.jsonl"])
    assert made["analysis"].gpu_hours == pytest.approx(sum(map(row_tokens, rows)) / 3 / rate)
    assert made["slice_1/sft"].gpu_hours == pytest.approx(made["slice_1/sft"].tokens / rate)
    # Of a process reward model the head alone is trained.
    assert made["slice_1/process_reward"].gpu_hours == pytest.approx(made["slice_1/process_reward"].tokens / 3 / rate)
    prompt = sum(row_tokens(row) - row_tokens_of_answer(row) for row in rows[-20:]) / 20
    greedy_and_sampled = Answers(40, prompt, 128, at_once=128)
    answered = Generation(forecaster.planner, 8, value_bytes=4).gpu_seconds(greedy_and_sampled) / 3600
    assert made["slice_1/accuracy_sft"].gpu_hours == pytest.approx(answered)
    assert made["slice_2/self_teach"].gpu_hours > 0 and made["slice_2/self_teach"].hours is None
    rollouts = made["slice_2/rleif"].gpu_hours - made["slice_2/rleif"].tokens * 3 / rate
    assert 0 < rollouts < made["slice_2/rleif"].gpu_hours
    assert made["arena"].local_calls == 2 * 6 * 20 and made["arena"].gpu_hours is None, "its answers are there"


def row_tokens_of_answer(row):
    return row_tokens(dataclasses.replace(row, messages=row.messages[-1:]))


def test_an_arena_without_accuracy_generates_its_answers(forecast):
    _, made = forecast(lambda text: text + "[measure]\naccuracy = false\n")
    assert "slice_1/accuracy_sft" not in made and made["arena"].gpu_hours > 0
    assert made["arena"].local_calls == 4 * 20 + 2 * 6 * 20


def test_sizes_without_a_preset_have_no_gpu_hours(forecast):
    forecaster, made = forecast(lambda text: text.replace('size = "7B"', 'size = "1B"'))
    assert forecaster.planner is None and not [one for one in made.values() if one.gpu_hours is not None]
    assert made["slice_1/sft"].steps and not [one for one in made.values() if one.disk_gib is not None]


def test_work_of_a_rollout_by_hand():
    options = progressive.rleif
    reward = options.RewardOptions(factors=("checked",))
    config = options.Config((Path("rows.jsonl"),), Path("out"), "model", reward)
    # Policy and reference; policy, reference, critic; the same with two reward models.
    alone = dataclasses.replace(config, ppo=options.PPOOptions(advantages="rloo"))
    assert online_work(alone) == pytest.approx(4 / 3) and online_work(config) == pytest.approx(8 / 3)
    both = dataclasses.replace(config, reward=options.RewardOptions(Path("a"), Path("b")))
    assert online_work(both) == pytest.approx(10 / 3)
    three = dataclasses.replace(both.reward, preference_model=Path("c"))
    assert online_work(dataclasses.replace(both, reward=three)) == pytest.approx(11 / 3)


def node(recipe, **options):
    module = progressive.RECIPES[recipe]
    return Node(recipe, recipe, module.Config(data=(Path("rows.jsonl"),), out=Path("out"), **options))


def rleif_node(steps, **options):
    module = progressive.rleif
    options = {"reward": module.RewardOptions(factors=("checked",)), **options}
    return node("rleif", model="m", rollout=module.RolloutOptions(steps=steps), **options)


@pytest.mark.parametrize(
    ("stage", "steps", "stays", "passing"),
    [
        (node("sft", training=Training(save_every=0)), 1000, 4, 0),
        # Steps 10, 20, 30, and the last, of which two are kept.
        (node("sft", training=Training(save_every=10)), 35, 4 + 2 * 12, 12),
        (node("sft", training=Training(save_every=10, keep_last=5)), 35, 4 + 4 * 12, 0),
        (node("sft", training=Training(save_every=200)), 35, 4 + 12, 0),
        (node("sft", training=Training(save_every=200)), None, 4 + 12, 0),
        # Two slices of 20 steps, a checkpoint in each.
        (node("stage_dpo", slices=2, training=Training(save_every=10)), 40, 4 + 2 * 12, 0),
        (node("stage_dpo", training=Training(save_every=200)), 40, 4, 0),
        (node("reward", kind="instruction", training=Training(save_every=200)), 40, 4 + 12, 0),
        (node("reward", kind="preference", training=Training(save_every=200)), 40, 4 + 12, 0),
        (node("reward", kind="process", training=Training(save_every=200)), 40, 4, 0),
        (node("reward", kind="process", surprise=False, training=Training(save_every=200)), 40, 4 + 12, 0),
        # Policy and critic; the policy alone; with its average.
        (rleif_node(35, training=OnlineTraining(save_every=10)), None, 4 + 2 * 24, 24),
        (rleif_node(35, ppo=progressive.rleif.PPOOptions(advantages="rloo")), None, 4, 0),
        (rleif_node(60, ppo=progressive.rleif.PPOOptions(advantages="rloo"), average_from=0.5), None, 4 + 16, 0),
        (node("mix"), None, 0, 0),
    ],
)
def test_disk_by_hand(stage, steps, stays, passing):
    device = progressive.runtime.Runtime().device
    assert disk_of(stage, PARAMETERS, device, steps) == Disk(stays * PARAMETERS, passing * PARAMETERS)


def test_what_passes_is_counted_once():
    assert disk_bytes({"a": Disk(10, 4), "b": Disk(20, 6)}) == 36 and disk_bytes({}) == 0


def test_disk_follows_the_steps(forecast):
    forecaster, made = forecast(lambda text: text + "[sft.training]\nsave-every = 2\npack-tokens = 256\n")
    parameters = sum(parameter.numel() for parameter in forecaster.planner.model.parameters())
    # A model in bf16 and two checkpoints.
    assert made["slice_1/sft"].steps > 6
    assert made["slice_1/sft"].disk_gib == pytest.approx((2 + 2 * 12) * parameters / GIB)
    assert made["slice_1/stage_dpo"].disk_gib == pytest.approx(2 * parameters / GIB)
    assert disk_bytes(forecaster.disk) > sum(one.disk_gib or 0 for one in made.values()) * GIB
