"""Tokenizers: SentencePiece models, Hugging Face tokenizer.json files, and one trained on a small corpus.

Text is always plain: `</s>` inside a text is encoded as characters, never as the end of a sequence. The code that
builds a sequence adds the special ids (see chat.py).

A SentencePiece-style tokenizer puts a space before every text that it encodes (`prefixes_space`), and `decode` removes
it. Rule for text that follows other ids: a leading space of the segment is removed before encoding, because the
tokenizer adds it. A segment without one (`USER:` after `</s>`) gets the space too, as `▁USER`, like the start of a
text. `decode(encode(text)) == text`, except that SentencePiece reads the character ▁ (U+2581) as a space, and that a
model may have its own Unicode normalisation.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from wizard_engine.runtime.files import write_bytes, write_json, write_text

from .pretokenizer import BYTE_CHARACTERS, UnitCache, byte_level_bytes, count_units, splitter

BOS, EOS = "<s>", "</s>"
BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "<eos>", "<|endoftext|>")
META_SPACE = "▁"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """Interface of tokenizers.

    prefixes_space: whether `encode` puts a space before the text (SentencePiece's dummy prefix).
    fingerprint: hash of everything that decides the ids.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    prefixes_space: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, without BOS and EOS. ValueError: the text holds a lone surrogate."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special ids are skipped, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an id behind other ids, a space in front of a word included; b"" for a special id."""

    def token_name(self, token: int) -> str:
        """The vocabulary's entry of an id, such as `</s>`."""

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character span (start, end) of each id in `decode(ids)`; ids that share a character overlap."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, as transformers reads them, into a directory."""


class _Bytes:
    """Decoding from a table of bytes per id; None marks special ids."""

    prefixes_space: bool
    _table: list[bytes | None]

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Bytes of each id; the first piece loses the space that `encode` added."""
        size = len(self._table)
        for index in ids:
            if not 0 <= index < size:
                raise ValueError(f"token id: expected 0 to {size - 1}, got {index}; use this model's own tokenizer")
        pieces = [self._table[index] for index in ids]
        if self.prefixes_space:
            first = next((i for i, piece in enumerate(pieces) if piece), None)
            if first is not None:
                pieces[first] = pieces[first].removeprefix(b" ")
        return [piece or b"" for piece in pieces]

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an id behind other ids, a space in front of a word included; b"" for a special id."""
        return (self._table[token] or b"") if 0 <= token < len(self._table) else b""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special ids are skipped, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._pieces(ids)).decode("utf-8", "replace")

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Character span (start, end) of each id in `decode(ids)`; ids that share a character overlap."""
        pieces = self._pieces(ids)
        if b"".join(pieces).isascii():
            return list(pairwise(accumulate(map(len, pieces), initial=0)))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spans, length = [], 0
        for piece in pieces:
            start, length = length, length + len(decoder.decode(piece))
            spans.append((start, length + bool(piece and decoder.getstate()[0])))
        return spans


def _checked(encode: Callable[[], list], texts: Sequence[str]) -> list:
    """Result of a library's encode; a clear ValueError for text that UTF-8 cannot hold."""
    try:
        return encode()
    except (TypeError, RuntimeError, UnicodeEncodeError):
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                surrogate = f"{text[error.start]!r} at character {error.start}"
                raise ValueError(
                    f"text: expected valid Unicode, got the lone surrogate {surrogate}; clean it"
                ) from None
        raise


class SentencePieceTokenizer(_Bytes):
    """A SentencePiece model (.model), control symbols never read from text.

    Args:
        model: the file's content.   name: its path, for messages.
    """

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{name}: expected a SentencePiece model, got {error}") from None
        backend = self._backend
        self._model = model
        self.vocab_size = backend.vocab_size()
        self.bos_id, self.eos_id = backend.bos_id(), backend.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{name}: expected a model with BOS and EOS, got ids {self.bos_id} and {self.eos_id}")
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:24]
        self.prefixes_space = backend.id_to_piece(backend.encode("a")[0]).startswith(META_SPACE)
        special = [backend.is_control(i) or backend.is_unused(i) for i in range(self.vocab_size)]
        pieces = backend.id_to_piece(list(range(self.vocab_size)))
        self._table = [None if skip else _piece_bytes(piece) for skip, piece in zip(special, pieces)]
        if backend.unk_id() >= 0:
            self._table[backend.unk_id()] = "\N{REPLACEMENT CHARACTER}".encode()

    def token_name(self, token: int) -> str:
        """The vocabulary's entry of an id, such as `</s>`."""
        return self._backend.id_to_piece(token) if 0 <= token < self.vocab_size else f"token_id:{token}"

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, without BOS and EOS. ValueError: the text holds a lone surrogate."""
        return _checked(lambda: self._backend.encode(text), [text])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return _checked(lambda: self._backend.encode(list(texts), num_threads=1), texts)

    def save(self, directory: Path) -> None:
        """Write tokenizer.model and tokenizer_config.json."""
        write_bytes(Path(directory) / "tokenizer.model", self._model)
        fields = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
        names = {
            "bos_token": self._backend.id_to_piece(self.bos_id),
            "eos_token": self._backend.id_to_piece(self.eos_id),
        }
        write_json(Path(directory) / "tokenizer_config.json", {**fields, **names})


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: <0x0A> is one byte, ▁ a space."""
    byte_piece = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte_piece.group(1), 16)]) if byte_piece else piece.replace(META_SPACE, " ").encode("utf-8")


class JsonTokenizer(_Bytes):
    """A tokenizer.json of the `tokenizers` library, byte-level or SentencePiece-like.

    Args:
        backend: the library's tokenizer; it is set to encode special tokens in text as plain text.
        config: fields of tokenizer_config.json; `bos_token` and `eos_token` are used where present.
        name: path, for messages.
    Raises:
        ValueError: the tokens cannot be decoded to bytes, or BOS or EOS is missing.
    """

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None, name: str = "tokenizer.json") -> None:
        self._backend, self._config = backend, dict(config or {})
        text = backend.to_str()
        backend.encode_special_tokens = True
        self.vocab_size = backend.get_vocab_size()
        self.bos_id = self._special_id("bos_token", BOS_NAMES, name)
        self.eos_id = self._special_id("eos_token", EOS_NAMES, name)
        self.fingerprint = "tokenizers-" + hashlib.sha256(text.encode()).hexdigest()[:24]
        fields = json.loads(text)
        self._table = self._byte_table(fields, name)
        self._units = UnitCache(backend, fields) if UnitCache.suits(fields) else None
        first = next(iter(backend.encode("a", add_special_tokens=False).ids), None)
        self.prefixes_space = first is not None and (self._table[first] or b"").startswith(b" ")
        # Unlike SentencePiece, Metaspace adds no space before a text that begins with one.
        spaced, bare = (backend.encode(text, add_special_tokens=False).ids for text in (" a", "a"))
        self._adds_space = self.prefixes_space and spaced == bare

    def _special_id(self, key: str, names: Sequence[str], where: str) -> int:
        named = self._config.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        for name in [named] if named else names:
            token_id = self._backend.token_to_id(name)
            if token_id is not None:
                return token_id
        tried = named or ", ".join(names)
        raise ValueError(f"{where}: expected a {key} ({tried}), got none; name it in tokenizer_config.json beside it")

    def _byte_table(self, fields: dict[str, Any], where: str) -> list[bytes | None]:
        vocabulary = self._backend.get_vocab()
        if '"ByteLevel"' in json.dumps(fields.get("decoder")):
            to_bytes = byte_level_bytes
        elif any(token.startswith(META_SPACE) for token in vocabulary):
            to_bytes = _piece_bytes
        else:
            raise ValueError(f"{where}: expected a byte-level or SentencePiece-like tokenizer, got another kind")
        table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        added = {entry["id"]: entry for entry in fields.get("added_tokens") or ()}
        for token, index in vocabulary.items():
            if index not in added:
                table[index] = to_bytes(token)
            elif not added[index]["special"]:
                table[index] = token.encode("utf-8")
        return table

    def token_name(self, token: int) -> str:
        """The vocabulary's entry of an id, such as `</s>`."""
        return self._backend.id_to_token(token) or f"token_id:{token}"

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text, without BOS and EOS. ValueError: the text holds a lone surrogate."""
        if self._units is not None and text.isascii():
            return self._units.encode(text)
        return _checked(lambda: self._backend.encode(self._spaced(text), add_special_tokens=False).ids, [text])

    def _spaced(self, text: str) -> str:
        """The text for the library, so that it gives the ids of SentencePiece."""
        return " " + text if self._adds_space and text.startswith((" ", META_SPACE)) else text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        if self._units is not None:
            return [self.encode(text) for text in texts]
        spaced = [self._spaced(text) for text in texts]
        encoded = _checked(lambda: self._backend.encode_batch_fast(spaced, add_special_tokens=False), texts)
        return [item.ids for item in encoded]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        write_text(Path(directory) / "tokenizer.json", self._backend.to_str(pretty=True))
        names = {
            "bos_token": self._backend.id_to_token(self.bos_id),
            "eos_token": self._backend.id_to_token(self.eos_id),
        }
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **self._config}
        write_json(Path(directory) / "tokenizer_config.json", fields)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Tokenizer of a *.model file, a tokenizer.json file, or a directory that holds one (tokenizer.json first).

    Raises:
        ValueError: there is none, or it cannot be read; names the file.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model"))]
        tokenizer_file = next((file for file in candidates if file.is_file()), None)
        if tokenizer_file is None:
            raise ValueError(f"{path}: expected tokenizer.json or a *.model file in this directory, got neither")
        return load_tokenizer(tokenizer_file)
    if not path.is_file():
        raise ValueError(f"{path}: expected a tokenizer file or directory, got nothing there; check the path")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    if path.suffix == ".json":
        return _load_json(path)
    raise ValueError(f"{path}: expected a tokenizer named *.model or tokenizer.json, got another file")


def _load_json(path: Path) -> JsonTokenizer:
    beside = path.with_name("tokenizer_config.json")
    fields = _read_object(path)
    model = fields.get("model")
    needed = {"vocab", "merges"} if isinstance(model, dict) and model.get("type") == "BPE" else {"vocab"}
    if not isinstance(model, dict) or not needed <= model.keys():
        raise ValueError(f"{path}: model: expected an object with {', '.join(sorted(needed))}, got another")
    backend = Backend.from_str(json.dumps(fields))
    return JsonTokenizer(backend, _read_object(beside) if beside.is_file() else {}, str(path))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, atoms: Sequence[str] = ()) -> JsonTokenizer:
    """Byte-level tokenizer for a corpus: a digit, a newline, a word with the space before it are a token each.

    If the distinct words of the corpus fit, each is a token, there are no tokens for parts of words, and other words
    are encoded as bytes. Otherwise byte-pair merges are learned inside words. Equal texts give equal tokenizers.

    Args:
        texts: the corpus.
        vocab_size: most ids: 2 special ones, 256 bytes, the atoms, and the words.
        atoms: texts that are always one token, such as the fixed parts of a prompt.
    Raises:
        ValueError: vocab_size is too small, or an atom is empty, special, given twice, or a sign of the byte alphabet.
    """
    alphabet = sorted(BYTE_CHARACTERS)
    room = vocab_size - 2 - len(alphabet) - len(atoms)
    if room < 0:
        raise ValueError(f"vocab_size: expected at least {vocab_size - room}, got {vocab_size}; raise it")
    if {"", BOS, EOS} & set(atoms) or len(set(atoms)) < len(atoms):
        raise ValueError(f"atoms: expected different texts, none empty or special, got {list(atoms)}")
    counts = count_units(texts, atoms)
    words = sorted((unit for unit in counts if len(unit) > 1), key=lambda unit: (-counts[unit], unit))
    if len(words) <= room:
        vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet, *words])}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    else:
        backend = _merged(counts, vocab_size - len(atoms), alphabet)
    backend.pre_tokenizer, backend.decoder = splitter(), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (BOS, EOS)])
    for atom in atoms:
        if backend.token_to_id(atom) is not None and byte_level_bytes(atom) != atom.encode():
            raise ValueError(f"atoms: expected texts apart from the byte alphabet, got {atom!r}; lengthen it")
    backend.add_tokens([AddedToken(atom, special=False, normalized=False) for atom in atoms])
    return JsonTokenizer(backend)


def _merged(counts: Counter[str], size: int, alphabet: Sequence[str]) -> Backend:
    """Byte-pair encoding of `size` ids, trained on the counted units."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\x00"), "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[BOS, EOS], initial_alphabet=list(alphabet), show_progress=False
    )
    joined = ("\x00".join([unit] * counts[unit]) for unit in sorted(counts))
    backend.train_from_iterator(joined, trainer)
    return backend
