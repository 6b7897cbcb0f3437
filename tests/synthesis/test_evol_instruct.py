"""Evol-Instruct: elimination, the pool, lineage, several turns; all of it in batches and repeatable."""

import copy

import pytest
from fake_agents import FAILED, Fake, listed

from wizard_engine import synthesis
from wizard_engine.agents import Limits
from wizard_engine.data.records import Conversation, Message, conversation
from wizard_engine.synthesis.elimination import detect_failure, instruction_fault, response_fault


def evolve_instructions(source_rows, **options):
    """The result with all rows: the given ones, then those that were made."""
    out = listed(synthesis.evolve_instructions(source_rows, **options))
    out.rows = [*source_rows, *out.made]
    return out


def agents(evolve=None, answer=None, compare=None):
    return {
        "evolver": Fake("evolver", evolve=evolve or (lambda r, f: f"{f['instruction']} +{f['operator']}")),
        "answerer": Fake("answerer", answer=answer or (lambda r, m: f"Answer to {m[-1].content}")),
        "judge": Fake("judge", compare=compare or (lambda r, f: "Not Equal")),
    }


def rows(number=4):
    attributes = {"source": "forum", "topic": "farm", "length": 3, "world": {"style": "terse"}}
    return [conversation(f"Question {i}", f"Old {i}", **attributes) for i in range(number)]


def test_evolved_rows_follow_their_parents_with_lineage():
    source_rows = rows(3)
    before = copy.deepcopy([row.to_json() for row in source_rows])
    out = evolve_instructions(source_rows, **agents(), rounds=2, operators=["steps"], seed=1)
    assert out.rows[:3] == source_rows and [row.to_json() for row in source_rows] == before
    first, second = out.rows[3:6], out.rows[6:]
    assert [row.instruction for row in first] == [f"Question {i} +steps" for i in range(3)]
    assert [row.answer for row in second] == [f"Answer to Question {i} +steps +steps" for i in range(3)]
    assert second[0].lineage == {
        "parents": [first[0].id],
        "operator": "steps",
        "agent": "evolver",
        "answerer": "answerer",
        "round": 2,
    }
    assert second[0].attributes == {"source": "forum", "topic": "farm", "evolutions": 2}
    assert out.eliminated == []
    assert out.statistics["rounds"] == [{"pool": 3, "kept": 3}] * 2


def test_evolving_in_breadth_does_not_keep_the_topic():
    out = evolve_instructions(rows(1), **agents(), operators=["breadth"])
    assert out.rows[1].attributes == {"source": "forum", "evolutions": 1}


def test_every_round_makes_one_batch_a_task():
    team = agents()
    evolve_instructions(rows(5), **team, rounds=2)
    assert team["evolver"].batches == [("evolve", 5)] * 2
    assert team["answerer"].batches == [("answer", 5)] * 2
    assert team["judge"].batches == [("compare", 5)] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"evolve": lambda r, f: "  "}, "call failed"),
        ({"evolve": lambda r, f: f" {f['instruction']}\n"}, "unchanged"),
        ({"evolve": lambda r, f: f"#Rewritten Prompt# {f['instruction']} and more"}, "template words"),
        ({"evolve": lambda r, f: f"Take the given prompt {f['instruction']}"}, "template words"),
        ({"evolve": lambda r, f: "Question 1"}, "already known"),
        ({"evolve": lambda r, f: FAILED}, "call failed"),
        ({"compare": lambda r, f: "Equal"}, "no information gain"),
        ({"compare": lambda r, f: "perhaps"}, "call failed"),
        ({"compare": lambda r, f: FAILED}, "call failed"),
        ({"answer": lambda r, m: FAILED}, "call failed"),
        ({"answer": lambda r, m: "I am sorry, I can not do that."}, "refused"),
        ({"answer": lambda r, m: "... !"}, "empty response"),
        ({"answer": lambda r, m: "It is what it is."}, "empty response"),
        ({"answer": lambda r, m: "What do you mean?"}, "stagnant"),
        ({"answer": lambda r, m: "Sure, which one?"}, "under-qualified"),
        ({"answer": lambda r, m: "What is it? Please provide the numbers."}, "lost information"),
    ],
)
def test_elimination_names_its_reason_and_returns_the_parent_to_the_pool(change, reason):
    team = agents(**change)
    out = evolve_instructions(rows(1) + rows(2)[1:], **team, rounds=2, operators=["deepen"])
    assert len(out.rows) == 2
    assert {item["reason"] for item in out.eliminated} <= {reason, "unchanged"}
    assert out.eliminated[0]["reason"] == reason
    assert out.statistics["rounds"] == [{"pool": 2, "kept": 0}] * 2
    assert [request.messages for request in team["evolver"].requests[:2]] == [
        request.messages for request in team["evolver"].requests[2:]
    ]
    counts = out.statistics["operators"]["deepen"]
    assert counts["tried"] == 4 == sum(number for name, number in counts.items() if name != "tried")


def test_failed_rows_are_tried_again_with_another_draw():
    first_seed = []

    def stubborn(request, fields):
        first_seed.append(request.seed)
        return fields["instruction"] if request.seed == first_seed[0] else fields["instruction"] + " harder"

    out = evolve_instructions(rows(2), **agents(evolve=stubborn), rounds=2)
    assert out.statistics["rounds"] == [{"pool": 2, "kept": 0}, {"pool": 2, "kept": 2}]
    assert [row.lineage["round"] for row in out.rows[2:]] == [2, 2]


def test_elimination_of_equal_evolutions_keeps_the_first():
    out = evolve_instructions(rows(3), **agents(evolve=lambda r, f: "The same new question"))
    assert len(out.rows) == 4
    assert [item["reason"] for item in out.eliminated] == ["already known"] * 2


def test_an_eliminated_text_may_come_again_later():
    verdicts = iter(["Equal", "Not Equal"])
    team = agents(evolve=lambda r, f: "New question", compare=lambda r, f: next(verdicts))
    out = evolve_instructions(rows(1), **team, rounds=2)
    assert [row.instruction for row in out.rows] == ["Question 0", "New question"]


def test_method_reaches_the_evolver_and_temperature_too():
    team = agents()
    evolve_instructions(rows(1), **team, method="1. Do it.", temperature=0.7, limits=Limits(evolve=99))
    (request,) = team["evolver"].requests
    assert "1. Do it." in request.messages[0].content
    assert (request.temperature, request.max_tokens) == (0.7, 99)


def two_turns():
    messages = [("system", "Be brief."), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    return Conversation(tuple(Message(*message) for message in messages))


def contents(row):
    return [message.content for message in row.messages]


def test_each_turn_of_a_conversation_is_evolved_in_its_new_context():
    team = agents(answer=lambda r, m: "|".join(message.content for message in m))
    out = evolve_instructions([two_turns()], **team, operators=["steps"])
    first = "Be brief.|U1 +steps"
    assert contents(out.rows[1]) == ["Be brief.", "U1 +steps", first, "U2 +steps", f"{first}|{first}|U2 +steps"]
    assert out.rows[1].lineage["operator"] == "steps+steps"


def test_a_turn_that_fails_is_answered_anew_after_a_change_only():
    only_first = agents(evolve=lambda r, f: "V1" if f["instruction"] == "U1" else f["instruction"])
    out = evolve_instructions([two_turns()], **only_first)
    assert contents(out.rows[1]) == ["Be brief.", "V1", "Answer to V1", "U2", "Answer to U2"]
    only_second = agents(evolve=lambda r, f: "V2" if f["instruction"] == "U2" else f["instruction"])
    out = evolve_instructions([two_turns()], **only_second)
    assert contents(out.rows[1]) == ["Be brief.", "U1", "A1", "V2", "Answer to V2"]


def test_a_conversation_ends_before_a_turn_without_a_good_answer():
    team = agents(
        evolve=lambda r, f: "V1" if f["instruction"] == "U1" else f["instruction"],
        answer=lambda r, m: "Please provide the number." if m[-1].content == "U2" else "Fine answer",
    )
    later = (Message("user", "U3"), Message("assistant", "A3"))
    row = two_turns()
    out = evolve_instructions([row.replace(messages=row.messages + later)], **team)
    assert contents(out.rows[1]) == ["Be brief.", "V1", "Fine answer"]


def test_evolving_repeats_exactly_and_depends_on_the_seed():
    one, two = (evolve_instructions(rows(12), **agents(), rounds=2, seed=5) for _ in range(2))
    assert one == two
    other = evolve_instructions(rows(12), **agents(), rounds=2, seed=6)
    assert [row.instruction for row in other.rows] != [row.instruction for row in one.rows]
    assert len({row.lineage["operator"] for row in one.rows[12:]}) > 3


def test_evolving_refuses_unknown_operators_and_negative_rounds():
    with pytest.raises(ValueError, match=r"operators: expected some of constraint, .*, got shrink"):
        evolve_instructions(rows(1), **agents(), operators=["shrink"])
    with pytest.raises(ValueError, match="rounds: expected 0 or more, got -1"):
        evolve_instructions(rows(1), **agents(), rounds=-1)


def test_evolving_nothing_gives_nothing():
    assert evolve_instructions([], **agents(), rounds=2).rows == []
    assert evolve_instructions(rows(2), **agents(), rounds=0).rows == rows(2)


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("Understood. Shall I go on?", "stagnant"),
        ("thank you for that, anything else?", "stagnant"),
        ("That is correct, is it not?", "stagnant"),
        ("Great! What next?\n", "stagnant"),
        ("What is 4?", "stagnant"),
        ("Whatever you like?", None),
        ("Sure. Which number?", "under-qualified"),
        ("Sure: 4.", None),
        ("Great, it is 4.", None),
        ("Could you please\nprovide the price", "lost information"),
        ("The answer is 4.", None),
        ("", None),
    ],
)
def test_failure_detector_follows_the_paper_on_responses(response, failure):
    assert detect_failure(response) == failure


def test_refusals_are_short():
    assert response_fault("Sorry, no.") == "refused"
    assert response_fault("Tom is sorry. " + "word " * 80) is None
    assert response_fault("19.") is None
    assert response_fault("七。") is None


def test_template_words_of_the_parent_are_accepted():
    assert instruction_fault("Explain the given prompt", "Explain the given prompt in French") is None
    assert instruction_fault("Count to 4", "Count with C# and F# to 4") is None
    assert instruction_fault("Count", "Count #Given Instruction# to 4") == "template words"
