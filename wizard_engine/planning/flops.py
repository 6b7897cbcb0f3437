"""FLOPs of a model per token, and the formula of MFU.

A forward pass takes, per token, 2 operations (a multiplication and an addition) for every weight of a matrix that the
token is multiplied with (N: all blocks, of experts those that it is sent to, and the output head, not the input
embedding, which is looked up), and in every layer 2 H C operations for each key it is scored against and 2 H C for each
value it adds up. With causal masking a token of a sequence of length s sees (s + 1) / 2 keys on average, fewer with a
sliding window:

    forward  = 2 N + 4 L H C keys          training = 3 forward (backward takes twice the forward) = 6 N + 12 L H C keys

A part whose weights are frozen has no gradient of them, and none of its input where nothing before it is trained.

MFU = training operations per second and device / peak of the device. Recomputation does not count as work.
"""

from typing import Protocol

TRAINING_FACTOR = 3


class Shapes(Protocol):
    """The sizes of a transformer that the count needs (a ModelConfig has them)."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    window: int | None
    experts: int
    experts_per_token: int


def matrix_parameters(config: Shapes) -> int:
    """N: weights of all matrices that a token is multiplied with, its experts' alone and the output head included."""
    attention = config.width * config.head_width * 2 * (config.heads + config.kv_heads)
    feed_forward = 3 * config.width * config.ffn_width * (config.experts_per_token if config.experts else 1)
    router = config.width * config.experts
    return config.layers * (attention + feed_forward + router) + config.width * config.vocab_size


def mean_keys(sequence_length: float, window: int | None = None) -> float:
    """Keys that a token of a causal sequence sees on average, itself included.

    Without a window (s + 1) / 2; with a window w < s: (w (w + 1) / 2 + (s - w) w) / s.
    """
    seen = min(window or sequence_length, sequence_length)
    return (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length


def flops_per_token(config: Shapes, sequence_length: float) -> float:
    """Operations of a forward pass per token; times TRAINING_FACTOR for a training step (formula above).

    Args:
        config: the transformer's sizes.
        sequence_length: tokens of a sequence (of one document, not of a packed row).
    Raises:
        ValueError: sequence_length is below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}")
    keys = mean_keys(sequence_length, config.window)
    return 2 * matrix_parameters(config) + 4 * config.layers * config.heads * config.head_width * keys


def step_flops_per_token(config: Shapes, sequence_length: float, *, layer_passes: float, head_passes: float) -> float:
    """Operations of a training step per token, where parts may be frozen or absent.

    Args:
        layer_passes: passes over a layer, mean of all layers: forward, gradient of its input, gradient of its weights.
        head_passes: the same over the output head; 0 where there is none.
    """
    head = 2 * config.width * config.vocab_size
    return layer_passes * (flops_per_token(config, sequence_length) - head) + head_passes * head
