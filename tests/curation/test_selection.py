"""Selection: what is removed, why, and what the sampling recipe writes."""

import dataclasses
import json

import pytest

from wizard_engine.curation.selection import draw, remove_contaminated, remove_duplicates, select
from wizard_engine.data.records import Preference, conversation, read_rows, write_rows

STORY = "Tom has {} apples in the kitchen and buys {} boxes of apples at the big market near the old school"


def rows(count=60):
    topics = ["market"] * 40 + ["school"] * 20
    return [conversation(STORY.format(i, i + 2), f"{i}", topic=topics[i]) for i in range(count)]


def test_remove_duplicates_keeps_the_first_and_names_it():
    first, second = conversation("Write a poem about the sea.", "a"), conversation("Write a poem about the sea!", "b")
    same, other = conversation("Write a poem about the sea.", "c"), conversation("Write a poem about 2 seas.", "d")
    kept = remove_duplicates([first, second, same, other])
    assert kept.rows == [first, other]
    assert kept.removed == [
        {"id": second.id, "reason": "near_duplicate", "of": first.id},
        {"id": same.id, "reason": "exact_duplicate", "of": first.id},
    ]
    assert len(remove_duplicates([first, second, same, other], by="row").rows) == 4


def test_remove_duplicates_of_ranking_rows_compares_the_instructions():
    ranks = [Preference((), "a b c", "d"), Preference((), "e f g", "h")]
    assert remove_duplicates(ranks).rows == ranks


def test_remove_contaminated_looks_at_every_turn():
    question = STORY.format(1, 2)
    clean = conversation("Hello", "Hi")
    kept = remove_contaminated(
        [clean, conversation("Repeat", f"Sure: {question}."), conversation(question, "3")], [question]
    )
    assert kept.rows == [clean]
    assert [item["evaluation"] for item in kept.removed] == [0, 0]
    assert kept.removed[0]["ngram"] == " ".join(question.lower().split()[:13])


def test_draw_reports_natural_target_achieved_and_drawn():
    result = draw(rows(), {"topic": {"school": 0.5, "market": 0.5}}, size=40)
    shares = {name: result.report[name]["topic"]["school"] for name in ("natural", "target", "achieved", "drawn")}
    assert shares["natural"] == pytest.approx(1 / 3) and shares["target"] == pytest.approx(
        shares["achieved"]
    ) == pytest.approx(0.5)
    assert shares["drawn"] == sum(row.attributes["topic"] == "school" for row in result.rows) / 40
    assert result.report["largest_sample"] == 40 and result.report["effective_sample_size"] == pytest.approx(60 * 8 / 9)
    with pytest.raises(ValueError, match="k: expected 0 to 40"):
        draw(rows(), {"topic": {"school": 0.5, "market": 0.5}}, size=41)
    assert len(draw([conversation("a", "b")], {}).rows) == 1


def test_select_counts_add_up_and_slices_are_disjoint():
    data = [*rows(), *rows(10), conversation("extra words " + STORY.format(90, 91), "x")]
    selection = select(data, [STORY.format(90, 91), STORY.format(5, 7)], slices=3, seed=1)
    counts = selection.report["counts"]
    assert counts["exact_duplicate"] == 10 and counts["contaminated"] == 2 and counts["rows"] == 71
    assert counts["clean"] == counts["drawn"] == 59 == sum(counts["slices"])
    assert len(selection.removed) == 12
    assert len({row.id for chosen in selection.slices for row in chosen}) == 59
    with pytest.raises(ValueError, match="rows: expected some to be left after cleaning"):
        select(rows(1), [STORY.format(0, 2)])


@pytest.fixture
def recipe():
    import recipes.sample

    return recipes.sample


def test_sample_recipe_writes_slices_and_report(tmp_path, recipe):
    write_rows(tmp_path / "rows.jsonl", [*rows(), *rows(5)])
    write_rows(tmp_path / "test.jsonl", rows(2))
    (tmp_path / "targets.json").write_text('{"topic": {"school": 0.5, "market": 0.5}}')
    cfg = recipe.Config(
        data=(tmp_path / "rows.jsonl",),
        out=tmp_path / "out",
        evaluation=(tmp_path / "test.jsonl",),
        targets=tmp_path / "targets.json",
        size=30,
        slices=2,
        quiet=True,
    )
    report = recipe.main(cfg)
    assert report["counts"]["contaminated"] == 2 and report["counts"]["slices"] == [15, 15]
    written = read_rows(tmp_path / "out/slice_1.jsonl") + read_rows(tmp_path / "out/slice_2.jsonl")
    assert len({row.id for row in written}) == 30 and written[0].attributes["topic"] in ("market", "school")
    assert json.loads((tmp_path / "out/sampling.json").read_text()) == report
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").read_text().splitlines()]
    assert [item["reason"] for item in removed] == ["exact_duplicate"] * 5 + ["contaminated"] * 2
    before = (tmp_path / "out/slice_1.jsonl").stat().st_mtime_ns
    assert recipe.main(cfg) == report and (tmp_path / "out/slice_1.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="size"):
        recipe.main(dataclasses.replace(cfg, size=29))


def test_sample_recipe_bad_targets_and_bad_rows(tmp_path, recipe):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a b", "output": "c"}\n{broken\n')
    cfg = recipe.Config(data=(tmp_path / "rows.jsonl",), out=tmp_path / "out", slices=1, quiet=True)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: json: "):
        recipe.main(cfg)
    skipping = dataclasses.replace(cfg, on_error="skip", out=tmp_path / "skipped")
    assert recipe.main(skipping)["counts"]["rejected"] == 1
    assert len((tmp_path / "skipped/rejects.jsonl").read_text().splitlines()) == 1
    for number, text in enumerate(["{", "[]", '{"topic": 3}', '{"topic": {"x": 1}}']):
        (tmp_path / "targets.json").write_text(text)
        bad = dataclasses.replace(skipping, out=tmp_path / f"bad{number}", targets=tmp_path / "targets.json")
        with pytest.raises(ValueError, match="targets"):
            recipe.main(bad)
        assert not (tmp_path / f"bad{number}/sampling.json").exists()


def test_sample_recipe_on_real_files(tmp_path, shared_data, recipe):
    names = ["instructions/alpaca_en.json", "instructions/alpaca_zh.json", "instructions/sharegpt_tools_en.json"]
    cfg = recipe.Config(
        data=tuple(shared_data / name for name in [*names, "gsm8k/train.jsonl"]),
        out=tmp_path / "out",
        unknown_fields="count",
        evaluation=(shared_data / "gsm8k/test.jsonl", shared_data / "mt_bench/question.jsonl"),
        uniform=("source",),
        cap=20,
        size=600,
        quiet=True,
    )
    report = recipe.main(cfg)
    counts = report["counts"]
    assert counts["rows"] == 9772 and counts["evaluation"] == 1319 + 160 and counts["slices"] == [200] * 3
    assert 1 <= counts["contaminated"] <= 30 and 50 <= counts["exact_duplicate"] + counts["near_duplicate"] <= 300
    assert all(share == pytest.approx(0.25, abs=0.03) for share in report["drawn"]["source"].values())


def test_rows_kept_apart_are_in_no_slice_and_nothing_repeats_them():
    words = [f"question number {n} asks how many legs {n} tables and chairs have in the old hall" for n in range(30)]
    rows = [conversation(text, "4") for text in words]
    selection = select(rows, hold_out=10, slices=2, decontaminate={"n": 9})
    assert len(selection.held_out) == 10 and selection.report["counts"]["held_out"] == 10
    apart = {row.id for row in selection.held_out}
    assert not apart & {row.id for part in selection.slices for row in part}
    # All questions share eight words, so that nothing is left to draw.
    with pytest.raises(ValueError, match="expected some to be left after cleaning"):
        select(rows, hold_out=10, decontaminate={"n": 4})


# Catches: a run that ends because one of the stages before made no rows.
def test_one_of_several_files_may_have_no_rows(tmp_path, recipe):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a b", "output": "c"}\n')
    (tmp_path / "none.jsonl").write_text("")
    files = (tmp_path / "none.jsonl", tmp_path / "rows.jsonl")
    cfg = recipe.Config(data=files, out=tmp_path / "out", slices=1, quiet=True)
    assert recipe.main(cfg)["counts"]["rows"] == 1
    with pytest.raises(ValueError, match=r"none.jsonl:1: file: expected"):
        recipe.main(dataclasses.replace(cfg, data=files[:1], out=tmp_path / "alone"))
    with pytest.raises(ValueError, match="expected some to be left after cleaning, got none of 0"):
        recipe.main(dataclasses.replace(cfg, data=files[:1] * 2, out=tmp_path / "twice"))
