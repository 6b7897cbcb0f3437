"""Evaluation of answers: exact-answer accuracy, blind pairwise preference, Elo ratings, MT-Bench, and the report."""

from wizard_engine.data.final_answers import extract_answer, same_answer

from .accuracy import Accuracy, accuracy, accuracy_by
from .battles import Battle
from .elo import Rating, elo
from .mt_bench import MTBench, mt_bench
from .pairwise import Pairwise, all_pairs, pairwise
from .questions import Question, read_questions

__all__ = [
    "Accuracy",
    "Battle",
    "MTBench",
    "Pairwise",
    "Question",
    "Rating",
    "accuracy",
    "accuracy_by",
    "all_pairs",
    "elo",
    "extract_answer",
    "mt_bench",
    "pairwise",
    "read_questions",
    "same_answer",
]
