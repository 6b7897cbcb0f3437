"""The content of a SentencePiece .model file made of a vocabulary, without the package protobuf."""

import struct
from collections.abc import Mapping, Sequence

# Of sentencepiece_model.proto: numbers of fields, and of the types of pieces.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
MODEL_TYPE, BYTE_FALLBACK = 3, 35
ID_FIELDS = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}
NORMALIZER_NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 1, 3, 4


def bpe_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    ids: Mapping[str, int],
    *,
    adds_space: bool = True,
    removes_spaces: bool = False,
) -> bytes:
    """A byte-pair model without a normalisation of its own.

    Args:
        pieces, scores, types: of each id.   ids: of "unk", "bos", "eos", "pad"; those left out are none.
        adds_space: puts a space in front of a text.   removes_spaces: that are doubled, or at the ends of a text.
    """
    model = b"".join(
        _message(PIECES, _text(1, piece) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind))
        for piece, score, kind in zip(pieces, scores, types)
    )
    trainer = _number(MODEL_TYPE, BPE) + _number(BYTE_FALLBACK, int(BYTE in types))
    for name, (id_field, piece_field) in ID_FIELDS.items():
        index = ids.get(name, -1)
        trainer += _number(id_field, index)
        trainer += _text(piece_field, pieces[index]) if index >= 0 else b""
    normalizer = _text(NORMALIZER_NAME, "identity") + _number(ADD_DUMMY_PREFIX, int(adds_space))
    normalizer += _number(REMOVE_EXTRA_WHITESPACES, int(removes_spaces))
    return model + _message(TRAINER, trainer) + _message(NORMALIZER, normalizer)


def _varint(value: int) -> bytes:
    # A negative number is written as that of 64 bits with the same bits.
    value &= 2**64 - 1
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8"))
