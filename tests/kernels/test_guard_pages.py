"""Kernels between unreadable pages: none touches memory outside of its arguments.

Every launch of `SUBSET` runs guarded here, in one process of its own; `GUARD_PAGES=all` takes every test of every file
that runs kernels, a process each. `GUARD_PAGES=on pytest tests/kernels/test_rope_triton.py` guards a file by hand.
"""

import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from forked import run_python
from guard_pages import LAUNCHED, OutsideArgumentError, guarded
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configuration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# One or a few tests for each kernel, of sizes that no tile divides: about a minute. Left out are further sizes, masks,
# dtypes and table entries of the same kernels.
SUBSET = tuple(
    f"tests/kernels/test_{name}"
    for name in (
        "attention_triton.py::test_attention_of_every_head_width[8]",
        "attention_triton.py::test_attention_of_other_keys_than_queries[plain-True-7]",
        "attention_triton.py::test_attention_of_unaligned_rows_does_without_descriptors",
        "shared_prefix.py::test_shared_prefixes_change_no_result[triton-False-1-None]",
        "linear_logprob_triton.py::test_linear_logprob_equals_full_logits[211-33-17-dtype0]",
        "linear_logprob_triton.py::test_linear_logprob_equals_full_logits[33-64-17-dtype1]",
        "linear_logprob_triton.py::test_many_splits_are_merged",
        "row_kernels.py::test_rms_norm_equals_its_formula[129-16-True-dtype0]",
        "row_kernels.py::test_rms_norm_equals_its_formula[2-31-False-dtype1]",
        "row_kernels.py::test_rope_turns_q_and_k[33-5-2-20-dtype0]",
        "row_kernels.py::test_swiglu_equals_its_formula[129-17-dtype0]",
        "row_kernels.py::test_swiglu_equals_its_formula[3-5000-dtype1]",
        "row_kernels.py::test_adamw_equals_its_formula[7-1023-gradient0]",
        "adamw_kernel.py::test_adamw_of_slices_does_not_change_their_neighbours",
        "adamw_kernel.py::test_adamw_scales_rounded_gradients_and_writes_a_rounded_copy[triton]",
        "rope_triton.py::test_rope_of_positions_outside_the_table_is_nan",
        "gae.py::test_gae_kernel_equals_the_reference",
        "losses_triton.py::test_dpo_kernel_equals_the_reference[lengths1-changes1]",
        "losses_triton.py::test_dpo_kernel_equals_the_reference[lengths2-changes4]",
        "losses_triton.py::test_sequence_logprobs_kernel_equals_the_reference",
        "losses_triton.py::test_ppo_kernel_equals_the_reference[changes6-terms6-1]",
        "losses_triton.py::test_ppo_kernel_equals_the_reference[changes6-terms6-331]",
        "losses_triton.py::test_value_loss_kernel_equals_the_reference",
        "sample.py::test_logprobs_are_as_near_to_float64_as_those_of_eager[{'temperature': 0.7}]",
        "sample.py::test_kernel_takes_rows_options_and_seeds_of_any_stride",
        "moe_route.py::test_logits_and_gates_equal_float64[triton-37-16-17-4-dtype0]",
        "moe_route.py::test_rows_stand_by_expert_then_token[triton-5-1-129-zipf]",
        "moe_route.py::test_replayed_experts_may_be_strided[triton]",
        "expert_mlp.py::test_widths[17-5-dtype0]",
        "expert_mlp.py::test_loads[1-zipf-dtype1]",
        "expert_mlp.py::test_permutation_copies_rows[24-one]",
        "decode_attention.py::test_windows_and_scales[17-None]",
        "decode_attention.py::test_pages_groups_and_widths[6-1-24-16]",
        "grad_norm.py::test_norm_of_both_dtypes_and_of_slices_between_nan",
        "write_pages_triton.py::test_without_positions_each_token_has_a_row_of_the_tables",
        "write_pages_triton.py::test_padding_goes_to_the_scratch_page_alone",
    )
)
MAX_CRASHES = 5

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("GUARD_PAGES") == "on",
    reason="guard pages: of the interpreter alone, and not inside of themselves",
)


def guarded_run(tests, report: Path, folder: Path = ROOT) -> tuple[list[str], set[str]]:
    """Failures of tests whose launches are guarded, and the kernels that were launched.

    A test that ends its process is a failure; the others run again without it.
    """
    crashed, failed, launched = [], [], set()
    for _ in range(MAX_CRASHES):
        command = ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--assert=plain"]
        command += ["-o", f"pythonpath={ROOT} {ROOT / 'tests'} {HERE}", "--disable-plugin-autoload"]
        command += [argument for line in crashed for argument in ("--deselect", line.split(" ")[0])]
        report.write_text("")
        env = os.environ | {"GUARD_PAGES": "on", "GUARD_REPORT": str(report)}
        done = run_python(*command, *tests, environment=env, folder=folder, timeout=1200)
        lines = report.read_text().splitlines()
        launched |= {name for line in lines if line.startswith(LAUNCHED) for name in line.split()[1:]}
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode in (0, 1):
            return crashed + failed, launched
        if done.returncode > 0 or not lines:
            return [*crashed, *failed, f"exit {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"], launched
        crashed.append(lines[-1])
    return crashed + failed, launched


def chosen() -> list:
    """What runs guarded: the subset, or each file that runs kernels."""
    if os.environ.get("GUARD_PAGES") != "all":
        return [pytest.param(SUBSET, id="subset")]
    files = [path for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    return [
        pytest.param((f"tests/kernels/{path.name}",), id=path.stem) for path in files if "triton" in path.read_text()
    ]


@pytest.mark.parametrize("tests", chosen())
def test_kernels_stay_inside_their_arguments(tests, tmp_path):
    failed, launched = guarded_run(tests, tmp_path / "report")
    assert not failed, "\n".join(failed)
    if tests == SUBSET:
        missing = {f"{name}_kernel" for name in configuration.kernels()} - launched
        assert not missing, f"add a test of {sorted(missing)} to SUBSET"


# A toy kernel with defects to plant, and what guards make of them.


@triton.jit
def toy_kernel(x, y, count, stride, READ: tl.constexpr, WRITE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = x + place * stride + READ
    values = tl.load(at, mask=place < count) if MASKED else tl.load(at)
    tl.store(y + place + WRITE, values + 1, mask=place < count)


@triton.jit
def tile_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(y + (row + tl.arange(0, BLOCK))[:, None] * WIDTH + column, x.load([row, 0]))


def launch_toy(x, y, read=0, write=0, masked=True):
    with guarded():
        toy_kernel[(triton.cdiv(len(x), 16),)](x, y, len(x), x.stride(0), read, write, masked, 16)


@pytest.mark.parametrize("count", [1, 16, 37, 1024, 4099])
@pytest.mark.parametrize("stride", [1, 3])
def test_guarded_launch_gives_what_a_plain_one_does(count, stride):
    x, y = torch.randn(count, stride)[:, 0], torch.zeros(count)
    launch_toy(x, y)
    assert torch.equal(y, x + 1)


def test_guarded_launch_changes_aliases_and_nothing_else():
    """In place, into a slice, in a storage with more in it."""
    storage = torch.arange(50.0)
    x = storage[5:42]
    launch_toy(x, x)
    expected = torch.arange(50.0)
    expected[5:42] += 1
    assert torch.equal(storage, expected)


def test_launch_with_a_huge_argument_runs_once_and_unguarded(monkeypatch):
    monkeypatch.setattr("guard_pages.MOST_BYTES", 147)
    x = torch.zeros(37)
    launch_toy(x, x)
    assert torch.equal(x, torch.ones(37))


@pytest.mark.parametrize("rows", [3, 7])
def test_guarded_descriptors_are_read_inside_their_shape(rows):
    x, y = torch.randn(9, 16)[:rows], torch.zeros(12, 16)
    with guarded():
        tile_kernel[(triton.cdiv(rows, 4),)](TensorDescriptor(x, [rows, 16], [16, 1], [4, 16]), y, 16, 4)
    assert torch.equal(y[:rows], x) and not y[rows:].any()


@pytest.mark.parametrize(
    "defect, text",
    [
        ({"read": 1}, "toy_kernel read argument x at byte 148 of 148, behind its end"),
        ({"read": -1}, "toy_kernel read argument x at byte -4 of 148, before its start"),
        ({"write": -1}, "toy_kernel wrote argument y at byte -4 of 148, before its start"),
        ({"write": 1}, "toy_kernel wrote argument y at byte 148 of 148, behind its end"),
        ({"masked": False}, "toy_kernel read argument x at byte 148 of 148, behind its end"),
    ],
)
def test_launch_outside_of_an_argument_is_named(defect, text):
    """In a slice too, whose storage goes on: what is guarded are the bytes of the argument."""
    x, y = torch.randn(64)[9:46], torch.zeros(64)[9:46]
    with pytest.raises(OutsideArgumentError) as caught:
        launch_toy(x, y, **defect)
    assert text in str(caught.value) and "test_launch_outside_of_an_argument_is_named" in str(caught.value)
    assert not y.any()


FAR = """
import pytest
import torch
from test_guard_pages import toy_kernel

@pytest.mark.parametrize("read", [0, 1 << 40, 1, 2])
def test_toy(read):
    x, y = torch.randn(37), torch.zeros(37)
    toy_kernel[(3,)](x, y, 37, 1, read, 0, True, 16)
"""


@pytest.mark.slow
def test_faults_far_outside_cost_one_test(tmp_path):
    """The process ends, and its other tests run again."""
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_far.py").write_text(FAR)
    failed, launched = guarded_run(["test_far.py"], tmp_path / "report", tmp_path)
    assert len(failed) == 3 and launched == {"toy_kernel"}
    assert failed[0].startswith("test_far.py::test_toy[1099511627776] (call): toy_kernel(x, y; empty: none): address")
    assert all(f"test_toy[{n}]" in line for n, line in zip((1, 2), failed[1:]))
