"""Run files: what they hold, and what is refused by name."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from gsm8k_files import write_files

from recipes.progressive import RECIPES, plan_of
from wizard_engine import world
from wizard_engine.pipeline.new_run import Options, write_run_file
from wizard_engine.pipeline.plan import Plan
from wizard_engine.pipeline.preflight import check_files, check_ranks, check_run, has_answers
from wizard_engine.pipeline.run_file import DEFAULT_STAGES, Rows, RunFile, read_run_file

ROOT = Path(__file__).parents[2]
OWN = """
slices = 2
[rows]
data = ["rows.jsonl"]
held-out = ["held.jsonl"]
[base]
model = "models/base"
size = "7B"
[agents]
teacher = "openai:big@http://127.0.0.1:9/v1"
rivals = ["openai:other@http://127.0.0.1:9/v1"]
"""


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def graph(tmp_path, text, has_answers=False):
    run = read_run_file(written(tmp_path, text))
    return Plan(run, RECIPES, size=run.base.size or "demo", has_answers=has_answers).build()


def configs(plan):
    return {node.where: node.config for node in plan.nodes}


def test_options_of_all_slices_of_one_slice_and_of_a_repeated_stage(tmp_path):
    text = OWN.replace("slices = 2", 'slices = 2\nstages = ["sft", "self_teach", "stage_dpo", "sft"]') + (
        "[sft.training]\nepochs = 2\n[sft_2.training]\nlr = 1e-7\n[slice_2.sft]\ntraining = { lr = 3e-6 }\n"
    )
    made = configs(graph(tmp_path, text))
    lr = {name: made[name].training.lr for name in made if "/sft" in name}
    assert lr == {"slice_1/sft": 5e-6, "slice_1/sft_2": 1e-7, "slice_2/sft": 3e-6, "slice_2/sft_2": 3e-6}
    assert {made[name].training.epochs for name in lr} == {2.0}
    assert made["slice_1/sft_2"].model == str(made["slice_1/stage_dpo"].out / "model")


# Catches: a word of the world in a run that has nothing of it.
def test_a_run_of_ones_own_has_nothing_of_the_world(tmp_path):
    plan = graph(tmp_path, OWN)
    assert "world" not in repr(plan.nodes)
    made = configs(plan)
    teacher = "openai:big@http://127.0.0.1:9/v1"
    assert made["slice_1/evol_instruct"].agents.evolver == made["slice_2/co_teach"].agents.suggester == teacher
    assert made["slice_1/self_teach"].agents.labeller == teacher and "slice_1/co_teach" not in made
    assert made["slice_2/sft"].model == str(plan.out / "slice_1" / "rleif" / "model")
    assert made["arena"].models[0] == f"base={plan.out / 'slice_1' / 'rleif' / 'model'}"


def test_a_role_of_nobody_is_not_the_teachers(tmp_path):
    nobody = '[agents]\nsuggester = "none"\nuser = "none"\noptimizer = "none"\nlabeller = "reference:labeller"'
    made = configs(graph(tmp_path, OWN.replace("[agents]", nobody)))
    agents = made["slice_2/co_teach"].agents
    assert (agents.suggester, agents.user, agents.rewriter) == (None, None, None)
    assert made["slice_1/self_teach"].agents.labeller == "reference:labeller"


def test_pairs_come_from_every_stage_that_makes_some(tmp_path):
    text = OWN.replace("[base]", 'pairs = ["own.jsonl"]\nhold-out-pairs = 9\n[base]') + "[mix]\nbattles = 0.25\n"
    made = configs(graph(tmp_path, text))
    out = made["slice_2/pairs"].out.parent
    sources = ["self_teach", "evol_answer", "co_teach"]
    expected = (Path("own.jsonl"), *(out / name / "preferences.jsonl" for name in sources))
    assert made["slice_2/pairs"].data == expected and made["slice_2/pairs"].shares == (1.0, 1.0, 1.0, 0.25)
    assert made["slice_1/pairs"].data == expected[:1] + tuple(
        out.parent / "slice_1" / name / "preferences.jsonl" for name in sources[:2]
    )
    assert made["slice_1/pairs"].hold_out == 9
    # Self-taught rows reach the supervised rows of the next slice.
    assert out.parent / "slice_1" / "self_teach" / "sft.jsonl" in made["slice_2/rows"].data


# Catches: a preference model of other pairs than Stage-DPO's, one that nobody asked for, a factor without its model.
def test_a_preference_model_learns_from_the_pairs_of_the_slice(tmp_path):
    assert not [where for where in configs(graph(tmp_path, OWN)) if "preference_" in where]
    stages = 'slices = 2\nstages = ["evol_answer", "sft", "stage_dpo", "preference_reward", "rleif"]'
    text = OWN.replace("slices = 2", stages).replace("[base]", 'pairs = ["own.jsonl"]\nhold-out-pairs = 9\n[base]')
    text += '[rleif.reward]\nfactors = ["instruction", "preference"]\n[preference_reward.training]\npack-tokens = 99\n'
    text = text.replace('"stage_dpo", "pref', '"stage_dpo", "instruction_reward", "pref').replace(
        '["evol_answer"', '["evol_instruct", "evol_answer"'
    )
    made = configs(graph(tmp_path, text))
    pairs, model = made["slice_2/pairs"].out, made["slice_2/preference_reward"]
    assert model.kind == "preference" and model.data == (pairs / "rows.jsonl",) == made["slice_2/stage_dpo"].data
    assert model.held_out == (pairs / "held_out.jsonl",) and "slice_2/preference_pairs" not in made
    assert model.model == str(made["slice_2/sft"].out / "model") and model.training.pack_tokens == 99
    assert model.training.lr == made["slice_2/instruction_reward"].training.lr == 1e-6
    reward = made["slice_2/rleif"].reward
    assert reward.preference_model == model.out / "model" and reward.process_model is None
    assert reward.factors == ("instruction", "preference") and made["slice_2/rleif"].ppo.group_baseline


def test_a_preference_model_without_stage_dpo_has_pairs_of_its_own(tmp_path):
    stages = 'slices = 2\nstages = ["preference_reward", "sft", "stage_dpo", "rleif"]'
    text = OWN.replace("slices = 2", stages).replace("[base]", 'pairs = ["own.jsonl"]\n[base]')
    text += '[rleif.reward]\nfactors = ["preference"]\n'
    plan = graph(tmp_path, text)
    made = configs(plan)
    assert made["slice_1/preference_pairs"].data == made["slice_1/pairs"].data == (Path("own.jsonl"),)
    for t in (1, 2):
        assert made[f"slice_{t}/preference_reward"].data == (made[f"slice_{t}/preference_pairs"].out / "rows.jsonl",)
    assert made["slice_1/preference_reward"].model == "models/base"
    (node,) = [node for node in plan.nodes if node.where == "slice_2/preference_reward"]
    assert node.learns == node.config.data and node.stands_for == {node.out / "model": None}


def test_union_and_a_finished_directory_in_place_of_a_stage(tmp_path):
    done = tmp_path / "before"
    done.mkdir()
    (done / "stage.json").write_text('{"stage": "evol_instruct"}')
    text = f'progression = "union"\n{OWN}[slice_1.evol_instruct]\nuse = "{done}"\n'
    text = text.replace("[agents]", '[agents]\noptimizer = "none"')
    made = configs(graph(tmp_path, text))
    assert "slice_1/evol_instruct" not in made and made["slice_1/evol_answer"].data == (done / "rows.jsonl",)
    assert made["slice_2/sft"].model == "models/base" and len(made["slice_2/sft"].data) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[rows]", "[row]"), r"mine.toml: row: expected a stage or a group, .*; the nearest is rows"),
        (("data =", "dat ="), r"mine.toml: rows.dat: expected a known option, .*; the nearest is data"),
        (("slices = 2", "slicez = 2"), r"mine.toml: slicez: expected a known name, .*; the nearest is slices"),
        (("slices = 2", 'stages = ["sfd"]'), r"stages: expected stages of a slice, got 'sfd'; the nearest is sft"),
        (("slices = 2", 'stages = ["sft", "evol_instruct"]'), "expected evol_instruct before sft, got it behind"),
        (("slices = 2", "slices = 0"), "mine.toml.slices: expected at least 1, got 0"),
        (("slices = 2", "slices = 2\n[slice_3.sft]\nbeta = 1"), "slice_3: expected one of 2 slices"),
        (("slices = 2", "slices = = 2"), "mine.toml: expected TOML, got"),
        (('size = "7B"', 'size = "8B"'), r"base.size: expected .*one of demo, 135M, 1B, 7B, 70B, 8x22B, got '8B'"),
        (
            ("slices = 2", "[sft]\nlr = 3\n"),
            "mine.toml: sft.lr: expected a known option, got an unknown one; the nearest is training.lr",
        ),
        (("slices = 2", "[sft.training]\nlr = 30\n"), "mine.toml: sft.training.lr: expected 0 to 10, got 30"),
        (("slices = 2", '[sft]\nout = "x"\n'), "sft.out: expected no such option"),
        (
            ("slices = 2", '[sft]\nuse = "nowhere"\n'),
            "slice_1/sft.use: expected the directory of a finished sft, got nowhere w",
        ),
        (("teacher", "answerer"), r"agents.evolver \(for evol_instruct\); .*agents.judge \(for evol_instruct\)"),
        (("rivals", "# rivals"), r"agents.rivals \(for co_teach\)"),
        (("data =", "# data ="), r"rows.data \(for everything\)"),
        (('model = "models/base"', ""), r"base.model \(for everything\)"),
        (("slices = 2", 'stages = ["sft", "rleif"]'), r"instruction_reward before it \(for slice_1/rleif\)"),
        (("slices = 2", 'stages = ["sft", "stage_dpo"]'), r"preference rows \(for slice_1/stage_dpo\): rows.pairs, or"),
        (
            ('"openai:big@http://127.0.0.1:9/v1"', '"served:big"'),
            r"expected a table \[served.big\] for 'served:big', got",
        ),
        (
            ("slices = 2", "slices = 2\n[co_teach]\nin-slices = [3]"),
            "co_teach.in-slices: expected a list of slices, 1 to 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, message):
    text = OWN.replace(*change)
    with pytest.raises(ValueError, match=message):
        graph(tmp_path, text)


def test_a_directory_of_another_stage_does_not_stand_for_one(tmp_path):
    (tmp_path / "stage.json").write_text('{"stage": "reward_process"}')
    graph(tmp_path, f'{OWN}[slice_1.process_reward]\nuse = "{tmp_path}"\n')
    with pytest.raises(
        ValueError, match=r"slice_1/sft.use: expected the directory of a finished sft, got .* of reward"
    ):
        graph(tmp_path, f'{OWN}[slice_1.sft]\nuse = "{tmp_path}"\n')


# Catches: a run without any agent that asks for a judge.
def test_models_play_where_there_is_a_judge(tmp_path):
    alone = OWN.replace("slices = 2", 'slices = 2\nstages = ["sft"]').split("[agents]")[0]
    assert "arena" not in configs(graph(tmp_path, alone))
    assert "arena" in configs(graph(tmp_path, alone + '[agents]\njudge = "openai:m@http://127.0.0.1:9/v1"\n'))
    assert "arena" not in configs(graph(tmp_path, f"{alone}{OWN[OWN.index('[agents]') :]}[measure]\narena = false\n"))
    with pytest.raises(ValueError, match=r"agents.judge \(for arena, or arena = false in \[measure\]\)"):
        graph(tmp_path, alone + "[measure]\narena = true\n")


def test_a_run_file_that_is_not_there_is_named_with_what_writes_one(tmp_path):
    with pytest.raises(ValueError, match=r"none.toml: expected a run file, got none; .*new-run DIR"):
        read_run_file(tmp_path / "none.toml")


def test_the_files_of_the_project_and_a_new_one_are_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WIZARD_DATA", str(write_files(tmp_path / "data")))
    world.register()
    for path in sorted((ROOT / "recipes" / "runs").glob("*.toml")):
        # Without their base models, which are made or fetched.
        run = replace(read_run_file(path), world=True)
        run = replace(run, base=replace(run.base, model=None))
        nodes = plan_of(run).nodes
        check_run(run, nodes)
    options = Options(
        tmp_path / "new", rows=(tmp_path / "a b.jsonl",), base=tmp_path, teacher="openai:t@http://h/v1", slices=2
    )
    path = write_run_file(options)
    run = read_run_file(path)
    assert run.stages == DEFAULT_STAGES and run.rows.data == options.rows and run.agents.rivals == (options.teacher,)
    assert Plan(run, RECIPES, size="7B", has_answers=True).build().nodes
    with pytest.raises(ValueError, match="expected no run file yet, got one"):
        write_run_file(options)


URL = "openai:t@http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("named", "stages"),
    [
        ({}, ("sft",)),
        ({"pairs": (Path("p.json"), Path("q.json"))}, ("sft", "stage_dpo")),
        ({"judge": URL}, ("sft", "self_teach", "stage_dpo")),
        ({"judge": "reference:judge", "pairs": (Path("p.json"),)}, ("sft", "self_teach", "stage_dpo")),
        ({"teacher": URL, "judge": URL + "#concurrency=2", "questions": Path("q.jsonl")}, DEFAULT_STAGES),
    ],
)
def test_a_new_run_has_the_stages_that_have_what_they_need(tmp_path, named, stages):
    # A folder whose name TOML and a shell have to quote.
    options = Options(tmp_path / 'ä "b" \U0001f600', rows=(Path("rows.json"),), base=Path("models/base"), **named)
    run = read_run_file(write_run_file(options))
    assert run.stages == stages and run.out == options.directory / "run" and run.rows.pairs == named.get("pairs", ())
    assert run.agents.judge == named.get("judge", "") and run.rows.questions == named.get("questions")
    assert run.rows.reference_answers == named.get("judge", "").startswith("reference:")
    made = configs(Plan(run, RECIPES, size="7B", has_answers=False).build())
    assert ("arena" in made) == bool(run.agents.judge or run.agents.teacher)
    # Eight processes divide every step.
    check_ranks(Plan(run, RECIPES, size="7B", has_answers=False).build().nodes, 8)
    wanted = shlex.split(run.path.read_text().splitlines()[0].split("Check it:")[1])
    assert wanted == ["python", "recipes/progressive.py", str(run.path), "--dry-run"]


def test_a_number_of_processes_that_does_not_divide_the_steps_is_refused(tmp_path):
    nodes = graph(tmp_path, OWN + "[sft.training]\npacks-per-step = 6\n[mesh]\ntp = 2\n").nodes
    training = (
        "stage_dpo.training.packs-per-step: expected a multiple of 2, the ranks that take rows of their own, got 1"
    )
    with pytest.raises(ValueError, match=training) as refused:
        check_ranks(nodes, 4)
    assert "sft" not in str(refused.value) and str(refused.value).count("stage_dpo") == 1
    check_ranks(nodes, 2)
    with pytest.raises(ValueError, match=r"sft: mesh\.tp must divide the ranks: tp=2, ranks = 3"):
        check_ranks(nodes, 3)


ROW = '{"instruction": "Name a bird.", "output": "A jay."}\n'
PAIR = '{"instruction": "Name a bird.", "chosen": "A jay.", "rejected": "No."}\n'


# Catches: a mistake in the files that shows after hours, or one mistake a start.
def test_files_that_are_not_what_they_are_named_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = OWN.replace("[base]", 'pairs = ["pairs.jsonl"]\n[base]').replace('size = "7B"\n', "")
    run = read_run_file(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"rows.data: expected a file, got none at rows.jsonl; .*base.model: expected"):
        check_files(run)
    Path("models/base").mkdir(parents=True)
    for name, content in (("rows", "no row\n" + PAIR), ("held", ROW), ("pairs", ROW)):
        Path(f"{name}.jsonl").write_text(content)
    belong = (
        "expected conversations, got preference rows in rows.jsonl; they belong to rows.pairs; rows.pairs: expected"
    )
    with pytest.raises(ValueError, match=belong):
        check_files(run)
    Path("rows.jsonl").write_text("no row\n")
    Path("pairs.jsonl").write_text(PAIR)
    check_files(run)


@pytest.mark.parametrize(("with_number", "expected"), [(10, True), (9, True), (8, False)])
def test_exact_answers_are_measured_where_nine_in_ten_rows_have_one(tmp_path, with_number, expected):
    answers = ["It is 4."] * with_number + ["It is blue."] * (10 - with_number)
    rows = [{"instruction": f"What is {n}?", "output": answer} for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunFile(tmp_path, rows=Rows(data=(tmp_path / "rows.jsonl",), hold_out=4))
    assert has_answers(run) == expected
    (tmp_path / "rows.jsonl").write_text("no row\n")
    with pytest.raises(
        ValueError, match=r'rows.jsonl:1: .*; or leave such rows out with on-error = "skip" in \[rows\]'
    ):
        has_answers(run)
