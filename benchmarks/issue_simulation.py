"""Plays the main loop of a kernel on one sub-core of a multiprocessor; `issue_model` says what it assumes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.issue_costs import L2_BYTES, LATENCY, OTHER, QUEUED, SUB_CORES, loaded_bytes, pipe_of
from benchmarks.machine_code import Instruction, MachineCode

# Iterations that are played, and those at the start that are not counted.
PLAYED, SKIPPED = 14, 6


@dataclass
class Warp:
    """A warp of the followed sub-core: where it stands, and when what it waits for is there.

    partners: warps of the sub-core that it meets at a barrier, itself included; they run the same code.
    boards: when each scoreboard is clear.   products, copies: when each group of wgmmas or asynchronous copies that it
    committed is complete.   ends: when it ended each iteration.
    """

    path: Sequence[Instruction]
    block: int
    role: int
    partners: int
    ready: float = 0.0
    at: int = 0
    iteration: int = 0
    copying: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    products: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @property
    def instruction(self) -> Instruction:
        """The next to be issued."""
        return self.path[self.at]

    def advance(self, time: float) -> None:
        """Pass the instruction that was issued at this time."""
        self.ready = time + max(1, self.instruction.stall)
        self.at += 1
        if self.at == len(self.path):
            self.at, self.iteration = 0, self.iteration + 1
            self.ends.append(time)

    def complete(self) -> float:
        """When as many groups are complete as a DEPBAR demands that comes next; 0 where none comes."""
        instruction = self.instruction
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            groups = self.products
        elif instruction.base == "DEPBAR" and "SB0" in instruction.operands:
            groups = self.copies
        else:
            return 0.0
        allowed = re.search(r"0x([0-9a-f]+)\b", instruction.operands)
        return max(groups[: len(groups) - (int(allowed[1], 16) if allowed else 0)], default=0.0)


def warps_of(code: MachineCode, blocks: int) -> list[Warp]:
    """The sub-core's warps of every block: one of each warp group."""
    if code.is_specialised:
        return [Warp(path, block, role, 1) for block in range(blocks) for role, path in enumerate(code.main_loops)]
    copies = max(1, code.num_warps // SUB_CORES)
    return [Warp(code.main_loops[0], block, 0, copies) for block in range(blocks) for _ in range(copies)]


class SubCore:
    """Plays the main loop: every step issues the instruction that can go first.

    Args:
        blocks: resident blocks.   stages: of the software pipeline.   tiles: bytes that a block loads per
            iteration through descriptors.
    """

    def __init__(self, code: MachineCode, blocks: int, stages: int, tiles: float) -> None:
        self.arch, self.is_specialised = code.arch, code.is_specialised
        # Iterations between asking for a tile and waiting for it; a producer fills all stages ahead.
        self.lead = max(1, stages) if code.is_specialised else max(0, stages - 1)
        self.warps = warps_of(code, blocks)
        self.free = dict.fromkeys(("issue", "tensor", "exp", "fma", "alu", "shared", "l2"), 0.0)
        self.streams = streams_of(code.main_loops[0])
        self.transfer = tiles / max(1, len(self.streams)) / L2_BYTES[self.arch]
        self.arrivals: dict[tuple[int, int, int], float] = {}
        self.meetings: dict[tuple[int, int, int, int], dict[int, float]] = {}
        self.actions: dict[str, Callable[[Warp, float, float], float]] = {
            "HGMMA": self._product,
            "LDGSTS": self._copy,
            "LDGDEPBAR": self._commit,
            "UTMALDG": self._load,
            "LDG": self._fetch,
        }

    def run(self) -> float:
        """Cycles of a turn, once the loop has settled."""
        while any(warp.iteration < PLAYED for warp in self.warps):
            times = [(time, n) for n, warp in enumerate(self.warps) if (time := self._earliest(warp)) is not None]
            assert times, "every warp waits for another one"
            time, number = min(times)
            self._issue(self.warps[number], time)
        spans = [(warp.ends[PLAYED - 1] - warp.ends[SKIPPED - 1]) / (PLAYED - SKIPPED) for warp in self.warps]
        return sum(spans) / len(spans)

    def _earliest(self, warp: Warp) -> float | None:
        """When the warp's next instruction can be issued; None while it waits for another warp, or has finished."""
        if warp.iteration >= PLAYED + 2 * self.lead + 2:
            return None
        instruction = warp.instruction
        time = max([warp.ready, self.free["issue"], *(warp.boards[board] for board in instruction.waits)])
        name, cycles = pipe_of(instruction, self.arch)
        if name and name != "tensor":
            time = max(time, self.free[name] - (QUEUED * cycles if name in ("exp", "shared") else 0))
        if name == "tensor" and instruction.base != "HGMMA":
            time = max(time, self.free["tensor"] - QUEUED * cycles)
        if instruction.base == "BAR":
            return self._barrier(warp, time)
        if instruction.opcode.startswith("SYNCS.PHASECHK"):
            return self._arrival(warp, time)
        return max(time, warp.complete())

    def _barrier(self, warp: Warp, time: float) -> float | None:
        """The warps that meet at a barrier pass it when the last one has come."""
        meeting = self.meetings.setdefault((warp.block, warp.role, warp.iteration, warp.at), {})
        meeting.setdefault(id(warp), time)
        return max(time, max(meeting.values()) + LATENCY["BAR"]) if len(meeting) == warp.partners else None

    def _arrival(self, warp: Warp, time: float) -> float | None:
        """When the tile that a warp waits for in this iteration is in shared memory."""
        stream = self.streams.get(_offset(warp.instruction))
        if stream is None:
            return time
        if self.is_specialised:
            return self._refilled(warp, stream, time)
        if warp.iteration < self.lead:
            return time
        arrival = self.arrivals.get((warp.block, stream, warp.iteration))
        return None if arrival is None else max(time, arrival)

    def _refilled(self, warp: Warp, stream: int, time: float) -> float | None:
        """The producer refills a stage when every consumer has ended the iteration that read it."""
        emptied = warp.iteration - self.lead
        if emptied < 0:
            return time
        consumers = [w for w in self.warps if w.block == warp.block]
        if any(len(w.ends) <= emptied for w in consumers):
            return None
        key = (warp.block, stream, warp.iteration)
        if key not in self.arrivals:
            self.arrivals[key] = self._transferred(max(w.ends[emptied] for w in consumers))
        return max(time, self.arrivals[key])

    def _transferred(self, time: float) -> float:
        """When a tile asked for at a time is there: behind those asked for before, at the L2's rate."""
        self.free["l2"] = max(self.free["l2"], time) + self.transfer
        return self.free["l2"] + LATENCY["UTMALDG"]

    def _issue(self, warp: Warp, time: float) -> None:
        instruction = warp.instruction
        self.free["issue"] = time + 1
        name, cycles = pipe_of(instruction, self.arch)
        start = max(time, self.free[name]) if name else time
        if name:
            self.free[name] = start + cycles
        done = start + cycles + LATENCY.get(instruction.base, OTHER)
        action = self.actions.get(instruction.base)
        if action:
            done = action(warp, start + cycles, done)
        for board, moment in ((instruction.sets, done), (instruction.reads, start + cycles)):
            if board >= 0:
                warp.boards[board] = max(warp.boards[board], moment)
        warp.advance(time)

    def _product(self, warp: Warp, _: float, done: float) -> float:
        if "gsb0" in warp.instruction.operands:
            warp.products.append(done)
        return done

    def _copy(self, warp: Warp, end: float, _: float) -> float:
        warp.copying = max(warp.copying, self._moved(warp, end) + LATENCY["LDGSTS"])
        return warp.copying

    def _commit(self, warp: Warp, _: float, done: float) -> float:
        warp.copies.append(warp.copying)
        return done

    def _fetch(self, warp: Warp, end: float, _: float) -> float:
        return self._moved(warp, end) + LATENCY["LDG"]

    def _moved(self, warp: Warp, end: float) -> float:
        """When the L2 has sent what a warp of each sub-core asks for with its next instruction."""
        moved = SUB_CORES * loaded_bytes(warp.instruction) / L2_BYTES[self.arch]
        self.free["l2"] = max(self.free["l2"], end) + moved
        return self.free["l2"]

    def _load(self, warp: Warp, end: float, done: float) -> float:
        """The first warp of the block that comes here asks for the tile of a later iteration."""
        number = sum(i.base == "UTMALDG" for i in warp.path[: warp.at])
        key = (warp.block, number, warp.iteration + self.lead)
        if key not in self.arrivals:
            self.arrivals[key] = self._transferred(end)
        return done


def streams_of(path: Sequence[Instruction]) -> dict[str, int]:
    """Which load of an iteration, by number, a wait is for: barrier address (its constant part) -> number.

    A load follows the SYNCS.ARRIVE that announces its bytes, at the barrier that SYNCS.PHASECHK waits for. Where the
    addresses do not say it (one register each), waits and loads are taken in their order.
    """
    announced: list[str] = []
    last = ""
    for instruction in path:
        if instruction.opcode.startswith("SYNCS.ARRIVE"):
            last = _offset(instruction)
        elif instruction.base == "UTMALDG":
            announced.append(last)
    waits = list(dict.fromkeys(_offset(i) for i in path if i.opcode.startswith("SYNCS.PHASECHK")))
    if announced and set(announced) == set(waits) and len(set(announced)) == len(announced):
        return {offset: number for number, offset in enumerate(announced)}
    limit = len(announced) if announced else len(waits)
    return {offset: number for number, offset in enumerate(waits[:limit])}


def _offset(instruction: Instruction) -> str:
    match = re.search(r"\[[^\]]*?\+?(0x[0-9a-f]+)\]", instruction.operands)
    return match[1] if match else instruction.operands


def simulate(code: MachineCode, blocks: int, stages: int, tiles: float) -> float:
    """Cycles of a turn of the main loop on one sub-core, `blocks` resident, each loading `tiles` bytes."""
    return SubCore(code, blocks, stages, tiles).run()
