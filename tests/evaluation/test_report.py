"""The report page and its charts: complete, self-contained, escaped, honest about what fell."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wizard_engine.evaluation.method_search import method_searches, method_section
from wizard_engine.evaluation.report import headline_pair, report_page, write_report
from wizard_engine.evaluation.report_parts import change, duration, marked
from wizard_engine.html import charts
from wizard_engine.html.flow import flow, wrapped
from wizard_engine.runtime.files import write_json, write_json_lines, write_text

STAGES = [
    {
        "slice": s,
        "name": name,
        "accuracy": a,
        "correct": round(1000 * a),
        "total": 1000,
        "sampled_accuracy": a - 0.05,
        "seconds": 12.5,
    }
    for s, values in ((1, (0.1, 0.4, 0.38, 0.45)), (2, (0.45, 0.55, 0.56, 0.61)))
    for name, a in zip(("base", "sft", "stage_dpo", "rleif"), values)
]
PAIRS = [
    {"a": "rleif", "b": "sft", "wins": 300, "losses": 200, "ties": 500, "win_rate": 0.6, "ci95": [0.55, 0.64]},
    {"a": "stage_dpo", "b": "sft", "wins": 0, "losses": 0, "ties": 10, "win_rate": None, "ci95": None},
]
SUMMARY = {"seed": 3, "seconds": 545.0, "stages": STAGES, "pairwise": PAIRS}
EVIL = '<script>alert("x")</script>&'
DETAILS = {
    "data_flow": [
        {"name": "natural corpus", "count": 9000, "note": "four sources"},
        {"name": EVIL, "count": None, "note": EVIL, "lane": "slice 1"},
    ],
    "attributes": [
        {"attribute": "topic", "values": ["farm", EVIL], "natural": [0.7, 0.3], "target": None, "achieved": [0.5, 0.5]}
    ],
    "method_searches": [
        {
            "slice": 1,
            "measure": "classes",
            "stopped": "within noise",
            "method": EVIL,
            "history": [
                {
                    "step": 0,
                    "failure_rate": 0.25,
                    "ci95": [0.15, 0.39],
                    "reasons": {"facts lost": 12, EVIL: 1},
                    "accepted": True,
                }
                | {"candidates": []},
                {"step": 1, "failure_rate": 0.125, "ci95": [0.06, 0.24], "reasons": {"facts lost": 6}, "accepted": True}
                | {"candidates": [{"failure_rate": 0.2}, {"failure_rate": 0.125}]},
                {"step": 2, "failure_rate": 0.125, "reasons": {}, "accepted": False}
                | {"candidates": [{"failure_rate": 0.11}]},
            ],
            "examples": [
                {
                    "class": "facts lost",
                    "by": "program",
                    "detail": EVIL,
                    "instruction": "Tom has 12 hats.",
                    "evolved": EVIL,
                }
            ],
        }
    ],
    "evolved": [
        {"operator": "", "instruction": "Tom has 3 apples.", "answer": "3"},
        {"operator": "constraint", "instruction": "Tom has 3 red apples.", "answer": EVIL},
    ],
    "curves": {"loss/slice 1": [(0, 3.0), (1, 2.0), (2, float("nan"))], "KL": [(0, 0.0), (5, 0.1)], "empty": []},
    "examples": [{"prompt": EVIL, "answers": {"base": "7", "rleif": EVIL}, "correct": {"base": False, "rleif": True}}],
    "elo": [{"model": "rleif", "elo": 1050.0, "low": 1020.0, "high": 1080.0, "battles": 100}],
    "mt_bench": [
        {"model": "rleif", "overall": 7.5, "turns": [8.0, None], "categories": {"farm": 7.0}, "missing": 2},
        {"model": "sft", "overall": 6.5, "turns": [7.0, 6.0], "categories": {"market": 6.0}, "missing": 0},
    ],
    "calls": {"world:judge": {"judge": {"replies": 1234, "failures": 5}}},
    "ablations": [{"name": "slices", "rows": [{"setting": "three", "accuracy": 0.6, "se": 0.01}]}],
    "machine": {"CPU": EVIL},
    "timing": [{"name": "base", "seconds": 61.0}],
    "phases": [
        {"name": EVIL, "steps": 3, "step": 1.5, "tail_idle": 0.25, "difference": 3e-6, "seconds": {"hand_over": 0.1}}
    ],
}


class Balanced(HTMLParser):
    """Fails where tags do not close in order; gathers the text."""

    VOID = frozenset({"meta", "br", "rect", "line", "circle", "path", "polyline"})

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def _read(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.texts).split())


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(SUMMARY, Path("runs/demo"), DETAILS)


def test_report_is_well_formed_self_contained_and_escaped(page):
    _read(page)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"url\(|@import|<img|<link|nan|None", page)


def test_report_shows_every_part(page):
    text = _read(page)
    for expected in (
        "programs, not language models",
        "The path of the data",
        "9,000",
        "Weighted sampling",
        "The evolving method",
        "Slice 1: classes of failure, ended with within noise",
        "15.0 to 39.0 %",
        "2, best 12.5 %, taken",
        "1, best 11.0 %, none taken",
        "Tom has 12 hats.",
        "A problem, evolved",
        "constraint",
        "What each stage bought",
        "Learning curves",
        "Blind preference",
        "300 : 200",
        "60.0 %",
        "55.0 %",
        "55.0 to 64.0 %",
        "Elo",
        "1050",
        "Two-turn questions",
        "are missing: 2",
        "Before and after",
        "right",
        "wrong",
        "Ablations",
        "1,234",
        "make demo SEED=3",
        "9 min 5 s",
        "10.0 → 61.0 %",
        "5.0 → 56.0 %",
        "1 min 1 s",
    ):
        assert expected in text, expected
    assert "red" in page[page.index("<mark>") : page.index("</mark>")]


def test_report_shows_a_fall_as_a_fall(page):
    assert '<span class="down">-2.0</span>' in page and '<span class="up">+30.0</span>' in page


def test_report_of_the_bare_summary_omits_the_rest(tmp_path):
    write_report(tmp_path / "report.html", SUMMARY | {"pairwise": []}, tmp_path)
    text = _read((tmp_path / "report.html").read_text())
    assert "What each stage bought" in text and "programs, not language models" in text
    for absent in ("The path of the data", "Blind preference", "Elo", "Learning curves", "Before and after"):
        assert absent not in text


def test_report_headline_is_rleif_over_sft_else_the_last_decided():
    assert headline_pair(PAIRS) == PAIRS[0]
    turned = {"a": "sft", "b": "rleif", "wins": 20, "losses": 30, "ties": 5, "win_rate": 0.4, "ci95": [0.3, 0.5]}
    headline = headline_pair([turned])
    assert (headline["a"], headline["wins"], headline["losses"]) == ("rleif", 30, 20)
    assert headline["win_rate"] == pytest.approx(0.6) and headline["ci95"] == pytest.approx([0.5, 0.7])
    other = {"a": "x", "b": "y", "wins": 1, "losses": 1, "win_rate": 0.5}
    assert headline_pair([other, PAIRS[1]]) == other and headline_pair([PAIRS[1]]) is None


@pytest.mark.parametrize("missing", ["seed", "stages", "pairwise"])
def test_report_refuses_an_incomplete_summary(tmp_path, missing):
    summary = {key: value for key, value in SUMMARY.items() if key != missing}
    with pytest.raises(ValueError, match=f"summary: expected {missing}"):
        write_report(tmp_path / "report.html", summary, tmp_path)
    with pytest.raises(ValueError, match="at least one stage"):
        write_report(tmp_path / "report.html", SUMMARY | {"stages": []}, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_report_words_and_numbers():
    assert [duration(s) for s in (8.42, 42.1, 545, 3900)] == ["8.4 s", "42 s", "9 min 5 s", "1 h 5 min"]
    assert change(0.5, 0.5002) == '<span class="quiet">+0.0</span>'
    assert change(0.5, None) == "" and "+1.0" in change(0.51, 0.5)
    assert marked("a b d", "a b <c> d") == "a b <mark>&lt;c&gt;</mark> d"


# ---- charts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(0.0, 5e-324)
def test_ticks_cover_the_range_in_even_round_steps(low, span):
    ticks = charts.ticks(low, low + span)
    slack = 1e-6 * (1 + abs(low) + span)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack and 2 <= len(ticks) <= 8
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.floats(10, 200))
def test_shorten_fits_or_is_an_ellipsis(content, width):
    shortened = charts.shorten(content, width, 12)
    assert charts.text_width(shortened, 12) <= width or shortened == "…"
    assert shortened == content or shortened.endswith("…")


def test_bars_are_in_proportion():
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', charts.bars([("a", 10, ""), ("b", 5, "")]))]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


def test_histogram_counts_every_value_and_marks_the_median():
    chart = charts.histogram([1] * 50 + [3] * 50 + [2] * 99)
    heights = sorted(float(h) for h in re.findall(r'height="([\d.]+)" rx="1"', chart))
    assert len(heights) == 3 and heights[0] == heights[1] == pytest.approx(heights[2] * 50 / 99, abs=0.2)
    assert "median 2" in chart and "no values" in charts.histogram([])


def test_lines_skip_values_that_are_not_finite():
    assert "nan" not in charts.lines({"a": [(0, float("nan")), (1, 2.0), (2, float("inf"))]})
    assert "no values" in charts.lines({"a": [(0, float("nan"))]})


def test_intervals_place_points_in_order():
    rows = [charts.Interval(str(v), v, v - 0.1, v + 0.1) for v in (0.3, 0.5, 0.7)]
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', charts.intervals(rows, span=(0, 1)))]
    assert xs == sorted(xs) and xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_smoothed_is_the_mean_of_a_window():
    assert charts.smoothed([1, 2, 3, 10], 3) == [1.5, 2, 5, 6.5]
    assert charts.smoothed([4, 5], 1) == [4, 5]


def test_flow_wraps_rows_and_starts_lanes_anew():
    nodes = [{"name": f"n{i}", "count": i} for i in range(4)] + [{"name": "x", "count": 1, "lane": "slice 1"}]
    chart = flow(nodes, columns=3)
    assert chart.count("<path ") == 3 and "slice 1" in chart
    assert wrapped("one two three four", 60, 12, 2) == ["one two", "three fo…"]


def test_method_searches_are_read_from_the_stages(tmp_path):
    folder = tmp_path / "slice_2" / "evol_instruct"
    folder.mkdir(parents=True)
    step = {"step": 0, "failure_rate": 0.5, "ci95": [0.2, 0.8], "reasons": {"facts lost": 3}, "candidates": []}
    write_json(folder / "report.json", {"method": {"stopped": "step limit", "measure": "classes", "history": [step]}})
    write_text(folder / "method.txt", "1. Think.\n")
    failure = {
        "candidate": None,
        "class": "facts lost",
        "by": "judge",
        "detail": "",
        "instruction": "a",
        "evolved": "b",
    }
    failures = [{**failure, "step": 1 - place // 5, "instruction": str(place)} for place in range(10)]
    write_json_lines(folder / "method_failures.jsonl", failures)
    (search,) = method_searches(tmp_path, 3)
    assert (search["slice"], search["method"], search["measure"]) == (2, "1. Think.", "classes")
    assert [example["instruction"] for example in search["examples"]] == ["5", "6"]
    assert method_section([search]).count("facts lost") >= 3 and method_section([]) == ""
    write_json(folder / "report.json", {"method": {}})
    assert method_searches(tmp_path, 3) == []
