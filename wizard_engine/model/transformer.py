"""The transformer, written for one device and packed tokens only."""

import math

import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_tables
from kernels.swiglu import swiglu

from .config import ModelConfig
from .mixture import Mixture, Routes

# Names of weights that write to the residual stream.
RESIDUAL = ("attention.out.weight", "feed_forward.down.weight", "feed_forward.down")


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
        qkv = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_width)
        q_THC, k_TKC, v_TKC = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return *rope(q_THC, k_TKC, cos, sin), v_TKC

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q_THC, k_TKC, v_TKC = self.project(x_TD, cos, sin)
        out_THC = attention(q_THC, k_TKC, v_TKC, cu_seqlens, max_seqlen, window=self.window)
        return self.out(out_THC.reshape(x_TD.shape[0], -1))


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

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, routes: Routes | None = None
    ) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), cos, sin, cu_seqlens, max_seqlen)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD), routes)


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
        """Normal weights of `init_std`, those that write to the residual stream scaled by 1 / sqrt(2 L)."""
        generator = torch.Generator().manual_seed(seed)
        residual = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            std = residual if name.endswith(RESIDUAL) else None
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std or self.config.init_std))

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
