"""What is said of a run's disk against what its training stages write."""

from dataclasses import replace

import pytest

from recipes import progressive
from wizard_engine.model import ModelDirectory
from wizard_engine.model.heads import scoring_head
from wizard_engine.pipeline.disk import disk_of
from wizard_engine.pipeline.graph import Node
from wizard_engine.rl.options import PPOOptions, RewardOptions, RolloutOptions
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.options import OnlineTraining, Training

QUICK = {"pack_tokens": 384, "packs_per_step": 1, "save_every": 2}


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory):
    """Finished training stages by recipe, and the steps that each made."""
    out = tmp_path_factory.mktemp("stages")
    files = {
        "rows": world.write("disk_rows.jsonl", world.single[:20]),
        "pairs": world.write("disk_pairs.jsonl", world.preferences(12)),
        "instruction": world.write("disk_rankings.jsonl", world.rankings(8)),
        "process": world.write("disk_processes.jsonl", world.processes(8)),
    }
    shared = {"model": world.base, "quiet": True}
    recipes = progressive.RECIPES

    def trained(recipe, name, file, steps, **options):
        config = recipes[recipe].Config(
            data=(files[file],),
            out=out / name,
            training=Training(**QUICK, epochs=20, max_steps=steps),
            **shared,
            **options,
        )
        return Node(name, recipe, config), steps

    nodes = [
        trained("sft", "sft", "rows", 7),
        trained("stage_dpo", "stage_dpo", "pairs", 3, slices=2),
        trained("reward", "instruction", "instruction", 3, kind="instruction"),
        trained("reward", "process", "process", 3, kind="process"),
    ]
    options = {"reward": RewardOptions(out / "instruction/model", out / "process/model")}
    options |= {"rollout": RolloutOptions(steps=5, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=8)}
    training = OnlineTraining(pack_tokens=384, save_every=2)
    rleif = recipes["rleif"].Config((files["rows"],), out / "rleif", training=training, **shared, **options)
    nodes.append((Node("rleif", "rleif", rleif), None))
    nodes.append((Node("alone", "rleif", replace(rleif, out=out / "alone", ppo=PPOOptions(advantages="rloo"))), None))
    for node, _ in nodes:
        recipes[node.recipe].main(node.config)
    return {node.where: (node, steps) for node, steps in nodes}


@pytest.mark.parametrize("name", ["sft", "stage_dpo", "instruction", "process", "rleif", "alone"])
def test_models_and_checkpoints_take_what_was_said(world, stages, name):
    node, steps = stages[name]
    with ModelDirectory(world.base) as directory:
        parameters, width = directory.parameter_count, directory.config.width
    # Stage-DPO makes as many steps in each of its slices.
    steps = steps * getattr(node.config, "slices", 1) if steps else None
    said = disk_of(node, parameters, Runtime().device, steps).stays
    if name == "process":
        # Beside a body this small its head, which alone is trained, takes room: with the model, and in two checkpoints.
        said += (4 + 2 * 12) * sum(p.numel() for p in scoring_head(width, 3, surprise=True).parameters())
    weights = [path.stat().st_size for path in node.out.rglob("*.safetensors") if path.parent.name != "reference"]
    assert said / 1.5 < sum(weights) < said * 1.5, (said, sum(weights))
