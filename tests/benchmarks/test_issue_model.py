"""The issue model on loops whose cycles can be counted by hand."""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.issue_costs import loaded_bytes, pipe_of
from benchmarks.issue_model import estimate, overlapped_exponentials, tile_bytes, tile_flops
from benchmarks.issue_simulation import simulate, streams_of
from benchmarks.machine_code import Instruction, MachineCode

PRODUCT = ("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR4], R24, gsb0")
WAIT = ("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
BARRIER = ("BAR.SYNC.DEFER_BLOCKING", "0x0")


def loop(*steps, num_warps: int = 4, arch: int = 90) -> MachineCode:
    """A kernel that is one loop; a step is an opcode with operands and, maybe, scheduling."""
    listed = [Instruction(16 * n, *step[:2], **(step[2] if len(step) > 2 else {})) for n, step in enumerate(steps)]
    listed.append(Instruction(16 * len(listed), "BRA", "0x0", "@P0"))
    return MachineCode("kernel", arch, num_warps, 128, 0, 0, 0, 0, tuple(listed))


def exponentials(number: int) -> list[tuple]:
    """MUFU.EX2 in a row, and an addition that waits for the last."""
    last = ("MUFU.EX2", "R8, R4", {"sets": 0})
    return [*[("MUFU.EX2", "R8, R4")] * (number - 1), last, ("FADD", "R8, R8, R9", {"waits": (0,)})]


@pytest.mark.parametrize(
    ("opcode", "operands", "arch", "expected"),
    [
        ("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR4], R24", 90, ("tensor", 64)),  # 262144 / 4096
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24", 90, ("tensor", 32)),  # 4 KB of operands: 32 too
        ("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR4], R24", 90, ("tensor", 20)),  # 2560 bytes / 128, not 8
        ("HGMMA.64x16x16.F32.BF16", "R24, R4, gdesc[UR4], R24", 90, ("tensor", 8)),  # A in registers
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", 80, ("tensor", 8)),  # 4096 / 512
        ("HMMA.1688.F32.TF32", "R4, R8, R12, R4", 80, ("tensor", 8)),  # half as large at half the rate
        ("MUFU.EX2", "R8, R4", 90, ("exp", 8)),
        ("FFMA", "R8, R4, R5, R6", 90, ("fma", 1)),
        ("FFMA", "R8, R4, R5, R6", 80, ("fma", 2)),
        ("IMAD.WIDE", "R8, R4, R5, R6", 90, ("fma", 2)),
        ("FMNMX", "R8, R4, R5, !PT", 90, ("alu", 2)),
        ("LDS.128", "R8, [R4]", 90, ("shared", 16)),  # 512 bytes / 128 for each of four sub-cores
        ("LDSM.16.M88.4", "R8, [R4]", 80, ("shared", 16)),
        ("LDSM.16.MT88", "R8, [R4]", 80, ("shared", 4)),
        ("SHFL.BFLY", "PT, R8, R4, 0x2, 0x1f", 90, ("shared", 4)),
        ("UIADD3", "UR4, UR4, 0x1, URZ", 90, ("", 0)),
    ],
)
def test_instruction_takes_its_unit_for_the_cycles_of_its_lanes(opcode, operands, arch, expected):
    # catches: 2 cycles for MUFU (16 lanes are those of the four sub-cores together), A read though it is in registers.
    assert pipe_of(Instruction(0, opcode, operands), arch) == expected


def test_loads_of_tiles_move_what_they_say_and_those_of_rows_a_sector():
    opcodes = ("LDGSTS.E.BYPASS.128", "LDG.E.128", "LDG.E", "STG.E.128")
    # catches: row vectors, which most threads of a warp read at the same places, counted once for every thread.
    assert [loaded_bytes(Instruction(0, opcode)) for opcode in opcodes] == [512, 512, 32, 0]


def test_overlap_is_what_stands_between_a_product_and_its_wait():
    after = loop(PRODUCT, WAIT, *exponentials(8)).main_loops[0]
    between = loop(PRODUCT, *exponentials(6), WAIT, *exponentials(2)).main_loops[0]
    late = loop(*exponentials(4), WAIT, *exponentials(4), PRODUCT).main_loops[0]
    assert [overlapped_exponentials(path) for path in (after, between)] == [0.0, 0.75]
    # catches: an iteration taken alone: a product issued at its end runs while the next one begins.
    assert overlapped_exponentials(late) == 0.5
    assert overlapped_exponentials(loop(PRODUCT, WAIT).main_loops[0]) == 0.0


def test_order_decides_whether_products_and_exponentials_overlap():
    # Product 64 + 20 to its result, then 8 exponentials of 8 cycles + 14: about 165; side by side only the former's 84.
    serial = simulate(loop(PRODUCT, WAIT, *exponentials(8)), 1, 1, 0)
    overlapped = simulate(loop(PRODUCT, *exponentials(8), WAIT), 1, 1, 0)
    assert serial == pytest.approx(166, abs=4) and overlapped == pytest.approx(87, abs=4)


def test_stalls_and_scoreboards_of_the_code_are_kept():
    # 20 additions 5 cycles apart; the product, which nobody waits for, and the branch take a cycle each.
    assert simulate(loop(PRODUCT, *[("FADD", "R1, R1, R2", {"stall": 5})] * 20), 1, 1, 0) == 102
    # A shuffle passes once for each of four sub-cores (4 cycles) and takes 23 more to its result; the addition waits.
    shuffled = [("SHFL.BFLY", "PT, R1, R2, 0x1, 0x1f", {"sets": 3}), ("FADD", "R1, R1, R2", {"waits": (3,)})]
    assert simulate(loop(PRODUCT, *shuffled * 4), 1, 1, 0) == 4 * (4 + 23 + 1) + 2


def test_barrier_keeps_warp_groups_in_step_and_blocks_overlap():
    steps = (PRODUCT, WAIT, BARRIER, *exponentials(8))
    one_block = simulate(loop(*steps), 1, 1, 0)
    in_step = simulate(loop(*steps, num_warps=8), 1, 1, 0)
    assert one_block == pytest.approx(64 + 20 + 20 + 64 + 14, abs=5)
    # The first warp's product runs during the second's exponentials (64); the second's follows (64 + 20), then comes
    # the barrier (20), and only then the first's exponentials (64 + 14).
    assert in_step == pytest.approx(64 + 64 + 20 + 20 + 64 + 14, abs=6)
    # catches: blocks that wait for each other's barriers, or that run in step: together they need hardly more than one.
    assert simulate(loop(*steps), 2, 1, 0) < 1.1 * one_block


def test_stages_hide_the_latency_of_loads():
    announce, load = ("SYNCS.ARRIVE.TRANS64", "RZ, [UR4+0x100], R2"), ("UTMALDG.2D", "[UR8], [UR6]")
    check = ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "P0, [UR4+0x100], R6")
    code = loop(check, *[PRODUCT] * 8, WAIT, announce, load)
    two, three = (simulate(code, 1, stages, 16_384) for stages in (2, 3))
    # 8 products of 64 cycles; 16 KB at 27 bytes per cycle take 603 and arrive 600 later: waited for at once, or later.
    assert two == pytest.approx(8 * 64 + 20 + 603 + 600, abs=20)
    # catches: stages that do not matter: with one more a load has a whole iteration to arrive.
    assert three == pytest.approx((603 + 600 + 8 * 64 + 20) / 2, rel=0.1) or three < 0.7 * two
    assert streams_of(code.main_loops[0]) == {"0x100": 0}


def test_asynchronous_copies_are_waited_for_by_groups():
    copy, commit = ("LDGSTS.E.BYPASS.128", "[R4], [R2.64]"), ("LDGDEPBAR", "")

    def cycles(pending: int) -> float:
        steps = [("DEPBAR.LE", f"SB0, 0x{pending}"), *[("FADD", "R1, R1, R2", {"stall": 15})] * 30, copy, commit]
        return simulate(loop(*steps, arch=80), 1, 1, 0)

    # catches: the number of groups that may be pending ignored. 450 cycles of work hide 300 of latency, if they may.
    assert cycles(0) > cycles(1) + 200 and cycles(1) == pytest.approx(454, abs=10)


def launch(width: int = 128, padded: int = 128, name: str = "attention_forward_kernel", **options) -> SimpleNamespace:
    tensor = torch.empty(4096, 8 * width, dtype=torch.bfloat16, device="meta")
    names = ("q_tiles", "k_tiles", "v_tiles")
    tiles = [SimpleNamespace(base=tensor, block_shape=[rows, padded]) for rows in (128, 64, 64)]
    kernel = SimpleNamespace(__name__=name, params=[SimpleNamespace(name=n, is_constexpr=False) for n in names])
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "WIDTH": width, "BLOCK_WIDTH": padded, "num_stages": 2}
    return SimpleNamespace(kernel=kernel, arguments=tuple(tiles), options=sizes | options)


def test_share_is_useful_operations_over_the_peak_of_the_simulated_cycles():
    scores = ("HGMMA.64x64x16.F32.BF16", "R88, gdesc[UR4], R88, gsb0")
    check, load = ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "P0, [UR4+0x100], R6"), ("UTMALDG.2D", "[UR8], [UR6]")
    code = loop(check, *[scores] * 8, *[PRODUCT] * 4, WAIT, load, num_warps=8)
    tile = 2 * 2 * 128 * 64 * 128
    assert tile_flops(code, launch()) == tile and tile_bytes(code, launch()) == 2 * 64 * 128 * 2
    modelled = estimate(code, launch())
    assert modelled.blocks == 2 and modelled.pipes["tensor"] == 2 * tile / 4096 == 2048
    assert modelled.flops == 2 * tile and modelled.share == pytest.approx(modelled.flops / (modelled.cycles * 4096))
    # catches: columns of padding counted as work.
    assert tile_flops(code, launch(width=96)) == tile * 96 // 128
    # Tiles of 32 KB per block and iteration come at 27 bytes per cycle, slower than the products: that is all it takes.
    assert modelled.cycles == pytest.approx(modelled.roof) == modelled.pipes["l2"] and modelled.limit == "l2"


def test_products_that_warps_repeat_are_no_work():
    # 24 products of 4096 operations by each of 8 warps are one and a half tiles: it is one.
    code = loop(*[("HMMA.16816.F32.BF16", "R4, R8, R12, R4")] * 24, num_warps=8, arch=80)
    small = launch(BLOCK_M=64, BLOCK_N=32, WIDTH=64, BLOCK_WIDTH=64)
    assert tile_flops(code, small) == 2 * 2 * 64 * 32 * 64


def test_model_is_silent_where_it_knows_nothing():
    assert estimate(loop(("UTCHMMA", "gdesc[UR4]"), arch=100), launch()) is None
    assert estimate(MachineCode("k", 90, 4, 32, 0, 0, 0, 0, (Instruction(0, "EXIT"),)), launch()) is None


def test_probe_has_specialised_warps_and_ranks_above_the_plain_loop():
    """In a process of its own: this one has the interpreter on, or a triton whose compiler does otherwise."""
    import triton

    if not triton.__version__.startswith("3.6"):
        pytest.skip("what triton 3.6 specialises; others differ")
    code = "from benchmarks.attention_probes import modelled_probe; print(modelled_probe(128, 128, 2, 90, 128))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    row = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert row["specialised"] and not row["serialised"] and row["spilled"] == 0
    assert 0.7 < row["share"] < 0.8
