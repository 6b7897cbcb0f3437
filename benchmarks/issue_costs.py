"""What an instruction takes: its unit, and for how long. The numbers' sources stand in `issue_model`."""

import re

from benchmarks.machine_code import Instruction

SUB_CORES = 4
TENSOR_FLOPS = {80: 2048, 86: 1024, 90: 4096}
FMA_CYCLES = {80: 2, 86: 1, 90: 1}
L2_BYTES = {80: 0.7 * 5120 / 108, 86: 16.0, 90: 0.7 * 5120 / 132}
SHARED_BYTES = 128
EXP_CYCLES = 8
# Cycles from issue to result, behind the unit's own; what is not named and sets a scoreboard takes OTHER.
LATENCY = {
    "MUFU": 14,
    "SHFL": 23,
    "LDS": 23,
    "LDSM": 23,
    "STS": 12,
    "S2R": 25,
    "S2UR": 25,
    "R2UR": 10,
    "SYNCS": 20,
    "LDG": 273,
    "LDGSTS": 300,
    "UTMALDG": 600,
    "BAR": 20,
    "HGMMA": 20,
    "LDL": 35,
}
OTHER = 12
# Instructions that wait for a unit without holding up their warp.
QUEUED = 2
ALU = (
    "FMNMX",
    "FSEL",
    "FSETP",
    "F2FP",
    "SEL",
    "ISETP",
    "LOP3",
    "IADD3",
    "LEA",
    "SHF",
    "PRMT",
    "PLOP3",
    "VOTE",
    "VOTEU",
    "FCHK",
    "IMNMX",
    "IABS",
    "LOP",
    "SGXT",
    "BMSK",
    "FLO",
    "POPC",
    "VIADD",
    "VIMNMX",
)
FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2")
SHARED = ("LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMS", "SHFL", "RED", "ATOMG")


def pipe_of(instruction: Instruction, arch: int) -> tuple[str, float]:
    """Unit of an instruction and for how many cycles a warp's takes a sub-core's; ("", 0) for those that take none."""
    base = instruction.base
    if instruction.flops:
        return "tensor", _product_cycles(instruction, arch)
    if base == "MUFU":
        return "exp", EXP_CYCLES
    if base in FMA:
        return "fma", FMA_CYCLES[arch]
    if base.startswith("IMAD"):
        return "fma", 2
    if base in ALU:
        return "alu", 2
    if base in SHARED:
        return "shared", SUB_CORES * shared_bytes(instruction) / SHARED_BYTES
    return "", 0


def _product_cycles(instruction: Instruction, arch: int) -> float:
    """A warp group's product occupies all sub-cores, a warp's its own; products of fp32 (TF32) run at half the rate."""
    rate = TENSOR_FLOPS[arch] / (1 if instruction.base == "HGMMA" else SUB_CORES)
    rate /= 2 if "TF32" in instruction.opcode else 1
    return max(instruction.flops / rate, operand_bytes(instruction) / SHARED_BYTES)


def operand_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that a warp group's product of 2-byte elements reads: B always, A unless in registers."""
    match = re.search(r"\.(\d+)x(\d+)x(\d+)\b", instruction.opcode)
    if instruction.base != "HGMMA" or not match:
        return 0
    m, n, k = (int(size) for size in match.groups())
    first = instruction.operands.split(",")[1].strip()
    return 2 * k * (n + (m if first.startswith("gdesc") else 0))


def shared_bytes(instruction: Instruction) -> int:
    """Bytes that a warp's instruction moves through the shared memory unit; a shuffle counts as one pass."""
    if instruction.base == "SHFL":
        return SHARED_BYTES
    matrices = re.search(r"\.M\w*88(?:\.(\d))?$", instruction.opcode)
    return SHARED_BYTES * int(matrices[1] or 1) if matrices else 32 * instruction.bytes


def loaded_bytes(instruction: Instruction) -> int:
    """Bytes that a warp's load asks the L2 for: tiles are loaded 16 bytes a thread, without repeats.

    Narrower loads are those of row vectors, where most threads want the same: a sector of 32 bytes.
    """
    if instruction.base not in ("LDG", "LDGSTS"):
        return 0
    return 32 * instruction.bytes if instruction.bytes >= 16 else 32
