"""Models on disk in the Hugging Face layout: config.json, model.safetensors, tokenizer files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.tokenizer import Tokenizer, load_tokenizer
from ..runtime import write_json
from .config import ModelConfig
from .heads import ScoringModel
from .transformer import Transformer

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# Fields of config.json that may say what the transformer does not do, and the value of each that it does.
IMPLEMENTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def published_config(config: ModelConfig, tokenizer: Tokenizer | None = None) -> dict:
    """config.json of a model: Mistral where it has a window, Llama otherwise."""
    kind = "llama" if config.window is None else "mistral"
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
        "torch_dtype": "float32",
    }
    if config.window is not None:
        fields["sliding_window"] = config.window
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
    except FileNotFoundError:
        raise ValueError(f"{source}: expected a model directory with config.json, found none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    architecture = (fields.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{source}: architectures: expected one of {sorted(ARCHITECTURES)}, got {architecture}")
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError(f"{source}: rope_scaling: expected none, got {scaling}")
    for name, expected in IMPLEMENTED.items():
        if fields.get(name, expected) != expected:
            raise ValueError(f"{source}: {name}: expected {expected}, got {fields[name]}")
    try:
        config = ModelConfig(
            vocab_size=fields["vocab_size"],
            width=fields["hidden_size"],
            layers=fields["num_hidden_layers"],
            heads=fields["num_attention_heads"],
            kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            head_width=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
            ffn_width=fields["intermediate_size"],
            rope_base=fields.get("rope_theta") or scaling.get("rope_theta", 10_000.0),
            norm_epsilon=fields.get("rms_norm_eps", 1e-5),
            window=fields.get("sliding_window"),
            tied=fields.get("tie_word_embeddings", False),
            max_positions=fields.get("max_position_embeddings", 2048),
            init_std=fields.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{source}: expected the field {error.args[0]}, found none") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return config, fields


def published_tensors(model: Transformer, prefix: str = "model.") -> dict[str, Tensor]:
    """Published tensor name -> tensor, with the fused products split again."""
    config = model.config
    sizes = [config.heads * config.head_width] + [config.kv_heads * config.head_width] * 2
    tensors = {f"{prefix}embed_tokens.weight": model.embedding.weight, f"{prefix}norm.weight": model.norm.weight}
    for index, block in enumerate(model.blocks):
        name = f"{prefix}layers.{index}."
        q, k, v = block.attention.qkv.weight.split(sizes)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        tensors |= {
            f"{name}input_layernorm.weight": block.attention_norm.weight,
            f"{name}self_attn.q_proj.weight": q,
            f"{name}self_attn.k_proj.weight": k,
            f"{name}self_attn.v_proj.weight": v,
            f"{name}self_attn.o_proj.weight": block.attention.out.weight,
            f"{name}post_attention_layernorm.weight": block.feed_forward_norm.weight,
            f"{name}mlp.gate_proj.weight": gate,
            f"{name}mlp.up_proj.weight": up,
            f"{name}mlp.down_proj.weight": block.feed_forward.down.weight,
        }
    if model.head is not None:
        tensors["lm_head.weight"] = model.head.weight
    return tensors


def save_model(
    model: Transformer | ScoringModel, tokenizer: Tokenizer, path: Path | str, *, extra: dict | None = None
) -> Path:
    """Write a model directory that transformers and this engine read; it appears by one rename.

    Args:
        model: a language model, or a scoring model (adds `score.*` tensors and `wizard_outputs`).
        tokenizer: saved beside the weights.   extra: further fields of config.json.
    Returns:
        path.
    """
    path = Path(path)
    scoring = isinstance(model, ScoringModel)
    body = model.body if scoring else model
    fields = published_config(body.config, tokenizer) | (extra or {})
    tensors = published_tensors(body)
    if scoring:
        fields |= {"wizard_outputs": model.outputs, "wizard_surprise": model.surprise}
        tensors |= {f"score.{name}": parameter for name, parameter in model.score.named_parameters()}
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write_weights(contiguous, partial / "model.safetensors", path)
        tokenizer.save(partial)
        write_json(partial / "config.json", fields)
        _swap(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_weights(tensors: dict[str, Tensor], file: Path, path: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: not saved ({error}); what was there is intact") from error


def _swap(partial: Path, path: Path) -> None:
    """Put `partial` in the place of `path`; what stood there goes only once the new one is in place."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load_model(path: Path | str, *, device: str | torch.device = "cpu") -> tuple[Transformer | ScoringModel, Tokenizer]:
    """Model and tokenizer of a directory that `save_model` (or transformers) wrote.

    Raises:
        ValueError: a file is missing or broken, or a tensor is missing or has another shape; names file and tensor.
    """
    path = Path(path)
    config, fields = read_config(path)
    outputs = fields.get("wizard_outputs")
    model = (
        Transformer(config)
        if outputs is None
        else ScoringModel(config, outputs, surprise=fields.get("wizard_surprise", False))
    )
    body = model if outputs is None else model.body
    targets = {name: tensor.detach() for name, tensor in published_tensors(body).items()}
    if outputs is not None:
        targets |= {f"score.{name}": parameter.detach() for name, parameter in model.score.named_parameters()}
    _fill(targets, path)
    return model.to(device), load_tokenizer(path)


def _fill(targets: dict[str, Tensor], path: Path) -> None:
    """Copy each named tensor of the directory's safetensors files into its target view."""
    missing = dict(targets)
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118
                    if name in missing:
                        _copy(missing.pop(name), source.get_tensor(name), f"{file}: {name}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: expected a whole safetensors file, got {error}") from error
    if missing:
        raise ValueError(f"{path}: expected the tensor {sorted(missing)[0]} (and {len(missing) - 1} more), found none")


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise ValueError(f"{single}: expected safetensors weights, found none; pickled weights are never read")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a JSON object with weight_map, got {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: expected file names inside the directory, got {outside[0]}")
    return [path / name for name in names]


def _copy(target: Tensor, tensor: Tensor, where: str) -> None:
    if target.shape != tensor.shape:
        raise ValueError(f"{where}: expected shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
    target.copy_(tensor)
