"""Shapes of a transformer of the Llama / Mistral / Mixtral families, and the named ones."""

from dataclasses import dataclass, replace
from math import isfinite, isqrt

# Most of any width or count: what a 32-bit index can reach.
MOST = 2**31 - 1
# Positions are exact in fp32 up to here.
MAX_POSITIONS = 2**24


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer (GQA, RoPE, SwiGLU, RMSNorm), dense or a mixture of experts.

    Widths are in elements; `window` is the keys that a query sees, itself included, or None for all of them. With
    `experts` > 0 every feed-forward block is a mixture: a router sends each token to `experts_per_token` of them.
    `balance_loss` and `z_loss` weigh the router's losses in training (kernels/moe_route.py).
    """

    vocab_size: int = 512
    width: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 24
    ffn_width: int = 256
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    window: int | None = None
    tied: bool = True
    max_positions: int = 512
    init_std: float = 0.02
    experts: int = 0
    experts_per_token: int = 2
    balance_loss: float = 0.001
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        positive = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "max_positions")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in (*positive, "experts"):
            if getattr(self, name) > MOST:
                raise ValueError(f"{name}: expected at most {MOST}, got {getattr(self, name)}")
        if self.max_positions > MAX_POSITIONS:
            raise ValueError(f"max_positions: expected at most {MAX_POSITIONS}, got {self.max_positions}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads: heads={self.heads}, kv_heads={self.kv_heads}; "
                f"choose from {_divisors(self.heads)[:12]}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width: expected an even number (rotary pairs), got {self.head_width}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")
        if self.experts < 0 or (self.experts and not 1 <= self.experts_per_token <= self.experts):
            raise ValueError(
                f"experts_per_token: expected 1 to experts={self.experts}, got {self.experts_per_token}; "
                "experts=0 makes the model dense"
            )
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected >= 0 and finite, got {getattr(self, name)}")
        for name in ("rope_base", "norm_epsilon"):
            if not isfinite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive and finite number, got {getattr(self, name)}")

    @property
    def num_parameters(self) -> int:
        """Parameters in all, a tied head counted once."""
        return self._parameters(max(1, self.experts))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those that it is sent to."""
        return self._parameters(self.experts_per_token if self.experts else 1)

    def _parameters(self, experts: int) -> int:
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * experts * self.width * self.ffn_width + self.width * self.experts
        block = attention + feed_forward + 2 * self.width
        return self.layers * block + self.vocab_size * self.width * (1 if self.tied else 2) + self.width


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


_TINY = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=64)
PRESETS: dict[str, ModelConfig] = {
    "demo": ModelConfig(heads=3, kv_heads=3, head_width=32, init_std=0.06),
    "tiny": _TINY,
    "tiny-mistral": replace(_TINY, window=16, tied=False),
    "tiny-llama": replace(_TINY, tied=False),
    "tiny-mixtral": replace(_TINY, rope_base=1e6, tied=False, ffn_width=32, experts=4),
    "small": ModelConfig(width=256, layers=6, heads=8, kv_heads=4, head_width=32, ffn_width=704, max_positions=2048),
    "7b": ModelConfig(
        vocab_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        ffn_width=14_336,
        window=4096,
        tied=False,
        max_positions=32_768,
    ),
    "70b": ModelConfig(
        vocab_size=32_000,
        width=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_width=128,
        ffn_width=28_672,
        tied=False,
        max_positions=4096,
    ),
    "8x22b": ModelConfig(
        vocab_size=32_000,
        width=6144,
        layers=56,
        heads=48,
        kv_heads=8,
        head_width=128,
        ffn_width=16_384,
        rope_base=1e6,
        tied=False,
        max_positions=65_536,
        experts=8,
    ),
}
