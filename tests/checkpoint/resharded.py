"""Worker of the tests of sharded checkpoints: load one in the layout of this world, write it again, export it."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from wizard_engine import checkpoint, runtime
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.model import load_hf, save_sharded
from wizard_engine.model.loading import language_model
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, sharded
from wizard_engine.training.train_state import checkpoint_shards, restore


def main(root, source, name, options):
    """`root`/source has the checkpoint; what this world made of it goes to `root`/name."""
    torch.set_num_threads(1)
    rt = runtime.start("cpu", timeout_seconds=30)
    mesh = make_mesh(MeshOptions(**options), rt)
    model, _ = language_model(
        str(root / "base"), None, seed=0, device=rt.device, mesh=mesh, sharding=Sharding(dtype="bfloat16")
    )
    with sharded(model).gathered():
        pairs = zip(model.parameters(), load_hf(root / "base", dtype=torch.bfloat16).parameters(), strict=True)
        is_read = all(torch.equal(a, b) for a, b in pairs)
    optimizer = AdamW(model)
    with ExitStack() as stack:
        checkpoint_read = checkpoint.resume(root / source, rt, stack)
        restore(checkpoint_read, "model", model, optimizer, checkpoint_read.state["updates"])
        state = checkpoint_read.state
    weights, moments = checkpoint_shards(model, optimizer)
    saver = checkpoint.Saver(root / name, rt)
    saver.save(checkpoint_read.step, {"model": weights, "model_optimizer": moments}, state)
    saver.wait()
    tokenizer = load_tokenizer(root / "base")
    if mesh.copy.size > 1:
        save_sharded(model, root / name / "model", rt, tokenizer=tokenizer, max_shard_bytes=20_000)
    (root / name / f"rank_{rt.rank}.json").write_text(
        json.dumps({"count": optimizer.count, "stall": saver.stall_seconds, "is_read": is_read})
    )
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
