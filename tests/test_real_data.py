"""Recipes on small samples of real data. These tests are skipped where the data folder is absent."""

import json
import math
import re
from pathlib import Path

import pytest

from recipes import reward, sft, stage_dpo
from wizard_engine.curation.analysis import analyze
from wizard_engine.curation.selection import select
from wizard_engine.data.records import read_files, read_prompts, read_rows, write_rows
from wizard_engine.model import load_model
from wizard_engine.training.options import Training

INSTRUCTIONS = ("instructions/alpaca_en.json", "instructions/alpaca_zh.json", "instructions/sharegpt_tools_en.json")
GSM8K = "gsm8k/train.jsonl"


def some(shared_data: Path, name: str, count: int, out: Path, kind: str | None = None) -> Path:
    """A JSONL file of the shortest `count` rows of a real one."""
    rows = sorted(
        read_rows(shared_data / name, kind=kind, unknown_fields="count"), key=lambda row: len(json.dumps(row.to_json()))
    )
    write_rows(out, rows[:count])
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def options(shared_data: Path, steps: int) -> dict:
    tokenizer = shared_data / "tokenizer" / "mistral_v1.model"
    training = Training(lr=3e-3, pack_tokens=512, max_steps=steps, save_every=0)
    return {"model": "tiny", "tokenizer": tokenizer, "training": training, "quiet": True}


def test_four_sources_are_read_whole(shared_data):
    rows, bad = read_files([shared_data / name for name in (*INSTRUCTIONS, GSM8K)], unknown_fields="count")
    counts = {}
    for row in rows:
        counts[row.attributes["source"]] = counts.get(row.attributes["source"], 0) + 1
    assert not bad
    assert counts == {"alpaca_en": 999, "alpaca_zh": 1000, "sharegpt_tools_en": 300, "gsm8k/train": 7473}


def test_analysis_and_sampling_over_four_sources_together(shared_data):
    sources = [read_rows(shared_data / name, unknown_fields="count")[:60] for name in INSTRUCTIONS]
    rows = [row for source in (*sources, read_rows(shared_data / GSM8K)[:240]) for row in source]
    analysis = analyze(rows)
    languages = dict(zip((row.id for row in analysis.rows), analysis.columns["language"]))
    assert all(languages[row.id] == "zh" for row in sources[1]) and languages[sources[0][0].id] == "en"
    natural = {line["value"]: line["share"] for line in analysis.tables["source"]["values"]}
    assert natural["gsm8k/train"] == pytest.approx(240 / 420)
    target = {"language": {"en": 0.7, "zh": 0.3}}
    drawn = select(analysis.rows, targets=target, size=120, slices=3, seed=0)
    assert drawn.report["drawn"]["language"]["zh"] == pytest.approx(0.3, abs=0.1)
    assert [len(slice_rows) for slice_rows in drawn.slices] == [40, 40, 40]


def test_gsm8k_train_is_decontaminated_against_test(shared_data):
    held_out = read_rows(shared_data / "gsm8k" / "test.jsonl")
    planted = held_out[5].replace(attributes={"source": "planted"})
    rows = [*read_rows(shared_data / GSM8K)[:300], planted]
    result = select(rows, read_prompts(shared_data / "gsm8k" / "test.jsonl"))
    removed = {item["id"]: item for item in result.removed}
    assert removed[planted.id]["reason"] == "contaminated" and removed[planted.id]["evaluation"] == 5
    assert len(removed) < 10


def test_sft_on_gsm8k_with_the_mistral_tokenizer(shared_data, tmp_path):
    data = some(shared_data, GSM8K, 30, tmp_path / "rows.jsonl")
    sft.main(sft.Config(data=(data,), out=tmp_path / "sft", audit=False, **options(shared_data, 4)))
    losses = [line["loss"] for line in metrics(tmp_path / "sft")]
    assert losses[0] == pytest.approx(math.log(32_000), abs=0.1) and losses[-1] < losses[0]
    model, tokenizer = load_model(tmp_path / "sft" / "model")
    assert model.config.vocab_size == tokenizer.vocab_size == 32_000


def test_stage_dpo_on_real_preferences_starts_at_ln_2(shared_data, tmp_path):
    data = some(shared_data, "preferences/dpo_en.json", 6, tmp_path / "pairs.jsonl")
    stage_dpo.main(
        stage_dpo.Config(data=(data,), out=tmp_path / "dpo", slices=2, audit=False, **options(shared_data, 4))
    )
    for index in (1, 2):
        first = metrics(tmp_path / "dpo" / f"stage_{index}")[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=5e-4)


def test_preference_reward_on_real_preferences(shared_data, tmp_path):
    data = some(shared_data, "preferences/dpo_en.json", 14, tmp_path / "pairs.jsonl", kind="preference")
    cfg = options(shared_data, 3)
    result = reward.main(reward.Config(kind="preference", data=(data,), out=tmp_path / "rm", **cfg))
    assert result["steps"] == 3 and result["pairs"] == 13 and result["held_out_ci95"][0] < result["held_out_ci95"][1]
    assert metrics(tmp_path / "rm")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    model, _ = load_model(tmp_path / "rm" / "model")
    assert model.outputs == 1


def test_process_labels_of_model_solutions_are_those_of_their_arithmetic(shared_data):
    rows = read_rows(shared_data / "gsm8k" / "model_solutions.jsonl", kind="process")
    raw = (shared_data / "gsm8k" / "model_solutions.jsonl").read_text().splitlines()
    wrong = sum(label == -1 for row in rows for label in row.labels)
    assert len(rows) <= 4 * len(raw) and 0 < wrong < 0.1 * sum(len(row.labels) for row in rows)
    checked = 0
    for row in rows[:400]:
        for step, label in zip(row.steps, row.labels):
            plain = re.fullmatch(r"[^\d.,(-]*?(\d+) ?([+*-]) ?(\d+) ?= ?\$?(\d+)[^\d.,%/]*\.?", step)
            if plain and label:
                left, sign, right, total = plain.groups()
                value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
                checked += 1
                assert (value == int(total)) == (label == 1), step
    assert checked > 50


def test_process_reward_on_model_solutions(shared_data, tmp_path):
    data = some(shared_data, "gsm8k/model_solutions.jsonl", 40, tmp_path / "steps.jsonl", kind="process")
    result = reward.main(reward.Config(kind="process", data=(data,), out=tmp_path / "prm", **options(shared_data, 2)))
    assert result["steps"] == 2 and 0 <= result["held_out_accuracy"] <= 1
    assert metrics(tmp_path / "prm")[0]["loss"] == pytest.approx(math.log(3), abs=0.1)
