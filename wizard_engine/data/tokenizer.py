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
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from wizard_engine.runtime.files import write_bytes, write_json, write_text
from wizard_engine.runtime.input_files import parse_object, read_json_object, read_regular, shown

from .chat_format import VICUNA, ChatFormat, directory_format
from .pretokenizer import BYTE_CHARACTERS, UnitCache, byte_level_bytes, count_units, splitter
from .sentencepiece_json import as_llama, tokenizer_json
from .tokenizer_files import (
    NOTHING_LISTED,
    ListedIds,
    check_ids,
    is_library_failure,
    library_failures,
    listed_ids,
    most_ids,
    named_token,
)

BOS, EOS = "<s>", "</s>"
BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "<eos>", "<|endoftext|>")
# Names of special tokens that chat templates know.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
META_SPACE = "▁"
# The class of transformers that a SentencePiece model is saved for.
LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
MAX_TOKENIZER_BYTES = 64 << 20
# A tokenizer that fails on some text fails when it is loaded.
PROBE = "a A  1é\n中😀\u0301</s>"
# Field of tokenizer_config.json: the hash of the tokenizer.json that was made from the tokenizer.model beside it.
MADE_FROM_MODEL = "wizard_tokenizer_json"


class Tokenizer(Protocol):
    """Interface of tokenizers.

    vocab_size: one more than the highest id; there may be holes below it.
    eos_id: closes the answers of training rows.   eos_ids: all that end an answer, `eos_id` first.
    text_ids: (vocab_size,) bool, the ids that a text can give.
    prefixes_space: whether `encode` puts a space before the text (SentencePiece's dummy prefix).
    fingerprint: hash of everything that decides the ids.
    chat_format: how conversations are written; see `chat.use_chat_format`.
    template_coder: what encodes in the template of that format, made at its first use.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    eos_ids: tuple[int, ...]
    text_ids: np.ndarray
    fingerprint: str
    prefixes_space: bool
    chat_format: ChatFormat
    template_coder: Any

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

    def drawable(self, vocab_size: int) -> np.ndarray | None:
        """Which ids of an embedding of so many rows a sampler may draw; None: all."""

    def end_answers_with(self, ids: Sequence[int]) -> None:
        """Add ids to those that end an answer; they have no text."""

    def backend_json(self) -> str:
        """tokenizer.json that gives the ids of the tokenizer, for texts whose special tokens are read."""

    def template_variables(self) -> dict[str, str]:
        """Texts of the special tokens by the names that chat templates know: `bos_token`, `eos_token` and others."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, as transformers reads them, into a directory."""


class _Bytes:
    """Decoding from a table of bytes per id; None marks special ids and holes."""

    vocab_size: int
    eos_id: int
    eos_ids: tuple[int, ...]
    text_ids: np.ndarray
    prefixes_space: bool
    chat_format: ChatFormat = VICUNA
    template_coder: Any = None
    _table: list[bytes | None]
    _known: np.ndarray

    def _end(
        self, table: list[bytes | None], known: np.ndarray, listed: ListedIds, added: Collection[int] = ()
    ) -> None:
        """Set what follows from the table, the ids that have an entry, the listed EOS ids, and the added tokens."""
        self.vocab_size, self._known = len(table), known
        self.text_ids = np.asarray([piece is not None for piece in table], dtype=bool)
        self.eos_ids = (self.eos_id, *(index for index in listed.eos if index != self.eos_id))
        # An EOS id without an entry can be drawn, and has no text.
        highest = max((index for index in self.eos_ids if index < most_ids(len(table))), default=0)
        self._table = table + [None] * (highest + 1 - len(table))
        for index in self.eos_ids:
            # An added token that ends an answer is a mark, not a part of its text.
            if index in added:
                self._table[index] = None

    def end_answers_with(self, ids: Sequence[int]) -> None:
        """Add ids to those that end an answer; they have no text."""
        self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, *ids)))
        for index in ids:
            self._table[index] = None

    def drawable(self, vocab_size: int) -> np.ndarray | None:
        """Which ids of an embedding of so many rows a sampler may draw; None: all.

        Those that have an entry, special ones included, and EOS; not those of padding and holes.

        Args:
            vocab_size: rows of the embedding.
        Returns:
            (vocab_size,) bool, or None.
        """
        mask = np.zeros(vocab_size, dtype=bool)
        mask[: len(self._known)] = self._known[:vocab_size]
        mask[[index for index in self.eos_ids if index < vocab_size]] = True
        return None if mask.all() else mask

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
    """Result of a library's encode; a clear ValueError for text that UTF-8 cannot hold or that the library fails on."""
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
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise ValueError(f"text: expected one that the tokenizer can encode, got {shown(str(error), 200)}") from None


class SentencePieceTokenizer(_Bytes):
    """A SentencePiece model (.model), control symbols never read from text.

    Args:
        model: the file's content.   name: its path, for messages.   listed: ids that other files name.
        config: fields of tokenizer_config.json, which say how transformers reads it.
    """

    def __init__(
        self,
        model: bytes,
        name: str = "tokenizer.model",
        listed: ListedIds = NOTHING_LISTED,
        config: dict[str, Any] | None = None,
    ) -> None:
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{name}: expected a SentencePiece model, got {shown(str(error), 200)}") from None
        backend, size = self._backend, self._backend.vocab_size()
        self._model, self._json, self._config = model, None, config or {}
        self.bos_id = self._special_id("BOS", backend.bos_id(), listed.bos, name)
        self.eos_id = self._special_id("EOS", backend.eos_id(), next(iter(listed.eos), None), name)
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:24]
        try:
            pieces = backend.id_to_piece(list(range(size)))
            probe = backend.encode("a") and backend.encode(PROBE)
        except (UnicodeDecodeError, RuntimeError) as error:
            raise ValueError(f"{name}: expected a SentencePiece model, got {shown(str(error), 200)}") from None
        if not probe:
            raise ValueError(f"{name}: expected a SentencePiece model, got one that has no ids for {PROBE!r}")
        self.prefixes_space = pieces[backend.encode("a")[0]].startswith(META_SPACE)
        special = [backend.is_control(i) or backend.is_unused(i) for i in range(size)]
        table = [None if skip else _piece_bytes(piece) for skip, piece in zip(special, pieces)]
        if backend.unk_id() >= 0:
            table[backend.unk_id()] = "\N{REPLACEMENT CHARACTER}".encode()
        known = np.asarray([not backend.is_unused(i) for i in range(size)], dtype=bool)
        self._end(table, known, listed)

    def _special_id(self, name: str, own: int, listed: int | None, where: str) -> int:
        """The model's own id, else the listed one."""
        index = own if own >= 0 or listed is None else listed
        if not 0 <= index < self._backend.vocab_size():
            raise ValueError(f"{where}: expected a model with BOS and EOS, got the id {index} for {name}")
        return index

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
        """Write tokenizer.model, tokenizer_config.json and, where the model has an equal one, tokenizer.json.

        transformers reads tokenizer.json without the packages protobuf and sentencepiece, which tokenizer.model needs.
        """
        write_bytes(Path(directory) / "tokenizer.model", self._model)
        fields = {**LLAMA_CLASS, "add_bos_token": True, "add_eos_token": False}
        if not self.prefixes_space:
            fields["add_prefix_space"] = False
        converted = self._converted()
        if converted:
            write_text(Path(directory) / "tokenizer.json", converted)
            fields[MADE_FROM_MODEL] = hashlib.sha256(converted.encode()).hexdigest()
        names = {
            "bos_token": self._backend.id_to_piece(self.bos_id),
            "eos_token": self._backend.id_to_piece(self.eos_id),
        }
        write_json(Path(directory) / "tokenizer_config.json", {**fields, **names})

    def backend_json(self) -> str:
        """tokenizer.json that gives the ids of the tokenizer.

        Raises:
            ValueError: there is none for a model of this kind.
        """
        return as_llama(self._converted() or tokenizer_json(self._model), LLAMA_CLASS | self._config)

    def template_variables(self) -> dict[str, str]:
        """Texts of the special tokens by the names that chat templates know."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._backend.unk_id()}
        return {name: self._backend.id_to_piece(index) for name, index in ids.items() if index >= 0}

    def _converted(self) -> str:
        """tokenizer.json with the same ids; "" where there is none."""
        if self._json is None:
            try:
                self._json = tokenizer_json(self._model)
            except ValueError:
                # A unigram model, or one with a normalisation of its own: docs/data.md says what reads it.
                self._json = ""
        return self._json


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: <0x0A> is one byte, ▁ a space."""
    byte_piece = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte_piece.group(1), 16)]) if byte_piece else piece.replace(META_SPACE, " ").encode("utf-8")


class JsonTokenizer(_Bytes):
    """A tokenizer.json of the `tokenizers` library, byte-level or SentencePiece-like.

    Args:
        backend: the library's tokenizer; it is set to encode special tokens in text as plain text.
        config: fields of tokenizer_config.json; `bos_token` and `eos_token` are used where present.
        name: path, for messages.   listed: ids that other files name, for what `config` does not.
    Raises:
        ValueError: the tokens cannot be decoded to bytes, or BOS or EOS is missing.
    """

    def __init__(
        self,
        backend: Backend,
        config: dict[str, Any] | None = None,
        name: str = "tokenizer.json",
        listed: ListedIds = NOTHING_LISTED,
    ) -> None:
        self._backend, self._config = backend, dict(config or {})
        # transformers too takes these from its callers alone.
        backend.no_truncation()
        backend.no_padding()
        text = backend.to_str()
        backend.encode_special_tokens = True
        self.fingerprint = "tokenizers-" + hashlib.sha256(text.encode()).hexdigest()[:24]
        fields = json.loads(text)
        vocabulary = backend.get_vocab()
        table = self._byte_table(vocabulary, fields, name)
        known = np.zeros(len(table), dtype=bool)
        known[list(vocabulary.values())] = True
        self.bos_id = self._special_id("bos_token", BOS_NAMES, listed.bos, known, name)
        self.eos_id = self._special_id("eos_token", EOS_NAMES, next(iter(listed.eos), None), known, name)
        self._end(table, known, listed, {entry["id"] for entry in fields["added_tokens"]})
        self._units = UnitCache(backend, fields) if UnitCache.suits(fields) else None
        backend.encode(PROBE, add_special_tokens=False)
        first = next(iter(backend.encode("a", add_special_tokens=False).ids), None)
        self.prefixes_space = first is not None and (self._table[first] or b"").startswith(b" ")
        # Unlike SentencePiece, Metaspace adds no space before a text that begins with one.
        spaced, bare = (backend.encode(text, add_special_tokens=False).ids for text in (" a", "a"))
        self._adds_space = self.prefixes_space and spaced == bare

    def _special_id(self, key: str, names: Sequence[str], listed: int | None, known: np.ndarray, where: str) -> int:
        named = named_token(self._config, key, where)
        if named is None and listed is not None:
            if listed < len(known) and known[listed]:
                return listed
            raise ValueError(f"{where}: expected the {key}_id {listed} of config.json beside it, got no such id")
        for name in [named] if named else names:
            token_id = self._backend.token_to_id(name)
            if token_id is not None:
                return token_id
        tried = shown(named) if named else ", ".join(names)
        raise ValueError(f"{where}: expected a {key} ({tried}), got none; name it in tokenizer_config.json beside it")

    def _byte_table(self, vocabulary: dict[str, int], fields: dict[str, Any], where: str) -> list[bytes | None]:
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

    def backend_json(self) -> str:
        """tokenizer.json, as transformers reads it."""
        return as_llama(self._backend.to_str(), self._config)

    def template_variables(self) -> dict[str, str]:
        """Texts of the special tokens by the names that chat templates know."""
        own = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        names = {name: self._backend.id_to_token(index) for name, index in own.items() if name not in self._config}
        listed = {name: named_token(self._config, name, "tokenizer") for name in NAMED_TOKENS}
        return names | {name: text for name, text in listed.items() if text is not None}

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

    BOS and EOS are those of tokenizer_config.json, else of generation_config.json and config.json beside it, else
    of the usual names. All EOS ids that the latter two list end an answer. The chat format is that of the directory.

    Raises:
        ValueError: there is none, or it cannot be read; names the file.
    """
    path = Path(path)
    if path.is_dir():
        return load_tokenizer(_file_of(path))
    try:
        content = read_regular(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        got = "nothing there" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: expected a tokenizer file or directory, got {got}; check the path") from None
    config = read_json_object(path.with_name("tokenizer_config.json")) or {}
    if path.suffix == ".model":
        tokenizer: Tokenizer = SentencePieceTokenizer(content, str(path), listed_ids(path.parent), config)
    elif path.suffix == ".json":
        tokenizer = _load_json(path, content, config)
    else:
        raise ValueError(f"{path}: expected a tokenizer named *.model or tokenizer.json, got another file")
    tokenizer.chat_format = directory_format(path.parent, config)
    return tokenizer


def _file_of(directory: Path) -> Path:
    """The tokenizer's file in a directory: tokenizer.json, unless it was made here from tokenizer.model, else that."""
    json_file, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if json_file.exists():
        made = (read_json_object(directory / "tokenizer_config.json") or {}).get(MADE_FROM_MODEL)
        if made is None or not model.exists():
            return json_file
        is_unchanged = hashlib.sha256(read_regular(json_file, MAX_TOKENIZER_BYTES)).hexdigest() == made
        return model if is_unchanged else json_file
    for file in (model, *sorted(directory.glob("*.model"))):
        if file.exists():
            return file
    raise ValueError(f"{directory}: expected tokenizer.json or a *.model file in this directory, got neither")


def _load_json(path: Path, content: bytes, config: dict[str, Any]) -> JsonTokenizer:
    fields = parse_object(content, path)
    model = fields.get("model")
    needed = {"vocab", "merges"} if isinstance(model, dict) and model.get("type") == "BPE" else {"vocab"}
    if not isinstance(model, dict) or not needed <= model.keys():
        raise ValueError(f"{path}: model: expected an object with {', '.join(sorted(needed))}, got another")
    check_ids(model["vocab"], fields.get("added_tokens"), path)
    with library_failures(f"{path}: expected a tokenizer of the tokenizers library"):
        # Written again, so that the library reads what was looked at, whatever stands there twice.
        return JsonTokenizer(Backend.from_str(json.dumps(fields)), config, str(path), listed_ids(path.parent))


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
