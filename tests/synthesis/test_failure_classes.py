"""Detectors of failed evolutions: what each finds, and what none of them may find."""

import pytest

from wizard_engine.agents import prompts
from wizard_engine.synthesis.failures import (
    FAILURE_CLASSES,
    Failure,
    Step,
    fields,
    names,
    numbers,
    response_failures,
    text_failures,
)

APPLES = "Tom has 12 apples and buys 7 more at the market. How many apples does Tom have now?"
ANSWER = "12 + 7 = 19\nThe answer is 19."
HARDER = "Tom has 12 apples, buys 7 more at the market and eats 3. How many apples does Tom have now?"
CAPITAL = "Which city is the capital of Peru, and on which river does it lie?"
SPANISH = "Tom tiene 12 manzanas y compra 7 más en el mercado. ¿Cuántas manzanas tiene Tom ahora?"

FOUND = {
    "task changed": [(APPLES, "Write an ode about a lonely lighthouse.", "constraint")],
    "facts lost": [
        (APPLES, HARDER.replace("12", "15"), "constraint"),
        (APPLES, HARDER.replace("Tom", "the boy"), "steps"),
        (APPLES, HARDER.replace("7 more", "some more"), "deepen"),
        (
            "Six friends share 30 sweets. How many does each get?",
            "Eight friends share 30 sweets fairly. How many each?",
            "",
        ),
        (APPLES, HARDER.replace("12 apples", "3 bags of 5 apples"), "complicate"),
        (
            "Mia sells 1,250 hats for $4.50 each. What does she earn?",
            "Mia sells 125 hats for $4.50 each and pays 9. What?",
            "",
        ),
    ],
    "answer leaked": [
        (APPLES, HARDER.replace("How", "So he had 19 before he ate. How"), "steps"),
        (CAPITAL, "Lima lies on a river. Which city is the capital of Peru, and which river is it on?", "steps"),
    ],
    "not harder": [
        (APPLES, "How many apples does Tom have now? Tom has 12 apples and buys 7 more at the market.", "steps"),
        (f"{APPLES} Explain, in at least 3 steps, and without a table.", APPLES.replace("at the market", ""), "steps"),
    ],
    "copied headings": [
        (APPLES, f"Operator: steps\n{HARDER}", "steps"),
        (APPLES, f"{HARDER} Change one thing only; add about 10 to 20 words, never more.", "steps"),
        (APPLES, f"#Given Prompt#: {HARDER}", "steps"),
    ],
    "other language": [(APPLES, f"{SPANISH} Explica cada paso de la solución con una frase.", "steps")],
}
SOUND = [
    (APPLES, HARDER, "constraint"),
    (APPLES, HARDER.replace("7 more", "seven more"), "constraint"),
    (APPLES, HARDER.replace("12 apples", "3 bags of 4 apples"), "complicate"),
    (APPLES, "A gardener plants 4 rows of 6 tulips. How many tulips are there?", "breadth"),
    (SPANISH, SPANISH.replace("mercado", "mercado y come 3"), "steps"),
    (
        "Someone has 5 things. Someone gets 3 more. How many things?",
        "Mia has 5 hats. She gets 3 more and sells 2. How many?",
        "",
    ),
    (
        "1. Name a fruit.\n2. Name a colour.",
        "Name a fruit and a colour that it can have, and say why it has it.",
        "deepen",
    ),
    (
        "Sort a list in Python.",
        "Sort a list of pairs in Python by the second item, keeping ties in order.",
        "constraint",
    ),
    ("Read a book once a day.", "Read a book every day and write down two sentences about it.", "steps"),
    (CAPITAL, "Which city is the capital of Peru, on which river does it lie, and who founded it?", "deepen"),
]


def step(parent, child, operator="steps", **more):
    answer = "Lima" if parent == CAPITAL else ANSWER if parent == APPLES else ""
    return Step(parent, child, operator, reference=more.pop("reference", answer), **more)


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in FOUND.items() for case in cases])
def test_failure_is_found_under_its_class(kind, case):
    found = text_failures(step(*case))
    assert kind in [failure.kind for failure in found] and all(failure.detail for failure in found)
    assert {failure.kind for failure in found} <= set(FAILURE_CLASSES)


@pytest.mark.parametrize("case", SOUND)
def test_sound_evolutions_have_no_failure(case):
    assert text_failures(step(*case)) == []


def test_answer_leaks_where_it_stands_as_a_result_alone():
    def leaks(child, reference=ANSWER):
        return "answer leaked" in [failure.kind for failure in text_failures(step(APPLES, child, reference=reference))]

    assert leaks(HARDER.replace("How", "In total that makes nineteen; the result is 19. How"))
    assert not leaks(HARDER.replace("eats 3", "gives 19 children one each"))  # a number by chance
    assert not leaks(HARDER.replace("How", "So he had 19. How"), reference="The answer is 20.")
    assert not leaks(HARDER, reference="")
    assert not leaks(HARDER.replace("How", "Does that make 19? How"))
    assert leaks(HARDER.replace("How", "He keeps 4812 of them. How"), reference="4812")  # no chance


def test_word_of_the_parent_is_no_leaked_answer():
    assert (
        text_failures(step("Is Lima in Peru?", "Is Lima in Peru or in Chile, and since when?", reference="Lima")) == []
    )


@pytest.mark.parametrize(
    ("response", "kind", "by"),
    [
        ("What do you mean? Please provide the numbers.", "facts lost", "rules"),
        ("Great, do you have more?", "not harder", "rules"),
        ("Sure, which one?", "not answerable", "rules"),
        ("Sorry, I cannot do that.", "not answerable", "rules"),
        ("It cannot be determined how many apples there are.", "not answerable", "program"),
        ("There is not enough information to say.", "not answerable", "program"),
    ],
)
def test_response_shows_what_the_texts_do_not(response, kind, by):
    (found,) = response_failures(step(APPLES, HARDER, response=response))
    assert (found.kind, found.by) == (kind, by)


def test_own_result_in_the_child_is_found_by_its_response():
    child = HARDER.replace("How", "Thus 16 are left. How")
    assert text_failures(step(APPLES, child)) == []
    assert response_failures(step(APPLES, child, response="12+7-3=16\nThe answer is 16.")) == [
        Failure("answer leaked", "program", "states 16")
    ]
    assert response_failures(step(APPLES, HARDER, response="12+7-3=16\nThe answer is 16.")) == []


def test_string_rules_go_first_and_alone():
    assert text_failures(step(APPLES, f" {APPLES.upper()} ")) == [Failure("not harder", "rules", "unchanged")]
    assert text_failures(step(APPLES, "\n")) == [Failure("not answerable", "rules", "blank")]


def test_words_copied_from_a_method_count_as_those_of_the_prompt():
    rule = "Never add a number that the reader has to guess from nowhere."
    child = f"{HARDER} {rule}"
    assert text_failures(step(APPLES, child)) == []
    found = text_failures(step(APPLES, child, method=f"1. Think.\n2. {rule}"))
    assert [failure.kind for failure in found] == ["copied headings"]


def test_numbers_and_names_of_a_text():
    assert numbers("1) Take 3 of 1,200 and half a dozen.\n2) Add twelve.") == {3, 1200, 12}
    assert numbers("Lee once cuentos.") == {11} and numbers("Once there was a king of two lands.") == {2}
    assert names("Tom met Mia. He likes the Alps. Paris is big. Paris is old. NASA said so.") == {
        "Mia",
        "Alps",
        "Paris",
    }


def test_judge_gets_the_meaning_of_the_operator():
    given = fields(Step(APPLES, HARDER, "steps", reference="19", response="16"))
    assert given["change"].startswith("steps: make the answer need") and given["reference"] == "19"
    assert prompts.parse("diagnose", prompts.render("diagnose", **given)) == given
