"""Two ranks answer as one does: their models share every batch, rank 0 makes the calls, errors end both."""

import re
from pathlib import Path

import pytest
from many_ranks import torchrun

RUN = Path(__file__).with_name("ranked_run.py")


def outcome(tmp_path, ranks, kind):
    done = torchrun(ranks, RUN, tmp_path, kind, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith(("rank ", "waits")))


@pytest.mark.slow
def test_two_ranks_reply_as_one_and_are_kept_alive(tmp_path):
    one = outcome(tmp_path / "1", 1, "wait")
    two = outcome(tmp_path / "2", 2, "wait")
    (digest,) = re.findall(r"rank 0: (\w{12})$", one[0])
    assert two[:2] == [f"rank 0: {digest}", f"rank 1: {digest}"]
    assert int(two[2].split()[1].strip(",")) >= 4, two[2]


# Catches: a rank that leaves at its error, while rank 0 waits for it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error 0", "[rank 0/2] row 5: the model is broken"),
        ("error 1", "[rank 1/2] row 5: the model is broken"),
        ("main error", "row 40: of rank 0"),
        ("short", "[rank 0/2] agent test:model: expected 8 replies, got 0; return one a request"),
    ],
)
def test_an_error_of_any_rank_ends_all_with_its_text(tmp_path, kind, message):
    first, second, _ = outcome(tmp_path, 2, kind)
    assert first.startswith("rank 0: ") and second.startswith("rank 1: ")
    assert message in first and message in second
