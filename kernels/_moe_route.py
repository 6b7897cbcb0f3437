"""Kernels of routing: logits and choices of a tile of tokens, prefix sums over the tiles, places of the rows."""

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
    hidden, router, given, logits, gates, experts, histogram, tokens, stride_hidden, stride_router,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < tokens
    at = rows.to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    # Rows and experts behind the last ones are repeated: they are not stored, and never chosen.
    value = pointer_products(
        hidden, router, tl.minimum(rows, tokens - 1).to(tl.int64), tl.minimum(expert, EXPERTS - 1), stride_hidden,
        stride_router, WIDTH, BLOCK_T, BLOCK_E, BLOCK_D, PRECISION,
    )  # fmt: skip
    tl.store(logits + at[:, None] * EXPERTS + expert[None, :], value, mask=live[:, None] & exists[None, :])
    # A NaN goes before all: its token's gates are NaN whatever is chosen, and the choice stays a valid one.
    order = tl.where(value == value, value, float("inf"))
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.int32) + tl.where(exists, 0, 1)[None, :]
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    choice = tl.arange(0, BLOCK_A)
    values = tl.full([BLOCK_T, BLOCK_A], float("-inf"), tl.float32)
    for number in tl.static_range(CHOICES):
        if given is None:
            best = tl.max(tl.where(taken == 0, order, float("-inf")), 1)
            is_best = (taken == 0) & (order == best[:, None])
            index = tl.min(tl.where(is_best, expert[None, :], BLOCK_E), 1)
        else:
            index = tl.load(given + at * CHOICES + number, mask=live, other=0).to(tl.int32)
            index = tl.minimum(tl.maximum(index, 0), EXPERTS - 1)
        here = expert[None, :] == index[:, None]
        taken = tl.where(here, 1, taken)
        chosen += tl.where(here & live[:, None], 1, 0)
        own = tl.sum(tl.where(here, value, 0.0), 1)
        values = tl.where((choice == number)[None, :], own[:, None], values)
        tl.store(experts + at * CHOICES + number, index, mask=live)
    exponential = tl.exp(values - tl.max(values, 1)[:, None])
    weight = exponential / tl.sum(exponential, 1)[:, None]
    tl.store(gates + at[:, None] * CHOICES + choice[None, :], weight, mask=live[:, None] & (choice < CHOICES)[None, :])
    tl.store(histogram + tile.to(tl.int64) * EXPERTS + expert, tl.sum(chosen, 0), mask=exists)


@triton.jit(repr=named("moe_offsets", "EXPERTS"), do_not_specialize=["blocks", "slots"])
def moe_offsets_kernel(
    histogram, bases, offsets, tiles, blocks, slots,
    EXPERTS: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        at = block.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
        kept = (block < blocks)[:, None] & exists[None, :]
        count = tl.load(histogram + at, mask=kept, other=0)
        tl.store(bases + at, total[None, :] + tl.cumsum(count, 0) - count, mask=kept)
        total += tl.sum(count, 0)
    end = tl.cumsum(total, 0)
    start = end - total
    tl.store(offsets + expert, start, mask=exists)
    tl.store(offsets + 1 + expert, end, mask=expert == EXPERTS - 1)
    number = (total + TILE - 1) // TILE
    last = tl.cumsum(number, 0)
    for first in range(0, slots, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        passed = (slot[:, None] >= last[None, :]) & exists[None, :]
        owner = tl.sum(tl.where(passed, 1, 0), 1)
        own = expert[None, :] == owner[:, None]
        row = tl.sum(tl.where(own, start[None, :] + (slot[:, None] - (last - number)[None, :]) * TILE, 0), 1)
        tl.store(tiles + slot, tl.where(owner < EXPERTS, owner, -1), mask=slot < slots)
        tl.store(tiles + slots + slot, row, mask=slot < slots)


@triton.jit(repr=named("moe_place", "EXPERTS", "CHOICES"), do_not_specialize=["tokens"])
def moe_place_kernel(
    experts, bases, offsets, rows, positions, tokens,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    expert = tl.arange(0, BLOCK_E)
    exists = expert < EXPERTS
    base = tl.load(bases + tile.to(tl.int64) * EXPERTS + expert, mask=exists, other=0)
    base += tl.load(offsets + expert, mask=exists, other=0)
    pair = token.to(tl.int64) * CHOICES
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for number in tl.static_range(CHOICES):
        own = tl.load(experts + pair + number, mask=live, other=-1)
        chosen += tl.where(expert[None, :] == own[:, None], 1, 0)
    place = base[None, :] + tl.cumsum(chosen, 0) - chosen
    for number in tl.static_range(CHOICES):
        own = tl.load(experts + pair + number, mask=live, other=-1)
        here = tl.where(expert[None, :] == own[:, None], 1, 0)
        position = tl.sum(here * place, 1)
        # Only a wrong replay has an expert twice; its second row then follows the first.
        place += here
        tl.store(positions + pair + number, position, mask=live)
        tl.store(rows + position, pair.to(tl.int32) + number, mask=live)


def shape_class(hidden: Tensor) -> dict[str, int]:
    """Keys of the tables: bytes of an element."""
    return {"bytes": hidden.element_size()}


def moe_route(hidden: Tensor, router: Tensor, experts_per_token: int, given: Tensor | None) -> tuple[Tensor, ...]:
    """logits, gates, experts, offsets, rows, positions, tiles of checked tensors."""
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
        moe_route_kernel, (blocks,), hidden, router, given, logits, gates, chosen, histogram, tokens, hidden.stride(0),
        router.stride(0), WIDTH=width, CHOICES=experts_per_token, BLOCK_A=triton.next_power_of_2(experts_per_token),
        PRECISION="ieee", **shared, **config,
    )  # fmt: skip
    launch(
        moe_offsets_kernel, (1,), histogram, bases, offsets, tiles, blocks, slots, TILE=TILE_ROWS, **shared,
        **configuration("moe_offsets", hidden.device),
    )  # fmt: skip
    launch(
        moe_place_kernel, (blocks,), chosen, bases, offsets, rows, positions, tokens, CHOICES=experts_per_token,
        BLOCK_T=config["BLOCK_T"], **shared, **configuration("moe_place", hidden.device),
    )  # fmt: skip
    return logits, gates, chosen, offsets, rows, positions, tiles
