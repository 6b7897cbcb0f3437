"""Evol-Instruct, Evol-Answer, co-teaching, self-teaching, labels and rankings: records and agents in, records out."""

from .co_teaching import CoTaught, co_teach
from .evol_answer import EvolvedAnswers, evolve_answers
from .evol_instruct import Evolved, evolve_instructions
from .labels import instruction_groups, label_processes, rank_instructions
from .method import Optimised, optimise_method
from .self_teaching import SelfTaught, self_teach

__all__ = [
    "CoTaught",
    "Evolved",
    "EvolvedAnswers",
    "Optimised",
    "SelfTaught",
    "co_teach",
    "evolve_answers",
    "evolve_instructions",
    "instruction_groups",
    "label_processes",
    "optimise_method",
    "rank_instructions",
    "self_teach",
]
