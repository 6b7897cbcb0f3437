"""What agents are told besides the texts to judge or rewrite: conversation, criteria, reference."""

from fake_agents import Fake, answerer, honest_judge, listed

from wizard_engine import synthesis
from wizard_engine.agents import prompts
from wizard_engine.data.records import Conversation, Message

CHAT = (
    Message("user", "Hello"),
    Message("assistant", "Hi"),
    Message("user", "Add 2 and 3."),
    Message("assistant", "6 q4"),
)
ROW = Conversation(CHAT, {"skill": "addition", "reference": "5"})


def told(agent, task):
    """The fields of the prompts of a task that an agent got."""
    return [prompts.parse(task, request.messages[0].content) for request in agent.asked(task)]


def test_rewriter_and_judge_of_evol_answer_see_conversation_reference_and_criteria():
    judge, rewriter = honest_judge(), Fake("rewriter", rewrite=lambda request, fields: "5 q8")
    listed(synthesis.evolve_answers([ROW], rewriter=rewriter, judge=judge, rounds=1))
    (fields,) = told(rewriter, "rewrite")
    assert (fields["history"], fields["reference"]) == (prompts.dialogue(CHAT[:2]), "5")
    assert {(f["history"], f["criteria"], f["reference"]) for f in told(judge, "judge")} == {
        (prompts.dialogue(CHAT[:2]), "math", "5")
    }


def test_refused_rewrite_is_unreadable_and_an_unchanged_refusal_is_not():
    refusal = "I'm sorry, but I can't help with that."
    rewriter = Fake("rewriter", rewrite=lambda request, fields: refusal)
    for answer, reason in (("6 q4", "call failed"), (refusal, "unchanged")):
        row = Conversation((Message("user", "Add 2 and 3."), Message("assistant", answer)), {})
        out = listed(synthesis.evolve_answers([row], rewriter=rewriter, judge=honest_judge(), rounds=1))
        assert [link["reason"] for link in out.chains[0]["links"]] == [reason]


def test_lessons_of_co_teaching_see_the_conversation():
    judge = honest_judge()
    suggester = Fake("suggester", suggest=lambda request, fields: "Suggestion: check the sum.")
    rewriter = Fake("rewriter", rewrite=lambda request, fields: "Here is the improved answer:\n5 q9")
    ours, rival = answerer("ours", lambda text, request: "6 q2"), answerer("rival", lambda text, request: "5 q8")
    team = {"ours": ours, "rivals": [rival], "judge": judge, "suggester": suggester, "rewriter": rewriter}
    out = listed(synthesis.co_teach([ROW], **team))
    history = prompts.dialogue(CHAT[:2])
    assert [(fields["history"], fields["reference"]) for fields in told(suggester, "suggest")] == [(history, "5")]
    (fields,) = told(rewriter, "rewrite")
    assert (fields["history"], fields["reference"], fields["suggestion"]) == (history, "5", "check the sum.")
    assert {(f["criteria"], f["reference"]) for f in told(judge, "judge")} == {("math", "5")}
    assert [lesson.answer for lesson in out.sft] == ["5 q9"]


def test_ratings_of_self_teaching_have_criteria_and_reference_of_the_row():
    judge = honest_judge()
    student = answerer("student", lambda text, request: f"q{request.seed % 7 + 2}")
    listed(synthesis.self_teach([ROW], student=student, judge=judge, samples=3))
    assert {fields["criteria"] for fields in told(judge, "rate")} == {"math"}
    assert {fields["reference"] for fields in told(judge, "rate")} == {"5"}
    assert {(f["criteria"], f["reference"]) for f in told(judge, "judge")} == {("math", "5")}


def test_judges_of_rows_without_a_skill_have_criteria_by_their_text():
    row = Conversation(
        (Message("user", "Write a Python function that sorts."), Message("assistant", "def f(): q4")), {}
    )
    judge, rewriter = honest_judge(), Fake("rewriter", rewrite=lambda request, fields: "def g(): q8")
    listed(synthesis.evolve_answers([row], rewriter=rewriter, judge=judge, rounds=1))
    ours, rival = answerer("ours", lambda text, request: "6 q2"), answerer("rival", lambda text, request: "5 q8")
    listed(synthesis.co_teach([row], ours=ours, rivals=[rival], judge=judge))
    student = answerer("student", lambda text, request: f"q{request.seed % 7 + 2}")
    listed(synthesis.self_teach([row], student=student, judge=judge, samples=3))
    for task, least in (("judge", 5), ("rate", 2)):
        criteria = [fields["criteria"] for fields in told(judge, task)]
        assert set(criteria) == {"coding"} and len(criteria) >= least


def test_evolutions_of_self_teaching_have_no_reference():
    judge, evolver = honest_judge(), Fake("evolver", evolve=lambda request, fields: "Add 2 and 3 and 4, then halve it.")
    student = answerer("student", lambda text, request: f"q{request.seed % 7 + 2}")
    listed(synthesis.self_teach([ROW], student=student, judge=judge, evolver=evolver, samples=3))
    by_instruction = {fields["instruction"]: fields["reference"] for fields in told(judge, "rate")}
    assert by_instruction == {"Add 2 and 3.": "5", "Add 2 and 3 and 4, then halve it.": ""}


def test_labellers_see_the_reference_and_rows_made_keep_it():
    row = Conversation(CHAT[2:], ROW.attributes)
    labeller = Fake("labeller", label=lambda request, fields: "1")
    student = answerer("student", lambda text, request: "5")
    rows = listed(synthesis.label_processes([row], student=student, labeller=labeller, samples=1))
    assert [fields["reference"] for fields in told(labeller, "label")] == ["5"]
    assert [made.attributes["reference"] for made in rows] == ["5"]


def test_later_turns_of_a_chat_have_no_reference():
    judge, user = honest_judge(), Fake("user", user=lambda request, messages: "And if you add 4 as well?")
    ours, rival = answerer("ours", lambda text, request: "6 q2"), answerer("rival", lambda text, request: "5 q8")
    suggester = Fake("suggester", suggest=lambda request, fields: "Check the sum.")
    rewriter = Fake("rewriter", rewrite=lambda request, fields: "5 q9")
    team = {"ours": ours, "rivals": [rival], "judge": judge, "user": user, "suggester": suggester, "rewriter": rewriter}
    out = listed(synthesis.co_teach([ROW], chat_turns=2, **team))
    for agent, task in ((judge, "judge"), (suggester, "suggest"), (rewriter, "rewrite")):
        seen = {fields["instruction"]: fields["reference"] for fields in told(agent, task)}
        assert seen == {"Add 2 and 3.": "5", "And if you add 4 as well?": ""}
    for rows in (out.sft, out.preferences):
        assert [row.attributes.get("reference") for row in rows] == ["5", None]
