"""A model directory made of a GGUF file: configuration, tokenizer, and weights as transformers has them."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wizard_engine.data.gguf_header import GgufHeader, Metadata
from wizard_engine.data.gguf_tokenizer import save_tokenizer
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.runtime.files import replace_directory, restore_replaced, sync_tree, write_json
from wizard_engine.runtime.input_files import shown
from wizard_engine.runtime.metrics import byte_bar

from .config import MAX_POSITIONS, ModelConfig
from .gguf_file import GgufFile
from .hugging_face import EMBEDDING, HEAD, INDEX, MAX_SHARD_BYTES, weight_files
from .published import Piece, pieces, published_config
from .safetensors_file import write_parts
from .vocabulary import check_vocabulary

ARCHITECTURE = "llama"
PREFIX = f"{ARCHITECTURE}."
# Names of tensors in the layout of transformers, and those of GGUF.
TOP = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
# Whose rows llama.cpp has in pairs, so that the two halves of a rotary pair stand together.
PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")
# Fields of the architecture that are read; that say nothing of the function; and those that may say what the
# transformer does not do, with the values that do not.
READ = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("rope.dimension_count", "rope.freq_base", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window"),
)
SILENT = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
NEUTRAL: dict[str, tuple] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def import_gguf(
    source: Path, out: Path, *, dtype: torch.dtype = torch.float32, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the model of a GGUF file as a directory that `load_model` and transformers read; returns `out`.

    Llama and Mistral, of the types in `gguf_header.READABLE`. The directory appears by one rename, complete or not at
    all. A part of one tensor is in memory at a time.

    Args:
        dtype: of the weights.   max_shard_bytes: of a file of weights, or one tensor.
    Raises:
        ValueError: a file that is broken, or of a model or tokenizer that is not read; names file and field.
        OSError: not written; what was at `out` is intact.
    """
    with GgufFile(source) as file:
        config = gguf_config(file.header)
        partial = out.with_name(f".{out.name}.partial")
        out.parent.mkdir(parents=True, exist_ok=True)
        restore_replaced(out.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write_companions(file.header.metadata, config, partial, str(dtype).removeprefix("torch."))
            _write_weights(file, config, partial, dtype, max_shard_bytes)
            sync_tree(partial)
            replace_directory(partial, out)
        except OSError as error:
            raise OSError(error.errno, f"{out}: not written ({error}); what was there is intact") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def gguf_config(header: GgufHeader) -> ModelConfig:
    """The configuration of a GGUF file, whose tensors are those that it needs.

    Raises:
        ValueError: another architecture, a field or tensor that changes the function, or one that is missing or wrong.
    """
    metadata = header.metadata
    if metadata.text("general.architecture") != ARCHITECTURE:
        raise metadata.error("general.architecture", f"{ARCHITECTURE} (Llama and Mistral)")
    if metadata.whole("split.count", 1) > 1:
        raise metadata.error("split.count", "a model in one file; merge its files with llama-gguf-split")
    _check_fields(metadata)
    tensors = header.tensors
    if TOP[EMBEDDING] not in tensors:
        raise ValueError(f"{header.path}: expected the tensor {TOP[EMBEDDING]}, found none")
    vocab_size = tensors[TOP[EMBEDDING]].shape[0]
    if metadata.whole(PREFIX + "vocab_size", vocab_size) != vocab_size:
        raise metadata.error(PREFIX + "vocab_size", f"{vocab_size}, as {TOP[EMBEDDING]} has rows")
    # Each layer has tensors: there are no more of them than of those.
    layers = metadata.whole(PREFIX + "block_count", least=1, most=max(1, len(tensors) // len(IN_LAYER)))
    try:
        config = _model_config(metadata, vocab_size, layers, tied=TOP[HEAD] not in tensors)
    except ValueError as error:
        text = str(error).removeprefix(f"{header.path}: ")
        raise ValueError(f"{header.path}: {text}") from None
    _check_tensors(header, config)
    return config


def _check_fields(metadata: Metadata) -> None:
    """Refuse fields of the architecture that would change the function."""
    for field, value in metadata.fields.items():
        name = field.removeprefix(PREFIX)
        if name == field or name in READ or name in SILENT:
            continue
        if name not in NEUTRAL:
            raise metadata.error(field, "a field that this engine knows")
        if not isinstance(value, str | int | float) or value not in NEUTRAL[name]:
            raise metadata.error(field, " or ".join(map(str, NEUTRAL[name])))


def _model_config(metadata: Metadata, vocab_size: int, layers: int, *, tied: bool) -> ModelConfig:
    def whole(name: str, default: int | None = None, **bounds: int) -> int:
        return metadata.whole(PREFIX + name, default, **({"least": 1} | bounds))

    width, heads = whole("embedding_length"), whole("attention.head_count")
    head_width = whole("attention.key_length", max(1, width // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if whole(name, head_width) != head_width:
            raise metadata.error(PREFIX + name, f"{head_width}, the width of a head")
    window = whole("attention.sliding_window", 0, least=0)
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=whole("attention.head_count_kv", heads),
        head_width=head_width,
        ffn_width=whole("feed_forward_length"),
        max_positions=whole("context_length", most=MAX_POSITIONS),
        rope_base=metadata.real(PREFIX + "rope.freq_base", 10_000.0),
        norm_epsilon=metadata.real(PREFIX + "attention.layer_norm_rms_epsilon"),
        window=window or None,
        tied=tied,
    )


def _gguf_name(published: str) -> str:
    """GGUF's name of a tensor in the layout of transformers."""
    in_layer = LAYER.fullmatch(published)
    return TOP[published] if in_layer is None else f"blk.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.weight"


def _check_tensors(header: GgufHeader, config: ModelConfig) -> None:
    expected = {_gguf_name(piece.name): piece.shape for piece in pieces(config)}
    for name, shape in expected.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{header.path}: expected the tensor {name}, found none")
        if tensor.shape != shape:
            raise ValueError(f"{header.path}: {name}: expected shape {shape}, got {tensor.shape}")
    extra = next((name for name in header.tensors if name not in expected), None)
    if extra is not None:
        raise ValueError(f"{header.path}: {shown(extra)}: expected a tensor of Llama or Mistral, got an unknown one")


def _write_companions(metadata: Metadata, config: ModelConfig, folder: Path, dtype: str) -> None:
    """Write the tokenizer, config.json and generation_config.json, and read the tokenizer again."""
    ids = save_tokenizer(metadata, folder, vocab_size=config.vocab_size, max_positions=config.max_positions)
    write_json(folder / "config.json", published_config(config, dtype=dtype) | ids)
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    try:
        check_vocabulary(load_tokenizer(folder), config, folder)
    except ValueError as error:
        text = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "")
        raise ValueError(f"{metadata.path}: {text}") from None


def _write_weights(file: GgufFile, config: ModelConfig, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    by_name = {piece.name: piece for piece in pieces(config)}
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {n: (dtype, piece.shape) for n, piece in by_name.items()}
    files, index = weight_files(specs, max_shard_bytes)
    total = sum(tensor.size for tensor in file.header.tensors.values())
    with byte_bar(f"import {file.path}", total) as bar:
        for name, tensors in files.items():
            write_parts(
                folder / name,
                {tensor: specs[tensor] for tensor in tensors},
                lambda tensor: _parts(file, by_name[tensor], config.head_width, dtype),
            )
            bar.update(sum(file.header.tensors[_gguf_name(tensor)].size for tensor in tensors))
    if index is not None:
        write_json(folder / INDEX, index)


def _parts(file: GgufFile, piece: Piece, head_width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor in the layout and the dtype that are asked for, in parts of whole rows."""
    name = _gguf_name(piece.name)
    is_permuted = any(part in piece.name for part in PERMUTED)
    for part in file.parts(name, rows=head_width if is_permuted else 1):
        if not part.isfinite().all():
            raise ValueError(f"{file.path}: {name}: expected finite numbers, got others; the file is damaged")
        cast = part.to(dtype)
        if not cast.isfinite().all():
            largest = part.abs().max().item()
            raise ValueError(
                f"{file.path}: {name}: expected numbers that {dtype} can hold, got {largest:g}; choose --dtype bfloat16"
            )
        yield _unpermuted(cast, head_width) if is_permuted else cast


def _unpermuted(rows: Tensor, head_width: int) -> Tensor:
    """Rows of heads with the first halves of the rotary pairs before the second ones, as transformers has them."""
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)
