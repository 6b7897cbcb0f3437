"""Hypothesis strategies of the world's tests."""

import random

from hypothesis import strategies as st

from wizard_engine.world import vocabulary as words
from wizard_engine.world.problems import Problem, random_problem

SIZES = st.integers(1, 5)


@st.composite
def problems(draw, operations=SIZES) -> Problem:
    """Sound problems over languages, topics, people and sizes."""
    return random_problem(
        random.Random(draw(st.integers(0, 2**32))),
        operations=draw(operations),
        language=draw(st.sampled_from(words.LANGUAGES)),
        topic=draw(st.sampled_from(tuple(words.TOPICS))),
        person=draw(st.sampled_from((None, None, words.SOMEONE, *words.NAMES))),
    )


seeds = st.integers(0, 2**32)
