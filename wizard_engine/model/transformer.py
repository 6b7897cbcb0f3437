"""The transformer, written for one device and packed tokens only."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu

from .config import ModelConfig
from .mixture import Mixture, Routes

# Names of weights that write to the residual stream.
RESIDUAL = ("attention.out.weight", "feed_forward.down.weight", "experts.down")


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.epsilon)


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come out of one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.window = config.window
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def project(self, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, C) and k (T, K, C), both rotated, and v (T, K, C)."""
        return self.split(self.qkv(x_TD), cos, sin)

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same out of the product with `qkv`."""
        heads = qkv.view(qkv.shape[0], -1, self.head_width)
        q_THC, k_TKC, v_TKC = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return *rope(q_THC, k_TKC, cos, sin), v_TKC

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, D) out of the product with `qkv`, (T, (H + 2 K) C)."""
        q_THC, k_TKC, v_TKC = self.split(qkv, cos, sin)
        out_THC = attention(q_THC, k_TKC, v_TKC, cu_seqlens, max_seqlen, window=self.window)
        return self.out(out_THC.reshape(qkv.shape[0], -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_TD: Tensor, routes: Routes | None = None) -> Tensor:
        return self.down(swiglu(self.gate_up(x_TD)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.width, config.norm_epsilon)
        self.feed_forward = Mixture(config, layer) if config.experts else FeedForward(config)

    def projected(self, x_TD: Tensor) -> Tensor:
        """q, k and v of the stream."""
        return self.attention.qkv(self.attention_norm(x_TD))

    def inner(self, x_TD: Tensor) -> Tensor:
        """Gate and up of the stream, of a dense block."""
        return self.feed_forward.gate_up(self.feed_forward_norm(x_TD))

    def outer(self, gate_up: Tensor) -> Tensor:
        """What a dense block adds to the stream."""
        return self.feed_forward.down(swiglu(gate_up))

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, routes: Routes | None = None
    ) -> Tensor:
        x_TD = x_TD + self.attention(self.projected(x_TD), cos, sin, cu_seqlens, max_seqlen)
        if isinstance(self.feed_forward, Mixture):
            return x_TD + self.feed_forward(self.feed_forward_norm(x_TD), routes)
        return x_TD + self.outer(self.inner(x_TD))


class Transformer(nn.Module):
    """Decoder-only language model over packed tokens.

    `model(tokens, positions, cu_seqlens, max_seqlen)` returns the hidden states after the last norm, (T, D);
    `model.logits(hidden)` the (T, V) logits in fp32.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config.width, config.norm_epsilon)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Take the numbers of `random_parameters`."""
        for (_, parameter), (_, value) in zip(self.named_parameters(), self.random_parameters(seed)):
            parameter.copy_(value)

    def random_parameters(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in turn, on the CPU in fp32: normal weights of `init_std`, those that write to the residual
        stream scaled by 1 / sqrt(2 L); vectors of ones."""
        generator = torch.Generator().manual_seed(seed)
        residual = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                yield name, torch.ones(parameter.shape)
                continue
            std = residual if name.endswith(RESIDUAL) else None
            yield name, torch.randn(parameter.shape, generator=generator) * (std or self.config.init_std)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) rows that score the vocabulary: the embedding itself where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, routes: Routes | None = None
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (T,) int64.   positions: (T,) int64, counted from each sequence's start.
            cu_seqlens: (S + 1,) int32.   max_seqlen: longest sequence, tokens.
            routes: of a model with experts, records where the tokens go, or replays what it has (see `Routes`).
        Returns:
            (T, D).
        """
        cos, sin = rope_tables(positions, self.config.head_width, self.config.rope_base)
        x_TD = self.embedding(tokens)
        if routes is not None:
            routes.real = torch.arange(tokens.shape[0], device=tokens.device) < cu_seqlens[-1]
        for block in self.blocks:
            x_TD = block(x_TD, cos, sin, cu_seqlens, max_seqlen, routes)
        return self.norm(x_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32 logits of hidden states."""
        weight_VD = self.head_weight
        if hidden_TD.dtype == torch.float64:
            return hidden_TD @ weight_VD.T
        differentiable = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
        if hidden_TD.is_cuda and hidden_TD.dtype != torch.float32 and not differentiable:
            # The product of halves added up in fp32, without a copy of the head in fp32.
            return torch.mm(hidden_TD, weight_VD.T, out_dtype=torch.float32)
        return hidden_TD.float() @ weight_VD.float().T
