"""The analysis as a whole: kept values, perplexity, clusters, the page, the recipe, real rows."""

import json
import math
import time
from itertools import pairwise

import pytest

from recipes import analyze as recipe
from wizard_engine import world
from wizard_engine.curation.analysis import analyze, answered
from wizard_engine.curation.analysis_page import analysis_page, write_analysis
from wizard_engine.curation.attributes import ATTRIBUTES
from wizard_engine.data.records import Message, Preference, conversation, read_rows, write_rows


def _rows():
    return [
        conversation("Tom has 3 apples. He buys 4 more. How many apples has Tom?", "3+4=7\nThe answer is 7."),
        conversation("Write a poem about the sea.", "Waves come and go.", topic="poetry", toxic=True),
        conversation("Write a poem about the sea!", "The sea is blue and deep."),
        Preference((Message("user", "Why is the sky blue?"),), "Because of scattering of light.", "No idea."),
        Preference((), "Explain the tides.", "Tides?", {"margin": 1.0}),
    ]


def test_analyze_fills_every_attribute_and_keeps_what_rows_bring():
    analysis = analyze(_rows(), sources=["a.json"] * 5)
    assert all(set(ATTRIBUTES) - {"perplexity"} <= set(row.attributes) for row in analysis.rows)
    poem = analysis.rows[1].attributes
    assert (poem["topic"], poem["toxic"], poem["skill"], poem["source"]) == ("poetry", True, "writing", "a.json")
    assert analysis.tables["topic"]["kept"] == 1 and analysis.tables["topic"]["inferred"] == 4
    assert [row.id for row in analysis.rows] == [row.id for row in _rows()]
    assert analysis.rows[4].attributes["margin"] == 1.0


def test_analyze_keeps_a_rows_own_source_and_cluster():
    rows = [conversation("Why is it so?", "So.", source="forum", cluster=77), conversation("Why not?", "No.")]
    analysis = analyze(rows, sources=["file", "file"])
    assert analysis.columns["source"] == ["forum", "file"] and analysis.columns["cluster"][0] == 77


def test_analyze_finds_near_duplicates():
    column = analyze(_rows()).columns["cluster"]
    assert column[1] == column[2] and len(set(column)) == 4


def test_analyze_places_perplexities_on_answered_rows_and_counts_missing():
    asked = []

    def perplexity(conversations):
        asked.extend(conversations)
        return [math.nan, *(float(len(row.answer)) for row in conversations[1:])]

    analysis = analyze(_rows(), perplexity=perplexity)
    assert [row.messages for row in asked] == [row.messages for row in answered(_rows())] and len(asked) == 4
    assert analysis.columns["perplexity"] == [None, 18.0, 25.0, 31.0, None]
    assert analysis.tables["perplexity"]["missing"] == 2
    assert "perplexity" not in analysis.rows[4].attributes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "rows: expected at least one"),
        ({"rows": _rows(), "sources": ["x"]}, "sources: expected one per row"),
        ({"rows": _rows(), "perplexity": lambda rows: [1.0]}, "perplexity: expected 4 values, got 1"),
    ],
)
def test_analyze_refuses_bad_arguments(arguments, message):
    rows = arguments.pop("rows")
    with pytest.raises(ValueError, match=message):
        analyze(rows, **arguments)


def test_analyze_does_not_depend_on_chance():
    rows = world.natural_corpus(150, seed=2)
    first, second = analyze(rows), analyze(rows)
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())


def test_analysis_page_is_self_contained_and_escaped():
    rows = [*_rows(), conversation("<script>alert(1)</script> & Why?", "<b>so</b>", topic="<i>x</i>")]
    page = analysis_page(analyze(rows), title="A <title>")
    assert "<script" not in page and "http://www.w3.org/2000/svg" in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "&lt;i&gt;x&lt;/i&gt;" in page and "<i>x</i>" not in page and "A &lt;title&gt;" in page
    assert all(name in page for name in ("Cramér", "topic", "toxic", "cluster"))


def test_write_analysis_rows_read_back(tmp_path):
    analysis = analyze(_rows()[:3])
    paths = write_analysis(analysis, tmp_path)
    assert [row.attributes for row in read_rows(paths["rows"])] == [row.attributes for row in analysis.rows]
    stored = json.loads(paths["analysis"].read_text())
    assert stored["rows"] == 3 and set(stored["attributes"]) == set(ATTRIBUTES)


def test_analyze_recipe_writes_counts_rejects_and_is_skipped_when_current(tmp_path):
    data = tmp_path / "rows.jsonl"
    write_rows(data, _rows()[:3])
    with data.open("a") as stream:
        stream.write('{"instruction": 3}\n')
    config = {"data": (data,), "out": tmp_path / "out", "quiet": True}
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: "):
        recipe.main(recipe.Config(**config))
    result = recipe.main(recipe.Config(**config, on_error="skip", overwrite=True))
    assert (result["rows"], result["rejected"]) == (3, 1) and (tmp_path / "out" / "rejects.jsonl").exists()
    written = (tmp_path / "out" / "analysis.html").stat().st_mtime_ns
    assert recipe.main(recipe.Config(**config, on_error="skip")) == result
    assert (tmp_path / "out" / "analysis.html").stat().st_mtime_ns == written


def test_analysis_of_real_rows(shared_data):
    names = ("instructions/alpaca_en.json", "instructions/alpaca_zh.json", "instructions/sharegpt_tools_en.json")
    sources = [read_rows(shared_data / name, unknown_fields="count") for name in names] + [
        read_rows(shared_data / "gsm8k/train.jsonl")[:700]
    ]
    began = time.process_time()
    analysis = analyze([row for source in sources for row in source])
    seconds = time.process_time() - began
    assert seconds < 20 * len(analysis.rows) / 5000, f"{seconds:.1f} s of CPU for {len(analysis.rows)} rows"
    ends = [sum(map(len, sources[:place])) for place in range(5)]
    language, skill = ([analysis.columns[name][a:b] for a, b in pairwise(ends)] for name in ("language", "skill"))
    assert [language[0].count("en"), language[1].count("zh"), language[2].count("en")] == [999, 1000, 300]
    assert sum(value.startswith("math-") for value in skill[3]) >= 0.95 * 700
    assert skill[2].count("tool-use") > 100 and skill[0].count("other") + skill[1].count("other") < 300
    assert {line["value"] for line in analysis.tables["difficulty"]["values"]} == {"easy", "medium", "hard"}
    assert next(p for p in analysis.pairs if (p["a"], p["b"]) == ("language", "source"))["cramers_v"] > 0.95
