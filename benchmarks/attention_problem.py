"""Attention as a measured operation: visible pairs, inputs, exact inputs, and a softmax over blocks of queries."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import normal
from benchmarks.kernel_problems import SEED_STEP, Problem, Tensors, Work


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """Pairs of a query and a key that it sees in one sequence; query i sees keys up to i, from i - window + 1."""
    window = length if window is None else min(window, length)
    hidden = length - window
    if causal:
        return window * (window + 1) // 2 + hidden * window
    return length * length - hidden * (hidden + 1) // 2


@dataclass(frozen=True)
class Attention(Problem):
    """Packed attention; `padding` rows of NaN stand behind the last sequence and must give zeros."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    padding: int = 0

    op: ClassVar[str] = "attention"
    rough: ClassVar[tuple[str, ...]] = ("q", "k", "v", "dout")
    gradients: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    is_matrix: ClassVar[bool] = True

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("out",)

    @property
    def tokens(self) -> int:
        """Packed rows, the padding included."""
        return sum(self.lengths) + self.padding

    @property
    def is_ragged(self) -> bool:
        """True if the sequences differ in length."""
        return len(set(self.lengths)) > 1

    @property
    def label(self) -> str:
        kind = ("causal" if self.causal else "full") + (f" window={self.window}" if self.window else "")
        sequences = f"S={len(self.lengths)}" + (" ragged" if self.is_ragged else "")
        return f"T={self.tokens} {sequences} H={self.heads} K={self.kv_heads} C={self.width} {kind}"

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        return sum(visible_pairs(length, self.causal, self.window) for length in self.lengths)

    def work(self, phase: str, itemsize: int) -> Work:
        twice = 2 if phase == "backward" else 1
        moved = twice * 2 * (self.heads + self.kv_heads) * self.tokens * self.width * itemsize
        products = 10 if phase == "backward" else 4
        return Work(products * self.width * self.heads * self.pairs, moved + 4 * self.tokens * self.heads)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "dout": self.heads}
        drawn = {
            name: normal(self.tokens, count, self.width, dtype=dtype, device=device, seed=seed * SEED_STEP + i)
            for i, (name, count) in enumerate(heads.items())
        }
        return self._packed(drawn, device)

    def _packed(self, tensors: Tensors, device: torch.device) -> Tensors:
        """With the marks of the sequences, and NaN in the padding."""
        if self.padding:
            for tensor in tensors.values():
                tensor[-self.padding :] = float("nan")
        marks = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()
        return tensors | {"cu_seqlens": marks}

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["Attention", Tensors]:
        """Each pair of keys has a code of signs, each query the code of a pair that it sees, 256 times as large.

        With a scale of ln 2 / 2 a logit is exact in units of log2, and every other key is 2^-256 as likely or less: the
        probabilities are 1 or two halves, the output means of two whole numbers, logit gradients multiples of 1/4. A
        quarter of the channels is 0 in the queries and differs within a pair of keys, or dQ would be 0.
        """
        generator = torch.Generator().manual_seed(seed)
        codes = [self._codes(length, generator) for length in self.lengths if length]
        q = torch.cat([code[1] for code in codes]).mul(256)[:, None].expand(-1, self.heads, -1)
        k = torch.cat([code[0] for code in codes])[:, None].expand(-1, self.kv_heads, -1)
        sign_KC = torch.randint(0, 2, (self.kv_heads, self.width), generator=generator) * 2 - 1
        drawn = {"q": q * sign_KC.repeat_interleave(self.heads // self.kv_heads, 0), "k": k * sign_KC}
        drawn["v"] = torch.randint(-2, 3, k.shape, generator=generator)
        drawn["dout"] = torch.randint(-1, 2, q.shape, generator=generator)
        tensors = {name: F.pad(x, (0, 0, 0, 0, 0, self.padding)) for name, x in drawn.items()}
        tensors = {name: x.to(device=device, dtype=dtype).contiguous() for name, x in tensors.items()}
        return replace(self, scale=math.log(2) / 2), self._packed(tensors, device)

    def _codes(self, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(M, C) keys of a sequence, codes that two neighbours share and free numbers, and codes of its queries."""
        pairs, width = torch.arange((length + 1) // 2), self.width - self.width // 4
        bits = (pairs[:, None] >> torch.arange(min(16, width))) & 1
        rest = torch.randint(0, 2, (len(pairs), width - bits.shape[1]), generator=generator)
        code = torch.cat((bits, rest), 1) * 2 - 1
        free = torch.randint(-2, 3, (length, self.width // 4), generator=generator)
        at = torch.arange(length)
        first = (at - (self.window or length) + 1).clamp(min=0)
        last = at if self.causal else torch.full_like(at, length - 1)
        drawn = torch.rand(length, generator=generator, dtype=torch.float64)
        target = first + (drawn * (last - first + 1)).long()
        return torch.cat((code[at // 2], free), 1), F.pad(code[target // 2], (0, self.width // 4))

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.attention import attention

        q, k, v, marks = (tensors[name] for name in ("q", "k", "v", "cu_seqlens"))
        longest = max(self.lengths)
        return (attention(q, k, v, marks, longest, causal=self.causal, window=self.window, scale=self.scale),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Scores, mask, softmax, product, sequence by sequence, the sequences of one length as a batch."""
        q, k, v = (tensors[name] for name in ("q", "k", "v"))
        shapes = [self.lengths] if not self.is_ragged else [(length,) for length in self.lengths if length]
        batches, start = [], 0
        for batch in shapes:
            rows = slice(start, start + sum(batch))
            start = rows.stop
            batches.append(self._softmax(q[rows], k[rows], v[rows], batch[0]))
        return (F.pad(torch.cat(batches), (0, 0, 0, 0, 0, self.padding)),)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        groups = self.heads // self.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * (self.width**-0.5 if self.scale is None else self.scale)
        if self.causal or self.window:
            scores = scores.masked_fill(~self.seen(0, length, 0, length, q.device), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    def keys_of(self, row: int, end: int, length: int) -> tuple[int, int]:
        """First key that some query of [row, end) sees, and the end of those keys."""
        first = max(0, row - self.window + 1) if self.window else 0
        return first, end if self.causal else length

    def seen(self, row: int, end: int, first: int, last: int, device: torch.device) -> Tensor:
        """(end - row, last - first) mask of the keys that those queries of a sequence see."""
        query = torch.arange(row, end, device=device)[:, None]
        key = torch.arange(first, last, device=device)[None, :]
        seen = (key <= query) if self.causal else torch.ones_like(key <= query)
        return seen & (key > query - self.window) if self.window else seen


# Scores of a block of queries in the reference, elements, and operations above which only two key heads are checked.
BLOCK_SCORES = 2**26
WHOLE_FLOPS = 10**12


def checked_heads(problem: Attention, phase: str) -> list[int]:
    """Key heads whose results are compared: all, or the first and the last where the reference would take long."""
    large = problem.work(phase, 2).flops > WHOLE_FLOPS
    return [0, problem.kv_heads - 1] if large and problem.kv_heads > 2 else list(range(problem.kv_heads))


def select_heads(problem: Attention, results: Tensors, heads: list[int]) -> Tensors:
    """The results of those key heads and their query heads."""
    group = problem.heads // problem.kv_heads
    queries = [head * group + member for head in heads for member in range(group)]
    return {name: x[:, heads if name in ("dk", "dv") else queries] for name, x in results.items()}


def in_blocks(
    problem: Attention, tensors: Tensors, phase: str, dtype: torch.dtype, heads: list[int], *, fused: bool = False
) -> Tensors:
    """out, or dq, dk and dv, of those key heads, (T, their heads, C), by a softmax in `dtype` over blocks of queries.

    Gradients of keys are summed over the blocks in at least fp32. `fused` takes torch's own attention for a block.
    """
    group, wide = problem.heads // problem.kv_heads, torch.promote_types(dtype, torch.float32)
    names = ("dq", "dk", "dv") if phase == "backward" else ("out",)
    shape = (problem.tokens, len(heads), problem.width)
    results = {
        name: torch.zeros(
            shape if name in ("dk", "dv") else (shape[0], shape[1] * group, shape[2]),
            dtype=wide,
            device=tensors["q"].device,
        )
        for name in names
    }
    start = 0
    for length in problem.lengths:
        for at, head in enumerate(heads):
            for row, end, first, last in _blocks(problem, length, group):
                queries, keys = slice(start + row, start + end), slice(start + first, start + last)
                members, mine = slice(head * group, (head + 1) * group), slice(at * group, (at + 1) * group)
                leaves = [tensors["q"][queries, members], tensors["k"][keys, head], tensors["v"][keys, head]]
                leaves = [x.to(dtype).detach().requires_grad_(phase == "backward") for x in leaves]
                mask = problem.seen(row, end, first, last, leaves[0].device)
                out = _block(problem, *leaves, mask, fused)
                if phase != "backward":
                    results["out"][queries, mine] = out.to(wide)
                    continue
                dout = tensors["dout"][queries, members].to(dtype)
                dq, dk, dv = torch.autograd.grad(out, leaves, dout)
                results["dq"][queries, mine] = dq.to(wide)
                results["dk"][keys, at] += dk.to(wide)
                results["dv"][keys, at] += dv.to(wide)
        start += length
    return {name: x.to(dtype) for name, x in results.items()}


def _blocks(problem: Attention, length: int, group: int):
    """(row, end, first key, end of keys) of the blocks of queries of a sequence."""
    step = max(16, BLOCK_SCORES // max(1, group * length))
    for row in range(0, length, step):
        end = min(row + step, length)
        yield row, end, *problem.keys_of(row, end, length)


def _block(problem: Attention, q_MGC: Tensor, k_NC: Tensor, v_NC: Tensor, seen: Tensor, fused: bool) -> Tensor:
    """(M, G, C) outputs of a block of queries of the heads of one group."""
    scale = problem.width**-0.5 if problem.scale is None else problem.scale
    q_GMC = q_MGC.transpose(0, 1)
    if fused:
        k_GNC, v_GNC = (x.expand(q_GMC.shape[0], -1, -1) for x in (k_NC, v_NC))
        out = F.scaled_dot_product_attention(q_GMC[None], k_GNC[None], v_GNC[None], attn_mask=seen, scale=scale)[0]
    else:
        scores = (q_GMC @ k_NC.T * scale).masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ v_NC
    return out.transpose(0, 1)
