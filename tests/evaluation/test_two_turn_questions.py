"""The MT-Bench protocol: two turns, references, counted failures; reading the published files."""

import json

import pytest

from wizard_engine import world
from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Reply
from wizard_engine.data.records import Message
from wizard_engine.evaluation.mt_bench import TurnRating, mean_rating, mt_bench, rate, read_rating
from wizard_engine.evaluation.questions import Question, read_questions

QUESTIONS = [
    Question("81", "writing", ("Write.", "Shorter.")),
    Question("111", "math", ("1+1?", "And 2+2?"), ("2", "4")),
    Question("9", "math", ("3+3?", "And 4+4?")),
]


class Judge:
    """Rates by a function of the fields; keeps them."""

    name, fingerprint = "judge", "judge/1"

    def __init__(self, reply):
        self.reply, self.seen, self.seeds = reply, [], []

    def respond(self, requests):
        fields = [prompts.parse("rate", request.messages[0].content) for request in requests]
        self.seen += fields
        self.seeds += [request.seed for request in requests]
        return [self.reply(item) for item in fields]


def _constant(text):
    return Judge(lambda fields: Reply(text))


def test_mt_bench_second_turn_holds_the_models_own_first_answer():
    asked = []

    def answers(conversations, temperature):
        asked.append((temperature, conversations))
        return [f"answer to {messages[-1].content}" for messages in conversations]

    judge = _constant("fine [[7]]")
    result = mt_bench(answers, QUESTIONS, judge=judge)
    assert [temperature for temperature, _ in asked] == [0.0, 0.7, 0.0, 0.7]
    first = (Message("user", "Write."), Message("assistant", "answer to Write."), Message("user", "Shorter."))
    assert asked[3][1] == [first]
    assert result.answers[1] == ("answer to 1+1?", "answer to And 2+2?")
    assert result.overall.score == 7 and result.overall.rated == 6
    by_turn = [next(x for x in judge.seen if x["instruction"] == turn) for turn in ("Write.", "Shorter.")]
    assert by_turn[0]["history"] == "" and by_turn[0]["answer"] == "answer to Write."
    assert prompts.parse_dialogue(by_turn[1]["history"]) == first[:2] and by_turn[1]["answer"] == "answer to Shorter."


def test_mt_bench_shows_references_where_there_are_any():
    judge = _constant("[[5]]")
    rate(QUESTIONS, [("a", "b")] * 3, judge=judge)
    assert [fields["reference"] for fields in judge.seen] == ["", "", "2", "Turn 1: 2\n\nTurn 2: 4", "", ""]


def test_mt_bench_means_by_turn_and_category():
    scores = {"a1": 4, "a2": 8, "b1": 10, "b2": 6, "c1": 1, "c2": 1}
    judge = Judge(lambda fields: Reply(f"[[{scores[fields['answer']]}]]"))
    result = rate(QUESTIONS, [("a1", "a2"), ("b1", "b2"), ("c1", "c2")], judge=judge)
    assert result.overall.score == 5 and [turn.score for turn in result.turns] == [5, 5]
    assert {name: mean.score for name, mean in result.categories.items()} == {"writing": 6, "math": 4.5}
    assert result.overall.ci95[0] < 5 < result.overall.ci95[1]


def test_mt_bench_counts_failures_and_never_drops_them_in_silence():
    def reply(fields):
        return {"a": Reply("[[8]]"), "b": Reply("no number"), "c": Reply("", "time out")}[fields["answer"]]

    result = rate(QUESTIONS, [("a", "a"), ("a", "b"), ("c", "a")], judge=Judge(reply))
    assert (result.call_errors, result.parse_errors) == (1, 1)
    assert result.overall.score == 8 and (result.overall.rated, result.overall.missing) == (4, 2)
    assert result.score_missing_as_1 == pytest.approx((4 * 8 + 2) / 6)
    assert (result.turns[0].missing, result.categories["math"].missing, result.categories["writing"].missing) == (
        1,
        2,
        0,
    )
    reasons = [rating.error for rating in result.ratings if rating.error]
    assert reasons[0].startswith("judge: unreadable: ") and reasons[1] == "judge: time out"
    assert result.missing == {"judge: unreadable": 1, "judge: time out": 1}


def test_mt_bench_without_any_rating_has_no_mean():
    result = rate(QUESTIONS, [("a", "a")] * 3, judge=_constant("none"))
    assert result.overall.score is None and result.overall.missing == 6 and result.score_missing_as_1 == 1.0


def test_mt_bench_repeats_use_seeds_of_their_own():
    judge = _constant("[[6]]")
    result = rate(QUESTIONS, [("a", "b")] * 3, judge=judge, repeats=2, seed=5)
    assert sorted(judge.seeds) == [5] * 6 + [6] * 6 and result.overall.rated == 12


def test_mt_bench_names_wrong_published_references():
    assert "111" in rate(QUESTIONS, [("a", "b")] * 3, judge=_constant("[[6]]")).notes[0]
    assert rate(QUESTIONS[2:], [("a", "b")], judge=_constant("[[6]]")).notes == ()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("fine [[7.5]]", 7.5),
        ("first [[2]], no, [[9]]", 9),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[7]", 7),
        ("as in [7]", None),
        ("", None),
    ],
)
def test_read_rating_takes_the_last_score_in_range(text, score):
    assert read_rating(Reply(text))[0] == score


def test_mean_rating_resamples_questions_not_ratings():
    twins = [TurnRating(str(q), "c", turn, 0, float(q % 2 * 9 + 1)) for q in range(20) for turn in (1, 2)]
    wide = mean_rating(twins, seed=0).ci95
    single = mean_rating([TurnRating(str(i), "c", 1, 0, rating.score) for i, rating in enumerate(twins)], seed=0).ci95
    assert wide[1] - wide[0] > 1.2 * (single[1] - single[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": []}, "questions: expected at least one"),
        ({"answers": lambda conversations, temperature: []}, "answer_fn: expected"),
        ({"repeats": 0}, "repeats: expected at least 1"),
    ],
)
def test_mt_bench_refuses_bad_arguments(arguments, message):
    answers = arguments.get("answers", lambda conversations, temperature: ["x"] * len(conversations))
    questions = arguments.get("questions", QUESTIONS)
    with pytest.raises(ValueError, match=message):
        mt_bench(answers, questions, judge=_constant("[[5]]"), repeats=arguments.get("repeats", 1))


def test_rate_refuses_answers_of_another_number():
    with pytest.raises(ValueError, match="expected a pair for each of 3"):
        rate(QUESTIONS, [("a", "b")], judge=_constant("[[5]]"))


def test_mt_bench_with_the_worlds_judge_prefers_right_answers():
    questions = world.mt_questions(24, seed=1)
    right = rate(questions, [q.references for q in questions], judge=world.program("world:judge"))
    wrong = rate(questions, [("The answer is 0.", "The answer is 0.")] * 24, judge=world.program("world:judge"))
    assert right.overall.score > 8.5 and wrong.overall.score < 5 and right.overall.missing == 0


# ---- files ----------------------------------------------------------------------------------------------------------


def test_read_questions_of_the_published_files(shared_data):
    folder = shared_data / "mt_bench"
    questions = read_questions(folder / "question.jsonl", folder / "reference_answer_gpt-4.jsonl")
    assert len(questions) == 80 and len({question.category for question in questions}) == 8
    with_references = [question for question in questions if question.references]
    assert [question.id for question in with_references] == [str(number) for number in range(101, 131)]
    assert {question.category for question in with_references} == {"math", "reasoning", "coding"}
    assert all(len(question.references) == 2 for question in with_references)


def test_read_questions_takes_own_references_but_not_the_published_field(tmp_path):
    path = tmp_path / "q.jsonl"
    line = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    path.write_text(
        "\n".join(json.dumps(line | more) for more in ({"references": ["c", "d"]}, {"reference": ["e", "f"]}))
    )
    assert [question.references for question in read_questions(path)] == [("c", "d"), ()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"q\.jsonl:1: file: expected at least one question"),
        (b'{"question_id": 1', r"q\.jsonl:1: json: "),
        (b'\n["x"]', r"q\.jsonl:2: json: expected an object, got str"),
        (b'{"category": "m", "turns": ["a", "b"]}', r"q\.jsonl:1: question_id: "),
        (b'{"question_id": 1, "category": "m", "turns": ["a"]}', r"q\.jsonl:1: turns: expected two texts"),
        (b'{"question_id": 1, "category": "m", "turns": ["a", 2]}', r"q\.jsonl:1: turns: expected two texts"),
        (b'{"question_id": 1, "category": "\xff"}', r"q\.jsonl:1: json: expected UTF-8"),
    ],
)
def test_read_questions_names_file_line_and_field(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_questions(path)
