"""Two gloo ranks do what one process does: losses, gradient norms, weights; errors reach every rank."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from many_ranks import save_base, selected, torchrun, untimed, word_texts
from safetensors.torch import load_file

from recipes import reward, rleif, sft, stage_dpo
from wizard_engine.data.loader import Loader
from wizard_engine.data.records import Message, Preference, Process, conversation, write_rows
from wizard_engine.parallel import MeshOptions, sum_over_ranks
from wizard_engine.rl.options import CriticOptions, PPOOptions, PTXOptions, RewardOptions, RolloutOptions
from wizard_engine.runtime import object_collectives
from wizard_engine.runtime.object_collectives import check_same, gather_objects
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.options import OnlineTraining, Training

SCRIPT = """
import json, sys, torch
from pathlib import Path
from recipes import reward, rleif, sft, stage_dpo
from wizard_engine import runtime
from wizard_engine.runtime.object_collectives import check_same, gather_objects
from wizard_engine.parallel import sum_over_ranks
from wizard_engine.runtime.object_collectives import from_main
sys.path[:0] = {tests!r}
from test_data_parallel import configurations

torch.set_num_threads(1)
root = Path({root!r})
rt = runtime.start("cpu")
results = {{"ranks": gather_objects([rt.rank, rt.world_size])}}
results["sums"] = sum_over_ranks({{"a": 0.1 + rt.rank, "b": 2.0**30 * rt.rank + 1}})
check_same(rt, "options", [1, 2])
try:
    check_same(rt, "options", [1, rt.rank])
except ValueError as error:
    results["differs"] = str(error)

def fail():
    raise ValueError("only the main rank knows")

results["work"] = from_main(rt, lambda: rt.rank + 41)
try:
    from_main(rt, fail)
except ValueError as error:
    results["error"] = str(error)
(root / f"result_{{rt.rank}}.json").write_text(json.dumps(results))
for name in sys.argv[1:]:
    for recipe, cfg in configurations(root, name):
        recipe.main(cfg)
runtime.stop()
tasks = Path("/proc/self/task")
names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.is_dir() else []
(root / f"threads_{{rt.rank}}.json").write_text(json.dumps([name for name in names if "gloo" in name]))
"""


# Directory -> the mesh of dense models, and that of mixtures.
LAYOUTS = {
    "one": (MeshOptions(), MeshOptions()),
    "two": (MeshOptions(), MeshOptions()),
    "tp": (MeshOptions(tp=2), MeshOptions(tp=2, ep=2)),
    "cp": (MeshOptions(cp=2), MeshOptions(ep=2)),
}


def configurations(root, name):
    """The same training into directories of another name, in its layout."""
    training = Training(lr=2e-3, pack_tokens=200, packs_per_step=4, epochs=2, clip=0.5)
    shared = {"model": str(root / "base"), "training": training, "device": "cpu", "quiet": True}
    shared["mesh"] = LAYOUTS[name][0]
    # One pack a pass: the second rank never has a row.
    mixture = {"model": str(root / "mixture_base"), "mesh": LAYOUTS[name][1]}
    single_pair = shared | {"training": replace(training, packs_per_step=2, epochs=1)}
    rewards = shared | {"training": replace(training, epochs=1)}
    copies = {"mesh": replace(LAYOUTS[name][0], dp_shard=1)}
    return [
        (
            stage_dpo,
            stage_dpo.Config(data=(root / "pair.jsonl",), out=root / name / "single_pair", slices=1, **single_pair),
        ),
        (sft, sft.Config(data=(root / "rows.jsonl",), out=root / name / "sft", **shared)),
        (stage_dpo, stage_dpo.Config(data=(root / "pairs.jsonl",), out=root / name / "dpo", slices=2, **shared)),
        (sft, sft.Config(data=(root / "rows.jsonl",), out=root / name / "mixture", **shared | mixture)),
        (sft, sft.Config(data=(root / "rows.jsonl",), out=root / name / "replicated", **shared | copies)),
        (reward, reward.Config(kind="instruction", data=(root / "ranks.jsonl",), out=root / name / "irm", **rewards)),
        (reward, reward.Config(kind="process", data=(root / "steps.jsonl",), out=root / name / "prm", **rewards)),
        (
            rleif,
            rleif.Config(
                data=(root / "rows.jsonl",),
                out=root / name / "rleif",
                model=str(root / "policy"),
                reward=RewardOptions(root / name / "irm" / "model", root / name / "prm" / "model"),
                training=OnlineTraining(lr=1e-4, pack_tokens=300, save_every=1, keep_last=3),
                critic=CriticOptions(lr=1e-4),
                rollout=RolloutOptions(steps=3, prompts_per_step=4, samples_per_prompt=4, max_new_tokens=60),
                ppo=PPOOptions(minibatches=2, epochs=2),
                ptx=PTXOptions(coefficient=0.1, rows=5),
                average_from=0.3,
                held_out=(root / "few.jsonl",),
                device="cpu",
                quiet=True,
                mesh=LAYOUTS[name][1],
            ),
        ),
    ]


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """Directory with what one process and what two ranks made, in the layouts that the session tests."""
    root = tmp_path_factory.mktemp("ranks")
    texts = word_texts(60)
    shapes = {"width": 16, "layers": 1, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 24}
    save_base(root / "base", texts, **shapes)
    save_base(root / "mixture_base", texts, experts=4, balance_loss=0.1, z_loss=0.01, **shapes)
    # The balance of a micro-batch is that of its own tokens, and each rank packs the answers that it sampled.
    save_base(root / "policy", texts, experts=4, z_loss=0.01, **shapes)
    write_rows(root / "rows.jsonl", [conversation(a, b) for a, b in pairwise(texts)])
    write_rows(root / "few.jsonl", [conversation(a, "The answer is 7.") for a in texts[:5]])
    pairs = [Preference((Message("user", a),), b, c) for a, b, c in zip(texts[::3], texts[1::3], texts[2::3])]
    write_rows(root / "pairs.jsonl", pairs)
    write_rows(root / "pair.jsonl", pairs[:1])
    write_rows(root / "ranks.jsonl", [Preference((), a, b) for a, b in pairwise(texts)])
    steps = [" ".join(text.split()[:6]) + ".\n" + "two three." for text in texts]
    write_rows(
        root / "steps.jsonl", [Process((Message("user", "one"),), tuple(text.split("\n")), (1, -1)) for text in steps]
    )
    (root / "script.py").write_text(
        SCRIPT.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], root=str(root))
    )
    done = torchrun(2, root / "script.py", *sorted({"two", *selected(request, "layout")}), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for recipe, cfg in configurations(root, "one"):
        recipe.main(cfg)
    return root


RUNS = ["sft", "mixture", "replicated", "dpo/stage_1", "dpo/stage_2", "single_pair/stage_1", "irm", "prm", "rleif"]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layout", ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp", "cp"))])
def test_two_ranks_log_the_metrics_of_one(ranks, layout, run):
    one, two = (untimed(ranks / name / run) for name in ("one", layout))
    assert len(one) == len(two) > (0 if run.startswith("single_pair") else 1)
    # Once rounding has changed one sampled token, the answers after it are others.
    for a, b in list(zip(one, two))[: 2 if run == "rleif" else None]:
        assert a.keys() == b.keys()
        # At policy = reference every margin is rounding noise, and its sign with it.
        # Returns that hardly differ make their explained share a quotient of rounding errors.
        noise = {"ratio_error", "explained_variance"} | ({"accuracy"} if a["step"] == 1 else set())
        # Prompts count once for each read, and ranks share the sampled answers differently.
        if run == "rleif":
            noise |= {"tail_idle"} | {name for name in a if "expert_load" in name}
        for name in a.keys() - noise:
            # The log shows the last of several updates, each of which divides rounding errors by their own size.
            close = {"rel": 5e-3, "abs": 1e-3} if run == "rleif" else {"rel": 1e-4, "abs": 1e-5}
            # A token may stand at the edge of the clipping interval.
            close["abs"] = 3e-3 if name.endswith("clip_fraction") else close["abs"]
            assert a[name] == pytest.approx(b[name], **close), (a["step"], name)


# Catches: answers that depend on the rank that samples them, and rows in the order of the ranks.
@pytest.mark.parametrize("layout", ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp", "cp"))])
def test_held_out_answers_before_training_are_those_of_one_process(ranks, layout):
    one, two = (
        [json.loads(line) for line in (ranks / name / "rleif" / "held_out.jsonl").read_text().splitlines()]
        for name in ("one", layout)
    )
    for a, b in zip(one, two, strict=True):
        assert a["row"] == b["row"] and "after" in a and a["before"].keys() == b["before"].keys()
        assert a["before"]["answer"] == b["before"]["answer"] and a["before"]["checked"] == b["before"]["checked"]
        assert a["before"]["process_factor"] == pytest.approx(b["before"]["process_factor"], abs=1e-4)
    assert len({line["before"]["answer"] for line in one}) > 1


def test_reinforcement_learning_of_two_ranks_goes_on_with_one(ranks):
    out, whole = ranks / "resumed", ranks / "one" / "rleif"
    later = shutil.ignore_patterns("stage.json", "model", "step_0000000[23]")
    shutil.copytree(ranks / "two" / "rleif", out, ignore=later)
    recipe, cfg = configurations(ranks, "two")[-1]
    assert recipe is rleif and [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]
    recipe.main(replace(cfg, out=out))
    first, second = untimed(out)[1], untimed(whole)[1]
    assert first["step"] == second["step"] == 2 and len(untimed(out)) == 3
    for name in ("loss", "reward", "length", "finished", "kl_k3", "value_loss", "grad_norm", "critic_grad_norm"):
        assert first[name] == pytest.approx(second[name], rel=5e-3, abs=1e-3), name


@pytest.mark.parametrize("layout", ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp", "cp"))])
def test_two_ranks_train_the_weights_of_one(ranks, layout):
    for run, start in (("sft", "base"), ("replicated", "base"), ("dpo", "base"), ("mixture", "mixture_base")):
        base = load_file(ranks / start / "model.safetensors")
        one, two = (load_file(ranks / name / run / "model" / "model.safetensors") for name in ("one", layout))
        for name, tensor in one.items():
            moved = float((tensor - base[name]).abs().max())
            assert moved > 0 and float((tensor - two[name]).abs().max()) < 0.02 * moved, (run, name)


def test_collectives_sum_and_reach_every_rank(ranks):
    for rank in range(2):
        sums = json.loads((ranks / f"result_{rank}.json").read_text())
        assert sums["ranks"] == [[0, 2], [1, 2]]
        assert sums["sums"] == {"a": 1.2000000000000002, "b": 2.0**30 + 2}
        assert sums["work"] == 41 and sums["error"] == "[rank 0/2] only the main rank knows"
        assert sums["differs"].startswith(
            "[rank 1/2] options: expected the same on every rank, got [1, 1], and [1, 0] on rank 0"
        )


# Catches: a reference to the process group that outlives it; its threads then abort a process that ends under load.
def test_no_thread_of_the_process_group_outlives_it(ranks):
    assert [json.loads((ranks / f"threads_{rank}.json").read_text()) for rank in range(2)] == [[], []]


def test_one_process_needs_no_collectives():
    check_same(Runtime(), "anything", object())
    assert sum_over_ranks({"a": 0.5}) == {"a": 0.5} and gather_objects("x") == ["x"]


def test_ranks_must_divide_the_packs_of_a_step(ranks):
    with pytest.raises(ValueError, match="world_size must divide packs_per_step: packs_per_step=3, world_size=2"):
        Loader(np.array([5, 5]), capacity=8, packs_per_step=3, seed=0, epochs=1.0, rank=0, world_size=2)


def test_the_option_that_differs_is_named(monkeypatch):
    options = {"seed": 0, "training": {"lr": 0.1, "epochs": 2.0}, "data": "rows.jsonl"}
    others = {
        "seed: expected the same on every rank, got 1, and 0 on rank 0": options | {"seed": 1},
        "training: lr: expected the same on every rank, got 0.2, and 0.1 on rank 0": options
        | {"training": {"lr": 0.2, "epochs": 2.0}},
        "model: expected the same on every rank, got tiny, and None on rank 0": options | {"model": "tiny"},
    }
    for text, other in others.items():
        monkeypatch.setattr(object_collectives, "gather_objects", lambda value, other=other: [options, other, options])
        with pytest.raises(ValueError, match=re.escape(f"[rank 1/3] sft: configuration: {text}")):
            check_same(Runtime(0, 3), "sft: configuration", options)
