"""The plain loop of attention's forward with Triton's warp specialisation, for the issue model alone.

Triton 3.6 specialises warps only in a kernel without a tile search, an early return, a branch, a second loop or a tail,
which the engine's kernel needs for packed sequences. This copy has none of them: one head, one sequence of whole
blocks, no mask. It is compiled and modelled beside the engine's variants; nothing runs it.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.compile_rows import Row
from benchmarks.issue_model import estimate
from benchmarks.machine_code import compile_launch
from kernels.launch import Launch

TOKENS = 4096
# Rows and columns of tiles, stages.
TILES = ((128, 128, 2), (128, 64, 3))


@triton.jit
def attention_probe_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out,
    keys,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPECIALISED: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M
    q_MC = q_tiles.load([row, 0])
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for column in tl.range(0, keys, BLOCK_N, warp_specialize=SPECIALISED):
        scores = tl.dot(q_MC, k_tiles.load([column, 0]).T)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probability = tl.math.exp2(scores * scale - (new_max * scale)[:, None])
        decay = tl.math.exp2((row_max - new_max) * scale)
        row_sum = row_sum * decay + tl.sum(probability, 1)
        acc = acc * decay[:, None]
        v_NC = v_tiles.load([column, 0])
        acc = tl.dot(probability.to(v_NC.dtype), v_NC, acc)
        row_max = new_max
    at = out + (row + tl.arange(0, BLOCK_M))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, (acc / row_sum[:, None]).to(q_MC.dtype))


def probe(block_m: int, block_n: int, stages: int, width: int) -> Launch:
    """The launch of the probe with 4 warps, on the meta device."""
    x = torch.empty(TOKENS, width, dtype=torch.bfloat16, device="meta")
    rows, columns = (TensorDescriptor(x, list(x.shape), list(x.stride()), [n, width]) for n in (block_m, block_n))
    options = {"WIDTH": width, "BLOCK_M": block_m, "BLOCK_N": block_n, "SPECIALISED": True}
    arguments = (rows, columns, columns, x, TOKENS, 0.1)
    return Launch(
        attention_probe_kernel, (TOKENS // block_m,), arguments, options | {"num_warps": 4, "num_stages": stages}
    )


def modelled_probe(block_m: int, block_n: int, stages: int, arch: int, width: int) -> Row:
    """Resources of the probe, whether its warps are specialised, and the model's share of the tensor peak."""
    launch = probe(block_m, block_n, stages, width)
    code = compile_launch(launch, arch)
    model = estimate(code, launch)
    return {
        "name": f"specialised probe BLOCK_M={block_m} BLOCK_N={block_n} num_warps=4 num_stages={stages}",
        "specialised": code.is_specialised,
        "serialised": code.is_serialised,
        "registers": code.registers,
        "spilled": code.spill_store_bytes + code.spill_load_bytes,
        "shared_bytes": code.shared_bytes,
        "share": None if model is None else model.share,
    }


def lines(arch: int, width: int = 128) -> list[str]:
    """A line per tile of the probe."""
    rows = [modelled_probe(*tile, arch, width) for tile in TILES]
    return [
        f"{row['name']:72} full     {row['share'] or 0:4.0%} {row['registers']} registers "
        f"{row['shared_bytes'] // 1024} KB, {row['spilled']} B spilled, warps {'' if row['specialised'] else 'not '}"
        f"specialised{', wgmma serialised' if row['serialised'] else ''}"
        for row in rows
    ]
