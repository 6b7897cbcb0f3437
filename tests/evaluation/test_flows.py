"""Battles, ratings and tags flow: no prompt waits for another, and the order of replies changes no output."""

import asyncio
import gc
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Late, draw, fields_of, judge, qualities, rival, verdict

from recipes import accuracy, analyze, arena
from recipes import mt_bench as bench
from wizard_engine.agents import Calls, Ledger, Reply, Request, Scheduler, register
from wizard_engine.agents.missing import Missing
from wizard_engine.data.records import conversation, read_rows, write_rows
from wizard_engine.evaluation import mt_bench, pairwise
from wizard_engine.evaluation.battles import Battle, Judging
from wizard_engine.evaluation.mt_bench import Bench
from wizard_engine.evaluation.pairwise import Tournament, all_pairs
from wizard_engine.evaluation.pairwise import given as answered
from wizard_engine.evaluation.questions import Question
from wizard_engine.synthesis.tagging import tag_rows

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [conversation(f"What is {i} and 1?", f"The answer is {i + 1}.") for i in range(50)])
    return path


def run_arena(tmp_path, rows, turns, salt="", out=None, judges=1, **options):
    for name in NAMES:
        register(f"late:{name}", lambda name=name: rival(name, turns=turns, salt=salt))
    # The second judge thinks alike, but less.
    said = (verdict, lambda request: "".join(f"[[{1 + (quality - 1) / 3:.2f}]]" for quality in qualities(request)))
    for number in range(judges):
        register(f"late:judge{number}", lambda number=number: judge(f"j{number}", said[number], turns=turns, salt=salt))
    config = {"models": tuple(f"{name}=late:{name}" for name in NAMES), "prompts": rows, "quiet": True}
    config |= {"judge": tuple(f"late:judge{number}" for number in range(judges)), "out": out or tmp_path / f"o{turns}"}
    return arena.main(arena.Config(**{**config, **options})), config["out"]


def files_of(folder):
    names = ["battles.jsonl", "arena.json", *(f"answers/{name}.jsonl" for name in NAMES)]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("judges", [1, 2])
def test_arena_writes_the_same_bytes_whatever_the_order_of_replies(tmp_path, rows, judges):
    report, first = run_arena(tmp_path, rows, 0, judges=judges)
    for salt in ("x", "y"):
        assert run_arena(tmp_path, rows, 40, salt, tmp_path / salt, judges=judges)[0] == report
        assert files_of(tmp_path / salt) == files_of(first)
    assert not list(tmp_path.rglob("*.spill"))


def test_arena_gives_every_battle_the_verdict_of_its_own_answers(tmp_path, rows):
    report, out = run_arena(tmp_path, rows, 40)
    ids = [row.id for row in read_rows(rows)]
    said = {
        name: {line["id"]: line["answer"] for line in map(json.loads, (out / f"answers/{name}.jsonl").open())}
        for name in NAMES
    }
    battles = [json.loads(line) for line in (out / "battles.jsonl").open()]
    pairs = [("b", "a"), ("c", "a"), ("d", "a"), ("c", "b"), ("d", "b"), ("d", "c")]
    assert [(b["a"], b["b"], b["prompt"]) for b in battles] == [(a, b, key) for a, b in pairs for key in ids]
    for battle in battles:
        number = ids.index(battle["prompt"])
        expected = [1 + round(9 * draw(battle[side], f"What is {number} and 1?"), 1) for side in "ab"]
        assert battle["games"] == [expected, expected]
        assert said[battle["a"]][battle["prompt"]].startswith(f"{battle['a']} says 'What is {number} and")
    for pair in report["pairwise"]:
        own = [battle["score"] for battle in battles if (battle["a"], battle["b"]) == (pair["a"], pair["b"])]
        assert (pair["wins"], pair["losses"], pair["ties"]) == (own.count(1), own.count(0), own.count(0.5))


def test_arena_with_one_judge_says_nothing_of_several_and_with_two_scores_by_the_mean(tmp_path, rows):
    one, out = run_arena(tmp_path, rows, 3)
    assert not any("judges" in pair for pair in one["pairwise"]) and "repeats" not in one
    assert not any("judges" in json.loads(line) for line in (out / "battles.jsonl").open())
    two, out = run_arena(tmp_path, rows, 3, out=tmp_path / "two", judges=2)
    for pair in two["pairwise"]:
        assert pair["judges"] == {"j0": {}, "j1": {}} and pair["judge"] == "j0, j1"
    for battle in map(json.loads, (out / "battles.jsonl").open()):
        (first, _), (second, _) = battle["judges"]
        assert battle["games"][0] == pytest.approx([(x + y) / 2 for x, y in zip(first, second)])


def test_arena_refuses_a_judge_named_twice_and_an_unknown_anchor_before_a_call(tmp_path, rows):
    with pytest.raises(ValueError, match="judge: expected different judges"):
        run_arena(tmp_path, rows, 0, judge=("late:judge0", "late:judge0"))
    with pytest.raises(ValueError, match="anchor: expected one of a, b, c, d, got 'e'"):
        run_arena(tmp_path, rows, 0, anchor="e", out=tmp_path / "anchor")
    assert not (tmp_path / "anchor").exists()


# What a judge does with one verdict, and the reason that is counted for it.
TROUBLES = {
    "cut": (Reply("At first [[9]] [[2]]", finish="length"), "judge: length"),
    "refused": (Reply("", "status 400: too long"), "judge: status 400"),
    "unreadable": (Reply("The second one."), "judge: unreadable"),
    "lost": (Reply("", "timeout: no answer"), "judge: timeout"),
}


def troubled(troubles, name="judge", **options):
    """A judge that has trouble with the questions of a mapping, the answers being shown in one of two orders."""

    def say(request):
        fields = fields_of(request)
        kind, game = troubles.get(fields["instruction"], (None, 0))
        is_hit = kind and game in (2, int(fields["answer_a"].startswith("a says")))
        return TROUBLES[kind][0] if is_hit else verdict(request)

    return judge(name, say, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, *TROUBLES]), st.sampled_from([0, 1, 2])), min_size=1, max_size=12))
def test_a_verdict_that_a_judge_does_not_give_is_no_loss_and_no_tie(plan):
    questions = [f"q{i}" for i in range(len(plan))]
    troubles = {question: trouble for question, trouble in zip(questions, plan) if trouble[0]}
    answers = {
        name: [f"{name} says: quality {1 + round(9 * draw(name, question), 1):g}" for question in questions]
        for name in "ab"
    }
    clean = pairwise(answers["a"], answers["b"], questions, judge=judge())
    result = pairwise(answers["a"], answers["b"], questions, judge=troubled(troubles, turns=9))
    for battle, same, question in zip(result.battles, clean.battles, questions):
        assert battle.score == (None if question in troubles else same.score)
        assert len(battle.errors) == {0: 1, 1: 1, 2: 2}[troubles[question][1]] if question in troubles else True
    assert result.missing == dict(Counter(TROUBLES[kind][1] for kind, _ in troubles.values()).most_common())
    assert result.errors == len(troubles) and result.wins + result.losses + result.ties == len(plan) - len(troubles)
    # A second judge without trouble gives every score; the trouble is counted for the first alone.
    both = pairwise(answers["a"], answers["b"], questions, judge=[troubled(troubles, turns=9), judge("other", turns=5)])
    assert [battle.score for battle in both.battles] == [battle.score for battle in clean.battles]
    assert both.judges == {"judge": result.missing, "other": {}} and both.missing == {} and both.errors == 0
    assert list(both.scores) == [battle.score for battle in both.battles]


def test_a_game_without_any_judge_has_no_score_and_says_who_failed():
    troubles = {"q1": ("refused", 2)}
    answers = [["a says: quality 9"] * 2, ["b says: quality 2"] * 2]
    judges = [troubled(troubles, "one"), troubled({"q1": ("cut", 0), "q0": ("cut", 1)}, "two")]
    result = pairwise(*answers, ["q0", "q1"], judge=judges)
    assert [battle.score for battle in result.battles] == [1.0, None]
    assert result.missing == {"judge: status 400": 1}
    assert result.judges == {"one": {"judge: status 400": 1}, "two": {"judge: length": 2}}
    assert [error[-5:] for error in result.battles[1].errors] == ["(one)", "(one)", "(two)"]


def test_a_missing_answer_is_judged_by_nobody_and_beats_nobody():
    asked = judge()
    result = pairwise(["quality 9", Missing("length")], ["quality 2", "quality 2"], ["p", "q"], judge=asked)
    assert (result.wins, result.losses, result.errors) == (1, 0, 1) and result.missing == {"answer: length": 1}
    assert asked.calls == 2 and result.battles[1].errors == ("answer: length",)


def test_reasons_of_the_same_number_are_ordered_by_their_prompts():
    troubles = {f"q{i}": (kind, 2) for i, kind in enumerate(["lost", "cut", "refused", "unreadable"])}
    answers = [[f"{name} says: quality 5"] * 4 for name in "ab"]
    for salt in "stuv":
        result = pairwise(*answers, list(troubles), judge=troubled(troubles, turns=30, salt=salt))
        assert list(result.missing) == [TROUBLES[kind][1] for kind, _ in troubles.values()]


def test_an_unreadable_verdict_is_asked_for_again_and_a_cut_one_with_twice_the_limit(tmp_path, rows):
    def say(request):
        if len(request.messages) > 1:
            return verdict(request)
        number = int(fields_of(request)["instruction"].split()[2])
        if number % 3 == 1:
            return "I prefer the first one."
        return Reply("I think", finish="length") if number % 3 == 2 and request.max_tokens == 2048 else verdict(request)

    report, out = run_arena(tmp_path, rows, 5)
    register("late:picky", lambda: judge("j0", say, turns=5))
    repeated, other = run_arena(tmp_path, rows, 5, out=tmp_path / "p", judge="late:picky")
    # 6 pairs in 2 orders; 17 and 16 prompts.
    assert repeated.pop("repeats") == {"judge": {"asked again": 204, "asked longer": 192}}
    assert repeated.pop("calls")["j0"]["judge"] == {"replies": 600 + 204 + 192, "failures": 0}
    assert {k: v for k, v in report.items() if k != "calls"} == repeated
    assert (other / "battles.jsonl").read_bytes() == (out / "battles.jsonl").read_bytes()


def test_arena_ends_where_one_of_two_judges_gives_too_few_verdicts(tmp_path, rows):
    register("late:silent", lambda: judge("silent", lambda _: Reply("", "status 400: no"), turns=2))
    with pytest.raises(ValueError, match=r"verdicts of late:silent on b : a: .* 50 of 50 \(status 400 50\)"):
        run_arena(tmp_path, rows, 2, judge=("late:judge0", "late:silent"))
    report, _ = run_arena(tmp_path, rows, 2, judge=("late:judge0", "late:silent"), max_missing=1.0)
    assert report["pairwise"][0]["errors"] == 0
    assert report["pairwise"][0]["judges"] == {"j0": {}, "silent": {"judge: status 400": 50}}


def test_two_models_are_judged_while_a_third_still_answers(tmp_path, rows):
    judged = {}

    def event(question):
        return judged.setdefault(question, asyncio.Event())

    class Slow(Late):
        async def reply(self, request):
            await asyncio.wait_for(event(request.messages[-1].content).wait(), 10)
            return await super().reply(request)

    def say(request):
        fields = fields_of(request)
        if "d says" not in fields["answer_a"] + fields["answer_b"]:
            event(fields["instruction"]).set()
        return verdict(request)

    register("late:slow", lambda: Slow("d", rival("d").say))
    register("late:watch", lambda: judge("j", say))
    models = ("a=late:a", "b=late:b", "d=late:slow")
    report, _ = run_arena(tmp_path, rows, 0, models=models, judge="late:watch")
    assert report["prompts"] == 50 and len(judged) == 50


def test_battles_are_kept_on_disk_and_not_in_memory():
    questions = [f"q{i}" for i in range(300)]
    answers = {name: [f"{name} says: quality 5"] * 300 for name in NAMES}
    results = all_pairs(answers, questions, judge=judge(turns=3))
    gc.collect()
    assert sum(type(thing) is Battle for thing in gc.get_objects()) == 0
    assert [len(result.battles) for result in results] == [300] * 6
    assert results[-1].battles[-1].prompt == 299 and len(results[2].battles[3:5]) == 2
    with pytest.raises(IndexError, match="expected a place below 300"):
        results[0].battles[300]


def test_no_more_prompts_are_open_than_the_agents_need():
    open_now, most = set(), 0
    watched = judge(turns=20)

    def prompts():
        nonlocal most
        for place in range(400):
            open_now.add(place)
            most = max(most, len(open_now))
            yield place

    async def flow():
        tournament = Tournament([("a", "b")], 400, Judging([watched], Calls(scheduler), seed=0))

        async def work(place):
            said = {name: answered(f"{name} says: quality {len(name + str(place))}") for name in "ab"}
            return await tournament.play(place, f"q{place}", said)

        def done(place, outcomes):
            open_now.discard(place)
            tournament.add(place, outcomes)

        await scheduler.rows(prompts(), work, done, desc="x", width=tournament.width, agents=[watched])
        return tournament.results()[0]

    scheduler = Scheduler(quiet=True)
    result = scheduler.run(flow())
    assert result.wins + result.losses + result.ties == 400 and most <= 4 * 64 / 2 + 1


# ---- MT-Bench -------------------------------------------------------------------------------------------------------

QUESTIONS = [Question(str(i), ("math", "writing")[i % 2], (f"What is {i}?", f"And {i} more?")) for i in range(20)]


def rated(turns, salt=""):
    scheduler = Scheduler(quiet=True)
    model = rival("m", turns=turns, salt=salt)

    async def answering(conversation, temperature, row):
        reply = await scheduler.ask(model, Request("answer", conversation, 0, temperature, row=row))
        return Missing("length") if row == "7" and len(conversation) == 1 else reply.text

    watching = judge(turns=turns, salt=salt)
    flow = Bench(QUESTIONS, watching, Calls(scheduler), answering=answering, repeats=2)
    scheduler.run(flow.run("questions", [model, watching]))
    return flow.result("m")


def test_mt_bench_gives_the_same_whatever_the_order_of_replies():
    first = rated(0)
    assert rated(40, "x") == first and rated(40, "y") == first
    assert first.missing == {"answer: length": 4} and first.overall.rated == 76
    order = [(rating.question, rating.turn, rating.repeat) for rating in first.ratings]
    assert order == [(str(i), turn, repeat) for i in range(20) for turn in (1, 2) for repeat in (0, 1)]
    for rating, answers in ((first.ratings[4 * i + 2 * t], first.answers[i]) for i in range(20) for t in (0, 1)):
        said = answers[rating.turn - 1]
        assert rating.score is None or f"quality {rating.score:g}" in said


def test_mt_bench_rates_the_first_turn_while_the_second_is_answered():
    ratings = {}

    def event(text):
        return ratings.setdefault(text, asyncio.Event())

    async def answering(conversation, temperature, row):
        if len(conversation) == 3:
            await asyncio.wait_for(event(conversation[0].content).wait(), 10)
        return f"quality {len(conversation)}"

    def say(request):
        event(fields_of(request)["instruction"]).set()
        return verdict(request)

    scheduler = Scheduler(quiet=True)
    flow = Bench(QUESTIONS, judge(say=say), Calls(scheduler), answering=answering)
    scheduler.run(flow.run("questions", [flow.judge]))
    assert [turn.score for turn in flow.result("m").turns] == [1, 3]


def test_mt_bench_recipe_asks_again_and_says_so(tmp_path):
    def say(request):
        return verdict(request) if len(request.messages) > 1 else "It is good."

    register("late:picky", lambda: judge("p", say, turns=4))
    register("late:m", lambda: rival("m", turns=4))
    report = bench.main(bench.Config(model="late:m", judge="late:picky", n=6, out=tmp_path / "o", quiet=True))
    assert report["overall"]["rated"] == 12 and report["repeats"] == {"rate": {"asked again": 12}}


def test_mt_bench_of_a_function_is_served_by_no_ledger(tmp_path):
    asked = []

    def answers(conversations, temperature):
        asked.extend(conversations)
        return ["quality 5"] * len(conversations)

    for _ in range(2):
        ledger = Ledger(tmp_path / "l.sqlite")
        watching = judge()
        mt_bench(answers, QUESTIONS[:3], judge=watching, scheduler=Scheduler(ledger, quiet=True))
        ledger.close()
    assert len(asked) == 12 and watching.calls == 0


# ---- accuracy and tags ----------------------------------------------------------------------------------------------


def test_accuracy_gives_the_same_whatever_the_order_of_replies(tmp_path, rows):
    def say(request):
        number = int(request.messages[-1].content.split()[2])
        if number % 10 == 3:
            return Reply("", "content_filter: no")
        is_right = request.temperature == 0 or draw(request.seed, number) < 0.5
        return f"The answer is {number + is_right}."

    written = []
    for turns in (0, 40):
        register("late:m", lambda turns=turns: Late("m", say, turns=turns))
        out = tmp_path / f"o{turns}"
        result = accuracy.main(accuracy.Config(model="late:m", data=rows, out=out, quiet=True, max_missing=0.2))
        assert (result["correct"], result["total"], result["missing"]) == (45, 45, 5)
        written.append([(out / name).read_bytes() for name in ("answers.jsonl", "accuracy.json")])
    assert written[0] == written[1]
    lines = [json.loads(line) for line in written[0][0].splitlines()]
    assert [line["greedy"] for line in lines[:4]] == [*(f"The answer is {i + 1}." for i in range(3)), None]


def tags(request):
    number = int(fields_of(request)["instruction"].split()[2])
    if number % 10 == 4 and len(request.messages) == 1:
        return "It is about counting."
    if number % 10 == 5:
        return Reply("", "status 400: no")
    return f"Topic: topic {number}\nSkill: adding\nDifficulty: easy"


def test_tags_stand_at_their_own_rows_whatever_the_order_of_replies(tmp_path, rows):
    own = {"topic": "own", "skill": "own", "difficulty": "hard"}
    read = [row.replace(attributes=own) if i % 10 == 7 else row for i, row in enumerate(read_rows(rows))]
    expected = {"tagged": 40, "kept": 5, "failed": 5, "unreadable": 0, "asked again": 5, "failed: status 400": 5}
    for turns in (0, 30):
        tagged, counts = tag_rows(read, Late("t", tags, turns=turns))
        assert counts == expected
        for i, row in enumerate(tagged):
            assert row.instruction == read[i].instruction
            assert (row.attributes or {}).get("topic") == {5: None, 7: "own"}.get(i % 10, f"topic {i}")


def test_analyze_ends_where_the_tagger_gives_too_few_tags(tmp_path, rows):
    register("late:t", lambda: Late("t", tags, turns=9))
    options = {"data": (rows,), "tagger": "late:t", "quiet": True}
    with pytest.raises(ValueError, match=r"tags of late:t: expected at most 5 % .* 5 of 50 \(status 400 5\)"):
        analyze.main(analyze.Config(**options, out=tmp_path / "a"))
    report = analyze.main(analyze.Config(**options, out=tmp_path / "a", max_missing=0.1))
    assert report["tags"]["tagged"] == 45
    made = [row.attributes["topic"] for row in read_rows(tmp_path / "a" / "rows.jsonl")]
    assert made[:4] == [f"topic {i}" for i in range(4)] and made[49] == "topic 49"


def told_to(judge_seen):
    """(criteria, reference) of the prompts of a judge."""
    return {(fields["criteria"], fields["reference"]) for fields in map(fields_of, judge_seen)}


def test_judges_of_battles_are_told_the_criteria_of_each_prompt_and_its_reference(tmp_path):
    seen = []

    def say(request):
        seen.append(request)
        return verdict(request)

    questions = ["Write a Python function.", "What is a photon?", "Translate 'good' to French."]
    answers = {name: [f"{name} {i}: quality {5 + i}" for i in range(3)] for name in "ab"}
    attributes = [{}, {"skill": "division", "reference": "5"}, {"category": "writing"}]
    for attributes_, expected in (
        (None, {("coding", ""), ("", ""), ("multilingual", "")}),
        (attributes, {("coding", ""), ("math", "5"), ("writing", "")}),
    ):
        seen.clear()
        pairwise(answers["a"], answers["b"], questions, judge=judge(say=say), attributes=attributes_)
        assert told_to(seen) == expected and len(seen) == 6
        all_pairs(answers, questions, judge=judge(say=say), attributes=attributes_)
        assert told_to(seen) == expected and len(seen) == 12
    with pytest.raises(ValueError, match="attributes: expected those of 3 prompts, got 1; give them for each"):
        pairwise(answers["a"], answers["b"], questions, judge=judge(say=say), attributes=[{}])
    rows = [conversation(question, "x.", **more) for question, more in zip(questions, attributes)]
    write_rows(tmp_path / "told.jsonl", rows)
    seen.clear()
    register("late:seeing", lambda: judge("seeing", say))
    run_arena(tmp_path, tmp_path / "told.jsonl", 0, judge=("late:seeing",))
    assert told_to(seen) == {("coding", ""), ("math", "5"), ("writing", "")} and len(seen) == 3 * 12
