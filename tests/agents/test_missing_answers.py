"""Calls that fail, are cut or refused, through the recipes: never a score, never a row, always with their reason."""

import json

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from asking import responses
from fake_endpoint import Fake, answer
from starlette.responses import JSONResponse

from recipes import accuracy, arena, co_teach, evol_answer, evol_instruct, mt_bench, self_teach
from wizard_engine.agents import Ledger, Request
from wizard_engine.agents.endpoint import EndpointAgent, Options
from wizard_engine.data.records import Message, conversation, read_rows, write_rows

CUT = "The sky is blue because air scatters short waves more. First, sunlight enters the air and meets mol"


@pytest.fixture(autouse=True)
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [conversation(f"What is {i} and 1?", f"The answer is {i + 1}.") for i in range(40)])
    return path


@pytest.fixture
def other(tmp_path):
    """An agent that says the same to all."""
    lines = [{"task": task, "reply": f"It is not known {task}."} for task in ("answer", "rewrite")]
    lines.append({"task": "rate", "reply": "[[5]]"})
    (tmp_path / "replies").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return f"scripted:{tmp_path / 'replies'}"


def last(body):
    return body["messages"][-1]["content"]


def teacher(answers):
    """Evolves, judges and rewrites in the right form; answers by a function of the question."""

    def behave(body, _):
        text = last(body)
        if "#Rewritten" in text:
            return answer(f"#Rewritten Instruction#:\nExplain in steps: {hash(text) % 10**6}, why is the sky blue?")
        if "Equal" in text:
            return answer("Not Equal")
        if "[[" in text:
            return answer("fine [[8]] [[3]]" if "#Answer B#:" in text else "fine [[8]]")
        return answers(text)

    return behave


def sky(text):
    return answer(CUT, finish="length")


# Case: an answer with finish_reason length was a row like any other.
@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_cut_answers_become_no_rows_or_rows_that_say_so(tmp_path, rows, choice):
    with Fake(teacher(sky)) as fake:
        spec = f"openai:x@{fake.url}"
        who = evol_instruct.Agents(evolver=spec, answerer=spec, judge=spec)
        options = {
            "data": (rows,),
            "out": tmp_path / "o",
            "agents": who,
            "quiet": True,
            "on_length": choice,
            "limit": 4,
        }
        if choice == "drop":
            with pytest.raises(
                ValueError, match=r"'answer': expected at most 5 % .* 4 of 4 \(length 4\); raise --max-tok"
            ):
                evol_instruct.main(evol_instruct.Config(**options))
            assert not (tmp_path / "o" / "stage.json").exists() and not (tmp_path / "o" / "rows.jsonl").exists()
            asked = len(fake.asked)
            report = evol_instruct.main(evol_instruct.Config(**options, max_missing=1.0))
            assert len(fake.asked) == asked, "the ledger knows what was cut"
            counts = {"asked": 4, "asked longer": 4, "failed": 4, "failed: length": 4, "unreadable": 0}
            assert report["calls"]["answer"] == counts
            limits = sorted(body["max_tokens"] for body in fake.asked if last(body).startswith("Explain"))
            assert limits == [256] * 4 + [512] * 4, "each was asked for once more, with twice the limit"
            assert len(read_rows(tmp_path / "o" / "rows.jsonl")) == 4
        else:
            report = evol_instruct.main(evol_instruct.Config(**options))
            made = read_rows(tmp_path / "o" / "rows.jsonl")[4:]
            assert report["calls"]["answer"]["cut"] == 4 and [row.answer for row in made] == [CUT] * 4
            assert {row.attributes["finish"] for row in made} == {"length"}


def test_no_recipe_of_synthesis_makes_a_row_of_a_cut_answer(tmp_path, rows, other):
    def behave(body, _):
        text = last(body)
        if "[[" in text:
            first = text.partition("#Answer A#:")[2].partition("#Answer B#:")[0]
            return answer(("[[9]] [[3]]" if "It is fine" in first else "[[3]] [[9]]") if first else "fine [[8]]")
        cut = "What is 3 and" in text or "What is 5 and" in text
        return answer(
            f"{CUT} {body.get('seed', 0) % 7}" if cut else f"It is fine {body.get('seed', 0) % 7}.",
            finish="length" if cut else "stop",
        )

    with Fake(behave) as fake:
        spec = f"openai:x@{fake.url}"
        common = {"data": (rows,), "limit": 8, "quiet": True, "max_missing": 0.5}
        self_teach.main(
            self_teach.Config(**common, out=tmp_path / "s", agents=self_teach.Agents(spec, spec), keep=1.0, samples=2)
        )
        co_teach.main(
            co_teach.Config(
                **common,
                out=tmp_path / "c",
                agents=co_teach.Agents(other, (spec,), (spec,), suggester=None),
                sft_threshold=0.0,
            )
        )
        evol_answer.main(
            evol_answer.Config(**common, out=tmp_path / "a", agents=evol_answer.Agents(spec, spec), rounds=1)
        )
    for path in tmp_path.rglob("*.jsonl"):
        assert "meets mol" not in path.read_text(), path
    assert len(read_rows(tmp_path / "s" / "sft.jsonl")) == 6 and read_rows(tmp_path / "c" / "sft.jsonl")


REFUSALS = {
    "option": (
        400,
        {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens"},
        "refuses the option max_to",
    ),
    "model": (404, {"message": "The model does not exist", "code": "model_not_found"}, "does not know the model"),
    "address": (404, {"message": "Not Found"}, "does not know the model or the address"),
    "key": (403, {"message": "forbidden"}, "refuses the key"),
    "alike": (400, {"message": "no such thing here"}, r"refused alike: status 400: .*no such thing"),
}


# Case: all calls refused was an accuracy of 0 and a finished stage.
@pytest.mark.parametrize("kind", REFUSALS)
def test_an_endpoint_that_refuses_all_ends_the_run_with_its_reason(tmp_path, rows, other, kind):
    status, error, reason = REFUSALS[kind]
    with Fake(lambda *_: JSONResponse({"error": error}, status)) as fake:
        spec = f"openai:m@{fake.url}#concurrency=2,give_up=4"
        with pytest.raises(ValueError, match=f"agent m@.*{reason}"):
            accuracy.main(accuracy.Config(model=spec, data=rows, out=tmp_path / "o", quiet=True))
        assert not (tmp_path / "o" / "stage.json").exists() and len(fake.asked) <= 8
        models = (f"a={spec}", f"b={other}")
        with pytest.raises(ValueError, match=reason):
            arena.main(arena.Config(models=models, prompts=rows, out=tmp_path / "arena", quiet=True))
        who = co_teach.Agents(other, (spec,))
        with pytest.raises(ValueError, match=reason):
            co_teach.main(co_teach.Config(data=(rows,), out=tmp_path / "c", agents=who, quiet=True))
        assert not list(tmp_path.rglob("stage.json"))


def test_a_limit_under_its_other_name_and_no_temperature(tmp_path):
    with Fake(lambda *_: answer()) as fake:
        agent = EndpointAgent(
            "m", fake.url, Options(token_limit="max_completion_tokens", temperature=False, seed=False)
        )
        request = Request("answer", (Message("user", "q"),), temperature=1.0, max_tokens=7)
        assert responses(agent, [request])[0].ok
        assert set(fake.asked[0]) == {"model", "messages", "max_completion_tokens"}


def flaky(text):
    """One in forty answers is filtered, one is cut, one is refused; the others are right."""
    number = int(text.split()[2])
    if number == 7:
        return answer("", finish="content_filter")
    if number == 8:
        return answer("Let me see: 8 and", finish="length")
    if number == 9:
        return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
    return answer(f"The answer is {number + 1}.")


def test_accuracy_counts_missing_answers_beside_the_average_and_never_as_wrong(tmp_path, rows, other, capsys):
    with Fake(lambda body, _: flaky(last(body))) as fake:
        options = {"model": f"openai:m@{fake.url}", "data": rows, "out": tmp_path / "o"}
        with pytest.raises(
            ValueError, match=r"greedy answers of .*got 3 of 40 \(content_filter 1, length 1, status 400 1\)"
        ):
            accuracy.main(accuracy.Config(**options))
        result = accuracy.main(accuracy.Config(**options, max_missing=0.1))
    assert (result["accuracy"], result["correct"], result["total"], result["missing"]) == (1.0, 37, 37, 3)
    assert result["missing_reasons"]["greedy"] == {"content_filter": 1, "length": 1, "status 400": 1}
    assert "(37 of 37), 3 missing (content_filter 1, length 1, status 400 1)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert (
        lines[7]["greedy"] is None and lines[7]["missing"]["greedy"] == "content_filter" and "missing" not in lines[0]
    )
    # The file goes into an arena as it is, and what is missing there loses nothing.
    models = (f"a={tmp_path / 'o' / 'answers.jsonl'}#greedy", f"b={other}")
    judged = {"judge": ("reference:judge",), "references": "answers", "quiet": True, "max_missing": 0.1}
    report = arena.main(arena.Config(models=models, prompts=rows, out=tmp_path / "arena", **judged))
    (pair,) = report["pairwise"]
    assert pair["errors"] == 3 and pair["missing"]["answer: length"] == 1
    assert pair["wins"] + pair["losses"] + pair["ties"] == 37 and report["answer_errors"] == {"a": 3, "b": 0}


def test_kept_cut_answers_are_scored_as_they_are(tmp_path, rows):
    with Fake(lambda body, _: answer("The answer is 1. And", finish="length")) as fake:
        options = {"model": f"openai:m@{fake.url}", "data": rows, "out": tmp_path / "o", "quiet": True}
        result = accuracy.main(accuracy.Config(**options, on_length="keep"))
    assert (result["correct"], result["total"], result["missing"]) == (1, 40, 0)


def judge_in(words):
    """A judge that explains itself in many words, then rates, and keeps to its limit."""

    def behave(body, _):
        said = ["well"] * words + ["[[8]]", "[[6]]" if "#Answer B#:" in last(body) else ""]
        kept = said[: body["max_tokens"]]
        return answer(" ".join(kept), finish="stop" if len(kept) == len(said) else "length")

    return behave


# Case: a judge was cut at 256 tokens, without an option, and its ratings were missing without a reason.
def test_judges_have_room_to_explain_and_a_cut_verdict_says_so(tmp_path):
    with Fake(judge_in(600)) as fake:
        options = {"model": "world:expert", "judge": f"openai:j@{fake.url}", "n": 3, "quiet": True}
        report = mt_bench.main(mt_bench.Config(**options, out=tmp_path / "a"))
        assert report["overall"]["score"] == 8 and report["overall"]["missing"] == 0
        assert fake.asked[0]["max_tokens"] == 2048
        with pytest.raises(ValueError, match=r"ratings of openai:j.*6 of 6 \(length 6\); raise --judge-max-tokens"):
            mt_bench.main(mt_bench.Config(**options, out=tmp_path / "b", judge_max_tokens=256))
        assert not (tmp_path / "b" / "stage.json").exists()
        report = mt_bench.main(mt_bench.Config(**options, out=tmp_path / "b", judge_max_tokens=256, max_missing=1.0))
        assert report["overall"]["score"] is None and report["missing"] == {"judge: length": 6}
        assert report["repeats"] == {"rate": {"asked longer": 6}} and fake.asked[-1]["max_tokens"] == 512
        report = mt_bench.main(mt_bench.Config(**options, out=tmp_path / "d", judge_max_tokens=400))
        assert report["overall"]["rated"] == 6 and report["repeats"] == {"rate": {"asked longer": 6}}
        lines = [json.loads(line) for line in (tmp_path / "b" / "ratings.jsonl").read_text().splitlines()]
        assert all(line["error"].startswith("judge: length: the verdict was cut") for line in lines)
        battle = {"models": ("a=world:expert", "b=world:terse"), "judge": options["judge"], "n": 3, "quiet": True}
        with pytest.raises(ValueError, match=r"verdicts of openai:j.*\(length 3\); raise --judge-max-tokens"):
            arena.main(arena.Config(**battle, out=tmp_path / "c", judge_max_tokens=100))


def test_a_cut_verdict_counts_for_nothing_even_if_a_score_stands_in_it(tmp_path, rows, other):
    with Fake(lambda *_: answer("At first sight [[9]] [[2]], but then", finish="length")) as fake:
        who = evol_answer.Agents(other, f"openai:j@{fake.url}")
        options = {"data": (rows,), "agents": who, "limit": 3, "quiet": True, "rounds": 1, "max_missing": 1.0}
        report = evol_answer.main(evol_answer.Config(**options, out=tmp_path / "o"))
    assert report["rows_changed"] == 0 and not report["calls"].get("judge", {}).get("unreadable")


def test_a_question_without_a_first_answer_is_not_asked_on(tmp_path, other):
    questions = [{"question_id": i, "category": "c\nd", "turns": [f"What is {i} and", "Again?"]} for i in (7, 1, 2)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with Fake(lambda body, _: answer("ok") if len(body["messages"]) > 1 else flaky(last(body))) as fake:
        options = {"questions": tmp_path / "q.jsonl", "out": tmp_path / "o", "max_missing": 0.5}
        report = mt_bench.main(mt_bench.Config(model=f"openai:m@{fake.url}", judge=other, **options))
        assert len(fake.asked) == 5 and report["answer_errors"] == report["unanswered"] == 2
    assert report["overall"]["rated"] == 4 and report["missing"] == {"answer: content_filter": 2}
    lines = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["answers"] == [None, None] and lines[0]["missing"] == ["content_filter"] * 2


def test_what_replies_hold_beside_their_text_is_named_at_the_end_or_refused(tmp_path, rows, capsys):
    with Fake(lambda body, _: answer("The answer is 1.", reasoning_content="hm", citations=["x"])) as fake:
        options = {"data": rows, "limit": 4, "quiet": True}
        spec = f"openai:m@{fake.url}"
        accuracy.main(accuracy.Config(model=spec, out=tmp_path / "o", **options))
        assert "not used of 8 replies: citations (8), reasoning_content (8)" in capsys.readouterr().err
        with pytest.raises(ValueError, match="extras 4"):
            accuracy.main(accuracy.Config(model=f"{spec}#extras=error", out=tmp_path / "p", **options))


def test_the_ledger_serves_a_cut_reply_as_one(tmp_path):
    request = Request("answer", (Message("user", "q"),))
    with Fake(lambda *_: answer("half", finish="length")) as fake:
        for _ in range(2):
            ledger = Ledger(tmp_path / "l.sqlite")
            (reply,) = responses(EndpointAgent("m", fake.url), [request], ledger)
            assert (reply.text, reply.finish, reply.is_cut) == ("half", "length", True)
            ledger.close()
        assert len(fake.asked) == 1
