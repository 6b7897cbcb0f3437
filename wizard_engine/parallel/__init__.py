"""Data parallelism: every gradient reduction is a sum."""

from .data_parallel import broadcast_parameters, sum_gradients, sum_over_ranks, with_names_of_all_ranks

__all__ = ["broadcast_parameters", "sum_gradients", "sum_over_ranks", "with_names_of_all_ranks"]
