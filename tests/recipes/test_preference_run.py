"""A run of one's own whose RLEIF takes the factor preference, with all of its stages, a step each."""

import json

from many_ranks import save_base

from recipes import progressive
from wizard_engine.evaluation.run_facts import held_out_measures, own_shares
from wizard_engine.runtime.files import read_object

RUN = """
out = "{folder}/run"
slices = 1
quiet = true
threads = 1
stages = ["sft", "preference_reward", "rleif"]
[rows]
data = ["{folder}/rows.jsonl"]
hold-out = 4
pairs = ["{folder}/pairs.jsonl"]
hold-out-pairs = 6
[base]
model = "{folder}/base"
[measure]
accuracy = false
[sft]
training = {{ max-steps = 1, pack-tokens = 256, save-every = 0 }}
[preference_reward]
training = {{ max-steps = 2, pack-tokens = 256, save-every = 0 }}
[rleif]
reward = {{ factors = ["preference"] }}
rollout = {{ steps = 1, prompts-per-step = 2, samples-per-prompt = 2, max-new-tokens = 4 }}
"""


# Catches: a stage that the driver, the report or RLEIF does not find.
def test_a_run_with_a_preference_model(tmp_path):
    rows = [{"instruction": f"Name {n} birds.", "output": f"A jay and {n} more."} for n in range(16)]
    pairs = [{"instruction": f"Praise {n} birds.", "chosen": "How fine.", "rejected": "No."} for n in range(20)]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [text for row in (*rows, *pairs) for text in row.values()]
    save_base(tmp_path / "base", texts, layers=1, width=16, heads=2, kv_heads=1)
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    progressive.main(progressive.Config(path))
    out = tmp_path / "run"
    assert read_object(out / "slice_1/preference_pairs/stage.json")["result"]
    made = read_object(out / "slice_1/preference_reward/stage.json")
    assert made["stage"] == "reward_preference" and made["result"]["held_out"]["rows"] == 6
    line = json.loads((out / "slice_1/rleif/metrics.jsonl").read_text().splitlines()[-1])
    assert "preference_factor" in line and "instruction_factor" not in line
    assert "preference_factor" in read_object(out / "slice_1/rleif/stage.json")["result"]["held_out"]["after"]
    assert [line["stage"] for line in held_out_measures(out)] == ["sft", "preference_reward", "rleif"]
    assert [line["measure"] for line in own_shares(out)] == ["accuracy"]
    assert "preference reward" in (out / "report.html").read_text()
