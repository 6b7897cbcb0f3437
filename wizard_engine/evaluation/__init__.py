"""How good answers are: exact-answer accuracy, blind pairwise preference, Elo ratings, MT-Bench, and the report."""

from wizard_engine.evaluation.accuracy import Accuracy, accuracy, accuracy_by, extract_answer, same_answer
from wizard_engine.evaluation.elo import Rating, elo
from wizard_engine.evaluation.mt_bench import MTBench, mt_bench
from wizard_engine.evaluation.pairwise import Battle, Pairwise, all_pairs, pairwise
from wizard_engine.evaluation.questions import Question, read_questions

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
