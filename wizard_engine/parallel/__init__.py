"""Meshes of ranks, sharded models, and reductions over ranks, all of which are sums."""

from .fsdp import Sharded, lockstep, sharded
from .mesh import Mesh, MeshOptions, make_mesh
from .parallelize import Sharding, compute_dtype, parallelize
from .reductions import pack_over_rows, sum_over_ranks, sum_over_rows

__all__ = [
    "Mesh",
    "MeshOptions",
    "Sharded",
    "Sharding",
    "compute_dtype",
    "lockstep",
    "make_mesh",
    "pack_over_rows",
    "parallelize",
    "sharded",
    "sum_over_ranks",
    "sum_over_rows",
]
