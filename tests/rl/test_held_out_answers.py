"""Held-out measures of RLEIF: the numbers of a comparison, when it is made, and what a run that goes on reads."""

import json

import pytest

from wizard_engine.parallel.mesh import Axis
from wizard_engine.rl import held_out
from wizard_engine.rl.held_out import HeldOut, PromptRows
from wizard_engine.rl.options import RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import AnswerReward
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.stage import Stage

BEFORE = [{"reward": r, "length": 4, "finished": f} for r, f in ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0))]
AFTER = [{"reward": r, "length": 6, "finished": 1.0} for r in (0.5, 1.0, 1.0)]


def test_comparison_pairs_the_rows():
    """Differences 0.5, 0.5, 0: mean 1/3, s = sqrt(1/12), error sqrt(1/36) = 1/6; unpaired it would be 1/3."""
    BEFORE[0]["checked"], AFTER[0]["checked"] = 0.0, 1.0
    result = held_out.comparison(BEFORE, AFTER)
    assert result["rows"] == 3 and result["before"]["length"] == [4.0, 0.0]
    assert result["difference"]["reward"] == pytest.approx([1 / 3, 1 / 6])
    assert result["before"]["reward"] == pytest.approx([0.5, (1 / 12) ** 0.5])
    assert result["difference"]["checked"] == [1.0, 0.0] and result["difference"]["finished"][0] == pytest.approx(1 / 3)
    assert held_out.shown(result) == (
        "held-out: reward 0.5 -> 0.833 (+0.33 +- 0.17, 3 rows), checked 0 -> 1 (+1 +- 0), "
        "finished 0.667 -> 1 (+0.33 +- 0.33)"
    )


@pytest.mark.parametrize(("scores", "has_process"), [((), True), ((0.25, 0.5), True), ((), False)])
def test_line_has_what_its_models_and_reference_give(scores, has_process):
    """An answer without a step has a process factor of 0 where there is a process model."""
    reward = AnswerReward(((0, 1),) if scores else (), scores, None, True, is_right=True)
    line = held_out.line_of(reward, RewardOptions(factors=("checked",)), answer="7", length=2, has_process=has_process)
    assert line.get("process_factor") == (min(scores, default=0.0) if has_process else None)
    assert line["reward"] == (1.0 if scores else 0.0)
    cut = AnswerReward(((0, 1),), (0.5,), None, False, is_right=True)
    options = RewardOptions(factors=("checked",), no_eos_penalty=0.3)
    assert held_out.line_of(cut, options, answer="7", length=2)["reward"] == -0.3
    assert "instruction_factor" not in line and line["checked"] == 1.0 and line["finished"] == 1.0


@pytest.mark.parametrize(
    ("every", "measures_last", "due"), [(0, True, {5}), (2, True, {2, 4, 5}), (2, False, {2, 4}), (5, False, set())]
)
def test_measurements_are_due_every_n_rollouts_and_last(tmp_path, every, measures_last, due):
    options = {"rows": PromptRows(["a:1"], [()], [None]), "every": every, "measures_last": measures_last}
    assert {step for step in range(1, 6) if measurer(tmp_path, **options).is_due(step)} == due
    assert not any(measurer(tmp_path, every=every).is_due(step) for step in range(1, 6))


def measurer(out, rows=None, every=0, measures_last=True):
    return HeldOut(
        rows or PromptRows(),
        out,
        sampler=None,
        tokenizer=None,
        score=None,
        reward=RewardOptions(factors=("checked",)),
        has_process=False,
        options=RolloutOptions(steps=5),
        data=Axis(),
        seed=0,
        every=every,
        measures_last=measures_last,
    )


# Catches: a first measurement of other rows or of another run that is taken for this one's; one made anew each time.
def test_first_measurement_is_kept_for_the_run_and_the_rows_that_it_is_of(tmp_path, monkeypatch):
    held, rows = tmp_path / "held.jsonl", PromptRows(["a:1"], [()], [None])
    measured = []

    def measure(self):
        measured.append(len(measured))
        return [{"reward": 0.5 + len(measured)}]

    monkeypatch.setattr(HeldOut, "measure", measure)

    def first(text, lr=1):
        held.write_text(text)
        of_rows = ({}, {"held_out": held})
        run = measurer(tmp_path, rows)
        run.before(Stage(tmp_path, "rleif", {"lr": lr}, {}, measured=of_rows), Runtime())
        return run.first

    assert first("one") == first("one") == [{"reward": 1.5}] and measured == [0]
    assert first("other") == [{"reward": 2.5}] and first("other", lr=2) == [{"reward": 3.5}]
    assert first("other", lr=2) == [{"reward": 3.5}] and len(measured) == 3
    path = tmp_path / held_out.FIRST
    path.write_bytes(path.read_bytes().replace(b"3.5", b"9.5"))
    with pytest.raises(ValueError, match=r"held_out_before\.json: .*remove it, and the rows are measured again"):
        first("other", lr=2)


def test_lines_name_their_rows(tmp_path):
    held_out.write_lines(tmp_path / "x", PromptRows(["a:1"], [()], [None]), before=[{"reward": 0.5}], after=[{}])
    assert json.loads((tmp_path / "x").read_text()) == {"row": "a:1", "before": {"reward": 0.5}, "after": {}}
