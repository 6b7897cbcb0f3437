"""Published names and shapes of Mistral, Llama and Mixtral: config.json, and tensors as boxes of this engine's."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.runtime.input_files import read_json_object, shown

from .config import MOST, ModelConfig
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
# This engine's names of the sizes, and those of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "ffn_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
EXPERTS = {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
MIN_POSITIVE, MAX_FLOAT = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
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
        fields |= special_ids(tokenizer)
    return fields


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """BOS and EOS as config.json and generation_config.json have them: several EOS ids are a list."""
    eos_ids = list(tokenizer.eos_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0]}


def read_config(path: Path) -> tuple[ModelConfig, dict]:
    """ModelConfig of a directory's config.json, and the whole JSON object.

    Raises:
        ValueError: the file is missing or broken, or describes what this engine does not implement; names the field.
    """
    source = path / "config.json"
    fields = read_json_object(source)
    if fields is None:
        raise ValueError(f"{source}: expected a model directory with config.json, found none")
    try:
        kind = _family(fields)
        return _model_config(kind, fields, _rope_base(kind, fields)), fields
    except KeyError as error:
        raise ValueError(f"{source}: expected the field {error.args[0]}, found none") from None
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise ValueError(f"{source}: {(SIZES | EXPERTS).get(name, name)}{colon}{rest}") from None


def _family(fields: dict) -> str:
    """llama, mistral or mixtral, once every field that would change the function has the value that is implemented."""
    named = fields.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "none"
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architectures: expected one of {sorted(ARCHITECTURES)}, got {shown(architecture)}")
    kind = ARCHITECTURES[architecture]
    # transformers goes by this field, and this engine by the other.
    if fields.get("model_type") not in (None, kind):
        raise ValueError(f"model_type: expected {kind}, as architectures says, got {shown(fields['model_type'])}")
    for name, expected in IMPLEMENTED.items():
        if fields.get(name) is not None and fields[name] != expected:
            raise ValueError(f"{name}: expected {expected}, got {shown(fields[name])}")
    return kind


def _rope_base(kind: str, fields: dict) -> float:
    """Base of the rotary embedding, which is the plain one.

    Where several fields name it, the one that transformers takes: in rope_scaling, else in rope_parameters, else
    rope_theta at the top.
    """
    for name in ("rope_scaling", "rope_parameters"):
        scaling = fields.get(name) or {}
        is_plain = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default"
        if not is_plain or scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{name}: expected none, got {shown(scaling, 120)}")
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    inner = (fields.get(where) or {}).get("rope_theta")
    if inner is not None:
        return _number(f"{where}: rope_theta", inner, positive=True)
    outer = fields.get("rope_theta")
    return _number("rope_theta", DEFAULTS[kind]["rope_theta"] if outer is None else outer, positive=True)


def _model_config(kind: str, fields: dict, rope_base: float) -> ModelConfig:
    known = DEFAULTS[kind] | {name: value for name, value in fields.items() if value is not None}
    heads = _whole("num_attention_heads", known["num_attention_heads"])
    width = _whole("hidden_size", known["hidden_size"])
    # An explicit null is "as many as heads"; the field left out is the family's own.
    kv_heads = fields.get("num_key_value_heads", DEFAULTS[kind]["num_key_value_heads"])
    known["num_key_value_heads"] = heads if kv_heads is None else kv_heads
    known.setdefault("head_dim", width // heads)
    if kind == "mixtral":
        balance_loss = _number("router_aux_loss_coef", known["router_aux_loss_coef"])
        experts = {name: _whole(field, known[field]) for name, field in EXPERTS.items()}
        # transformers takes either name.
        if known.get("num_experts", known["num_local_experts"]) != known["num_local_experts"]:
            raise ValueError(f"num_experts: expected num_local_experts, got {shown(known['num_experts'])}")
        experts |= {"balance_loss": balance_loss, "z_loss": _number("wizard_z_loss", known.get("wizard_z_loss", 0.0))}
    else:
        experts = {}
    # An explicit null is "no window"; the field left out is the family's own.
    window = fields.get("sliding_window", DEFAULTS[kind].get("sliding_window")) if kind != "llama" else None
    tied = known.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings: expected true or false, got {shown(tied)}")
    sizes = {name: _whole(field, known[field]) for name, field in SIZES.items()}
    return ModelConfig(
        **sizes,
        **experts,
        rope_base=rope_base,
        norm_epsilon=_number("rms_norm_eps", known["rms_norm_eps"], positive=True),
        window=None if window is None else _whole("sliding_window", window),
        tied=tied,
        init_std=_number("initializer_range", known.get("initializer_range", 0.02)),
    )


def _whole(name: str, value: Any) -> int:
    """A count or a width of config.json."""
    if type(value) is not int:
        got = repr(value[:80]) if isinstance(value, str) else shown(value)
        raise ValueError(f"{name}: expected a whole number, got {got}")
    if not 1 <= value <= MOST:
        raise ValueError(f"{name}: expected 1 to {MOST}, got {shown(value)}")
    return value


def _number(name: str, value: Any, *, positive: bool = False) -> float:
    """A real number of config.json, >= 0 or positive, and finite in fp32 as the kernels take it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    least = MIN_POSITIVE if positive else 0.0
    if not is_number or not least <= value <= MAX_FLOAT:
        expected = "a positive number" if positive else "a number >= 0"
        raise ValueError(f"{name}: expected {expected} that fp32 can hold, got {shown(value)}")
    return float(value)


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
