"""Published names and shapes of Mistral, Llama and Mixtral: config.json, and tensors as boxes of this engine's."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wizard_engine.data.tokenizer import Tokenizer

from .config import ModelConfig
from .transformer import Transformer

Region = tuple[slice, ...]

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral"}
# Fields of config.json that may say what the transformer does not do, and the value of each that it does.
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "router_jitter_noise": 0.0,
    "quantization_config": None,
    "layer_types": None,
}
# What the families take for a field that config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
}


def published_config(config: ModelConfig, tokenizer: Tokenizer | None = None, *, dtype: str = "float32") -> dict:
    """config.json of a model: Mixtral where it has experts, Mistral where it has a window, Llama otherwise."""
    kind = "mixtral" if config.experts else "llama" if config.window is None else "mistral"
    fields = {
        "architectures": [next(name for name, value in ARCHITECTURES.items() if value == kind)],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": dtype,
    }
    if kind != "llama":
        fields["sliding_window"] = config.window
    if config.experts:
        fields |= {
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": config.balance_loss,
        }
        if config.z_loss:
            fields["wizard_z_loss"] = config.z_loss
    if tokenizer is not None:
        fields |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return fields


def read_config(path: Path) -> tuple[ModelConfig, dict]:
    """ModelConfig of a directory's config.json, and the whole JSON object.

    Raises:
        ValueError: the file is missing or broken, or describes what this engine does not implement.
    """
    source = path / "config.json"
    try:
        fields = json.loads(source.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{source}: expected a model directory with config.json, found none") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    kind = _family(fields, source)
    rope = _rope(fields, source)
    try:
        return _model_config(kind, fields, rope), fields
    except KeyError as error:
        raise ValueError(f"{source}: expected the field {error.args[0]}, found none") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _family(fields: dict, source: Path) -> str:
    """llama, mistral or mixtral, once every field that would change the function has the value that is implemented."""
    named = fields.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "none"
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{source}: architectures: expected one of {sorted(ARCHITECTURES)}, got {architecture}")
    for name, expected in IMPLEMENTED.items():
        if fields.get(name) is not None and fields[name] != expected:
            raise ValueError(f"{source}: {name}: expected {expected}, got {str(fields[name])[:80]}")
    return ARCHITECTURES[architecture]


def _rope(fields: dict, source: Path) -> dict:
    """Fields of the rotary embedding, which is the plain one."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        scaling = fields.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        others = set(scaling) - {"rope_type", "type", "rope_theta"} if isinstance(scaling, dict) else ()
        if kind != "default" or (others and scaling.get("partial_rotary_factor", 1.0) != 1.0):
            raise ValueError(f"{source}: {name}: expected none, got {str(scaling)[:120]}")
        rope |= scaling
    return rope


def _model_config(kind: str, fields: dict, rope: dict) -> ModelConfig:
    known = DEFAULTS[kind] | {name: value for name, value in fields.items() if value is not None}
    # An explicit null is "no window"; the field left out is the family's own.
    window = fields.get("sliding_window", DEFAULTS[kind].get("sliding_window")) if kind != "llama" else None
    heads = known["num_attention_heads"]
    experts = (
        {
            "experts": known["num_local_experts"],
            "experts_per_token": known["num_experts_per_tok"],
            "balance_loss": known["router_aux_loss_coef"],
            "z_loss": known.get("wizard_z_loss", 0.0),
        }
        if kind == "mixtral"
        else {}
    )
    numbers = {
        "vocab_size": known["vocab_size"],
        "width": known["hidden_size"],
        "layers": known["num_hidden_layers"],
        "heads": heads,
        "kv_heads": known["num_key_value_heads"] or heads,
        "head_width": known.get("head_dim") or known["hidden_size"] // heads,
        "ffn_width": known["intermediate_size"],
        "max_positions": known["max_position_embeddings"],
    }
    for name, value in numbers.items():
        if type(value) is not int:
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    base = fields.get("rope_theta") or rope.get("rope_theta") or known["rope_theta"]
    return ModelConfig(
        **numbers,
        **experts,
        rope_base=float(base),
        norm_epsilon=float(known["rms_norm_eps"]),
        window=window,
        tied=bool(known.get("tie_word_embeddings", False)),
        init_std=float(known.get("initializer_range", 0.02)),
    )


@dataclass(frozen=True)
class Piece:
    """A published tensor: its name and shape, and the box of one of this engine's parameters that it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    region: Region

    def start_in(self, shape: tuple[int, ...]) -> int:
        """Where it begins among the elements of its parameter, in which it is one run in row-major order."""
        whole = [b.start == 0 and b.stop == n for b, n in zip(self.region, shape)]
        first = next((i for i, b in enumerate(self.region) if b.stop - b.start != 1), len(shape) - 1)
        assert all(whole[first + 1 :]), f"{self.name}: its elements do not stand together"
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return sum(b.start * stride for b, stride in zip(self.region, strides))


def pieces(config: ModelConfig, *, stacked: bool = False, prefix: str = "model.") -> Iterator[Piece]:
    """Every published tensor of a model, in the order of its layers.

    Args:
        stacked: experts in one tensor per layer, as newer versions of transformers keep them, instead of w1, w2 and w3
            of each expert.   prefix: in front of the body's names.
    """

    def whole(name: str, parameter: str, *shape: int) -> Piece:
        return Piece(name, shape, parameter, tuple(slice(0, n) for n in shape))

    width, kv_width = config.width, config.kv_heads * config.head_width
    inner = config.heads * config.head_width
    yield whole(f"{prefix}embed_tokens.weight", "embedding.weight", config.vocab_size, width)
    for layer in range(config.layers):
        ours, name = f"blocks.{layer}.", f"{prefix}layers.{layer}."
        yield whole(f"{name}input_layernorm.weight", f"{ours}attention_norm.weight", width)
        start = 0
        for letter, rows in (("q", inner), ("k", kv_width), ("v", kv_width)):
            region = slice(start, start + rows), slice(0, width)
            yield Piece(f"{name}self_attn.{letter}_proj.weight", (rows, width), f"{ours}attention.qkv.weight", region)
            start += rows
        yield whole(f"{name}self_attn.o_proj.weight", f"{ours}attention.out.weight", width, inner)
        yield whole(f"{name}post_attention_layernorm.weight", f"{ours}feed_forward_norm.weight", width)
        yield from _feed_forward(config, f"{ours}feed_forward.", name, stacked)
    yield whole(f"{prefix}norm.weight", "norm.weight", width)
    if not config.tied:
        yield whole("lm_head.weight", "head.weight", config.vocab_size, width)


def _feed_forward(config: ModelConfig, ours: str, name: str, stacked: bool) -> Iterator[Piece]:
    width, ffn_width, experts = config.width, config.ffn_width, config.experts
    columns, inner = slice(0, width), slice(0, ffn_width)
    halves = slice(0, ffn_width), slice(ffn_width, 2 * ffn_width)
    if not experts:
        for word, rows in zip(("gate", "up"), halves):
            yield Piece(f"{name}mlp.{word}_proj.weight", (ffn_width, width), f"{ours}gate_up.weight", (rows, columns))
        yield Piece(f"{name}mlp.down_proj.weight", (width, ffn_width), f"{ours}down.weight", (columns, inner))
        return
    router = (slice(0, experts), columns)
    part, stack = "mlp" if stacked else "block_sparse_moe", f"{ours}experts."
    yield Piece(f"{name}{part}.gate.weight", (experts, width), f"{ours}router.weight", router)
    if stacked:
        every, both = slice(0, experts), slice(0, 2 * ffn_width)
        shapes = (experts, 2 * ffn_width, width), (experts, width, ffn_width)
        yield Piece(f"{name}mlp.experts.gate_up_proj", shapes[0], f"{stack}gate_up", (every, both, columns))
        yield Piece(f"{name}mlp.experts.down_proj", shapes[1], f"{stack}down", (every, columns, inner))
        return
    for expert in range(experts):
        one, base = slice(expert, expert + 1), f"{name}block_sparse_moe.experts.{expert}."
        yield Piece(f"{base}w1.weight", (ffn_width, width), f"{stack}gate_up", (one, halves[0], columns))
        yield Piece(f"{base}w2.weight", (width, ffn_width), f"{stack}down", (one, columns, inner))
        yield Piece(f"{base}w3.weight", (ffn_width, width), f"{stack}gate_up", (one, halves[1], columns))


def published_tensors(model: Transformer, prefix: str = "model.", *, stacked: bool = False) -> dict[str, Tensor]:
    """Published tensor name -> view of the model's parameter, with the fused products split again."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    return {
        piece.name: parameters[piece.parameter][piece.region].view(piece.shape)
        for piece in pieces(model.config, stacked=stacked, prefix=prefix)
    }
