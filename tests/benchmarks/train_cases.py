"""Rows of all recipes on the layouts of its command line, in one start of the ranks; rank 0 writes them to OUT.

torchrun --nproc-per-node N train_cases.py OUT LAYOUTS (JSON: name -> options)
"""

import json
import sys
from pathlib import Path

from benchmarks.train_step import Options, measure_all
from wizard_engine import runtime
from wizard_engine.parallel import MeshOptions, Sharding


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    rt = runtime.start("cpu")
    results = {}
    for name, layout in layouts.items():
        layout = dict(layout)
        mesh, sharding = MeshOptions(**layout.pop("mesh", {})), Sharding(**layout.pop("sharding", {}))
        layout["recipe"] = tuple(layout["recipe"])
        results[name] = measure_all(Options(**layout, mesh=mesh, sharding=sharding), rt)
    if rt.is_main:
        out.write_text(json.dumps(results))
    runtime.stop()


main()
