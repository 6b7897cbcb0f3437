"""Reading machine code: listings, schedules, widths, loops, spills, occupancy. Listings here are written by hand."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.control_flow import loops, main_loops
from benchmarks.machine_code import Instruction, MachineCode, instructions_of, source_of, spills_of
from kernels.launch import Launch

ENCODED = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
                                                                      /* 0x000ea2000c1e1d00 */
.L_x_1:
        /*0010*/              @!P0 MUFU.EX2 R8, R4 ;                  /* 0x0000000400087308 */
                                                                      /* 0x004e640000000800 */
        /*0020*/               @P1 BRA `(.L_x_1) ;                    /* 0xfffffffc00f81947 */
                                                                      /* 0x002fea000383ffff */
.L_x_2:
        /*0030*/                   BRA `(.L_x_2);                     /* 0xfffffffc00fc7947 */
                                                                      /* 0x000fc0000383ffff */
"""

# A loop as compilers write one for Hopper: waiting out of line (.L_x_9), masks behind a branch, a smaller loop behind.
LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x100], R6 ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
        /*0060*/                   FSEL R24, R24, -INF , P2 ;
        /*0070*/                   FSEL R25, R25, -INF , P3 ;
.L_x_3:
        /*0080*/                   MUFU.EX2 R8, R24 ;
        /*0090*/               @P4 UTMALDG.2D [UR8], [UR6] ;
        /*00a0*/               @P5 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00c0*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*00d0*/               @P5 BRA `(.L_x_4) ;
        /*00e0*/                   EXIT ;
.L_x_9:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x100], R6 ;
        /*0100*/              @!P0 BRA `(.L_x_9) ;
        /*0110*/                   BRA `(.L_x_2) ;
"""


def code(instructions, **changes) -> MachineCode:
    values = {
        "name": "kernel",
        "arch": 90,
        "num_warps": 8,
        "registers": 128,
        "spill_store_bytes": 0,
        "spill_load_bytes": 0,
        "stack_bytes": 0,
        "shared_bytes": 0,
        "instructions": tuple(instructions),
    }
    return MachineCode(**values | changes)


def test_listing_gives_opcodes_guards_targets_and_schedules():
    load, exponential, branch, last = instructions_of(ENCODED)
    assert (load.address, load.opcode, load.guard) == (0, "LDG.E.128", "")
    # catches: the scheduling bits read one place off, where every scoreboard and stall would be another.
    assert (load.stall, load.sets, load.reads, load.waits) == (1, 2, -1, ())
    assert (exponential.guard, exponential.stall, exponential.sets, exponential.waits) == ("@!P0", 2, 1, (2,))
    assert exponential.operands == "R8, R4" and branch.waits == (1,) and branch.stall == 5
    # catches: a label taken for the address before it.
    assert branch.target == 0x10 and last.target == 0x30 and load.target is None


def test_listing_without_encodings_is_read_too():
    actual = list(instructions_of(LOOP))
    assert len(actual) == 18 and actual[0].operands == "R1, c[0x0][0x28]"
    assert actual[2].target == 0xF0 and actual[-1].target == 0x30


@pytest.mark.parametrize(
    ("opcode", "size", "flops"),
    [
        ("LDG.E.128.CONSTANT", 16, 0),
        ("STG.E.64", 8, 0),
        ("LDG.E.U16", 2, 0),
        ("STG.E.U8", 1, 0),
        ("LDL", 4, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16, 0),
        ("HGMMA.64x128x16.F32.BF16", 4, 2 * 64 * 128 * 16),
        ("HMMA.16816.F32.BF16", 4, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 4, 2 * 16 * 8 * 8),
        ("UTCHMMA", 4, 0),
    ],
)
def test_opcode_says_bytes_and_operations(opcode, size, flops):
    instruction = Instruction(0, opcode)
    assert (instruction.bytes, instruction.flops) == (size, flops)
    assert instruction.is_matrix == (opcode.partition(".")[0] in ("HGMMA", "HMMA", "UTCHMMA"))


def test_vector_bytes_are_the_widest_of_global_memory():
    opcodes = ("LDG.E.64", "LDG.E.U16", "STG.E.U16", "STS.128", "LDGSTS.E.BYPASS.128")
    assert code(Instruction(16 * n, o) for n, o in enumerate(opcodes)).vector_bytes == {"load": 16, "store": 2}


def test_main_loop_leaves_out_waits_masks_and_smaller_loops():
    instructions = tuple(instructions_of(LOOP))
    (path,) = main_loops(instructions, is_specialised=False)
    # catches: loops taken as ranges of addresses: the branch back from .L_x_9 would make one of everything behind it.
    assert [hex(i.address) for i in path] == ["0x10", "0x20", "0x30", "0x40", "0x50", "0x80", "0x90", "0xa0"]
    # catches: counting products instead of their sizes, which would take the loop behind, with two small ones.
    assert path == code(instructions).main_loops[0]
    without_loads = tuple(instructions_of(LOOP.replace("@P4 UTMALDG.2D", "@P4 NOP")))
    assert main_loops(without_loads, is_specialised=False)[0][0].address == 0x10
    assert [len(loop.path) for loop in loops(instructions)] == [8, 3, 2]


def test_specialised_warps_have_a_main_loop_each():
    twin = LOOP.replace("/*00", "/*10").replace("/*01", "/*11").replace("L_x_", "L_y_")
    both = LOOP.replace("     MOV R1, c[0x0][0x28] ;", "@P6 BRA `(.L_y_1) ;") + twin
    instructions = [*instructions_of(both), Instruction(0x2000, "USETMAXREG.DEALLOC.CTAPOOL", "0x18")]
    assert [path[0].address for path in code(instructions).main_loops] == [0x10, 0x1010]


def test_inner_loop_is_the_main_one():
    nested = """
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   LDG.E R4, [R2] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""
    (path,) = main_loops(tuple(instructions_of(nested)), is_specialised=False)
    assert [i.address for i in path] == [0x20, 0x30, 0x40]
    assert main_loops((Instruction(0, "EXIT"),), is_specialised=False) == ()


def test_spills_are_those_of_the_assembler_not_the_stack():
    log = "Function properties for a\n 512 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    # catches: the stack frame taken for a spill.
    assert spills_of(log.format(0, 0)) == (0, 0)
    assert spills_of(log.format(36, 40) + log.format(4, 8)) == (40, 48)
    assert code([], spill_store_bytes=36, spill_load_bytes=40).spill_bytes == 76


def test_serialised_wgmma_is_told_from_single_ones():
    chain = "HGMMA.64x128x16.F32.BF16"
    together = [
        Instruction(0, chain, "R24, gdesc[UR4], RZ, !UPT"),
        Instruction(16, chain, "R24, gdesc[UR8], R24, gsb0"),
    ]
    single = [Instruction(0, chain, "R24, gdesc[UR4], RZ, !UPT, gsb0")]
    waiting = [single[0], Instruction(16, chain, "R24, gdesc[UR8], R24, gsb0")]
    # catches: every gsb0 taken for one: products of a single instruction commit their group too.
    assert [code(actual).is_serialised for actual in (together, single, single * 2, waiting)] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "blocks", "occupancy"),
    [
        (90, 8, 128, 0, 2, 0.25),  # 65536 registers / (128 * 256)
        (90, 8, 81, 0, 2, 0.25),  # 81 registers take 88: catches registers that are not allocated by eights
        (90, 8, 32, 113 * 1024, 2, 0.25),  # 228 KB / (113 + 1)
        (90, 8, 32, 114 * 1024, 1, 0.125),
        (80, 4, 16, 0, 16, 1.0),  # 2048 threads
        (86, 1, 16, 0, 16, 16 / 48),  # 16 blocks on sm_86
        (86, 8, 32, 99 * 1024, 1, 8 / 48),
    ],
)
def test_occupancy_is_what_the_scarcest_resource_allows(arch, num_warps, registers, shared, blocks, occupancy):
    actual = code([], arch=arch, num_warps=num_warps, registers=registers, shared_bytes=shared)
    assert actual.blocks_per_multiprocessor == blocks and actual.occupancy == pytest.approx(occupancy)


def parameter(name: str, is_constexpr: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, is_constexpr=is_constexpr, do_not_specialize=False)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"WIDTH": 1}, "expected 1 arguments, got 0"),
        ((torch.empty(1),), {}, "expected the constexpr WIDTH among the options, got none"),
        ((torch.empty(1),), {"WIDTH": 1, "HEIGHT": 2}, r"expected only its constexprs, got \['HEIGHT'\] too"),
        (("text",), {"WIDTH": 1}, "x: expected a tensor, descriptor, number or None, got str"),
    ],
)
def test_launch_that_does_not_fit_its_kernel_is_refused(arguments, options, message):
    kernel = SimpleNamespace(params=[parameter("x"), parameter("WIDTH", True)])
    with pytest.raises(ValueError, match=message):
        source_of(Launch(kernel, (1,), arguments, options))
