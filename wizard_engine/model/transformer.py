"""The transformer, written for one device and packed tokens only."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear_logprob import VocabularyShard
from kernels.rms_norm import rms_norm
from kernels.rope import rope_of_product, rope_tables
from kernels.shared_prefix import Prefixes
from kernels.swiglu import swiglu
from wizard_engine.parallel.context import SINGLE_DEVICE, ParallelContext
from wizard_engine.parallel.recompute import behind_norm

from .config import ModelConfig
from .mixture import Mixture, Routes

# Names of weights that write to the residual stream.
RESIDUAL = ("attention.out.weight", "feed_forward.down.weight", "experts.down")


# (T, H, C) attention out of the product with q, k and v, (T, (H + 2 K) C), and more arguments.
Attend = Callable[..., Tensor]


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normed rows; with `residual_TD`, those of the sum of both, and the sum, in one pass."""
        return rms_norm(x_TD, self.weight, self.epsilon, residual_TD)


class Embedding(nn.Embedding):
    """Rows of a table; on several ranks, of this rank's tokens of a row."""

    parallel: ParallelContext = SINGLE_DEVICE

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, D) rows of tokens (T,)."""
        return self.parallel.embed(self.parallel.shard_over_cp(tokens), self.weight)


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come out of one product. A rank may have some of the heads alone."""

    parallel: ParallelContext = SINGLE_DEVICE

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
        kv_heads = heads.shape[1] * self.kv_heads // (self.heads + 2 * self.kv_heads)
        return rope_of_product(heads, cos, sin, kv_heads)

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, H, C) attention within the sequences of a packed row, out of the product with `qkv`."""
        q_THC, k_TKC, v_TKC = self.split(qkv, cos, sin)
        return self.parallel.attend(q_THC, k_TKC, v_TKC, cu_seqlens, max_seqlen, window=self.window)

    def forward(self, qkv: Tensor, *where: Any, attend: Attend | None = None) -> Tensor:
        """(T, D) out of the product with `qkv`, (T, (H + 2 K) C).

        Args:
            where: what `attend` takes beside the product.   attend: another attention; default: the method.
        """
        out_THC = (attend or self.attend)(qkv, *where)
        return self.parallel.row_parallel(out_THC.reshape(qkv.shape[0], -1), self.out.weight)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_TD: Tensor, routes: Routes | None = None) -> Tensor:
        return self.down(swiglu(self.gate_up(x_TD)))


class Block(nn.Module):
    """Attention and a feed-forward block, each behind a norm.

    A sum with the residual stream is one pass with the norm behind it, and so is the gradient of both: a block takes
    the stream and what is to be added to it, and gives back the same.
    """

    parallel: ParallelContext = SINGLE_DEVICE
    recompute = "none"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.width, config.norm_epsilon)
        self.feed_forward = Mixture(config, layer) if config.experts else FeedForward(config)

    def projected(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """q, k and v of the stream; with `delta_TD`, of the stream plus that, and the sum."""
        out, stream_TD = self._product(self.attention_norm, self.attention.qkv, x_TD, delta_TD)
        return out if delta_TD is None else (out, stream_TD)

    def inner(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Gate and up of a dense block, of what `projected` takes; with `delta_TD`, the sum too."""
        out, stream_TD = self._product(self.feed_forward_norm, self.feed_forward.gate_up, x_TD, delta_TD)
        return out if delta_TD is None else (out, stream_TD)

    def _product(self, norm: Norm, linear: nn.Linear, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normed stream times a matrix, and the stream."""
        product = behind_norm(
            norm,
            lambda y_TD, _: self.parallel.column_parallel(y_TD, linear.weight),
            again=self.recompute == "selective",
        )
        return product(x_TD, delta_TD)

    def outer(self, gate_up: Tensor) -> Tensor:
        """What a dense block adds to the stream."""
        return self.parallel.row_parallel(swiglu(gate_up), self.feed_forward.down.weight)

    def forward(
        self,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        routes: Routes | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream (T, D) behind attention, and what the feed-forward block adds to it.

        Args:
            x_TD: the stream.   delta_TD: what is to be added to it, or None.
        """
        rest = routes, cos, sin, cu_seqlens, max_seqlen
        if self.recompute == "full":
            return behind_norm(self.attention_norm, self._behind_norm, again=True)(x_TD, delta_TD, *rest)[0]
        qkv, x_TD = self._product(self.attention_norm, self.attention.qkv, x_TD, delta_TD)
        return self._behind_product(qkv, x_TD, *rest)

    def decode(
        self, x_TD: Tensor, delta_TD: Tensor | None, attend: Attend, routes: Routes | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `forward` gives, with another attention, such as one over cached keys; without a gradient."""
        qkv, x_TD = self._product(self.attention_norm, self.attention.qkv, x_TD, delta_TD)
        return self._behind_product(qkv, x_TD, routes, attend=attend)

    def _behind_norm(self, y_TD: Tensor, x_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return self._behind_product(self.parallel.column_parallel(y_TD, self.attention.qkv.weight), x_TD, *rest)

    def _behind_product(
        self, qkv: Tensor, x_TD: Tensor, routes: Routes | None, *where: Any, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        delta_TD = self.attention(qkv, *where, attend=attend)
        if isinstance(self.feed_forward, Mixture):
            y_TD, x_TD = self.feed_forward_norm(delta_TD, x_TD)
            return x_TD, self.feed_forward(y_TD, routes)
        gate_up, x_TD = self.inner(x_TD, delta_TD)
        return x_TD, self.outer(gate_up)


class Transformer(nn.Module):
    """Decoder-only language model over packed tokens.

    `model(tokens, positions, cu_seqlens, max_seqlen)` returns the hidden states after the last norm, (T, D);
    `model.logits(hidden)` the (T, V) logits in fp32. `parallelize` shards it over several ranks, see `ParallelContext`.
    """

    parallel: ParallelContext = SINGLE_DEVICE

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
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
        stream scaled by 1 / sqrt(2 L); vectors of ones. The shapes are those of now, whatever becomes of the model."""
        return self._drawn([(name, parameter.shape) for name, parameter in self.named_parameters()], seed)

    def _drawn(self, shapes: list[tuple[str, torch.Size]], seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        residual = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, shape in shapes:
            if len(shape) < 2:
                yield name, torch.ones(shape)
                continue
            std = residual if name.endswith(RESIDUAL) else self.config.init_std
            yield name, torch.randn(shape, generator=generator) * std

    @property
    def head_weight(self) -> Tensor:
        """(V, D) rows that score the vocabulary: the embedding itself where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def shard(self) -> VocabularyShard | None:
        """What this rank has of the vocabulary and of a row's tokens, for losses of hidden states; None: all."""
        return self.parallel.vocabulary_shard(self.head_weight)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | Prefixes,
        max_seqlen: int,
        routes: Routes | None = None,
        *,
        own_tokens: bool = False,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: (T,) int64.   positions: (T,) int64, counted from each sequence's start.
            cu_seqlens: (S + 1,) int32, or the prefixes that sequences share.   max_seqlen: longest sequence, tokens.
            routes: of a model with experts, records where the tokens go, or replays what it has (see `Routes`).
            own_tokens: on several ranks, give this rank's tokens back.
        Returns:
            (T, D). Where several ranks divide the tokens of a row, every one of them is given the whole row, and gets
            what its context-parallel rank has of it, padding included; `shard` tells a loss which tokens these are.
        """
        parallel = self.parallel
        cos, sin = rope_tables(parallel.shard_over_cp(positions), self.config.head_width, self.config.rope_base)
        x_TD, delta_TD = self.embedding(tokens), None
        if routes is None and self.config.experts and torch.is_grad_enabled():
            # What is computed again in the backward goes the same ways.
            routes = Routes()
        if routes is not None:
            used = cu_seqlens.tokens if isinstance(cu_seqlens, Prefixes) else cu_seqlens[-1]
            routes.begin(torch.arange(tokens.shape[0], device=tokens.device) < used, parallel)
        for block in self.blocks:
            x_TD, delta_TD = block(x_TD, delta_TD, cos, sin, cu_seqlens, max_seqlen, routes)
        x_TD = self.norm(x_TD) if delta_TD is None else self.norm(delta_TD, x_TD)[0]
        return x_TD if own_tokens else parallel.gather_over_tp(x_TD)

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
