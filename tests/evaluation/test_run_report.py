"""The report of a run of one's own: who was asked and what it took, what stages bought, the graph, its own model."""

import json
import re
from types import SimpleNamespace

import pytest
from many_ranks import save_base
from test_report import Balanced

from wizard_engine.agents import Ledger, Reply, Request
from wizard_engine.agents.ledger import Stored, request_key
from wizard_engine.agents.registry import name_of
from wizard_engine.data.records import Message, conversation, write_rows
from wizard_engine.evaluation import run_facts, run_parts
from wizard_engine.evaluation.report import report_page
from wizard_engine.evaluation.summary import Timing, write_summary
from wizard_engine.html.graph import direct_reads, graph
from wizard_engine.pipeline import about as about_run
from wizard_engine.pipeline.graph import Node, Status
from wizard_engine.runtime.files import write_json, write_sealed
from wizard_engine.runtime.process import Runtime

EVIL = '<script>alert("x")</script>&'


def text_of(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.texts).split())


def fill(path, agent, replies, failures=()):
    """A ledger with replies of (tokens in, tokens out), and failed calls of (error, tokens in)."""
    ledger = Ledger(path)
    calls = [Reply("x", tokens_in=a, tokens_out=b, seconds=0.5) for a, b in replies]
    calls += [Reply("", error, tokens_in=tokens) for error, tokens in failures]
    requests = [Request("answer", (Message("user", f"{number} {path}"),)) for number in range(len(calls))]
    ledger.store([Stored(agent, agent, request_key(agent, q), q, reply) for q, reply in zip(requests, calls)])
    ledger.close()


# Catches: calls of one ledger alone, failed calls without their tokens, a price of another agent, reasons lost.
def test_agents_have_the_numbers_of_all_ledgers_and_their_cost(tmp_path):
    failed = [("status 400: no such field", 3), ("status 400: another text", 0), ("timeout: after 60 s", 2)]
    for stage in ("slice_1/evol", "slice_2/evol"):
        (tmp_path / stage).mkdir(parents=True)
        fill(tmp_path / stage / "ledger.sqlite", "big@host:1", [(100, 10), (200, 20)], failed)
    fill(tmp_path / "slice_2" / "ledger.sqlite", "slice_1/sft/model", [(0, 0)])
    known = [
        {"agent": "big@host:1", "spec": "openai:big@http://host:1/v1", "roles": ["judge"], "price": [2.0, 8.0]},
        {"agent": "idle@host:1", "spec": "openai:idle@http://host:1/v1", "roles": ["user"], "price": None},
    ]
    big, idle, local = run_facts.agents_used(tmp_path, known)
    assert (big["replies"], big["failures"], big["tokens_in"], big["tokens_out"]) == (4, 6, 610, 60)
    assert big["reasons"] == {"status 400": 4, "timeout": 2}
    assert big["cost"] == pytest.approx((610 * 2 + 60 * 8) / 1e6) and big["seconds"] == 2.0
    assert (idle["replies"], idle["cost"], idle["reasons"]) == (0, None, {})
    assert (local["spec"], local["replies"], local["roles"]) == ("slice_1/sft", 1, [])
    facts = run_facts.stage_facts(tmp_path, "slice_1/evol", {"slice_1/evol": 7.0})
    assert facts == {"seconds": 7.0, "tokens_per_second": None, "calls": 5, "call_tokens": 335}
    shown = text_of(run_parts.agents([big, idle, local]))
    for words in ("endpoint judge 10 6 610 60 2, 8 0.00", "status 400 4", "timeout 2", "model of this machine – 1 0"):
        assert words in shown, words


def test_agents_are_found_by_their_names_in_ledgers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://host/v1")
    assert name_of("openai:m@http://127.0.0.1:80/v1#price_in=2") == "m@127.0.0.1:80"
    assert name_of("openai:m") == "m@host" and name_of("reference:judge") == "reference:judge"
    assert name_of(tmp_path / "a" / "b" / "c" / "d") == "b/c/d" and name_of("scripted:x/a/b/c") == "scripted:a/b/c"


def agents(**roles):
    from recipes.co_teach import Agents

    return Agents(**roles)


# Catches: two agents out of one that has other options in another stage; the student's own path; prices of the file.
def test_agents_of_a_run_have_roles_and_prices(tmp_path):
    (tmp_path / "prices.json").write_text(json.dumps({"listed": {"in": 1, "out": 2}}))
    run = SimpleNamespace(out=tmp_path, prices=tmp_path / "prices.json")
    ours, url = str(tmp_path / "slice_1" / "sft" / "model"), "@http://h:1/v1"
    first = agents(ours=ours, rivals=(f"openai:own{url}#price_in=3,price_out=4",), judge=(f"openai:listed{url}",))
    second = agents(ours=ours, rivals=(f"openai:own{url}#concurrency=2",), judge=("reference:judge",), suggester=None)
    nodes = [Node("a", "co_teach", SimpleNamespace(agents=a)) for a in (first, second)]
    models = (f"base={ours}", "other=x/answers.jsonl#sampled")
    nodes.append(Node("arena", "arena", SimpleNamespace(judge=(f"openai:free{url}",), models=models)))
    listed = {entry["agent"]: entry for entry in about_run.agents_of(run, nodes)}
    assert listed["own@h:1"]["price"] == [3, 4] and listed["listed@h:1"]["price"] == [1, 2]
    assert listed["free@h:1"]["price"] is None and listed["reference:judge"]["price"] is None
    student = listed["slice_1/sft/model"]
    assert (student["spec"], student["roles"]) == ("slice_1/sft", ["ours", "compared"])
    assert listed["own@h:1"]["spec"] == f"openai:own{url}" and listed["own@h:1"]["roles"] == ["rivals"]


# Catches: the demo student's sizes on the page of another model; parameters of the tied head counted twice.
def test_base_model_is_the_runs_own(tmp_path):
    save_base(tmp_path / "mine", ["a few words of text"] * 5, layers=1, max_positions=512)
    facts = run_facts.model_facts(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert facts["layers"] == "1" and facts["context"] == "512 tokens"
    assert facts["vocabulary"] == f"{config['vocab_size']:,} entries"
    from wizard_engine.model import load_model

    count = sum(p.numel() for p in load_model(tmp_path / "mine")[0].parameters())
    assert facts["parameters"] == f"{count:,}"


def lines_of(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# Catches: differences that are not paired, answers that did not come counted as wrong, a stage against another start.
def test_exact_answers_are_compared_with_the_model_that_a_stage_started_from(tmp_path):
    right, wrong = "The answer is 7.", "The answer is 8."
    columns = {"base": [wrong, wrong, right, None], "sft": [right, wrong, right, right]}
    for name, greedy in columns.items():
        lines_of(
            tmp_path / name / "answers.jsonl",
            [{"prompt": "?", "reference": right, "greedy": text, "sampled": right} for text in greedy],
        )
    measured = [(1, name, tmp_path / name) for name in columns]
    greedy, sampled = run_facts.exact_answers(measured, {(1, "sft"): (1, "base")})
    assert (greedy["stage"], greedy["measure"], greedy["rows"]) == ("sft", "greedy_accuracy", 3)
    assert greedy["before"][0] == pytest.approx(1 / 3) and greedy["after"][0] == pytest.approx(2 / 3)
    # Differences 1, 0, 0: mean 1/3, s^2 = 1/3, error sqrt(1/9).
    assert greedy["change"] == pytest.approx([1 / 3, 1 / 3])
    assert sampled["change"] == [0, 0] and run_facts.exact_answers(measured, {}) == []


# Catches: a stage without the measures of reward models, arena or rated questions; a difference without an error.
def test_every_measure_of_a_stage_stands_under_it(tmp_path):
    record = {"result": {"held_out_rows": 20, "held_out_accuracy": 0.75, "held_out_answer_auc": 0.8}}
    write_sealed(tmp_path / "slice_1" / "process_reward" / "stage.json", record)
    pair = {"a": "sft", "b": "base", "wins": 5, "losses": 1, "ties": 4, "win_rate_with_ties": 0.7}
    pairs = [pair | {"ci95_with_ties": [0.5, 0.9]}, pair | {"b": "other", "ci95_with_ties": None}]
    overall = {"score": 5.0, "ci95": [4.0, 6.0], "rated": 8}
    tests = {"base": {"overall": overall}, "rleif": {"overall": overall | {"score": 6.5}}}
    others = run_facts.own_shares(tmp_path) + run_facts.preferences(pairs, 1, {(1, "sft"): (1, "base")})
    others += run_facts.ratings(tests, 1)
    held = {"slice": 1, "stage": "sft", "rows": 1, "before": {"loss": [2.0, None]}, "after": {"loss": [1.5, None]}}
    held |= {"difference": {"loss": [-0.5, None]}}
    order = ["slice_1/sft", "slice_1/process_reward", "slice_1/rleif"]
    shown = text_of(run_parts.bought([held], others, order))
    expected = [
        "slice 1 SFT loss, nats held-out rows 1 2.000 1.500 -0.500 blind wins",
        "the judge, against base 10 – 70.0 [50.0, 90.0] –",
        "slice 1 process reward accuracy, % own rows kept apart 20 – 75.0 [53.1, 88.8] –",
        "area under the curve own rows kept apart 20 – 0.800 –",
        "slice 1 RLEIF rating of 1 to 10 the judge, against base 8 5.00 [4.00, 6.00] 6.50 [4.00, 6.00] –",
    ]
    places = [shown.index(words) for words in expected]
    assert places == sorted(places) and "other" not in shown


def test_rates_are_tokens_over_the_time_of_all_steps(tmp_path):
    """100 tokens in 10 s and 900 in 1 s are 1000 in 11 s; the mean of both rates would be 455 tokens/s."""
    lines = [{"step": 1, "tokens": 100, "tokens_per_second": 10}, {"step": 2, "tokens": 1000, "tokens_per_second": 900}]
    lines_of(tmp_path / "dpo" / "stage_1" / "metrics.jsonl", lines)
    assert run_facts.stage_facts(tmp_path, "dpo", {})["tokens_per_second"] == pytest.approx(1000 / 11)


# Catches: examples that show wins alone, or answers of another prompt.
def test_examples_are_battles_won_lost_and_tied(tmp_path):
    rows = [conversation(f"Question {number}?", "yes") for number in range(6)]
    write_rows(tmp_path / "held.jsonl", rows)
    scores = [1.0, 1.0, 0.0, 0.5, None, 1.0]
    for name in ("base", "sft"):
        lines = [{"id": row.id, "answer": f"{name} {number}"} for number, row in enumerate(rows)]
        lines_of(tmp_path / "arena" / "answers" / f"{name}.jsonl", lines)
    battles = [{"a": "sft", "b": "base", "prompt": row.id, "score": s} for row, s in zip(rows, scores)]
    lines_of(tmp_path / "arena" / "battles.jsonl", battles)
    write_json(tmp_path / "arena" / "arena.json", {"missing_answers": {"base": {}, "sft": {}}})
    chosen = run_facts.examples(tmp_path, tmp_path / "held.jsonl", (), 1)
    assert [item["kind"] for item in chosen] == ["won", "lost", "tied", "won"]
    assert [item["answers"]["sft"] for item in chosen] == ["sft 0", "sft 2", "sft 3", "sft 1"]
    assert chosen[1]["prompt"] == "Question 2?" and chosen[1]["verdicts"] == {"sft": "lost against base"}
    shown = text_of(run_parts.examples(chosen))
    assert "Question 2? base base 2 SFT lost against base sft 2" in shown
    before_after = [
        {"row": f"{tmp_path / 'held.jsonl'}:{n}", "before": {"reward": 0.2, "answer": "a"}, "after": after}
        for n, after in ((1, {"reward": 0.3, "answer": "b"}), (2, {"reward": 0.9, "answer": "c"}))
    ]
    lines_of(tmp_path / "slice_1" / "rleif" / "held_out.jsonl", before_after)
    answers = run_facts.examples(tmp_path, None, (tmp_path / "held.jsonl",), 1)
    assert [item["prompt"] for item in answers] == ["Question 1?", "Question 0?"]
    assert answers[0]["verdicts"]["after RLEIF"] == "reward 0.90"


NODES = [
    {"name": "sample", "reads": [], "state": "done"},
    {"name": "slice_1/sft", "reads": ["sample"], "state": "running", "lane": "slice 1", "note": "5 s"},
    {"name": "slice_1/pairs", "reads": ["sample"], "state": "left out", "lane": "slice 1", "why": EVIL},
    {"name": "slice_1/stage_dpo", "reads": ["sample", "slice_1/sft", "slice_1/pairs"], "state": "stale"},
    {"name": "arena", "reads": ["sample", "slice_1/sft", "slice_1/stage_dpo"], "state": "to run"},
]


def test_graph_draws_every_stage_with_its_state_and_the_reads_that_say_something():
    reads = direct_reads(NODES)
    assert reads["slice_1/stage_dpo"] == ["slice_1/sft", "slice_1/pairs"] and reads["arena"] == ["slice_1/stage_dpo"]
    chain = [("a", []), ("b", ["a"]), ("c", ["b"]), ("d", ["a", "c"])]
    assert direct_reads([{"name": n, "reads": r, "state": "done"} for n, r in chain])["d"] == ["c"]
    picture = graph(NODES)
    text = text_of(picture)
    assert picture.count("<rect") == 5 and picture.count("<path") == sum(map(len, reads.values())) == 5
    assert "running, 5 s" in text and "slice_1/pairs: left out: <script>" in text and "<script" not in picture
    assert len(set(re.findall(r'fill="(#\w+)" stroke', picture))) == 5 and picture.count("dasharray") == 1
    long = [{"name": f"s{n}", "reads": [f"s{n - 1}"] if n else [], "state": "done"} for n in range(23)]
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', graph(long))
    assert len(set(boxes)) == 23 and max(float(x) for x, _ in boxes) < 1200


# Catches: a page of a run that goes on that needs what is not there yet; states without their reasons.
def test_page_of_a_run_that_goes_on(tmp_path):
    about = {
        "run": {"name": EVIL, "text": "base on rows, 1 slices.", "figures": []},
        "graph": [
            {"stage": "slice_1/sft", "state": "running", "why": "", "reads": []},
            {"stage": "slice_1/pairs", "state": "left out", "why": f"no rows {EVIL}", "reads": ["slice_1/sft"]},
        ],
        "agents": [],
        "base": {"model": "mine", "parameters": "134,515,008", "layers": "30"},
        "command": "python x",
    }
    (tmp_path / "mt_bench_base").mkdir()
    summary = write_summary(
        tmp_path, 0, 3.0, [(1, "sft", tmp_path / "no")], tmp_path / "arena", {}, slices=1, about=about
    )
    page = (tmp_path / "report.html").read_text()
    text = text_of(page)
    assert summary["stages"] == [] and "<script" not in page and not re.search(r"\bnan\b|None", text)
    for words in ("1 of 2", "135M parameters of mine", "layers 30", "left out no rows <script>"):
        assert words in text, words
    assert "student" not in text and "make demo" not in text and "embedded world" not in text


def test_page_without_one_readable_rating_or_verdict():
    nothing = {"model": "base", "overall": None, "turns": [None, None], "categories": {"math": None}, "missing": 4}
    pair = {"a": "sft", "b": "base", "wins": 0, "losses": 0, "ties": 0, "win_rate": None, "ci95": None, "errors": 4}
    details = {"run": {"name": "x", "text": "y", "figures": []}, "mt_bench": [nothing], "elo": []}
    summary = {"seed": 0, "seconds": 1.0, "stages": [], "pairwise": [pair]}
    text = text_of(report_page(summary, SimpleNamespace(name="x"), details))
    assert "are missing: 4" in text and "0 : 0" in text


# Catches: the time of a stage that was interrupted and went on is that of its last start alone.
def test_time_of_a_stage_holds_that_of_its_interrupted_starts(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("wizard_engine.evaluation.summary.time.perf_counter", lambda: clock[0])
    out = tmp_path / "sft"

    def run(seconds, ends=True):
        timing = Timing(tmp_path / "timing.json", Runtime())
        with timing.of("sft", out):
            clock[0] += seconds
            if not ends:
                raise KeyboardInterrupt
            write_json(out / "stage.json", {"at": clock[0]})
        return timing.seconds

    for seconds in (10.0, 5.0):
        with pytest.raises(KeyboardInterrupt):
            run(seconds, ends=False)
    assert run(2.0) == {"sft": 17.0} and run(3.0) == {"sft": 3.0}


# Catches: stages that are said to be open after they ran, or done before.
def test_driver_knows_what_each_stage_is_at(tmp_path):
    driver = SimpleNamespace(known={"a": Status("done"), "b": Status("left out", "no rows")})
    nodes = [Node(name, "mix", SimpleNamespace(out=tmp_path / name)) for name in "abc"]
    plan = SimpleNamespace(nodes=nodes, measured=[], held_out=())
    base = SimpleNamespace(model=None)
    run = SimpleNamespace(
        out=tmp_path, base=base, rows=SimpleNamespace(data=()), slices=1, seed=3, path="r", prices=None
    )
    facts = about_run.about(run, plan, driver)
    assert [(stage["state"], stage["why"]) for stage in facts["graph"]] == [
        ("done", ""),
        ("left out", "no rows"),
        ("to run", ""),
    ]
    assert "1 of them left out" in facts["run"]["text"] and "Not finished: 1 stages" in facts["run"]["text"]
