"""Kernels of routing: a counting sort of (token, choice) pairs by expert in three launches.

1. `moe_route_kernel`, a program per tile of tokens: logits = hidden router^T in fp32, top-k, softmax over the chosen,
   and a histogram: how many tokens of the tile chose each expert.
2. `moe_offsets_kernel`, one program: prefix sums of the histograms over the tiles (`bases`), offsets of the experts,
   and the tile table of the grouped products.
3. `moe_place_kernel`, a program per tile: row of a pair = offset of its expert + base of the tile + number of earlier
   tokens of the tile with the same expert.

Counts are integers and places follow the order of tokens: the result is one stable sort, the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import pointer_products
from .configuration import configuration
from .expert_tiles import TILE_ROWS, num_slots
from .launch import launch, named


@triton.jit(repr=named("moe_route", "WIDTH", "EXPERTS", "CHOICES"), do_not_specialize=["tokens"])
def moe_route_kernel(
    hidden,
    router,
    replayed_experts,
    logits,
    gates,
    experts,
    histogram,
    tokens,
    stride_hidden,
    stride_router,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Logits of the tile, (BLOCK_T, BLOCK_E).
    tile = tl.program_id(0)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    at = rows.to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    # Rows and experts after the last ones are repeated: never stored, never chosen.
    logit = pointer_products(
        hidden,
        router,
        tl.minimum(rows, tokens - 1).to(tl.int64),
        tl.minimum(expert, EXPERTS - 1),
        stride_hidden,
        stride_router,
        WIDTH,
        BLOCK_T,
        BLOCK_E,
        BLOCK_D,
        PRECISION,
    )
    tl.store(logits + at[:, None] * EXPERTS + expert[None, :], logit, mask=row_mask[:, None] & exists[None, :])
    # Top-k: the best expert that is not taken, CHOICES times. A NaN sorts first: the token's gates are then NaN, and
    # the chosen index is still valid.
    sort_key = tl.where(logit == logit, logit, float("inf"))
    is_taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32) + tl.where(exists, 0, 1)[None, :]
    counts = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    choice = tl.arange(0, BLOCK_A)
    chosen_logits = tl.full([BLOCK_T, BLOCK_A], float("-inf"), tl.float32)
    for slot in tl.static_range(CHOICES):
        if replayed_experts is None:
            # The lowest index among the best: ties go to the lower expert.
            best = tl.max(tl.where(is_taken == 0, sort_key, float("-inf")), 1)
            is_best = (is_taken == 0) & (sort_key == best[:, None])
            index = tl.min(tl.where(is_best, expert[None, :], BLOCK_E), 1)
        else:
            # Clamped, so that a wrong index cannot make a later store leave its buffer.
            index = tl.load(replayed_experts + at * CHOICES + slot, mask=row_mask, other=0).to(tl.int32)
            index = tl.minimum(tl.maximum(index, 0), EXPERTS - 1)
        is_chosen = expert[None, :] == index[:, None]
        is_taken = tl.where(is_chosen, 1, is_taken)
        counts += tl.where(is_chosen & row_mask[:, None], 1, 0)
        chosen_logit = tl.sum(tl.where(is_chosen, logit, 0.0), 1)
        chosen_logits = tl.where((choice == slot)[None, :], chosen_logit[:, None], chosen_logits)
        tl.store(experts + at * CHOICES + slot, index, mask=row_mask)
    # Softmax over the chosen; slots after CHOICES hold -inf.
    exponential = tl.exp(chosen_logits - tl.max(chosen_logits, 1)[:, None])
    weight = exponential / tl.sum(exponential, 1)[:, None]
    tl.store(
        gates + at[:, None] * CHOICES + choice[None, :], weight, mask=row_mask[:, None] & (choice < CHOICES)[None, :]
    )
    tl.store(histogram + tile.to(tl.int64) * EXPERTS + expert, tl.sum(counts, 0), mask=exists)


@triton.jit(repr=named("moe_offsets", "EXPERTS"), do_not_specialize=["blocks", "slots"])
def moe_offsets_kernel(
    histogram,
    bases,
    offsets,
    tiles,
    blocks,
    slots,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Rows of each expert in the tiles before each tile.
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    expert_rows = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        at = block.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
        mask = (block < blocks)[:, None] & exists[None, :]
        count = tl.load(histogram + at, mask=mask, other=0)
        tl.store(bases + at, expert_rows[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        expert_rows += tl.sum(count, 0)
    # Offsets of the experts.
    end = tl.cumsum(expert_rows, 0)
    start = end - expert_rows
    tl.store(offsets + expert, start, mask=exists)
    tl.store(offsets + 1 + expert, end, mask=expert == EXPERTS - 1)
    # Tile table: the expert of a slot is the number of experts whose tiles all come before it; -1 after the last tile.
    expert_tiles = (expert_rows + TILE - 1) // TILE
    tile_end = tl.cumsum(expert_tiles, 0)
    for first in range(0, slots, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        is_past = (slot[:, None] >= tile_end[None, :]) & exists[None, :]
        owner = tl.sum(tl.where(is_past, 1, 0), 1)
        is_owner = expert[None, :] == owner[:, None]
        row = tl.sum(
            tl.where(is_owner, start[None, :] + (slot[:, None] - (tile_end - expert_tiles)[None, :]) * TILE, 0), 1
        )
        tl.store(tiles + slot, tl.where(owner < EXPERTS, owner, -1), mask=slot < slots)
        tl.store(tiles + slots + slot, row, mask=slot < slots)


@triton.jit(repr=named("moe_place", "EXPERTS", "CHOICES"), do_not_specialize=["tokens"])
def moe_place_kernel(
    experts,
    bases,
    offsets,
    rows,
    positions,
    tokens,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # First row of each expert for this tile's tokens.
    tile = tl.program_id(0)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = token < tokens
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    base = tl.load(bases + tile.to(tl.int64) * EXPERTS + expert, mask=exists, other=0)
    base += tl.load(offsets + expert, mask=exists, other=0)
    # Tokens of the tile that chose each expert, then an exclusive prefix sum over the tokens.
    pair = token.to(tl.int64) * CHOICES
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for slot in tl.static_range(CHOICES):
        chosen_expert = tl.load(experts + pair + slot, mask=row_mask, other=-1)
        chosen += tl.where(expert[None, :] == chosen_expert[:, None], 1, 0)
    place = base[None, :] + tl.cumsum(chosen, 0) - chosen
    for slot in tl.static_range(CHOICES):
        chosen_expert = tl.load(experts + pair + slot, mask=row_mask, other=-1)
        is_chosen = tl.where(expert[None, :] == chosen_expert[:, None], 1, 0)
        position = tl.sum(is_chosen * place, 1)
        # Only a wrong replay names an expert twice; the second row then follows the first.
        place += is_chosen
        tl.store(positions + pair + slot, position, mask=row_mask)
        tl.store(rows + position, pair.to(tl.int32) + slot, mask=row_mask)


def shape_class(hidden: Tensor) -> dict[str, int]:
    """Keys of the tables: bytes of an element."""
    return {"bytes": hidden.element_size()}


def moe_route(
    hidden: Tensor, router: Tensor, experts_per_token: int, replayed_experts: Tensor | None
) -> tuple[Tensor, ...]:
    """Logits, gates, experts, offsets, rows, positions and tiles, as in `Routing`; arguments are checked."""
    tokens, (experts, width) = hidden.shape[0], router.shape
    config = configuration("moe_route", hidden.device, **shape_class(hidden))
    blocks, block_e = triton.cdiv(tokens, config["BLOCK_T"]), max(16, triton.next_power_of_2(experts))
    slots = num_slots(tokens * experts_per_token, experts)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    logits, gates = (empty(tokens, n, dtype=torch.float32) for n in (experts, experts_per_token))
    chosen, positions = empty(tokens, experts_per_token), empty(tokens, experts_per_token)
    histogram, bases, offsets = empty(blocks, experts), empty(blocks, experts), empty(experts + 1)
    rows, tiles = empty(tokens * experts_per_token), empty(2, slots)
    shared = {"EXPERTS": experts, "BLOCK_E": block_e}
    launch(
        moe_route_kernel,
        (blocks,),
        hidden,
        router,
        replayed_experts,
        logits,
        gates,
        chosen,
        histogram,
        tokens,
        hidden.stride(0),
        router.stride(0),
        WIDTH=width,
        CHOICES=experts_per_token,
        BLOCK_A=triton.next_power_of_2(experts_per_token),
        PRECISION="ieee",
        **shared,
        **config,
    )
    launch(
        moe_offsets_kernel,
        (1,),
        histogram,
        bases,
        offsets,
        tiles,
        blocks,
        slots,
        TILE=TILE_ROWS,
        **shared,
        **configuration("moe_offsets", hidden.device),
    )
    launch(
        moe_place_kernel,
        (blocks,),
        chosen,
        bases,
        offsets,
        rows,
        positions,
        tokens,
        CHOICES=experts_per_token,
        BLOCK_T=config["BLOCK_T"],
        **shared,
        **configuration("moe_place", hidden.device),
    )
    return logits, gates, chosen, offsets, rows, positions, tiles
