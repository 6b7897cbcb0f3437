"""The planner: what it says of memory and traffic against real ranks, its seconds by hand, what it refuses."""

import dataclasses
import json
import time

import pytest
import torch
from forked import COMPILING, ROOT, run_python, run_ranks

from recipes import reward, sft, stage_dpo
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, parallelize
from wizard_engine.parallel.mesh import MeshShape, resolve
from wizard_engine.planning import report
from wizard_engine.planning.estimate import estimate
from wizard_engine.planning.planner import Layout, Options, Planner
from wizard_engine.planning.presets import SCALES, presets
from wizard_engine.planning.rates import GPUS, Rates, rates_of
from wizard_engine.planning.simulate import peak_bytes, simulated_rank

SMALL = dataclasses.replace(PRESETS["tiny"], width=64, layers=6, ffn_width=96, head_width=16, tied=False)
MIXTURE = dataclasses.replace(SMALL, experts=4, layers=4)
# Ranks -> (name, model, mesh, recompute, tokens, micro-batches).
PROBLEMS = {
    2: [
        ("tp", SMALL, {"tp": 2}, "none", 96, 1),
        ("cp", SMALL, {"cp": 2}, "full", 96, 1),
        ("ep", MIXTURE, {"ep": 2}, "none", 64, 1),
    ],
    4: [("tp, ep, dp", MIXTURE, {"tp": 2, "ep": 4}, "full", 64, 1)],
}
NAMES = [(world, problem[0]) for world, problems in PROBLEMS.items() for problem in problems]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(ranks, name) -> traffic and peak of each real rank; kernels in the interpreter, so that a GPU's run."""
    out, results = tmp_path_factory.mktemp("measured"), {}
    script = ROOT / "tests" / "parallel" / "measured_rank.py"
    for world, problems in PROBLEMS.items():
        cases = [(name, dataclasses.asdict(config), *rest) for name, config, *rest in problems]
        done = run_ranks(world, script, out, json.dumps(cases), timeout=500, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = [json.loads((out / f"measured_{world}_{rank}.json").read_text()) for rank in range(world)]
        results |= {(world, problem[0]): [on_rank[problem[0]] for on_rank in ranks] for problem in problems}
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), NAMES)
def test_memory_and_traffic_are_those_of_real_ranks(measured, world, name):
    _, config, options, recompute, tokens, micro_batches = next(p for p in PROBLEMS[world] if p[0] == name)
    sharding = Sharding(dtype="float32", recompute=recompute)
    with torch.device("meta"):
        plain, model = Transformer(config), Transformer(config)
    with simulated_rank(MeshOptions(**options), 0, world) as mesh:
        model = parallelize(model, mesh, sharding)
        peak = peak_bytes(model, AdamW(model), tokens, micro_batches)
        expected = estimate(plain, mesh, sharding, tokens=tokens, micro_batches=micro_batches)
    ranks = measured[world, name]
    assert max(abs(on_rank["peak"] / peak - 1) for on_rank in ranks) < 0.05
    assert max(on_rank["peak"] for on_rank in ranks) <= 1.005 * expected.peak
    # What a rank sends back in an exchange is what it got, which is even over all ranks alone.
    for (kind, axis), size in expected.traffic.items():
        on_rank = [rank["traffic"][f"{kind} {axis}"] for rank in ranks]
        assert sum(on_rank) == world * size and (kind == "exchange" or set(on_rank) == {size}), (kind, axis)
    assert {key for rank in ranks for key in rank["traffic"]} == {f"{k} {a}" for k, a in expected.traffic}


def planned(preset, gpus, **options):
    return Planner(Options(preset, gpus, **options), Rates())


def command(*arguments):
    return run_python("-m", "wizard_engine", *arguments, environment=COMPILING, timeout=120)


@pytest.mark.slow
def test_8x22b_on_128_is_planned_in_under_a_minute():
    began = time.perf_counter()
    done = command("plan", "--preset", "8x22b", "--gpus", 128, "--json")
    assert done.returncode == 0 and time.perf_counter() - began < 60, done.stderr
    result = json.loads(done.stdout)
    rates = [one["tokens_per_second"] for one in result["plans"]]
    assert len(rates) == 5 and rates == sorted(rates, reverse=True) and result["layouts_that_fit"] > 20
    first, simulated = result["plans"][0], result["simulated"]
    assert first["fits"] and first["bottleneck"] in first["seconds"] and 0.2 < first["mfu"] < 0.6
    assert sum(first["memory"].values()) == first["peak"] < result["room_gib"] * 2**30
    assert simulated["collectives"] == "fit" and simulated["ranks_compared"] == 128
    assert simulated["traffic_as_planned"] is True
    assert 0.9 < simulated["peak"] / simulated["bound"] <= 1.0


def test_what_cannot_fit_is_refused_with_the_reason():
    done = command("plan", "--preset", "8x22b", "--gpus", 1)
    assert done.returncode == 1 and not done.stdout
    assert "8x22b does not fit on 1 H100: the smallest layout" in done.stderr and "it fits on 64" in done.stderr
    assert "parameters, gradients, moments 2357.3" in done.stderr and "Traceback" not in done.stderr
    assert pytest.approx(PRESETS["8x22b"].num_parameters * 18 / 2**30, abs=0.1) == 2357.3
    with pytest.raises(ValueError, match=r"70b does not fit on 16 H100: the smallest layout, .*tp=2,recompute=full"):
        report.run(Options("70b", 16, layout="tp=2,recompute=full"))


def test_run_of_the_recipes_is_no_model_to_plan():
    with pytest.raises(ValueError, match=r"got '7b-8'; the run 7b-8 of the recipes has the model 7b$"):
        Options("7b-8", 8)


@pytest.mark.every(7)
@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("plan", "--preset", "8x23b", "--gpus", 8), 2, "expected one of demo, tiny"),
        (("plan", "--preset", "7b", "--gpus", 8, "--gpu", "H900"), 2, "expected one of A100-80GB, H100, H200, B200"),
        (("plan", "--preset", "7b", "--gpus", 0), 2, "gpus: expected at least 1, got 0"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layot", "tp=2"), 2, "the nearest is --layout"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layout", "tp=3"), 1, "mesh.tp must divide the ranks: tp=3"),
        (("plan", "--preset", "7b", "--gpus", 16, "--layout", "tp=16"), 1, "mesh.tp must divide kv_heads: tp=16"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layout", "ep=2"), 1, "expected 1 for a model without experts"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layout", "pp=2"), 1, "expected options like tp=2 of dp_replicate"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layout", "tp=x"), 1, "layout: tp: expected a number, got 'x'"),
        (("plan", "--preset", "7b", "--gpus", 8, "--layout", "recompute=some"), 1, "expected one of none, selective"),
        (("plan", "--preset", "7b", "--gpus", 8, "--rates", "absent.json"), 1, "expected a JSON object of rates"),
        (("plam",), 2, "expected a command, got 'plam'; the nearest is plan"),
        (("--help",), 0, ""),
    ],
)
def test_bad_input_is_named(options, code, text):
    done = command(*options)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_seconds_of_one_gpu_by_hand():
    planner = planned("7b", 1, gpu="H200", step_tokens=4096)
    layout = Layout(MeshShape(1, 1, 1, 1, 1), "full", 1, 1)
    seconds, c = planner.plan(layout).seconds, PRESETS["7b"]
    block = 2 * 4096 * (c.width * 128 * 2 * (32 + 8) + 3 * c.width * c.ffn_width)
    head = 2 * 4096 * c.width * c.vocab_size
    assert seconds["matrices"] == pytest.approx((4 * 32 * block + 4 * head) / (0.75 * 989e12))
    keys = (4096 + 1) / 2
    attention = 4 * 32 * 32 * 128 * keys * 4096
    assert seconds["attention"] == pytest.approx(attention * (2 / (0.6 * 989e12) + 2.5 / (0.45 * 989e12)))
    # Master and two moments read and written, the gradient in bf16 read, the copy written: 24 + 2 + 2; the norm's 2,
    # and 4 to copy the gradient from where autograd puts it.
    assert seconds["optimizer"] == pytest.approx(c.num_parameters * 34 / (0.8 * 4.8e12), rel=1e-3)
    assert not {"tensor parallel", "expert exchange", "copies"} & seconds.keys()


def test_seconds_of_collectives_by_hand():
    planner = planned("8x22b", 128)
    layout = Layout(MeshShape(1, 16, 1, 8, 8), "full", 1, 1)

    def seconds(kind, axis, size):
        return planner._collectives(kind, axis, size, layout) - planner._starts(kind, axis, layout) * 20e-6

    # Within a node over its own links; one GPU of each of 16 nodes over its own network link.
    assert seconds("gather", "tp", 8e9) == pytest.approx(8e9 * 7 / 8 / (0.8 * 450e9))
    assert seconds("gather", "shard", 16e9) == pytest.approx(16e9 * 15 / 16 / (0.8 * 50e9))
    # All GPUs of 16 nodes: each of the eight links of a node takes its share.
    assert seconds("reduce", "copy", 16e9) == pytest.approx(16e9 * 15 / 16 / 8 / (0.8 * 50e9))
    assert seconds("exchange", "ep", 8e9) == pytest.approx(8e9 * 7 / 8 / (0.8 * 450e9))
    wide = Layout(MeshShape(8, 16, 1, 1, 1), "full", 1, 1)
    summed = planner._collectives("sum", "replicate", 8e9, wide) - 20e-6
    assert summed == pytest.approx(2 * 8e9 * 7 / 8 / (0.8 * 50e9))


def test_faster_links_and_more_memory_never_make_a_plan_worse(monkeypatch):
    before = planned("70b", 32).best()
    gpu = GPUS["H100"]
    monkeypatch.setitem(GPUS, "H100", dataclasses.replace(gpu, network=2 * gpu.network, memory_gib=120.0))
    after = {one.layout.mesh: one for one in planned("70b", 32).best()}
    assert len(after) > len(before)
    for one in before:
        assert after[one.layout.mesh].tokens_per_second >= one.tokens_per_second


def test_measured_rates_take_the_place_of_assumptions(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"matrix": 0.5, "machine": "some GPU"}))
    assert rates_of(path) == Rates(matrix=0.5)
    path.write_text(json.dumps({"matrix": -1}))
    with pytest.raises(ValueError, match="expected positive matrix, grouped"):
        rates_of(path)


@pytest.mark.parametrize("name", SCALES)
def test_presets_fit_and_are_near_the_best_plan(name):
    scale = SCALES[name]
    planner = planned(scale.model, scale.gpus, gpu=scale.gpu, step_tokens=scale.packs * scale.pack_tokens)
    mesh = resolve(scale.mesh, scale.gpus)
    layout = Layout(
        mesh, scale.sharding.recompute, scale.pack_tokens // 4096, scale.packs // (mesh.replicate * mesh.dp_shard)
    )
    preset_plan, best = planner.plan(layout), planner.best()[0]
    assert preset_plan.fits and preset_plan.tokens_per_second > 0.93 * best.tokens_per_second, best.layout.flags


@pytest.mark.parametrize("recipe", [sft, stage_dpo, reward])
def test_presets_are_configurations_of_the_recipes(recipe):
    for name, cfg in presets(recipe.Config).items():
        scale = SCALES[name]
        assert cfg.model == scale.model and cfg.mesh == scale.mesh and cfg.training.pack_tokens == scale.pack_tokens
        assert cfg.training.packs_per_step % (scale.gpus // scale.mesh.tp) == 0
    done = run_python(recipe.__file__, "--preset", "7b-8")
    assert done.returncode == 2 and "--out" in done.stderr and "required" in done.stderr
