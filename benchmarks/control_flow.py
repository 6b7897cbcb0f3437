"""Loops of machine code, and the path that an iteration takes when nothing has to wait and nothing is masked.

The compiler puts a waiting loop out of line: a branch leaves for it and another one comes back. So a loop is what the
control flow says, not a range of addresses: a branch to a block that dominates it, and the blocks that reach the branch
from there (Aho et al. 2006, section 9.6).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# An instruction here is a `machine_code.Instruction`.
Path = tuple[Any, ...]
ENDS = ("EXIT", "RET", "BRX", "JMP", "KILL")


@dataclass(frozen=True)
class Block:
    """Instructions in a row, and the numbers of the blocks that may follow; the next in line comes first."""

    instructions: Path
    followers: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Blocks of a loop by number, its first one, and one iteration's path."""

    header: int
    blocks: frozenset[int]
    path: Path


def blocks_of(instructions: Sequence[Any]) -> list[Block]:
    """Basic blocks of a kernel, in the order of their addresses."""
    targets = {i.target for i in instructions if i.target is not None}
    groups: list[list[Any]] = []
    closed = True
    for instruction in instructions:
        if closed or instruction.address in targets:
            groups.append([])
        groups[-1].append(instruction)
        closed = instruction.base in ("BRA", *ENDS)
    block_of_address = {group[0].address: number for number, group in enumerate(groups)}
    return [
        Block(tuple(group), _followers(group[-1], n, block_of_address, len(groups))) for n, group in enumerate(groups)
    ]


def _followers(last: Any, number: int, block_of_address: dict[int, int], num_blocks: int) -> tuple[int, ...]:
    is_last = last.base in ("BRA", *ENDS) and not _is_conditional(last)
    following = () if is_last or number + 1 == num_blocks else (number + 1,)
    target = block_of_address.get(last.target)
    return following if target is None or target in following else (*following, target)


def _is_conditional(branch: Any) -> bool:
    """True where the next instruction in line may follow."""
    with_predicate = re.match(r"!?U?P\w*\s*,", branch.operands) is not None
    return bool(branch.guard) or with_predicate or ".DIV" in branch.opcode or ".CONV" in branch.opcode


def dominators(blocks: Sequence[Block]) -> list[set[int]]:
    """For each block those that every path to it passes; all of them for a block that is never reached."""
    everything = set(range(len(blocks)))
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for follower in block.followers:
            before[follower].append(number)
    dominating = [set(everything) if number else {0} for number in range(len(blocks))]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            above = [dominating[n] for n in before[number]]
            new = (set.intersection(*above) if above else set(everything)) | {number}
            changed |= new != dominating[number]
            dominating[number] = new
    return dominating


def loops(instructions: Sequence[Any]) -> list[Loop]:
    """Loops of a kernel, in the order of their first blocks; several branches back to one block are one loop."""
    blocks = blocks_of(instructions)
    above = dominators(blocks)
    bodies: dict[int, set[int]] = {}
    for number in _reached(blocks):
        for follower in blocks[number].followers:
            if follower in above[number]:
                bodies.setdefault(follower, {follower}).update(_body(number, follower, blocks))
    return [Loop(head, frozenset(body), _path(head, body, blocks)) for head, body in sorted(bodies.items())]


def _reached(blocks: Sequence[Block]) -> set[int]:
    """Blocks that control reaches from the first."""
    reached, waiting = set(), [0] if blocks else []
    while waiting:
        number = waiting.pop()
        if number not in reached:
            reached.add(number)
            waiting += blocks[number].followers
    return reached


def _body(branch: int, header: int, blocks: Sequence[Block]) -> set[int]:
    """Blocks from which the branch is reached without passing the header again."""
    body, waiting = {header}, [branch]
    while waiting:
        number = waiting.pop()
        if number not in body:
            body.add(number)
            waiting += [n for n, block in enumerate(blocks) if number in block.followers]
    return body


def _path(header: int, body: set[int], blocks: Sequence[Block]) -> Path:
    """The iteration with the most products on the tensor cores and, of those, the fewest instructions."""
    best: dict[int, tuple[tuple[int, int], Path]] = {}

    def search(number: int, seen: frozenset[int]) -> tuple[tuple[int, int], Path] | None:
        if number in best:
            return best[number]
        block = blocks[number].instructions
        paths = [((0, 0), ())] if header in blocks[number].followers else []
        inside = [n for n in blocks[number].followers if n in body and n != header and n not in seen]
        paths += [path for n in inside if (path := search(n, seen | {n}))]
        if not paths:
            return None
        (products, length), rest = max(paths, key=lambda path: path[0])
        best[number] = (products + sum(i.is_matrix for i in block), length - len(block)), block + rest
        return best[number]

    best_path = search(header, frozenset({header}))
    return best_path[1] if best_path else blocks[header].instructions


def main_loops(instructions: Sequence[Any], is_specialised: bool) -> tuple[Path, ...]:
    """One iteration of the main loop; of each warp group's copy where warps are specialised; () without a loop.

    Of the innermost loops that hold products on the tensor cores, where there are any, it is the one with asynchronous
    loads, with the largest products (wgmma) or the most bytes loaded, and the shortest: the one without masks. Small
    mma.sync products are no measure, since the warps repeat each other's where a tile is too small for them.
    """
    all_loops = loops(instructions)
    working = [loop for loop in all_loops if any(i.is_matrix for i in loop.path)]
    working = working or [loop for loop in all_loops if any(i.moved_bytes for i in loop.path)]
    inner = [loop.path for loop in working if not any(other.blocks < loop.blocks for other in working)]
    if not inner:
        return ()
    best = max(inner, key=_weight)
    if not is_specialised:
        return (best,)
    return tuple(path for path in inner if _weight(path)[:2] == _weight(best)[:2] and _flops(path) == _flops(best))


def _flops(path: Path) -> int:
    return sum(i.flops for i in path)


def _weight(path: Path) -> tuple[bool, int, int]:
    is_pipelined = any(i.base in ("UTMALDG", "LDGSTS") for i in path)
    has_groups = any(i.base == "HGMMA" for i in path)
    return is_pipelined, _flops(path) if has_groups else sum(i.moved_bytes for i in path), -len(path)
