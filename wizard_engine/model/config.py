"""Shapes of a transformer of the Llama / Mistral family, and the named ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer (GQA, RoPE, SwiGLU, RMSNorm).

    Widths are in elements; `window` is the keys that a query sees, itself included, or None for all of them.
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

    def __post_init__(self) -> None:
        positive = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "max_positions")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            choices = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"kv_heads must divide heads: heads={self.heads}, kv_heads={self.kv_heads}; choose from {choices}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width: expected an even number (rotary pairs), got {self.head_width}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")

    @property
    def num_parameters(self) -> int:
        """Parameters in all, a tied head counted once."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.width * self.ffn_width + 2 * self.width
        return self.layers * block + self.vocab_size * self.width * (1 if self.tied else 2) + self.width


PRESETS: dict[str, ModelConfig] = {
    "demo": ModelConfig(heads=3, kv_heads=3, head_width=32, init_std=0.06),
    "tiny": ModelConfig(width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=64),
    "small": ModelConfig(width=256, layers=6, heads=8, kv_heads=4, head_width=32, ffn_width=704, max_positions=2048),
    "7b": ModelConfig(
        vocab_size=32_000, width=4096, layers=32, heads=32, kv_heads=8, head_width=128, ffn_width=14_336,
        window=4096, tied=False, max_positions=32_768,
    ),
    "70b": ModelConfig(
        vocab_size=32_000, width=8192, layers=80, heads=64, kv_heads=8, head_width=128, ffn_width=28_672,
        tied=False, max_positions=4096,
    ),
}  # fmt: skip
