"""A SentencePiece model as tokenizer.json of the `tokenizers` library, in the layout of Llama and Mistral."""

import json
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

META_SPACE = "▁"
# Texts on which a conversion must give the ids of SentencePiece: spaces, line ends, digits, scripts, bytes, markup.
PROBES = (
    "",
    " ",
    "a",
    "  two  spaces ",
    "A chat between a curious user and an artificial intelligence assistant.",
    "What is 12 + 30?\nIt's  42.\n\n\tdef f(x): return x",
    "Größe naïve e\u0301 ½ Ⅷ ﬁ",
    "中文 текст مرحبا 😀👩‍👩‍👧",
    "</s><s>[INST]<0x41>",
    "\u00a0\u2028\x00\x1b",
    "x" * 100,
    "1234567890.5e-3",
)


def tokenizer_json(model: bytes) -> str:
    """tokenizer.json (BPE with byte fallback) that gives the ids of a SentencePiece model on any text.

    Merges are the pairs that make up each piece, by the pieces' scores and then by the parts' ids.

    Args:
        model: content of a .model file.
    Raises:
        ValueError: the model is of another kind (unigram, or with another normalisation): ids would differ.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    converted = _converted(processor)
    backend = Backend.from_str(converted)
    backend.encode_special_tokens = True
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ValueError(
                f"tokenizer: expected a SentencePiece BPE model without a normalisation of its own, got one whose ids "
                f"of {text!r} differ"
            )
    return converted


def as_llama(text: str, config: dict[str, Any]) -> str:
    """tokenizer.json as transformers reads it where tokenizer_config.json names the class LlamaTokenizer.

    That class keeps vocabulary and merges, and puts the space in front of a text by a rule of its own: none before a
    text that begins with one; with `legacy` behind every special token, else at the beginning alone.

    Args:
        config: fields of tokenizer_config.json.
    """
    fields = json.loads(text)
    is_llama = str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if not is_llama or '"ByteLevel"' in json.dumps(fields.get("decoder")):
        return text
    scheme = "always" if config.get("legacy", False) else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    metaspace = {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": scheme, "split": False}
    return json.dumps(fields | {"normalizer": None, "pre_tokenizer": metaspace}, ensure_ascii=False)


def _converted(processor: sentencepiece.SentencePieceProcessor) -> str:
    pieces = processor.id_to_piece(list(range(processor.vocab_size())))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    special = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    unknown = pieces[processor.unk_id()] if processor.unk_id() >= 0 else None
    merges = _merges(processor, pieces, vocabulary)
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    first = processor.encode("a")
    adds_space = bool(first) and pieces[first[0]].startswith(META_SPACE)
    spaces, joined = normalizers.Replace(" ", META_SPACE), [decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(META_SPACE), spaces] if adds_space else [spaces])
    stripped = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence([decoders.Replace(META_SPACE, " "), *joined, *stripped])
    backend.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in special])
    user_defined = _user_defined(processor, pieces, merges)
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in user_defined])
    fields = json.loads(backend.to_str())
    fields["model"]["fuse_unk"] = True
    return json.dumps(fields, ensure_ascii=False)


def _merges(processor, pieces: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order in which they are merged."""
    ranked = []
    for index, piece in enumerate(pieces):
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index):
            continue
        score = -processor.get_score(index)
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((score, left, right))
    return [(pieces[left], pieces[right]) for _, left, right in sorted(ranked)]


def _user_defined(processor, pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Pieces that no merge makes, and that SentencePiece finds whole in a text."""
    made = {left + right for left, right in merges}
    return [
        piece
        for index, piece in enumerate(pieces)
        if len(piece) > 1
        and piece not in made
        and META_SPACE not in piece
        and not processor.is_byte(index)
        and index in processor.encode(piece)
    ]
