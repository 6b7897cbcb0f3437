"""The whole pipeline and its ablations on a few rows: what they record, and that a second call does nothing again."""

import json
from dataclasses import replace

import pytest

from recipes import ablations, progressive
from wizard_engine.runtime import Runtime

HELD_OUT = 16
SIZES = progressive.Sizes(corpus=900, plain=120, held_out=HELD_OUT, sample=240, battles=6, preferences=12, questions=2)
STEPS = replace(progressive.TINY_STEPS, pack_tokens=256, max_steps=3)
SMALL = replace(
    progressive.TINY,
    sizes=SIZES,
    quiet=True,
    pretraining=STEPS,
    supervised=STEPS,
    preference=STEPS,
    instruction_reward=STEPS,
    process_reward=STEPS,
    rollout=replace(progressive.TINY.rollout, prompts_per_step=2, max_new_tokens=16),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished run, its summary, and the preset it came from under the name "few"."""
    progressive.PRESETS["few"] = replace(SMALL, out=tmp_path_factory.mktemp("progressive") / "demo")
    yield progressive.PRESETS["few"], progressive.main(progressive.PRESETS["few"])
    del progressive.PRESETS["few"]


def untimed(value):
    """A summary without the times."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not key.startswith("seconds")}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def test_progressive_records_every_stage_of_every_slice(demo):
    cfg, summary = demo
    assert summary == json.loads((cfg.out / "summary.json").read_text())
    names = ("base", "sft", "stage_dpo", "rleif")
    assert [(row["slice"], row["name"]) for row in summary["stages"]] == [(t, n) for t in (1, 2, 3) for n in names]
    for row in summary["stages"]:
        assert (
            row["total"] == HELD_OUT
            and row["accuracy"] == row["correct"] / HELD_OUT
            and 0 <= row["sampled_accuracy"] <= 1
        )
    last = {row["name"]: row for row in summary["stages"] if row["slice"] == 2}
    first = {row["name"]: row for row in summary["stages"] if row["slice"] == 3}
    assert first["base"]["correct"] == last["rleif"]["correct"], "a slice starts from the model of the one before"
    for battle in summary["pairwise"]:
        assert battle["wins"] + battle["losses"] + battle["ties"] == HELD_OUT
        assert battle["ci95"][0] <= battle["win_rate"] <= battle["ci95"][1]
    assert "<svg" in (cfg.out / "report.html").read_text()


def test_progressive_samples_custom_rows_only_without_weights(demo, tmp_path):
    cfg, _ = demo
    data = tmp_path / "rows.jsonl"
    questions = [f"How many legs do {n} tables and {n * n} chairs have?" for n in range(2, 12)]
    data.write_text("".join(json.dumps({"instruction": text, "output": "#### 4"}) + "\n" for text in questions))
    own_data = replace(
        cfg,
        out=tmp_path / "out",
        data=(data,),
        evaluation=cfg.out / "world" / "held_out.jsonl",
        base=str(cfg.out / "base" / "model"),
        sizes=replace(SIZES, sample=6),
    )
    with pytest.raises(ValueError, match=r"targets\..*belong to the embedded world; pass --no-weighted"):
        progressive.Pipeline(own_data, Runtime()).prepare()
    slices, _ = progressive.Pipeline(replace(own_data, weighted=False), Runtime()).prepare()
    assert sum(len(path.read_text().splitlines()) for path in slices) == 6


def test_progressive_again_skips_every_stage(demo):
    cfg, summary = demo
    metrics = {path: path.stat().st_mtime_ns for path in cfg.out.rglob("metrics.jsonl")}
    assert untimed(progressive.main(cfg)) == untimed(summary)
    assert {path: path.stat().st_mtime_ns for path in cfg.out.rglob("metrics.jsonl")} == metrics and metrics


@pytest.mark.slow
def test_ablations_measure_each_variant_against_the_demo(demo, tmp_path):
    cfg, _ = demo
    result = ablations.main(ablations.Config(demo=cfg.out, out=tmp_path / "ablations", preset="few", quiet=True))
    assert result == json.loads((tmp_path / "ablations" / "ablations.json").read_text())
    tables = {table["name"]: [row["setting"] for row in table["rows"]] for table in result["tables"]}
    assert list(tables) == ["slices", "Evol Lab and co-teaching", "sampling", "RLEIF reward"]
    assert tables["RLEIF reward"] == ["before RLEIF", "instruction x process", "instruction", "process"]
    assert all(row["total"] == HELD_OUT for table in result["tables"] for row in table["rows"])


def test_ablations_need_a_finished_demo(tmp_path):
    with pytest.raises(ValueError, match=r"demo: expected a finished run with summary.json in .*; run make demo first"):
        ablations.main(ablations.Config(demo=tmp_path, out=tmp_path / "out", preset="tiny"))
