"""Decode attention as a measured operation: sequences of random lengths, pages dealt out at random."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.gpu_timing import normal
from benchmarks.kernel_problems import SEED_STEP, Problem, Tensors, Work
from kernels.decode_attention import decode_attention, decode_attention_reference


@dataclass(frozen=True)
class DecodeAttention(Problem):
    """One new token of each of `batch` sequences of up to `length` keys; at least half as many each."""

    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    page: int = 64
    window: int | None = None
    scale: float | None = None

    op: ClassVar[str] = "decode_attention"
    phases: ClassVar[tuple[str, ...]] = ("forward",)
    timed: ClassVar[tuple[str, ...]] = ("forward",)
    rough: ClassVar[tuple[str, ...]] = ("values",)
    whole: ClassVar[frozenset[str]] = frozenset(("keys", "values"))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("out",)

    @property
    def label(self) -> str:
        window = f" window={self.window}" if self.window else ""
        return f"B={self.batch} N={self.length} H={self.heads}/{self.kv_heads} C={self.width} page={self.page}{window}"

    def _lengths(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.batch)
        drawn = torch.randint(-(-self.length // 2), self.length + 1, (self.batch,), generator=generator)
        drawn[:1] = self.length
        return drawn.int()

    def work(self, phase: str, itemsize: int) -> Work:
        seen = int(self._lengths().clamp(max=self.window or self.length).sum())
        moved = 2 * seen * self.kv_heads * self.width + 2 * self.batch * self.heads * self.width
        return Work(4 * seen * self.heads * self.width, moved * itemsize)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        lengths, columns = self._lengths(), -(-self.length // self.page)
        pages = self.batch * columns
        generator = torch.Generator().manual_seed(seed)
        table = torch.randperm(pages, generator=generator).view(self.batch, columns).int()
        like = {"dtype": dtype, "device": device}
        keys, values = (
            normal(pages, self.page, self.kv_heads, self.width, seed=seed * SEED_STEP + n, **like) for n in (1, 2)
        )
        q = normal(self.batch, self.heads, self.width, seed=seed * SEED_STEP, **like)
        return {"q": q, "keys": keys, "values": values, "table": table.to(device), "lengths": lengths.to(device)}

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["DecodeAttention", Tensors]:
        """Every key has its position as a code of signs, every query that of a key that it sees, 256 times as large.

        With a scale of ln 2 / 2 any other key is 2^-256 as likely: the outputs are whole numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = self.inputs(dtype, device, seed)
        table, lengths = tensors["table"].cpu().long(), tensors["lengths"].cpu().long()
        position = torch.arange(table.shape[1] * self.page)
        bits = (position[:, None] >> (torch.arange(self.width) % 16)) & 1
        codes = bits * 2 - 1
        keys = torch.zeros(tensors["keys"].shape)
        keys[table] = codes.view(1, -1, self.page, 1, self.width).expand(*table.shape, -1, self.kv_heads, -1).float()
        first = (lengths - (self.window or self.length)).clamp(min=0)
        drawn = torch.rand(self.batch, generator=generator, dtype=torch.float64)
        target = first + (drawn * (lengths - first)).long()
        q = 256 * codes[target][:, None].expand(-1, self.heads, -1)
        values = torch.randint(-9, 10, keys.shape, generator=generator)
        like = {"dtype": dtype, "device": device}
        changed = {"q": q.to(**like).contiguous(), "keys": keys.to(**like), "values": values.to(**like)}
        return replace(self, scale=math.log(2) / 2), tensors | changed

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (decode_attention(*self._arguments(tensors), window=self.window, scale=self.scale),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (decode_attention_reference(*self._arguments(tensors), window=self.window, scale=self.scale),)

    def _arguments(self, tensors: Tensors) -> tuple:
        return *(tensors[name] for name in ("q", "keys", "values", "table", "lengths")), self.length
