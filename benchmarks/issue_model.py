"""A model of what one iteration of a kernel's main loop costs, in cycles, from its machine code: no GPU is needed.

It compares variants of one kernel before they can be timed. It predicts an order, not a time: clocks under load, the
memory of the whole chip, launch and tail are not in it.

A multiprocessor has four sub-cores that do the same here, so one of them is followed, with the warps that it holds of
all resident blocks. What bounds them, in cycles for one iteration of each resident block (a turn):

    tensor   operations of the products over TENSOR_FLOPS
    exp      MUFU: 16 lanes per multiprocessor, so a warp's instruction takes its sub-core's unit for 8 cycles
    fma      FFMA, FADD, FMUL: 128 lanes per multiprocessor (64 on sm_80), IMAD half of that
    alu      FMNMX, FSEL, F2FP, integers, logic: 64 lanes
    issue    one instruction of a warp per cycle and sub-core
    shared   bytes of LDS, STS, LDSM, and of what wgmma reads from shared memory, at 128 bytes per cycle; SHFL
    l2       bytes that the iteration loads, over the L2's share of a multiprocessor

The roof is the largest of these: perfect overlap. The serial bound is tensor plus the largest of exp, fma, alu and
issue: no overlap. In between, `simulate` plays the iteration: warps issue in order, at most one instruction per cycle,
each not before the stall count and the scoreboards that the assembler wrote into the code allow it, not before its unit
is free, and not before barriers, products (WARPGROUP.DEPBAR) and loads that it waits for are there. So what stands
between the issue of a product and its wait overlaps with it inside a warp group; what a common BAR.SYNC keeps in step
does not overlap between warp groups; warp-specialised consumers and separate blocks, which share no barrier, do.

Taken from the CUDA C++ Programming Guide, "Arithmetic Instructions" (lanes per cycle): exp, fma, alu. From NVIDIA's
peaks: 312e12 / (108 * 1.41e9) = 2048 (A100), 149.7e12 / (84 * 1.74e9) = 1024 (A40), 989.4e12 / (132 * 1.83e9) = 4096
operations per cycle (H100 SXM). L2: 5120 bytes per cycle and chip (A100 white paper; taken for H100 too), of which 70 %
are had: FA3's 740 TFLOP/s with 128 queries a block need 65 %; sm_86 is a guess. Latencies of MUFU, SHFL and shared
memory follow Jia et al. 2018 (arXiv:1804.06826), that of the L2 Luo et al. 2024 (arXiv:2402.13499).

Assumed, not known: a TMA load takes 600 cycles (400 to 1000 move shares with two stages by 4 points, with three by
none); wgmmas wait in a queue of any length and are served in the order of issue (a queue of two costs specialised warps
up to 7 points, others 3); loads hit the L2; blocks and warp groups without a common barrier start together and drift.

Checked against the published ladder on an H100 (width 128, no mask, 8k tokens): Triton's tutorial 464 TFLOP/s, with
specialised warps 526 (+13 %). Modelled, at equal clocks: plain 128x128 with three stages 64 % of peak; the same loop
with specialised warps and two stages, in a kernel without branches, 74 % (+16 %). The order fits; the level does not:
64 % of 989 would be 630 TFLOP/s. Clocks under load (cuBLAS itself reaches 660), prologues and tails are what is
missing. Overlap inside a warp group, published as +10 % on top of specialised warps, gains 5 % over the plain loop of
the same tile here. Backward kernels have no published ladder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.issue_costs import (
    L2_BYTES,
    SHARED_BYTES,
    SUB_CORES,
    TENSOR_FLOPS,
    loaded_bytes,
    operand_bytes,
    pipe_of,
)
from benchmarks.issue_simulation import simulate
from benchmarks.machine_code import Instruction, MachineCode
from kernels.launch import Launch

# Products over a whole tile per iteration, of the kernels that have any.
PRODUCTS = {"attention_forward": 2, "attention_backward_kv": 4, "attention_backward_q": 3}


@dataclass(frozen=True)
class Estimate:
    """Cycles of a turn (one iteration of each resident block) and what they are made of.

    pipes: cycles of each unit.   cycles: those of the simulation.   flops: useful operations of a turn.
    share: flops over what the tensor cores could do in `cycles`.   overlapped: share of the exponentials that stand
    between the issue of a product and its wait in the code of one warp.
    """

    pipes: dict[str, float]
    cycles: float
    flops: int
    share: float
    overlapped: float
    blocks: int

    @property
    def roof(self) -> float:
        """Cycles if everything overlapped."""
        return max(self.pipes.values())

    @property
    def serial(self) -> float:
        """Cycles if the products overlapped with nothing."""
        return self.pipes["tensor"] + max(self.pipes[name] for name in ("exp", "fma", "alu", "issue"))

    @property
    def limit(self) -> str:
        """The unit that bounds the roof, or "order" where the simulation stays a fifth and more above every unit."""
        name = max(self.pipes, key=lambda pipe: self.pipes[pipe])
        return name if self.cycles < 1.2 * self.pipes[name] else f"order ({name})"


def overlapped_exponentials(path: Sequence[Instruction]) -> float:
    """Share of an iteration's exponentials between the issue of a wgmma and the wait for it; 0 without exponentials."""
    flying, during, exponentials = False, 0, 0
    for turn in range(2):
        for instruction in path:
            if instruction.base == "HGMMA":
                flying = True
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR") and re.search(r"0x0\b", instruction.operands):
                flying = False
            elif instruction.opcode.startswith("MUFU.EX2") and turn:
                exponentials += 1
                during += flying
    return during / exponentials if exponentials else 0.0


def estimate(code: MachineCode, launch: Launch) -> Estimate | None:
    """The model of a kernel's main loop; None without such a loop, or for an architecture that the model lacks."""
    if code.arch not in TENSOR_FLOPS or not code.main_loops or not code.blocks_per_multiprocessor:
        return None
    blocks, tiles = code.blocks_per_multiprocessor, tile_bytes(code, launch)
    copied = code.num_warps * sum(loaded_bytes(i) for i in code.main_loops[0])
    pipes = _pipes(code, blocks) | {"l2": blocks * (tiles + copied) / L2_BYTES[code.arch]}
    cycles = simulate(code, blocks, launch.options.get("num_stages", 1), tiles)
    flops = blocks * tile_flops(code, launch)
    share = flops / (cycles * TENSOR_FLOPS[code.arch])
    return Estimate(pipes, cycles, flops, share, overlapped_exponentials(code.main_loops[0]), blocks)


def _pipes(code: MachineCode, blocks: int) -> dict[str, float]:
    """Cycles that a turn takes of each unit of a sub-core."""
    copies = max(1, code.num_warps // SUB_CORES) if len(code.main_loops) == 1 and not code.is_specialised else 1
    pipes = dict.fromkeys(("tensor", "exp", "fma", "alu", "issue", "shared"), 0.0)
    for path in code.main_loops:
        for instruction in path:
            name, cycles = pipe_of(instruction, code.arch)
            pipes["issue"] += blocks * copies
            pipes["shared"] += blocks * copies * operand_bytes(instruction) / SHARED_BYTES
            if name:
                pipes[name] += blocks * copies * cycles
    return pipes


def tile_bytes(code: MachineCode, launch: Launch) -> int:
    """Bytes of the tiles that a block loads through descriptors in an iteration."""
    if not (code.is_specialised or any(i.base == "UTMALDG" for i in code.main_loops[0])):
        return 0
    descriptors = _descriptors(launch)
    return sum(_descriptor_bytes(descriptors[name]) for name in _walked(launch) if name in descriptors)


def _descriptors(launch: Launch) -> dict[str, Any]:
    names = [parameter.name for parameter in launch.kernel.params if not parameter.is_constexpr]
    return {name: value for name, value in zip(names, launch.arguments) if hasattr(value, "block_shape")}


def _walked(launch: Launch) -> tuple[str, ...]:
    """Descriptors that the main loop walks; the others are read once, before it."""
    keys_stay = table_of(launch) == "attention_backward_kv"
    return ("q_tiles", "do_tiles") if keys_stay else ("k_tiles", "v_tiles")


def _descriptor_bytes(descriptor: Any) -> int:
    elements = 1
    for size in descriptor.block_shape:
        elements *= size
    return elements * descriptor.base.element_size()


def table_of(launch: Launch) -> str:
    """Name of the table that a launch takes its configuration from: the kernel's, without `_kernel`."""
    return launch.kernel.__name__.removesuffix("_kernel")


def tile_flops(code: MachineCode, launch: Launch) -> int:
    """Useful operations of a block's iteration; padding of the width is none, nor are products that warps repeat."""
    issued = sum(i.flops for path in code.main_loops for i in path)
    per_block = code.num_warps // SUB_CORES if any(i.base == "HGMMA" for i in code.main_loops[0]) else code.num_warps
    issued *= 1 if code.is_specialised else per_block
    products, options = PRODUCTS.get(table_of(launch)), launch.options
    if products is None:
        return issued
    tile = 2 * products * options["BLOCK_M"] * options["BLOCK_N"]
    return max(1, issued // (tile * options["BLOCK_WIDTH"])) * tile * options["WIDTH"]
