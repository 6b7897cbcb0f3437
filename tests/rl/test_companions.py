"""Models that are not trained: each body is in memory once, and scores as one of its own does."""

import json
import shutil

import pytest
import torch
from forked import run_ranks

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, ScoringModel, Transformer, load_model, save_model
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh
from wizard_engine.rl.companions import FrozenModels
from wizard_engine.runtime.process import Runtime

TEXTS = ["one two three four.", "The answer is 7."]
CALIBRATION = {"wizard_mean": 0.25, "wizard_std": 2.0}
ROW = torch.arange(6), torch.arange(6), torch.tensor([0, 6], dtype=torch.int32), 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model; an instruction model with another last weight; a process model on the language model's body."""
    root, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer(TEXTS, vocab_size=300, atoms=CHAT_ATOMS)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24
    )
    policy = Transformer(config, seed=0)
    save_model(policy, tokenizer, root / "policy")
    for name, outputs, surprise in (("process", 3, True), ("other", 1, False)):
        model = ScoringModel.from_language_model(policy, outputs, surprise=surprise)
        with torch.no_grad():
            for parameter in model.score.parameters():
                parameter.normal_()
            if name == "other":
                list(model.body.parameters())[-1][-1] += 1.0
        save_model(model, tokenizer, root / name, extra=CALIBRATION)
    return root


# Catches: bodies that are shared without a look at all of their weights, or never; a head that is not read.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_bodies_are_loaded_once_and_score_as_their_own(folder, dtype):
    frozen = FrozenModels(make_mesh(MeshOptions(), Runtime()), Sharding(dtype=dtype))
    reference = frozen.reference(folder / "policy")
    process = frozen.process_reward(folder / "process", neutral=0.5, capacity=100)
    instruction = frozen.instruction_reward(folder / "other", capacity=100)
    assert process.model.body is reference and len(frozen.bodies) == 2
    assert (instruction.mean, instruction.std, process.neutral) == (0.25, 2.0, 0.5)
    assert not any(p.requires_grad for model in (process.model, instruction.model) for p in model.parameters())
    for model, name in ((process.model, "process"), (instruction.model, "other")):
        alone = load_model(folder / name)[0]
        alone.body.to(getattr(torch, dtype))
        with torch.no_grad():
            assert torch.equal(model(*ROW), alone(*ROW))


RANK = """
import json, sys
from pathlib import Path
import numpy as np
from wizard_engine import runtime
from wizard_engine.data.chat import Sample
from wizard_engine.parallel import MeshOptions, make_mesh
from wizard_engine.rl.companions import FrozenModels
from wizard_engine.rl.rewards import score_tokens

folder, rt = Path(sys.argv[1]), runtime.start("cpu")
frozen = FrozenModels(make_mesh(MeshOptions(dp_shard=rt.world_size), rt), None)
frozen.reference(folder / "policy")
models = [frozen.process_reward(folder / "process", neutral=0.5, capacity=9).model]
models.append(frozen.instruction_reward(folder / "other", capacity=9).model)
# One pass on the first rank, two on the second.
samples = [Sample(np.arange(6, dtype=np.int32), np.ones(6, np.float32))] * (1 + rt.rank)
scores = [scores.tolist() for model in models for scores in score_tokens(model, samples, capacity=9)[-1]]
Path(sys.argv[2], f"{rt.rank}.json").write_text(json.dumps([len(frozen.bodies), scores]))
runtime.stop()
"""


# Catches: a shared body whose passes one rank makes alone, and a body that one rank shares and another does not.
def test_two_ranks_share_bodies_and_score_alike(folder, tmp_path):
    done = run_ranks(2, "-c", RANK, folder, tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first[0] == 2
    with torch.no_grad():
        alone = [load_model(folder / name)[0](*ROW).tolist() for name in ("process", "other")]
    assert first[1] == [pytest.approx(score, abs=1e-5) for scores in alone for score in scores]


def test_reward_models_of_another_kind_are_refused(folder):
    frozen = FrozenModels(make_mesh(MeshOptions(), Runtime()), None)
    with pytest.raises(ValueError, match="process: expected an instruction reward model, got a process reward model"):
        frozen.instruction_reward(folder / "process", capacity=100)
    with pytest.raises(ValueError, match="policy: expected a process reward model, got a language model"):
        frozen.process_reward(folder / "policy", neutral=0.5, capacity=100)
    with pytest.raises(ValueError, match="other: expected a preference reward model, got an instruction reward model"):
        frozen.preference_reward(folder / "other", capacity=100)


# Catches: scores of answers that are taken for those of instructions, which have as many outputs.
def test_a_preference_model_is_known_by_its_name(folder, tmp_path):
    frozen = FrozenModels(make_mesh(MeshOptions(), Runtime()), None)

    def named(kind):
        copy = tmp_path / "preference"
        shutil.copytree(folder / "other", copy, dirs_exist_ok=True)
        fields = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(fields | {"wizard_reward": kind}))
        return copy

    assert frozen.preference_reward(named("preference"), capacity=50).capacity == 50
    with pytest.raises(ValueError, match="expected an instruction reward model, got a preference reward model"):
        frozen.instruction_reward(named("preference"), capacity=100)
    for kind in ("process", "taste", ["preference"]):
        with pytest.raises(ValueError, match="expected a preference reward model, got 1 outputs"):
            frozen.preference_reward(named(kind), capacity=100)
