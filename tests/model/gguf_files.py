"""GGUF files for tests, written by the package `gguf`, and what each of them means."""

import functools
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from wizard_engine.model import ModelConfig
from wizard_engine.model.published import pieces

try:
    import gguf
except ImportError:
    gguf = None

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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
CORPUS = [
    "Tom has 12 apples, and Sara has 345. How many have they?",
    "the tall tree told the tale of the three thieves that they thanked there",
    "def add(first, second):\n    return first + second  # sums\n",
    "Größe naïve 中文 текст",
] * 3
TEXTS = [
    *("", " ", "a", "  two  spaces ", "\t\tTom has 2024 apples\n\n\nthe  end\r\n", "it's they'LL", "x" * 40),
    *(
        "Größe naïve é ½ Ⅷ",
        "中文 текст مرحبا 😀👩‍👩‍👧",
        "</s><s>[INST]<|end|> <|begin|>",
        "\u00a0\u2028\x1b",
        "1234567890.5e-3",
    ),
    *("a<|begin|>b", "٣٤٥ ²³", "—“the”…!?;", "f(x) != <=> ||~"),
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)
SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


@dataclass(frozen=True)
class Written:
    """A file, the weights that it means under the names of transformers, and the tokenizer that it was made of."""

    path: Path
    config: ModelConfig
    weights: dict[str, np.ndarray]
    ids: Any


@functools.cache
def byte_level(pre: str = "smollm") -> tuple[dict[str, Any], Backend]:
    """Fields of a byte-level tokenizer, and the tokenizer itself."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(SPLITS[pre]), decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fields = json.loads(backend.to_str())
    tokens = sorted(backend.get_vocab(), key=backend.token_to_id)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 4 if token == "<think>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }, backend


@functools.cache
def sentence_piece() -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    """Fields of a SentencePiece tokenizer, and the tokenizer itself."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|end|>"],
        user_defined_symbols=["<|begin|>"],
        character_coverage=0.98,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    own = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    size = own.vocab_size()
    kinds = [2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 1 for i in range(size)]
    kinds[own.piece_to_id("<|begin|>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": own.id_to_piece(list(range(size))),
        "tokenizer.ggml.scores": own.get_score(list(range(size))),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": own.bos_id(),
        "tokenizer.ggml.eos_token_id": own.eos_id(),
        "tokenizer.ggml.unknown_token_id": own.unk_id(),
    }, own


TOKENIZERS = {"gpt2": byte_level, "llama": sentence_piece}


def write_gguf(
    path: Path,
    *,
    kind: str = "F32",
    tokenizer: str = "gpt2",
    width: int = 32,
    ffn_width: int | None = None,
    is_zero: bool = False,
    tied: bool = True,
    fields: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> Written:
    """Write a model of two layers, its matrices in a type.

    Args:
        is_zero: all weights are 0, which takes no time.
        fields: added, or in the place of those of the model.   without: fields and tensors that are left out.
        extra: tensors that are added, or in the place of those of the model; None leaves one out.
    """
    trained, ids = TOKENIZERS[tokenizer]()
    entries = dict(trained)
    vocab_size = len(entries["tokenizer.ggml.tokens"])
    config = ModelConfig(
        vocab_size=vocab_size, width=width, layers=2, heads=4, kv_heads=2, head_width=width // 4,
        ffn_width=ffn_width or width, rope_base=50_000.0, norm_epsilon=1e-5, tied=tied, max_positions=128,
    )  # fmt: skip
    entries |= {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": width,
        "llama.feed_forward_length": config.ffn_width,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50_000.0,
        "llama.vocab_size": vocab_size,
    }
    entries |= fields or {}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        if name == "general.architecture":
            writer.kv_data[0][name].value = value
        elif name not in without:
            add_field(writer, name, value)
    draw, weights = np.random.default_rng(0), {}
    for piece in pieces(config):
        is_matrix = len(piece.shape) > 1
        packed, means = packed_weights(draw, piece.shape, kind if is_matrix else "F32", is_zero)
        weights[piece.name] = means
        name = gguf_name(piece.name)
        if ".attn_q." in name or ".attn_k." in name:
            heads = config.heads if ".attn_q." in name else config.kv_heads
            # As in llama.cpp's conversion: the two halves of each rotary pair are put together.
            packed = packed.reshape(heads, 2, -1, packed.shape[1]).swapaxes(1, 2).reshape(packed.shape)
        if name not in without and name not in (extra or {}):
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind if is_matrix else "F32"])
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, config, weights, ids)


def add_field(writer: Any, name: str, value: Any) -> None:
    """Add a field of the type that llama.cpp gives such a value."""
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value) if value >= 0 else writer.add_int32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def gguf_name(published: str) -> str:
    """GGUF's name of a tensor that transformers has under another."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", published)
    if layer:
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.weight"
    return NAMES[published.removesuffix(".weight")] + ".weight"


def packed_weights(draw: np.random.Generator, shape: tuple[int, ...], kind: str, is_zero: bool) -> tuple:
    """Random rows in a type, and the numbers that they stand for."""
    number = gguf.GGMLQuantizationType[kind]
    if is_zero:
        return np.zeros(shape, np.float32 if kind == "F32" else np.float16), np.zeros(0)
    if kind not in ("Q4_K", "Q6_K"):
        values = (draw.standard_normal(shape) * 10 ** draw.uniform(-2, 0, (*shape[:-1], 1))).astype(np.float32)
        packed = gguf.quants.quantize(values, number)
        return packed, gguf.quants.dequantize(packed, number)
    # The package reads these types and does not write them: random blocks with small scales.
    block, size = gguf.GGML_QUANT_SIZES[number]
    packed = draw.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    places = (0, 2) if kind == "Q4_K" else (size - 2,)
    for place in places:
        scales = draw.uniform(1e-4, 1e-3, packed.shape[:-1]).astype(np.float16)
        packed[..., place : place + 2] = scales[..., None].view(np.uint8)
    packed = packed.reshape(*shape[:-1], -1)
    return packed, gguf.quants.dequantize(packed, number)
