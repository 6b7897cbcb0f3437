"""100,000 battles between ten rivals with two judges: memory stays flat, and the ledger is no bottleneck."""

import json
import subprocess
import sys

import pytest
from forked import ENVIRONMENT, ROOT


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(223, id="10,000 battles", marks=pytest.mark.slow),
        pytest.param(2223, id="100,000 battles", marks=pytest.mark.soak),
    ],
)
def test_memory_is_flat_and_the_ledger_is_no_bottleneck(tmp_path, prompts, capsys):
    script = ROOT / "tests" / "evaluation" / "measured_arena.py"
    # 45 battles on a prompt.
    command = [sys.executable, script, tmp_path / "o", "23", str(prompts)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(json.loads, done.stdout.splitlines())
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert (small["battles"], large["battles"]) == (45 * 23, 45 * prompts) and large["calls"] == 190 * prompts
    assert large["peak_mb"] - small["peak_mb"] < 40
    assert large["ledger_share"] < 0.4
