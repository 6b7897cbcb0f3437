"""A rank that measures held-out rows in several layouts: python held_out_rank.py OUT. OUT/cases.json names the layouts
and kinds of rows."""

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


def rows_and_model(kind):
    """Rows of a kind, and a model that reads them; the weights of scores are not zero."""
    language, pairs = Transformer(CONFIG, seed=0), [Pair(a, b) for a, b in zip(samples(7), samples(9))]
    if kind == "supervised":
        return SupervisedRows(samples(11), CAPACITY), language
    if kind == "preference":
        return PreferenceRows(pairs, CAPACITY, 0.3, "sigmoid", 0.0, False), language
    outputs = 1 if kind == "ranking" else 3
    model = ScoringModel.from_language_model(language, outputs)
    model.score.weight.data.copy_(model.body.embedding.weight.detach()[:outputs])
    answers = [(sample, [1, 2], (1, -1 if n % 2 else 0)) for n, sample in enumerate(samples(8))]
    return (RankingRows(pairs, CAPACITY) if kind == "ranking" else StepRows(answers, CAPACITY)), model


def main(out):
    """Measure, and write what was found; also when the first measurement is already there."""
    rt = runtime.start("cpu")
    found, cases = {}, json.loads((out / "cases.json").read_text())
    for layout, options in LAYOUTS[rt.world_size].items():
        if layout not in cases:
            continue
        mesh = make_mesh(MeshOptions(**options), rt)
        for kind in (kind for kind in cases if kind not in LAYOUTS[1] | LAYOUTS[2]):
            rows, model = rows_and_model(kind)
            model = parallelize(model, mesh)
            stage = Stage(out / layout / kind, "held", {}, {})
            made = [HeldOut(stage, rt, mesh, model, rows, rejected=0, every=0, quiet=True) for _ in range(2)]
            result = made[1].finish(3)["held_out"]
            columns = {name: values.tolist() for name, values in made[0].first.items()}
            found[f"{layout}/{kind}"] = {"columns": columns, "before": result["before"], "after": result["after"]}
    (out / f"result_{rt.world_size}_{rt.rank}.json").write_text(json.dumps(found))
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
