"""Meshes of ranks, sharded models, and reductions over ranks: every one of them is a sum."""

from .data_parallel import (
    check_same,
    from_main,
    gather_objects,
    is_distributed,
    pack_over_rows,
    sum_over_ranks,
    sum_over_rows,
    with_names_of_all_ranks,
)
from .fsdp import Sharded, paced, sharded
from .mesh import Mesh, MeshOptions, make_mesh
from .parallelize import Sharding, compute_dtype, parallelize

__all__ = [
    "Mesh", "MeshOptions", "Sharded", "Sharding", "check_same", "compute_dtype", "from_main",
    "gather_objects", "is_distributed", "make_mesh", "paced", "pack_over_rows", "parallelize", "sharded",
    "sum_over_ranks", "sum_over_rows", "with_names_of_all_ranks",
]  # fmt: skip
