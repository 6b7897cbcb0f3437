"""Checkpoints of many ranks: written by four, read by one, two, three; resumed; exported by ranges."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from forked import ROOT, run_ranks
from many_ranks import save_base, untimed, word_texts

from wizard_engine import checkpoint
from wizard_engine.data.records import conversation, write_rows
from wizard_engine.model import load_hf

STEPS, SAVED = 8, 4


def train(root, out, ranks, *arguments):
    done = run_ranks(
        ranks,
        ROOT / "recipes" / "sft.py",
        "--model",
        root / "base",
        "--data",
        root / "rows.jsonl",
        "--out",
        out,
        "--training.lr",
        "3e-3",
        "--training.pack-tokens",
        "120",
        "--training.packs-per-step",
        "12",
        "--training.epochs",
        "40",
        "--training.max-steps",
        STEPS,
        "--training.save-every",
        SAVED,
        "--quiet",
        "--training.weight-decay",
        "0.1",
        *arguments,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of four ranks, not interrupted; `run` has its first checkpoint alone."""
    root = tmp_path_factory.mktemp("resharded")
    texts = word_texts(40)
    shapes = {"width": 20, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 28, "tied": False}
    save_base(root / "base", texts, experts=4, balance_loss=0.01, **shapes)
    write_rows(root / "rows.jsonl", [conversation(a, b) for a, b in zip(texts[::2], texts[1::2])])
    train(root, root / "whole", 4)
    (root / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(root / name / "checkpoints" / f"step_{SAVED:08d}" for name in ("whole", "run")))
    return root


def resumed(root, name, ranks, *arguments):
    out = root / name
    shutil.copytree(root / "whole", out, ignore=shutil.ignore_patterns("model", "stage.json", f"step_{STEPS:08d}"))
    train(root, out, ranks, *arguments)
    return out


def test_every_rank_writes_its_shard(root):
    path = root / "run" / "checkpoints" / f"step_{SAVED:08d}"
    files = [f"part_{rank:05d}.safetensors" for rank in range(4)]
    assert sorted(os.listdir(path)) == ["manifest.json", *files]
    sizes = [(path / name).stat().st_size for name in files]
    assert max(sizes) < 1.1 * min(sizes)


def reshard(root, ranks, source, name, **options):
    script = Path(__file__).parent / "resharded.py"
    done = run_ranks(ranks, script, root, source, name, json.dumps(options))
    assert done.returncode == 0, done.stderr[-3000:]


def check_same_state(root, name, expected="run"):
    first, state = checkpoint.load(checkpoint.latest(root / expected))
    second, again = checkpoint.load(checkpoint.latest(root / name))
    assert state == again and first.keys() == second.keys() == {"model", "model_optimizer"}
    for group, tensors in first.items():
        assert tensors.keys() == second[group].keys() and len(tensors) > 10
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[group][key]), (group, key)


def check_export(root, name):
    expected, _ = checkpoint.load(checkpoint.latest(root / "run"))
    exported = load_hf(root / name / "model", dtype=torch.bfloat16)
    assert len(list((root / name / "model").glob("model-*.safetensors"))) > 2
    for key, parameter in exported.named_parameters():
        assert torch.equal(parameter, expected["model"][key].bfloat16()), key


@pytest.mark.every(6)
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2), (2, 2), (4, 1)])
def test_checkpoint_of_four_ranks_is_the_same_in_any_layout(root, ranks, replicas):
    name = f"on_{ranks}_{replicas}"
    reshard(root, ranks, "run", name, dp_replicate=replicas)
    check_same_state(root, name)
    for rank in range(ranks):
        assert json.loads((root / name / f"rank_{rank}.json").read_text())["count"] == {"model": SAVED}
    if ranks > replicas:
        check_export(root, name)


@pytest.mark.every(7)
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tp": 2}),
        (2, {"ep": 2}),
        (2, {"tp": 2, "ep": 2}),
        (4, {"tp": 2, "ep": 2}),
        (4, {"ep": 4}),
        (4, {"tp": 2, "cp": 2, "ep": 4}),
        (4, {"tp": 2, "dp_replicate": 2}),
    ],
)
def test_matrices_and_experts_resharded_and_gathered_are_the_same(root, ranks, layout):
    """From four ranks of data to this layout, and from it to one rank, to four, or to experts on two."""
    name = "_".join([f"in_{ranks}", *(f"{key}_{size}" for key, size in layout.items())])
    reshard(root, ranks, "run", name, **layout)
    assert all(json.loads((root / name / f"rank_{rank}.json").read_text())["is_read"] for rank in range(ranks))
    check_same_state(root, name)
    check_export(root, name)
    backs = {"one": (1, {}), "four": (4, {}), "experts": (2, {"ep": 2})}
    # All three for tp 2 x dp 2 with experts on two ranks; one each for the others.
    expected = backs if (ranks, layout) == (4, {"tp": 2, "ep": 2}) else [list(backs)[len(name) % 3]]
    for back in expected:
        count, options = backs[back]
        reshard(root, count, name, f"{name}_{back}", **options)
        check_same_state(root, f"{name}_{back}")


@pytest.mark.slow
def test_transformers_reads_what_four_ranks_exported(root):
    transformers = pytest.importorskip("transformers")
    reshard(root, 4, "run", "exported", tp=2, ep=2)
    path = root / "exported" / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours, tokens = load_hf(path), torch.arange(40) % 250
    marks = torch.tensor([0, 40], dtype=torch.int32)
    with torch.no_grad():
        logits = ours.logits(ours(tokens, torch.arange(40), marks, 40))
        expected = theirs(tokens[None]).logits[0]
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.slow
def test_four_ranks_resume_bit_equal(root):
    out = resumed(root, "again", 4)
    assert untimed(out) == untimed(root / "whole") and len(untimed(out)) == STEPS
    ours, theirs = (load_hf(path / "model") for path in (out, root / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (1, ()),
        (2, ("--mesh.dp-replicate", "2")),
        (3, ()),
        (2, ("--mesh.tp", "2", "--mesh.ep", "2")),
        (2, ("--mesh.cp", "2")),
        (4, ("--mesh.tp", "2", "--mesh.ep", "4")),
    ],
)
def test_other_layouts_go_on_with_the_same_losses(root, ranks, arguments):
    out = resumed(root, "with_" + "_".join([str(ranks), *arguments]).replace("--mesh.", ""), ranks, *arguments)
    ours, theirs = untimed(out)[SAVED:], untimed(root / "whole")[SAVED:]
    assert len(ours) == len(theirs) == STEPS - SAVED
    for a, b in zip(ours, theirs):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
        for name in ("loss", "grad_norm", "router_loss"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)


@pytest.mark.slow
def test_lost_file_and_another_model_are_named_on_every_rank(root, tmp_path):
    script = Path(__file__).parent / "resharded.py"
    shutil.copytree(root / "base", tmp_path / "base")
    shutil.copytree(root / "run", tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run")
    (path / "part_00002.safetensors").unlink()
    done = run_ranks(2, script, tmp_path, "run", "out", "{}")
    assert done.returncode and done.stderr.count("[rank 0/2]") >= 2
    assert "part_00002.safetensors: missing; expected tensors model/" in done.stderr
    shutil.copytree(root / "run", tmp_path / "run", dirs_exist_ok=True)
    content = bytearray((path / "part_00003.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "part_00003.safetensors").write_bytes(content)
    done = run_ranks(2, script, tmp_path, "run", "out", "{}")
    assert done.returncode and "[rank 1/2]" in done.stderr and "part_00003.safetensors: tensor" in done.stderr
    shutil.copytree(root / "run", tmp_path / "run", dirs_exist_ok=True)
    shapes = {"width": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 28, "tied": False}
    save_base(tmp_path / "base", word_texts(40), experts=3, **shapes)
    done = run_ranks(2, script, tmp_path, "run", "out", '{"tp": 2}')
    assert done.returncode and "this checkpoint is another model's" in done.stderr
