"""The units into which trained tokenizers split text, and the alphabet of byte-level tokens."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

# A digit; a newline; a contraction; a word or a run of signs with the space before it; any other blank.
# ASCII_UNITS cuts pure ASCII text at the same places.
UNITS = r"\p{N}|\n|'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}[\p{L}\p{M}]*| ?[^\s\p{L}\p{N}]+|\s"
ASCII_UNITS = re.compile(r"[0-9]|\n|'(?:s|t|re|ve|m|ll|d)\b| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s", re.ASCII)
MAX_CACHED_UNITS = 1 << 18


def _byte_characters() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; a token outside the alphabet is encoded in UTF-8."""
    if any(character not in BYTE_CHARACTERS for character in token):
        return token.encode("utf-8")
    return bytes(BYTE_CHARACTERS[character] for character in token)


def splitter() -> pre_tokenizers.PreTokenizer:
    """The library's pre-tokenizer that cuts text into UNITS and writes their bytes in the byte-level alphabet."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(UNITS), "isolated"), bytes_only])


def splitter_fields() -> dict[str, Any]:
    """The splitter's fields in tokenizer.json."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = splitter()
    return json.loads(backend.to_str())["pre_tokenizer"]


def count_units(texts: Iterable[str], atoms: Sequence[str]) -> Counter[str]:
    """How often each unit occurs, in byte-level characters; atoms are cut out first."""
    cut = alternatives(atoms)
    cutter = splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        for part in cut.split(text)[::2] if cut else [text]:
            counts.update(unit for unit, _ in cutter.pre_tokenize_str(part))
    return counts


def alternatives(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Pattern, with a group, of any of the texts, the longest first; None where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if texts else None


class UnitCache:
    """Encodes ASCII text by looking up its units, six times as fast as the library, for tokenizers trained here.

    The ids of a unit do not depend on the text around it, because such tokenizers encode each unit separately.
    """

    def __init__(self, backend: Backend, fields: dict[str, Any]) -> None:
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        atoms = [entry["content"] for entry in fields["added_tokens"] if not entry["special"]]
        self._atoms = frozenset(atoms)
        self._cut = alternatives(atoms)

    @staticmethod
    def suits(fields: dict[str, Any]) -> bool:
        """Whether a tokenizer splits text exactly like those of `train_tokenizer`."""
        model = fields["model"]
        alike = fields.get("pre_tokenizer") == splitter_fields() and fields.get("normalizer") is None
        return alike and model.get("type") == "BPE" and not model.get("dropout")

    def encode(self, text: str) -> list[int]:
        """Ids of an ASCII text."""
        ids: list[int] = []
        known = self._ids
        for part in self._cut.split(text) if self._cut else [text]:
            for unit in [part] if part in self._atoms else ASCII_UNITS.findall(part):
                unit_ids = known.get(unit)
                ids += self._learn(unit) if unit_ids is None else unit_ids
        return ids

    def _learn(self, unit: str) -> list[int]:
        if len(self._ids) >= MAX_CACHED_UNITS:
            self._ids.clear()
        ids = self._ids[unit] = self._backend.encode(unit, add_special_tokens=False).ids
        return ids
