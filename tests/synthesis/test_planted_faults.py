"""Planted faults that no string rule sees: the classes of failure find them, and the method's search avoids them."""

import pytest

from benchmarks import evolving_failures
from wizard_engine.agents import prompts


def measured(place, dev_size):
    return evolving_failures.measured(*evolving_failures.MEASURES[place], dev_size=dev_size)


@pytest.fixture(scope="module")
def by_judge():
    return measured(2, 150)


def test_string_rules_see_no_planted_fault_and_change_no_method():
    found = measured(0, 60)
    assert all(count > 0 and hits == 0 for count, hits, _ in found.by_fault.values())
    assert (found.reported, found.stopped, found.method) == (0.0, "no failures", prompts.whole_prompt())
    assert found.before == found.after > 0.25


def test_classes_find_each_planted_fault_and_no_sound_evolution(by_judge):
    for count, hits, right in by_judge.by_fault.values():
        assert hits == count > 0 and right >= 0.8 * count
    sound, alarms = by_judge.alarms
    assert sound > 80 and alarms <= 0.03 * sound
    low, high = by_judge.interval
    assert low < by_judge.reported < high and by_judge.reported > 0.25


def test_search_by_classes_ends_with_a_method_that_avoids_the_faults(by_judge):
    assert by_judge.accepted >= 2 and by_judge.after < by_judge.before / 2
    assert sum(rule in by_judge.method.lower() for rule in evolving_failures.RULE_OF.values()) >= 2
    assert prompts.is_whole_prompt(by_judge.method)


def test_programs_alone_find_changed_numbers():
    found = measured(1, 60)
    count, hits, right = found.by_fault["number changed"]
    assert hits >= 0.8 * count and right == hits and found.alarms[1] == 0


def test_table_has_a_line_for_each_measure_and_one_of_its_search(by_judge, capsys):
    text = evolving_failures.tables([by_judge])
    assert text.count(by_judge.name) == 2 and f"{by_judge.before:.1%}" in text and by_judge.stopped in text
