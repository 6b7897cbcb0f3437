"""The embedded data source: a closed world of word problems whose answers a program can check."""

from .corpus import Question, held_out, mt_questions, natural_corpus, plain_text
from .evolve import OPERATORS, evolve
from .judges import quality
from .parse import parse, parse_follow_up, parse_turns
from .problems import LARGEST, Equation, Problem, Quantity, Statement, random_problem
from .programs import PROGRAMS, program, register
from .render import render, render_follow_up
from .solve import STYLES, check_answer, claimed_answer, label_steps, solve

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
