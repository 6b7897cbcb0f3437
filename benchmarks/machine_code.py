"""Machine code of recorded launches, compiled with no GPU at hand: resources, spills, instructions, loops.

`compile_launch` turns a `kernels.launch.Launch` (arguments may be on the meta device) into the binary that the same
launch would run on a given architecture, and reads it. Only the Triton wheel is needed: its ptxas, cuobjdump and
nvdisasm.

Spills are what the assembler says they are (`ptxas -v`: spill stores and loads, bytes), so that a stack frame is not
taken for one. A binary without LDL, STL and stack has none; only for the others the assembler runs again.
"""

import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.control_flow import main_loops
from kernels.launch import Launch

POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "num_ctas")
# What a multiprocessor holds at a time, and the shared memory of its blocks together and of one block, bytes:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS = 65_536
THREADS = {80: 2048, 86: 1536, 90: 2048, 100: 2048}
BLOCKS = {80: 32, 86: 16, 90: 32, 100: 32}
SHARED = {80: 164 * 1024, 86: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_PER_BLOCK = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Shared memory that the system takes from every block; cuobjdump counts it as static from sm_90 on.
RESERVED = 1024
MATRIX = r"HGMMA|HMMA|IMMA|DMMA|UTC\w*MMA"


@dataclass(frozen=True)
class Instruction:
    """One instruction: address in the kernel, opcode with its suffixes, operands, predicate and scheduling bits.

    The assembler fixes the schedule (Volta and later): how many cycles pass before the warp's next instruction, which
    of six scoreboards clears when the instruction has its result (`sets`) or has read its operands (`reads`), and which
    must be clear before it starts (`waits`). -1 stands for no scoreboard.
    """

    address: int
    opcode: str
    operands: str = ""
    guard: str = ""
    stall: int = 1
    sets: int = -1
    reads: int = -1
    waits: tuple[int, ...] = ()

    @property
    def base(self) -> str:
        """Opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Address that a branch jumps to."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.base == "BRA" else None
        return int(match[1], 16) if match else None

    @property
    def is_matrix(self) -> bool:
        """True for a product on the tensor cores."""
        return re.fullmatch(MATRIX, self.base) is not None

    @property
    def flops(self) -> int:
        """Operations of a product, of a warp group's (HGMMA) or a warp's; 0 where the opcode does not say the shape.

        HGMMA.64x128x16 and HMMA.16816 (16x8x16) say it; the fifth generation (UTCHMMA) keeps it in a descriptor.
        """
        match = re.search(r"\.(\d+)x(\d+)x(\d+)\b", self.opcode) or re.search(r"\.(16)(8)(8|16|32)\b", self.opcode)
        return 2 * int(match[1]) * int(match[2]) * int(match[3]) if match and self.is_matrix else 0

    @property
    def moved_bytes(self) -> int:
        """Bytes of global memory per thread, without what the tensor memory accelerator moves."""
        return self.bytes if self.base in ("LDG", "LDGSTS", "STG") else 0

    @property
    def bytes(self) -> int:
        """Bytes per thread of a memory instruction."""
        match = re.search(r"\.(256|128|64)\b", self.opcode)
        if match:
            return int(match[1]) // 8
        return 1 if re.search(r"\.[US]8\b", self.opcode) else 2 if re.search(r"\.[US]16\b", self.opcode) else 4


@dataclass(frozen=True)
class MachineCode:
    """What a binary takes and does; bytes for memory, counts for instructions."""

    name: str
    arch: int
    num_warps: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    @property
    def spill_bytes(self) -> int:
        """Bytes of a thread's spill stores and loads, each instruction counted once."""
        return self.spill_store_bytes + self.spill_load_bytes

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of the prefixes."""
        return count(self.instructions, *prefixes)

    @property
    def is_specialised(self) -> bool:
        """True if warp specialisation took effect: warp groups change their register counts."""
        return self.count("USETMAXREG") > 0

    @property
    def is_serialised(self) -> bool:
        """True if every wgmma waits for the one before it: ptxas does so where it lacks registers (warning C7510)."""
        products = [i for i in self.instructions if i.base == "HGMMA"]
        if not products or not all("gsb0" in i.operands for i in products):
            return False
        accumulators = [i.operands.split(",")[0] for i in products]
        return any(a == b and "RZ" not in i.operands for a, b, i in zip(accumulators, accumulators[1:], products[1:]))

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that fit on one multiprocessor at a time."""
        threads = 32 * self.num_warps
        per_thread = max(8, (self.registers + 7) // 8 * 8)
        fits = [BLOCKS[self.arch], REGISTERS // (per_thread * threads), THREADS[self.arch] // threads]
        if self.shared_bytes:
            fits.append(SHARED[self.arch] // (self.shared_bytes + RESERVED))
        return min(fits)

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that a multiprocessor takes."""
        return self.blocks_per_multiprocessor * 32 * self.num_warps / THREADS[self.arch]

    @property
    def vector_bytes(self) -> dict[str, int]:
        """Widest global load and store of a thread, bytes; asynchronous copies into shared memory count as loads."""
        widest = {"load": 0, "store": 0}
        for instruction in self.instructions:
            kind = {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(instruction.base)
            if kind:
                widest[kind] = max(widest[kind], instruction.bytes)
        return widest

    @cached_property
    def main_loops(self) -> tuple[tuple[Instruction, ...], ...]:
        """One iteration of the main loop, one per warp group where warps are specialised: see `control_flow`."""
        return main_loops(self.instructions, self.is_specialised)


def count(instructions: tuple[Instruction, ...], *prefixes: str) -> int:
    """Instructions whose opcode starts with one of the prefixes."""
    return sum(instruction.opcode.startswith(prefixes) for instruction in instructions)


def ptxas_version(arch: int) -> str:
    """Release of the assembler that serves an architecture."""
    path = _assembler(arch).path
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", printed)[1]


def _assembler(arch: int) -> Any:
    return knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What `triton.compile` takes for a launch: types, constants and divisibility as the run-time launcher sees them.

    Raises:
        ValueError: an argument of a kind that no kernel takes, or constexprs that do not fit the kernel.
    """
    parameters = launch.kernel.params
    runtime = [p for p in parameters if not p.is_constexpr]
    if len(runtime) != len(launch.arguments):
        raise ValueError(f"{launch.kernel}: expected {len(runtime)} arguments, got {len(launch.arguments)}")
    values = dict(zip((p.name for p in runtime), launch.arguments))
    constants = {name: value for name, value in launch.options.items() if name not in OPTIONS}
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(parameters):
        name = parameter.name
        if parameter.is_constexpr:
            if name not in constants:
                raise ValueError(f"{launch.kernel}: expected the constexpr {name} among the options, got none")
            signature[name], constexprs[(index,)] = "constexpr", constants.pop(name)
            continue
        kind, divisible = _type_of(values[name], parameter)
        signature[name] = kind
        if kind == "constexpr":
            constexprs[(index,)] = values[name]
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    if constants:
        raise ValueError(f"{launch.kernel}: expected only its constexprs, got {sorted(constants)} too")
    options = {name: value for name, value in launch.options.items() if name in OPTIONS}
    return ASTSource(launch.kernel, signature, constexprs, attributes), options


def _type_of(value: Any, parameter: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be divisible by 16."""
    if isinstance(value, Tensor):
        return f"*{POINTERS[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        block = ", ".join(str(size) for size in value.block_shape)
        return f"tensordesc<{POINTERS[value.base.dtype]}[{block}]>", False
    if value is None:
        return "constexpr", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, value % 16 == 0 and not parameter.do_not_specialize
    if isinstance(value, float):
        return "fp32", False
    raise ValueError(f"{parameter.name}: expected a tensor, descriptor, number or None, got {type(value).__name__}")


def compile_launch(launch: Launch, arch: int) -> MachineCode:
    """The binary of a launch for an architecture (80, 86, 90, 100), read."""
    source, options = source_of(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    shared, registers, stack, instructions = read(compiled.asm["cubin"], arch)
    spills = (0, 0)
    if stack or count(instructions, "LDL", "STL"):
        spills = spills_of(assembler_log(compiled.asm["ptx"], arch, options))
    return MachineCode(
        compiled.name,
        arch,
        compiled.metadata.num_warps,
        registers,
        *spills,
        stack,
        compiled.metadata.shared + shared,
        instructions,
    )


def assembler_log(ptx: str, arch: int, options: dict[str, Any]) -> str:
    """What the assembler prints about a kernel, run with the options that Triton gives it."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as printed:
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), arch)
    return printed.getvalue()


def spills_of(log: str) -> tuple[int, int]:
    """Bytes of spill stores and of spill loads in what `ptxas -v` printed, over all its functions."""
    matches = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return sum(int(stores) for stores, _ in matches), sum(int(loads) for _, loads in matches)


def read(cubin: bytes, arch: int) -> tuple[int, int, int, tuple[Instruction, ...]]:
    """Static shared memory (bytes), registers, stack (bytes) and instructions of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name)
    registers, stack, shared = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    return max(0, shared - RESERVED if arch >= 90 else shared), registers, stack, tuple(instructions_of(listing))


def _run(path: str, *arguments: str) -> str:
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


LABEL = re.compile(r"\s*(\.L_\w+):")
CODE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
HIGH_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def instructions_of(listing: str) -> Iterator[Instruction]:
    """Instructions of an nvdisasm listing, with or without encodings (-hex); branch labels become addresses."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    lines: list[list[Any]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            pending.append(label[1])
        elif code := CODE.match(line):
            labels.update(dict.fromkeys(pending, int(code[1], 16)))
            pending.clear()
            lines.append([int(code[1], 16), code[3], code[4], code[2] or "", ()])
        elif lines and (match := HIGH_WORD.match(line)):
            lines[-1][-1] = _schedule(int(match[1], 16))
    for address, opcode, operands, guard, schedule in lines:
        target = re.search(r"`\((\.L_\w+)\)", operands)
        if target and target[1] in labels:
            operands = operands.replace(target[0], f"0x{labels[target[1]]:x}")
        yield Instruction(address, opcode, operands, guard, *schedule)


def _schedule(high_word: int) -> tuple[int, int, int, tuple[int, ...]]:
    """Stall cycles, scoreboards set and read, and scoreboards waited for, from the upper half of an encoding.

    Bits 41 to 61: stall (4), yield (1), write scoreboard (3), read scoreboard (3), wait mask (6), reuse (4).
    Source: Jia et al. 2018, arXiv:1804.06826, section 2.1, for Volta; sm_80 to sm_90 keep it.
    """
    control = high_word >> 41
    scoreboards = ((control >> 5) & 7, (control >> 8) & 7)
    sets, reads = (-1 if board == 7 else board for board in scoreboards)
    return control & 15, sets, reads, tuple(board for board in range(6) if control >> 11 & 1 << board)
