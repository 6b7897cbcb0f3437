"""Attribute heuristics: languages, topics, skills, difficulty, length, toxicity, on made-up and on the world's rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine import world
from wizard_engine.curation import attributes
from wizard_engine.curation.topics import OTHER, clustered_topics, spherical_kmeans, terms, tfidf
from wizard_engine.data.records import Conversation, Message, Preference, Process, conversation


@pytest.fixture(scope="module")
def natural() -> list[Conversation]:
    return world.natural_corpus(600, seed=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom has 12 apples. He buys 3 more. How many apples does Tom have now?", "en"),
        ("Ana tiene 5 huevos. Da 3. ¿Cuántos huevos tiene ahora?", "es"),
        ("写一封邮件给经理，请求更改会议时间。", "zh"),
        ("编辑给定的代码: def add(a, b): return a + b", "zh"),
        ("東京の天気はどうですか。明日は雨が降りますか。", "ja"),
        ("오늘 날씨가 어때요? 내일은 비가 올까요?", "ko"),
        ("Quelle est la capitale de la France et combien d'habitants a-t-elle aujourd'hui ?", "fr"),
        ("Wie viele Einwohner hat die Stadt und wie groß ist sie im Vergleich zu anderen?", "de"),
        ("Сколько яблок осталось у мальчика после того, как он отдал пять яблок сестре?", "ru"),
        ("12 + 5 = ?", "und"),
    ],
)
def test_language_of_short_texts(text, expected):
    pytest.importorskip("py3langid", reason="py3langid not installed")
    assert attributes.language(text) == expected


def test_language_asks_the_answer_where_the_text_is_short():
    assert attributes.language("Describe a mojito cocktail.", "It is a drink of rum that is served with mint.") == "en"
    assert attributes.language("2+2?", "The answer is 4, because it is the sum of the two.") == "en"


def test_language_without_py3langid_counts_stop_words_and_says_so(monkeypatch):
    monkeypatch.setattr(attributes, "_identify", lambda: None)
    assert attributes.language("Die Katze ist in dem Haus und schläft auf der Bank.") == "de"
    assert attributes.language("El gato está en la casa y duerme.") == "es"
    assert attributes.language("zzz qqq") == "und"
    assert "not installed" in attributes.language_method()


def test_language_agrees_with_the_worlds_truth(natural):
    views = [attributes.view(row) for row in natural]
    languages = [attributes.language(item.user, item.answer) for item in views]
    wrong = [row.instruction for row, code in zip(natural, languages) if code != row.attributes["world"]["language"]]
    assert len(wrong) <= 3, wrong[:5]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Translate the sentence into French: good morning", "translation"),
        ("翻译成英语：你好", "translation"),
        ("Write a Python function that sorts a list.", "code"),
        ("编写一个函数来计算平均值。", "code"),
        ("Tom has 12 apples. He buys 5 more. How many apples does he have?", "math-additive"),
        ("Tom has 3 bags with 4 apples each. How many apples does he have?", "math-multiplicative"),
        ("Tom has 3 apples. Ana has 4 more apples than Tom. How many does Ana have?", "math-comparison"),
        ("Tom has 12 apples and splits them equally among 4 friends. How many does each friend get?", "math-division"),
        ("Tom has 3 bags with 4 apples each. Ana has 2 fewer apples than Tom. How many has Ana?", "math-mixed"),
        ("Act as a travel guide.", "roleplay"),
        ("Classify the sentence as positive or negative.", "classification"),
        ("Summarize the following article.", "summarisation"),
        ("Extract the names from the text.", "extraction"),
        ("Rewrite the sentence in the passive voice.", "editing"),
        ("Write a poem about the sea.", "writing"),
        ("写一首关于大海的诗。", "writing"),
        ("List five healthy breakfast foods.", "brainstorming"),
        ("Compare cats and dogs.", "reasoning"),
        ("Explain photosynthesis.", "explanation"),
        ("Who painted the Mona Lisa?", "knowledge"),
        ("Hm.", "other"),
    ],
)
def test_skill_of_typical_instructions(question, expected):
    row = conversation(question, "...")
    assert attributes.skill(row.messages, question) == expected


def test_skill_is_tool_use_where_the_assistant_calls_a_function():
    call = '{"name": "search", "arguments": {"q": "rice"}}'
    messages = (Message("user", "Write a poem"), Message("assistant", call))
    assert attributes.skill(messages, "Write a poem") == "tool-use"


def test_skill_agrees_with_the_worlds_truth(natural):
    views = [attributes.view(row) for row in natural]
    wrong = [
        (row.attributes["world"]["skill"], item.first)
        for row, item in zip(natural, views)
        if attributes.skill(item.messages, item.first) != f"math-{row.attributes['world']['skill']}"
    ]
    assert len(wrong) <= len(natural) // 50, wrong[:5]


def test_topic_agrees_with_the_worlds_truth(natural):
    known = [row for row in natural if row.attributes["world"]["topic"] in world.corpus.words.TOPIC_NAMES]
    views = [attributes.view(row) for row in known]
    topics = [attributes.lexicon_topic(item.user, item.answer) for item in views]
    right = sum(topic == row.attributes["world"]["topic"] for topic, row in zip(topics, known))
    assert right >= 0.93 * len(known)


def test_topic_counts_words_of_the_question_and_ignores_unrelated_answers():
    assert attributes.lexicon_topic("How do vaccines protect patients?") == "health"
    assert attributes.lexicon_topic("介绍一下地球的气候与海洋。") == "nature"
    assert attributes.lexicon_topic("The teacher asks the doctor.", "A hospital has nurses.") == "health"
    assert attributes.lexicon_topic("The teacher and a student ask the doctor.", "A hospital.") == "school"
    assert attributes.lexicon_topic("Hello", "Doctors treat patients in a hospital.") is None


def test_difficulty_rises_with_the_operations_of_a_problem(natural):
    scores: dict[int, list[float]] = {}
    for row in world.held_out(200, seed=1):
        item = attributes.view(row)
        score = attributes.difficulty_score(item.messages)
        scores.setdefault(row.attributes["operations"], []).append(score)
    means = [sum(scores[n]) / len(scores[n]) for n in sorted(scores)]
    assert means == sorted(means) and means[-1] - means[0] > 0.8


def test_difficulty_formula_by_hand():
    # numbers 3 and 5; clauses ",", "?" and "and"; one constraint; two equations.
    turn = Message("user", "Tom has 3 hats, and must buy 5?"), Message("assistant", "3+5=8\n8-0=8")
    score = attributes.difficulty_score(turn)
    assert score == pytest.approx((1.5849625 + 2.0 + 1.5849625) / 2 + 0.5)
    again = (*turn, Message("user", "Why?"), Message("assistant", "So."))
    assert attributes.difficulty_score(again) == pytest.approx(score + 0.25)
    levels = [attributes.difficulty(value) for value in (2.49, 2.5, 3.49, 3.5)]
    assert levels == ["easy", "medium", "medium", "hard"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("one two, three-four!", 4), ("你好世界", 4), ("用Python写代码", 5), ("12 apples", 2)],
)
def test_length_counts_words_and_cjk_characters(text, expected):
    assert attributes.length(text) == expected


def test_toxic_flags_rude_words_only():
    assert attributes.is_toxic("Answer now, you IDIOT.") and attributes.is_toxic("Responde ya, idiota.")
    assert not attributes.is_toxic("The class passed the assessment in Scunthorpe.")


def test_view_of_each_kind_of_row():
    prompt = (Message("system", "Be kind."), Message("user", "Hi"))
    preference = attributes.view(Preference(prompt, "good", "bad"))
    assert (preference.user, preference.answer, preference.turns) == ("Hi", "good", 1)
    process = attributes.view(Process(prompt, ("1+1=2", "done"), (1, 0)))
    assert process.answer == "1+1=2\ndone"
    ranking = attributes.view(Preference((), "better task", "worse task"))
    assert (ranking.user, ranking.answer) == ("better task", "")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300), st.text(max_size=120))
def test_heuristics_take_any_text(user, answer):
    assert attributes.language(user, answer)
    assert attributes.lexicon_topic(user, answer) is None or isinstance(attributes.lexicon_topic(user, answer), str)
    assert attributes.skill((Message("user", user), Message("assistant", answer)), user)
    assert 0 <= attributes.turn_score(user, answer) < 40
    assert attributes.length(user) >= 0 and attributes.is_toxic(user) in (True, False)


# ---- topics beyond the lexicon --------------------------------------------------------------------------------------


def _themes(count: int) -> tuple[list[str], list[int]]:
    """Texts of eight words out of twelve, of four vocabularies in turns, and which one each is of."""
    themes = [i % 4 for i in range(count)]
    vocabulary = [[f"{syllable}{letter}" for letter in "abcdefghijkl"] for syllable in ("glom", "trin", "vask", "pelu")]
    return [" ".join(vocabulary[t][(i + k) % 12] for k in range(8)) for i, t in enumerate(themes)], themes


def test_clustered_topics_separate_vocabularies_and_are_named_by_them():
    texts, themes = _themes(240)
    topics = clustered_topics(texts, seed=3, most=4)
    named = dict(zip(themes, topics))
    assert [named[theme] for theme in themes] == topics and len(set(topics)) == 4
    for theme, syllable in enumerate(("glom", "trin", "vask", "pelu")):
        assert all(word.startswith(syllable) for word in named[theme].split("/"))
    assert clustered_topics(texts, seed=3, most=4) == topics


def test_clustered_topics_of_few_texts_are_other():
    assert clustered_topics(["alpha beta"] * 50) == [OTHER] * 50
    assert clustered_topics([]) == []


def test_tfidf_vectors_have_unit_length_or_are_zero():
    texts, _ = _themes(48)
    vectors, vocabulary = tfidf([*texts, "lonely"])
    norms = (vectors**2).sum(axis=1)
    assert norms[:48] == pytest.approx(1.0, abs=1e-5) and norms[48] == 0
    assert set(vocabulary) == {word for text in texts for word in text.split()}


def test_spherical_kmeans_finds_orthogonal_groups():
    texts, themes = _themes(60)
    assignment, centres = spherical_kmeans(tfidf(texts)[0], 4, seed=0)
    assert len(set(zip(themes, assignment.tolist()))) == len(set(assignment.tolist())) == 4
    assert np.linalg.norm(centres, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_terms_pair_cjk_characters_and_drop_filler():
    assert terms("the quantum 模型 of 2024") == ["quantum", "模型"]
