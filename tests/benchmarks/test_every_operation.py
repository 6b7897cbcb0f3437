"""Every operation, a training step of every recipe, every collective: the checks of a GPU, in the interpreter."""

import ast
import json
from pathlib import Path

import pytest
import torch
from forked import COMPILING, ROOT, run_python

from benchmarks import one_rank, operation_check, tiny_steps
from benchmarks.every_operation import NOT_OPERATIONS, OPERATIONS, WHOLE
from benchmarks.operation_check import rows, verdict
from kernels import use_backend

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")


def public_functions() -> set[str]:
    """Names of the functions that the modules of kernels/ have for others, references apart."""
    names = set()
    for path in (ROOT / "kernels").glob("[a-z]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names.add(node.name)
    return {name for name in names if not name.endswith("_reference")}


# Catches: a new operation that no GPU has ever run.
def test_every_public_function_of_kernels_is_an_operation_or_named_as_none():
    covered = {name for operation in OPERATIONS for name in operation.covers}
    assert public_functions() - covered - NOT_OPERATIONS == set(), "add these to benchmarks/every_operation.py"
    assert (covered | NOT_OPERATIONS) - public_functions() == set(), "these are gone"
    assert not covered & NOT_OPERATIONS and len({o.name for o in OPERATIONS}) == len(OPERATIONS)


# About 15 s of the interpreter, all operations together.
@interpreted
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_is_right_in_the_interpreter(operation):
    with use_backend("triton"):
        (row,) = rows(operation, CPU, torch.float32)
    assert row["status"] == "right" and 0 < row["error_over_limit"] <= 1, row


# Catches: dtypes that do not meet in half precision, which the interpreter cannot run.
def test_inputs_and_references_are_right_in_bf16():
    for operation in OPERATIONS:
        (row,) = rows(operation, CPU, torch.bfloat16)
        assert row["status"] == "right", (operation.name, row)
    for step in tiny_steps.STEPS:
        (row,) = tiny_steps.rows(step, CPU, torch.bfloat16)
        assert row["status"] == "right" and row["allowed"] < 0.2, (step.name, row)


@pytest.mark.parametrize(("name", "operation"), WHOLE, ids=[name for name, _ in WHOLE])
def test_norm_and_generation_agree_with_their_plain_forms(name, operation):
    (row,) = rows(operation, CPU, torch.float32)
    assert row["status"] == "right", row


# Catches: a comparison of the plain path with itself; a result, a gradient or a shape that is not looked at.
@interpreted
def test_a_wrong_kernel_gradient_shape_or_nan_is_seen(monkeypatch):
    from kernels import _swiglu

    swiglu = next(operation for operation in OPERATIONS if operation.name == "swiglu")
    right = _swiglu.swiglu_backward
    monkeypatch.setattr(_swiglu, "swiglu_backward", lambda dy, gate_up: right(dy, gate_up) * (1 + 1e-5))
    with use_backend("triton"):
        (row,) = rows(swiglu, CPU, torch.float32)
    assert row["status"] == "wrong" and row["note"].startswith("result 1 of 2: error")
    one, ref = torch.ones(3), torch.ones(3, dtype=torch.float64)
    assert verdict([(one, ref, one)])["status"] == "right"
    for out in (torch.ones(4), torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([1.0, 1.0, 1.001])):
        assert verdict([(one, ref, one), (out, ref, one)])["status"] == "wrong"


def test_inputs_on_a_gpu_are_of_the_7b_models_widths():
    sizes = operation_check.Sizes.of(torch.device("cuda", 0))
    assert (sizes.head, sizes.width, sizes.ffn) == (128, 4096, 14336)
    wide = tiny_steps.config(device=torch.device("cuda", 0))
    assert (wide.head_width, wide.width, wide.ffn_width) == (128, 4096, 2048)
    assert operation_check.dtypes(torch.device("cuda", 0)) == (torch.bfloat16, torch.float32)


# About 20 s of the interpreter: a layer, forward and backward, twice for each step.
@pytest.mark.every(3)
@interpreted
@pytest.mark.parametrize("step", tiny_steps.STEPS, ids=lambda step: step.name)
def test_training_steps_of_the_recipes_agree_with_the_plain_path(monkeypatch, step):
    monkeypatch.setattr(tiny_steps, "LAYERS", 1)
    monkeypatch.setattr(tiny_steps, "KV_HEADS", 1)
    monkeypatch.setattr(tiny_steps, "LENGTHS", (4, 7))
    with use_backend("triton"):
        (row,) = tiny_steps.rows(step, CPU, torch.float32)
    assert row["status"] == "right" and row["error"] > 0, row


# Catches: a wrong scale of one parameter's gradient, a wrong norm: what a comparison of losses does not see.
@interpreted
def test_a_wrong_gradient_or_norm_of_a_step_is_seen(monkeypatch):
    from kernels import _rms_norm

    monkeypatch.setattr(tiny_steps, "LAYERS", 1)
    monkeypatch.setattr(tiny_steps, "KV_HEADS", 1)
    monkeypatch.setattr(tiny_steps, "LENGTHS", (4, 2))
    step = tiny_steps.STEPS[0]
    with monkeypatch.context() as patch:
        patch.setattr(tiny_steps, "engine_norm", lambda *arguments: 3.0)
        (row,) = tiny_steps.rows(step, CPU, torch.float32)
    assert row["status"] == "wrong" and "of the norm" in row["note"]
    right = _rms_norm.rms_norm_backward

    def scaled(*arguments):
        dx, dweight, *more = right(*arguments)
        return dx, dweight * (1 + 1e-4), *more

    monkeypatch.setattr(_rms_norm, "rms_norm_backward", scaled)
    with use_backend("triton"):
        (row,) = tiny_steps.rows(step, CPU, torch.float32)
    assert row["status"] == "wrong" and row["loss"] == pytest.approx(row["reference_loss"], rel=1e-6)


def test_recipes_that_train_are_all_there(capsys):
    names = " ".join(step.name for step in tiny_steps.STEPS)
    assert all(name in names for name in ("sft", "stage_dpo", "ranking", "process", "rleif policy", "rleif critic"))
    cuda = tiny_steps.cases(torch.device("cuda", 0))
    assert [name for name, _ in cuda][:: len(tiny_steps.STEPS)] == ["sft bfloat16", "sft float32"]
    if not torch.cuda.is_available():
        assert tiny_steps.main([]) == 2 and "expected a GPU, got none" in capsys.readouterr().err


def test_every_collective_runs_in_a_group_of_one_rank():
    done = run_python("-m", "benchmarks.one_rank", "--device", "cpu", environment=COMPILING)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and all(row.get("status", "right") == "right" for row in lines), (
        done.stdout + done.stderr
    )
    assert lines[0]["backend"] == "gloo" and len({row["case"] for row in lines}) == 16


# Catches: a collective that the engine uses and the check does not.
def test_every_collective_of_the_engine_is_checked(capsys):
    def called(paths) -> set[str]:
        names = set()
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                    names.add(node.attr)
        return names

    moving = {
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather_object",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "scatter",
        "scatter_object_list",
        "send",
        "recv",
        "isend",
        "irecv",
        "batch_isend_irecv",
    }
    engine = called((ROOT / "wizard_engine").rglob("*.py")) & moving
    # Those of collectives.py are called through its functions.
    names = {"all_gather_into_tensor", "reduce_scatter_tensor"}
    checked = called([Path(one_rank.__file__)]) | names | {name.replace("_into_tensor", "_single") for name in names}
    assert engine - checked - {"reduce_scatter_single"} == set()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            one_rank.main(["--device", "cuda"])
        assert "expected a machine with a GPU for cuda" in capsys.readouterr().err
