"""Two ranks answer as one does: their models share every batch, rank 0 makes the calls, errors end both."""

import json
import re
from pathlib import Path

import pytest
from many_ranks import torchrun

RUN = Path(__file__).with_name("ranked_run.py")


def outcome(tmp_path, ranks, kind):
    tmp_path.mkdir(exist_ok=True)
    done = torchrun(ranks, RUN, tmp_path, kind, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_two_ranks_reply_as_one_and_are_kept_alive(tmp_path):
    (one,) = outcome(tmp_path / "1", 1, "wait")
    two = outcome(tmp_path / "2", 2, "wait")
    assert [rank["result"] for rank in two] == [one["result"]] * 2 and len(one["result"]) == 12
    assert two[0]["waits"] >= 4


# Catches: a rank that leaves at its error, while rank 0 waits for it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error 0", r"\[rank 0/2\] row 5: the model is broken"),
        ("error 1", r"\[rank 1/2\] row 5: the model is broken"),
        ("main error", "row 40: of rank 0"),
        ("short", r"\[rank 0/2\] agent test:model: expected \d replies, got 0; return one a request"),
    ],
)
def test_an_error_of_any_rank_ends_all_with_its_text(tmp_path, kind, message):
    assert all(re.search(message, rank["result"]) for rank in outcome(tmp_path, 2, kind))
