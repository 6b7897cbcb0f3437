"""The embedded default: a closed world of word problems whose answers a program can check."""

from wizard_engine.world.corpus import Question, held_out, mt_questions, natural_corpus, plain_text
from wizard_engine.world.evolve import OPERATORS, evolve
from wizard_engine.world.judges import quality
from wizard_engine.world.parse import parse, parse_follow_up, parse_turns
from wizard_engine.world.problems import LARGEST, Equation, Problem, Quantity, Statement, random_problem
from wizard_engine.world.programs import PROGRAMS, program, register
from wizard_engine.world.render import render, render_follow_up
from wizard_engine.world.solve import STYLES, check_answer, claimed_answer, label_steps, solve

__all__ = [
    "LARGEST",
    "OPERATORS",
    "PROGRAMS",
    "STYLES",
    "Equation",
    "Problem",
    "Quantity",
    "Question",
    "Statement",
    "check_answer",
    "claimed_answer",
    "evolve",
    "held_out",
    "label_steps",
    "mt_questions",
    "natural_corpus",
    "parse",
    "parse_follow_up",
    "parse_turns",
    "plain_text",
    "program",
    "quality",
    "random_problem",
    "register",
    "render",
    "render_follow_up",
    "solve",
]
