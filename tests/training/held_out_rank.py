"""A rank that measures held-out rows of every kind in several layouts: python held_out_rank.py OUT."""

import json
import sys
from pathlib import Path

import numpy as np

from wizard_engine import runtime
from wizard_engine.data.chat import Sample
from wizard_engine.data.samples import Pair
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.parallel import MeshOptions, make_mesh, parallelize
from wizard_engine.runtime.stage import Stage
from wizard_engine.training.held_out import HeldOut
from wizard_engine.training.held_out_rows import PreferenceRows, RankingRows, StepRows, SupervisedRows

LAYOUTS = {1: {"one": {}}, 2: {"sharded": {}, "copies": {"dp_shard": 1}, "tp": {"tp": 2}, "cp": {"cp": 2}}}
SHAPES = {"vocab_size": 32, "width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 24}
CONFIG = ModelConfig(**SHAPES, init_std=0.2)
CAPACITY = 24


def samples(count):
    """Samples of 3 to 18 tokens, of which the later part is supervised."""
    generator = np.random.default_rng(count)
    lengths = generator.integers(3, 18, count)
    weights = [(np.arange(n) >= max(1, n // 3)).astype(np.float32) for n in lengths]
    return [Sample(generator.integers(0, 32, n).astype(np.int32), w) for n, w in zip(lengths, weights)]


def kinds(mesh):
    """Name -> rows, and the model that reads them; the heads of scores are random."""
    language = parallelize(Transformer(CONFIG, seed=0), mesh)
    single, pairs = samples(11), [Pair(a, b) for a, b in zip(samples(7), samples(9))]
    answers = [(sample, [1, 2], (1, -1 if n % 2 else 0)) for n, sample in enumerate(samples(8))]
    scoring = {}
    for outputs in (1, 3):
        model = ScoringModel.from_language_model(Transformer(CONFIG, seed=outputs), outputs)
        model.score.weight.data.copy_(model.body.embedding.weight.detach()[:outputs])
        scoring[outputs] = parallelize(model, mesh)
    return {
        "supervised": (SupervisedRows(single, CAPACITY), language),
        "preference": (PreferenceRows(pairs, CAPACITY, 0.3, "sigmoid", 0.0, False), language),
        "ranking": (RankingRows(pairs, CAPACITY), scoring[1]),
        "steps": (StepRows(answers, CAPACITY), scoring[3]),
    }


def main(out):
    """Measure, and write what was found; also when the first measurement is already there."""
    rt = runtime.start("cpu")
    found = {}
    for layout, options in LAYOUTS[rt.world_size].items():
        mesh = make_mesh(MeshOptions(**options), rt)
        for kind, (rows, model) in kinds(mesh).items():
            stage = Stage(out / layout / kind, "held", {}, {})
            made = [HeldOut(stage, rt, mesh, model, rows, rejected=0, every=0, quiet=True) for _ in range(2)]
            result = made[1].finish(3)["held_out"]
            columns = {name: values.tolist() for name, values in made[0].first.items()}
            found[f"{layout}/{kind}"] = {"columns": columns, "before": result["before"], "after": result["after"]}
    (out / f"result_{rt.world_size}_{rt.rank}.json").write_text(json.dumps(found))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
