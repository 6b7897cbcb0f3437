"""Failure rates of methods: counts, intervals, and when one method is better than another one."""

import pytest
from fake_agents import FAILED, Fake

from wizard_engine.agents.calls import Calls
from wizard_engine.data.proportions import sign_test
from wizard_engine.synthesis.failure_rate import Checks, Measured, Outcome, chance, is_better, shared_checks
from wizard_engine.synthesis.failures import Failure, Step

LOST, LEAKED = Failure("facts lost", "program", "gone: 7"), Failure("answer leaked", "judge", "says 5")


def measured(*failures, method="m"):
    return Measured(method, tuple(Outcome(Step("a", "b"), f if f is None else tuple(f)) for f in failures))


def rows(failed, passed):
    return measured(*[[LOST]] * failed, *[[]] * passed)


def test_counts_name_rows_by_class_and_leave_out_what_is_missing():
    counts = measured([LOST, LOST, LEAKED], [LEAKED], [], None).counts()
    assert counts["failure_rate"] == pytest.approx(2 / 3) and counts["missing"] == 1
    assert counts["reasons"] == {"answer leaked": 2, "facts lost": 1}
    assert counts["found_by"] == {"judge": 2, "program": 1}
    low, high = counts["ci95"]
    assert 0.2 < low < 2 / 3 < high < 0.95
    assert measured(None).counts()["failure_rate"] == 1.0


def test_sign_test_by_hand():
    assert sign_test(3, 0) == 1 / 8 and sign_test(2, 1) == 1 / 2 and sign_test(0, 0) == 1.0
    assert sign_test(9, 1) == pytest.approx(11 / 1024)


def test_rows_on_which_both_fail_say_nothing():
    old = measured([LOST], [LOST], [LOST], [], None)
    new = measured([LOST], [], [], [LEAKED], [])
    assert chance(new, old) == sign_test(2, 1)


def test_method_within_noise_replaces_none():
    old = rows(10, 40)
    assert is_better(rows(9, 41), old, 0.0, 5) and not is_better(rows(9, 41), old, 0.95, 5)
    assert is_better(rows(0, 50), old, 0.95, 5)
    # Seven rows mended and none broken: enough for one candidate, and for the best of five.
    assert chance(rows(3, 47), old) == 1 / 128
    assert is_better(rows(3, 47), old, 0.95, 5) and not is_better(rows(3, 47), old, 0.95, 7)
    assert not is_better(rows(10, 40), old, 0.0, 1)


# Catches: a method that is as good in the mean, and fails on other rows.
def test_equal_rates_on_other_rows_are_no_better():
    old, new = rows(10, 10), measured(*[[]] * 9, *[[LOST]] * 9, [], [])
    assert new.rate < old.rate and not is_better(new, old, 0.95, 1)


def checked(step, *, judge=None, answer="The answer is 4.", measure="classes"):
    calls = Calls()
    agent = Fake("answerer", answer=lambda request, messages: answer)
    checks = Checks(calls, measure, agent, judge, 0)

    async def run():
        failures = await checks.of_text(step)
        answered = await checks.answered(step)
        return failures, answered and await checks.of_response(answered)

    return calls.scheduler.run(run())


HARDER = Step("Add 1 and 2.", "Add 1 and 2, and take away 7 from ten times that.", "steps")


def test_judge_is_asked_where_no_program_finds_anything():
    said = '{"assessment": "x", "failures": [{"class": "contradiction", "reason": "no"}, {"class": "not answerable"}]}'
    judge = Fake("judge", diagnose=lambda request, fields: said)
    assert checked(HARDER, judge=judge) == ([], [Failure("not answerable", "judge", "")])
    assert judge.requests[0].schema and "The answer is 4." in judge.requests[0].messages[0].content
    lost = Step("Add 1 and 2.", "Add 1 and 5, and take away 7.", "steps")
    assert [failure.kind for failure in checked(lost)[0]] == ["facts lost"]
    assert checked(HARDER, judge=judge, answer="Please provide them.")[1] == [
        Failure("facts lost", "rules", "lost information")
    ]
    assert len(judge.requests) == 1


def test_verdict_that_cannot_be_read_is_missing_and_no_failure():
    for said in ("Well.", FAILED):
        assert checked(HARDER, judge=Fake("judge", diagnose=lambda request, fields, said=said: said)) == ([], None)


def test_rules_alone_see_no_lost_fact():
    lost = Step("Add 1 and 2.", "Add 1 and 5, and take away 7.", "steps")
    judge = Fake("judge", diagnose=lambda request, fields: "facts lost")
    assert checked(lost, judge=judge, measure="rules") == ([], []) and judge.requests == []


def test_examples_and_checks_show_what_was_found():
    (example, other) = measured([LOST, LEAKED], []).examples()
    assert example["class"] == "facts lost" and example["evolved"] == "b" and other["by"] == "judge"
    assert shared_checks([[LOST], [], [LEAKED]]) == "stage 1: facts lost (gone: 7); stage 3: answer leaked (says 5)"
