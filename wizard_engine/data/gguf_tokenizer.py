"""The tokenizer in a GGUF file's metadata, written as the files that this project and transformers read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from wizard_engine.runtime.files import write_json
from wizard_engine.runtime.input_files import shown

from .gguf_header import Metadata
from .sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, bpe_model
from .tokenizer import JsonTokenizer, SentencePieceTokenizer
from .tokenizer_files import library_failures

OURS, TEMPLATE, TEMPLATES = "tokenizer.ggml.", "tokenizer.chat_template", "tokenizer.chat_templates"
# Parts of a token are looked up one by one, in a time that grows with the square of its length. A vocabulary of
# 128,000 tokens has a million characters.
MAX_TOKEN_CHARACTERS, MAX_CHARACTERS = 512, 1 << 22
# Of a vocabulary with so many tokens there are merges for each, and some have two.
MAX_MERGES_OF_A_TOKEN = 8
# Tokens that end an answer, the first of which closes training rows.
ENDS = ("eos", "eot", "eom")
IDS = {name: f"{OURS}{name}_token_id" for name in ("bos", *ENDS)} | {
    "unk": f"{OURS}unknown_token_id",
    "pad": f"{OURS}padding_token_id",
}

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts a text before it merges: by one pattern after the other.

    ignores_merges: a unit that is a token is taken whole.   adds_bos: where the file does not say.
    """

    splits: Sequence[str]
    ignores_merges: bool = False
    adds_bos: bool = False


# By the name in tokenizer.ggml.pre, as in llama.cpp's src/llama-vocab.cpp.
LLAMA3 = PreTokenizer((LLAMA3_SPLIT,), ignores_merges=True, adds_bos=True)
DIGIT_BY_DIGIT = PreTokenizer((r"\p{N}", GPT2_SPLIT))
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((GPT2_SPLIT,)),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "pixtral": LLAMA3,
    "refact": DIGIT_BY_DIGIT,
    "smollm": DIGIT_BY_DIGIT,
    "starcoder": DIGIT_BY_DIGIT,
    "tekken": PreTokenizer((TEKKEN_SPLIT,), ignores_merges=True, adds_bos=True),
}


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens and their types by id, and the ids of special tokens by name."""

    tokens: list[str]
    types: list[int]
    ids: Mapping[str, int]


def save_tokenizer(metadata: Metadata, directory: Path, *, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """Write the tokenizer of a GGUF file into a directory; returns its special ids as config.json has them.

    Args:
        vocab_size: rows of the embedding.   max_positions: the model's context, in tokens.
    Raises:
        ValueError: a kind of tokenizer that is not read, or broken metadata; names file and field.
    """
    vocabulary = _vocabulary(metadata, vocab_size)
    kind = metadata.text(OURS + "model")
    if kind == "llama":
        adds_bos = metadata.flag(OURS + "add_bos_token", True)
        _sentencepiece(metadata, vocabulary).save(directory)
    elif kind == "gpt2":
        pre = _pre_tokenizer(metadata)
        adds_bos = metadata.flag(OURS + "add_bos_token", pre.adds_bos)
        _byte_level(metadata, vocabulary, pre, adds_bos).save(directory)
    else:
        raise metadata.error(OURS + "model", "llama (SentencePiece) or gpt2 (byte-level)")
    named = {
        f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.ids.items() if name not in ENDS[1:]
    }
    fields = {
        **json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")),
        **named,
        "add_bos_token": adds_bos,
        "add_eos_token": metadata.flag(OURS + "add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    template = _chat_template(metadata)
    write_json(directory / "tokenizer_config.json", fields | ({} if template is None else {"chat_template": template}))
    ends = list(dict.fromkeys(vocabulary.ids[name] for name in ENDS if name in vocabulary.ids))
    ids = {"bos_token_id": vocabulary.ids["bos"], "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return ids | ({"pad_token_id": vocabulary.ids["pad"]} if "pad" in vocabulary.ids else {})


def _vocabulary(metadata: Metadata, vocab_size: int) -> _Vocabulary:
    name = OURS + "tokens"
    tokens = metadata.texts(name)
    if len(tokens) != vocab_size:
        raise metadata.error(name, f"{vocab_size} tokens, as token_embd.weight has rows")
    known: set[str] = set()
    for index, token in enumerate(tokens):
        if not 1 <= len(token) <= MAX_TOKEN_CHARACTERS or token in known:
            expected = f"different tokens of 1 to {MAX_TOKEN_CHARACTERS} characters"
            raise ValueError(f"{metadata.path}: {name}: expected {expected}, got {shown(token)!r} at {index}")
        known.add(token)
    characters = sum(map(len, tokens))
    if characters > MAX_CHARACTERS:
        raise ValueError(f"{metadata.path}: {name}: expected at most {MAX_CHARACTERS} characters, got {characters}")
    types = metadata.numbers(OURS + "token_type", vocab_size, kind="i").tolist()
    wrong = next((kind for kind in types if not NORMAL <= kind <= BYTE), None)
    if wrong is not None:
        raise ValueError(f"{metadata.path}: {OURS}token_type: expected {NORMAL} to {BYTE}, got {wrong}")
    needed = ("bos", "eos")
    ids = {
        short: metadata.whole(field, most=vocab_size - 1)
        for short, field in IDS.items()
        if short in needed or field in metadata.fields
    }
    for short in ("bos", *ENDS):
        # A text never holds them: of some conversions they are plain tokens.
        if short in ids and types[ids[short]] != UNKNOWN:
            types[ids[short]] = CONTROL
    return _Vocabulary(tokens, types, ids)


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> SentencePieceTokenizer:
    scores = metadata.numbers(OURS + "scores", len(vocabulary.tokens), kind="f")
    if not np.isfinite(scores).all():
        raise ValueError(f"{metadata.path}: {OURS}scores: expected finite numbers, got others among them")
    ids = {name: vocabulary.ids[name] for name in ("bos", "eos", "unk") if name in vocabulary.ids}
    model = bpe_model(
        vocabulary.tokens,
        scores.tolist(),
        vocabulary.types,
        ids,
        adds_space=metadata.flag(OURS + "add_space_prefix", True),
        removes_spaces=metadata.flag(OURS + "remove_extra_whitespaces", False),
    )
    return SentencePieceTokenizer(model, f"{metadata.path}: {OURS}tokens")


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.fields.get(OURS + "pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise metadata.error(OURS + "pre", f"one of {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary, pre: PreTokenizer, adds_bos: bool) -> JsonTokenizer:
    where = f"{metadata.path}: {OURS}"
    with library_failures(f"{where}merges: expected pairs of tokens that make a token"):
        backend = _backend(metadata, vocabulary, pre)
    bos, eos = (vocabulary.tokens[vocabulary.ids[name]] for name in ("bos", "eos"))
    with library_failures(f"{where}tokens: expected a byte-level vocabulary"):
        if adds_bos:
            backend = _with_bos(backend, bos, vocabulary.ids["bos"])
        return JsonTokenizer(backend, {"bos_token": bos, "eos_token": eos}, f"{where}tokens")


def _backend(metadata: Metadata, vocabulary: _Vocabulary, pre: PreTokenizer) -> Backend:
    tokens, types = vocabulary.tokens, vocabulary.types
    # Rows of the embedding that pad it have no token.
    entries = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    backend = Backend(models.BPE(vocab=entries, merges=_merges(metadata), ignore_merges=pre.ignores_merges))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*splits, bytes_only]), decoders.ByteLevel()
    special = [index for index, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    plain = [index for index, kind in enumerate(types) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in plain])
    return backend


def _with_bos(backend: Backend, bos: str, index: int) -> Backend:
    """The tokenizer with BOS in front of every text, for those that let it add special tokens, as transformers does."""
    fields = json.loads(backend.to_str())
    (a, b), special = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"], {"id": bos, "type_id": 0}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, a],
        "pair": [{"SpecialToken": special}, a, {"SpecialToken": special}, b],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
    return Backend.from_str(json.dumps(fields))


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    name = OURS + "merges"
    texts = metadata.texts(name)
    most = MAX_MERGES_OF_A_TOKEN * len(metadata.texts(OURS + "tokens"))
    if len(texts) > most:
        raise metadata.error(name, f"at most {most} merges")
    pairs = []
    for text in texts:
        # The first part may itself be a space.
        left, _, right = text[1:].partition(" ")
        if not text or not right:
            raise ValueError(f"{metadata.path}: {name}: expected two tokens with a space between, got {shown(text)!r}")
        pairs.append((text[0] + left, right))
    return pairs


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]] | None:
    """The template, or the named ones where there are several."""
    if TEMPLATE not in metadata.fields:
        return None
    default = metadata.text(TEMPLATE)
    if TEMPLATES not in metadata.fields:
        return default
    named = {name: metadata.text(f"{TEMPLATE}.{name}") for name in metadata.texts(TEMPLATES) if name != "default"}
    return [{"name": name, "template": text} for name, text in {"default": default, **named}.items()]
