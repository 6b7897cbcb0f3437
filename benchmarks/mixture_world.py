"""A mixture of experts against a dense model with equal active parameters, trained alike on the embedded world.

    python -m benchmarks.mixture_world --seeds 0 1 --json benchmarks/results/mixture_world.json

Both learn plain text and then the natural rows, with the demo's options and with the same data, order and steps; held
out problems measure them: loss per token of the answers (nats), and exact answers, greedy. The load is that of the last
tenth of the steps: the largest share of an expert over the mean, for each layer.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.__main__ import environment
from recipes import accuracy, make_world, sft
from wizard_engine.data.chat import encode_conversation
from wizard_engine.data.records import read_rows
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation import sequence_logprobs
from wizard_engine.model import PRESETS, ModelConfig, Transformer, load_model, save_model
from wizard_engine.pipeline.run_file import read_run_file
from wizard_engine.runtime.files import write_json
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.runtime.option_tables import with_table
from wizard_engine.training.options import Training

EXPERTS = 8
DEMO = Path(__file__).parents[1] / "recipes" / "runs" / "demo.toml"


def demo(stage: str) -> Training:
    """Training options of a stage of the demo."""
    return with_table(Training(), read_run_file(DEMO).options[stage]["training"], stage)


def configurations(vocab_size: int) -> dict[str, ModelConfig]:
    """The demo's dense model, and 8 experts of half its feed-forward width, of which a token meets two."""
    dense = replace(PRESETS["demo"], vocab_size=vocab_size)
    mixture = replace(dense, ffn_width=dense.ffn_width // 2, experts=EXPERTS, experts_per_token=2, balance_loss=0.01)
    assert abs(mixture.active_parameters / dense.active_parameters - 1) < 0.02
    return {"dense": dense, "mixture": mixture}


def trained(name: str, config: ModelConfig, world: Path, folder: Path, seed: int, scale: float) -> dict:
    """Train one model and measure it; returns a row."""
    tokenizer = load_tokenizer(world / "tokenizer")
    save_model(Transformer(config, seed=seed), tokenizer, folder / "start")
    began = time.perf_counter()
    shared = {"seed": seed, "device": "cpu", "quiet": True, "audit": False}
    for stage, options in (
        (
            "base",
            {"data": (world / "plain.jsonl",), "kind": "text", "training": _shortened(demo("pretraining"), scale)},
        ),
        ("sft", {"data": (world / "corpus.jsonl",), "training": replace(demo("sft"), max_steps=int(900 * scale))}),
    ):
        start = folder / ("start" if stage == "base" else "base/model")
        sft.main(sft.Config(out=folder / stage, model=str(start), **options, **shared))
    seconds = time.perf_counter() - began
    model, tokenizer = load_model(folder / "sft" / "model")
    rows = read_rows(world / "held_out.jsonl", kind="conversation")
    samples = [encode_conversation(tokenizer, row.messages) for row in rows]
    loss = -sequence_logprobs(model, samples).sum() / sum(float(s.weights.sum()) for s in samples)
    result = accuracy.main(
        accuracy.Config(
            str(folder / "sft" / "model"), world / "held_out.jsonl", folder / "accuracy", seed=seed, quiet=True
        )
    )
    row = {
        "model": name,
        "seed": seed,
        "parameters": config.num_parameters,
        "active": config.active_parameters,
        "loss": float(loss),
        "accuracy": result["accuracy"],
        "se": result["se"],
        "problems": result["total"],
        "train_seconds": seconds,
    }
    return row | _load(folder, config)


def _shortened(training, scale: float):
    return replace(training, max_steps=int(training.max_steps * scale))


def _load(folder: Path, config: ModelConfig) -> dict:
    """Mean over the last tenth of the steps of both stages of each layer's largest share over the mean."""
    if not config.experts:
        return {}
    loads = {}
    for stage in ("base", "sft"):
        lines = read_metrics(folder / stage / "metrics.jsonl")
        last = lines[-max(1, len(lines) // 10) :]
        loads[f"load_{stage}"] = np.mean([line["expert_load_max"] for line in last], axis=0).round(3).tolist()
    return loads


def main() -> None:
    """Train, print a line per model, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the demo's steps")
    parser.add_argument("--json", type=Path, help="write the rows")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            world = Path(folder) / f"world_{seed}"
            counts = make_world.main(make_world.Config(world, seed=seed, quiet=True, held_out=1000))
            for name, config in configurations(counts["vocabulary"]).items():
                row = trained(name, config, world, Path(folder) / f"{name}_{seed}", seed, options.scale)
                rows.append(row)
                load = " ".join(f"load {s} {row[f'load_{s}']}" for s in ("base", "sft") if f"load_{s}" in row)
                print(
                    f"{name:8} seed {seed}  active {row['active']:,} of {row['parameters']:,}  loss {row['loss']:.4f}  "
                    f"accuracy {row['accuracy']:.3f} (se {row['se']:.3f})  {row['train_seconds']:.0f} s  {load}",
                    flush=True,
                )
                if options.json:
                    write_json(options.json, {"environment": environment(), "scale": options.scale, "rows": rows})


if __name__ == "__main__":
    main()
