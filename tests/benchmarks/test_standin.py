"""A stand-in GPU sees what a real one would refuse, waits of the host, and the launches of the engine's steps."""

import json
from pathlib import Path

import pytest
from forked import COMPILING, run_python

# Launches of a training step of two blocks, and of each block more (recomputed in full), at most.
STEP_LAUNCHES, BLOCK_LAUNCHES = 172, 42
DECODE_BLOCK_LAUNCHES = 10
# Operations without a Triton kernel: a formula of a few numbers, and the update in host memory.
WITHOUT_KERNELS = ("preference_loss", "offloaded_adamw")


@pytest.fixture(scope="module")
def seen() -> dict:
    """What the child process saw; Triton must not run in its interpreter there."""
    done = run_python(Path(__file__).with_name("standin_child.py"), environment=COMPILING, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_have_devices_addresses_and_gradients(seen):
    actual = seen["tensors"]
    assert actual["devices"] == ["cuda:0", "cuda:0", "cuda:0", "cpu", "cuda:0", "cpu"]
    assert actual["is_cuda"] == [True, True, True, False] and actual["host"] == [3, 4] and actual["pinned"]
    assert actual["offset"] == 2 * (3 * 128 + 16) and actual["aligned"] == 0 and actual["apart"]
    assert actual["moved"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "call", ["item", "mask", "nonzero", "cpu", "tolist", "tensor", "blocking", "synchronize", "pageable"]
)
def test_calls_that_wait_for_the_device_are_counted(seen, call):
    assert seen["waits"][call][0] == 1


@pytest.mark.parametrize(
    ("call", "launches"),
    [("pinned", 1), ("staged", 1), ("sum", 1), ("view", 0), ("where", 2), ("slots", 2), ("kernel", 2)],
)
def test_calls_that_do_not_wait_are_not_counted(seen, call, launches):
    assert seen["waits"][call] == [0, launches]


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        ("swapped", "invalid operands of type pointer<bf16>"),
        ("host tensor", "cpu tensor?"),
        ("grid", "invalid argument"),
        ("threads", "invalid argument"),
        ("option", "blocks was specified but unrecognised"),
        ("missing", "missing 1 required positional argument"),
        ("descriptor", "Failed to create tensor map descriptor"),
    ],
)
def test_launches_that_a_gpu_would_refuse_are_refused(seen, launch, error):
    assert error in seen["refusals"][launch]


def test_launch_at_the_limits_of_the_grid_is_taken(seen):
    assert seen["refusals"]["right"] == ""


# Catches: arguments in another order, tensors on the host, grids and descriptors that a GPU refuses.
def test_every_operation_and_recipe_takes_its_cuda_path_to_the_launch(seen):
    assert {name: error for name, (error, _) in seen["operations"].items() if error} == {}
    silent = {name.split()[0] for name, (_, launches) in seen["operations"].items() if not launches}
    assert silent == set(WITHOUT_KERNELS)


# Catches: a run-time number that Triton specialises by its divisibility.
def test_second_variant_is_seen(seen):
    assert seen["variants"] == {"specialised_kernel": 2, "plain_kernel": 1}


def test_training_step_waits_once_for_the_numbers_at_its_end(seen):
    for name in ("train", "deeper", "wider", "longer", "selective", "none"):
        assert seen["steps"][name]["host_syncs"] == 1, (name, seen["steps"][name]["waits"])


# Catches: `float(loss)` in the loop; and says where it stands.
def test_host_read_inside_the_step_is_named(seen):
    waits = seen["steps"]["host read"]["waits"]
    assert sum(waits.values()) == 2 and any(where.startswith("tests/benchmarks/standin_child.py") for where in waits)


def test_launches_do_not_grow_with_the_number_of_elements(seen):
    launches = {name: seen["steps"][name]["launches"] for name in ("train", "wider", "longer", "launch a chunk")}
    assert launches["wider"] == launches["train"] <= STEP_LAUNCHES
    # A longer row has more chunks of the vocabulary's products, of which each takes three launches.
    assert launches["longer"] <= launches["train"] + 12
    assert launches["launch a chunk"] > launches["train"] + 50


def test_launches_of_a_block_are_capped(seen):
    each = (seen["steps"]["deeper"]["launches"] - seen["steps"]["train"]["launches"]) / 2
    assert each <= BLOCK_LAUNCHES


def test_decode_step_is_one_graph_and_few_launches(seen):
    actual = seen["steps"]["decode"]
    assert actual["launches"] <= 20 + 2 * DECODE_BLOCK_LAUNCHES
    assert actual["host_syncs"] <= 1


def test_online_step_waits_by_phase_and_not_by_micro_batch(seen):
    waits = {where: n for where, n in seen["steps"]["rleif"]["waits"].items() if "rollout/engine.py" not in where}
    assert sum(waits.values()) <= 12, waits


# Catches: a number that differs between the passes of a step (slots, tokens, programs) and is not exempt.
def test_no_kernel_is_compiled_twice_for_one_shape(seen):
    assert len(seen["compiled"]) >= 30 and set(seen["compiled"].values()) == {1}, seen["compiled"]


@pytest.mark.parametrize(("step", "tokens"), [("ledger", 1024), ("online ledger", 256)])
def test_ledger_adds_up(seen, step, tokens):
    ledger = seen["steps"][step]
    assert ledger["launches"] == sum(row["launches"] for row in ledger["rows"])
    assert ledger["bytes"] == sum(row["bytes"] for row in ledger["rows"])
    assert ledger["flops"] == sum(row["flops"] for row in ledger["rows"])
    assert ledger["tokens_per_second"] == pytest.approx(tokens / ledger["predicted_seconds"])
    assert 0 < ledger["mfu"] < 1 and 0 <= ledger["host_bound"] < 1
