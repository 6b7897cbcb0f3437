"""What a run will take is said before it starts: calls, cost, steps, GPU-hours, and the commands of its stages."""

import json
import re

import pytest

from recipes import progressive
from wizard_engine.pipeline.run_file import read_run_file
from wizard_engine.runtime.process import Runtime

BIG = """
slices = 2
[rows]
data = ["{rows}"]
hold-out = 20
[base]
model = "models/8x22b"
size = "8x22B"
[agents]
teacher = "openai:teacher@http://127.0.0.1:9/v1#price_in=1,price_out=2,requests_per_minute=600"
judge = "openai:judge@http://127.0.0.1:9/v1#price_in=1,price_out=2"
rivals = ["openai:first@http://127.0.0.1:9/v1", "openai:second@http://127.0.0.1:9/v1"]
[launch]
nodes = 16
processes = 8
[mesh]
ep = 8
"""


@pytest.fixture
def run(tmp_path):
    rows = [{"instruction": f"Explain why {n} is a larger number than {n - 1}.", "output": "Count."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "big.toml"
    path.write_text(BIG.format(rows=tmp_path / "rows.jsonl") + f'[sample]\nsize = 40\n[sft]\nmodel = "{tmp_path}"\n')
    return read_run_file(path)


# The planner looks at every layout of 128 GPUs.
@pytest.mark.slow
def test_a_dry_run_of_8x22b_on_16_nodes_says_what_it_takes(run, monkeypatch):
    monkeypatch.setattr(progressive, "disk_bytes", lambda *_: 10 << 30)
    plan = progressive.plan_of(run)
    text = progressive.dry_run(run, plan, progressive.driver_of(run, Runtime(), plan.nodes))
    assert all(f"{node.where} " in text for node in plan.nodes) and "about 10.0 GiB of disk" in text
    header = next(line for line in text.splitlines() if "GPU-hours" in line)
    total = text.splitlines()[-3]
    assert total.startswith("in all") and len(re.split(r" {2,}", header.strip())) == 9
    evolved = next(line for line in text.splitlines() if re.match(r"slice_1/evol_instruct +\d", line)).split()
    # 20 rows a slice: one evolution, one answer, one comparison each; the ranker scores families in three calls of ten.
    assert evolved[1] == "20" and int(evolved[2]) >= 60
    gpu_hours = float(total.split()[-1].replace(",", ""))
    assert 0 < gpu_hours < 1e5


def test_commands_of_a_large_run_are_one_line_a_stage(run):
    lines = progressive.shown_commands(run, progressive.plan_of(run).nodes).splitlines()
    assert len(lines) == len(progressive.plan_of(run).nodes)
    sft = next(line for line in lines if "slice_2/sft" in line)
    assert "--nproc-per-node 8 --nnodes 16" in sft and "--mesh.ep 8" in sft
