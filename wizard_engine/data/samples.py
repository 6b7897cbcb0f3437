"""Token samples from row files; a row that gives no sample is an error or is counted."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.metrics import progress
from wizard_engine.runtime.object_collectives import check_same
from wizard_engine.runtime.process import Runtime

from .chat import Sample, encode_conversation, encode_preference, encode_prompt, encode_text
from .records import Conversation, Message, Preference, Process, read_located
from .row_fields import FieldReader, UnknownFields, expect, field
from .rows import brief, check_text
from .text_files import OnError, Piece, read_values
from .tokenizer import Tokenizer

Item = TypeVar("Item")
# Score units of a ranking loss for a point of a judge's gap (scores of 0 to 10), as rankings of instructions have it.
MARGIN_PER_POINT = 0.1


@dataclass(frozen=True)
class Pair:
    """A preference in tokens; `margin` is that of a ranking loss in score units or of DPO's order, 0 where none is."""

    chosen: Sample
    rejected: Sample
    margin: float = 0.0

    @property
    def length(self) -> int:
        """Packed positions of both."""
        return sum(self.documents)

    @property
    def documents(self) -> tuple[int, int]:
        """Packed positions of each."""
        return len(self.chosen.tokens) - 1, len(self.rejected.tokens) - 1


def read_samples(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    kind: str,
    max_length: int,
    on_error: OnError,
    rejects: Path,
    unknown_fields: UnknownFields = "refuse",
    truncate: bool = False,
    quiet: bool = False,
) -> tuple[list[Sample], int]:
    """Samples of conversation rows, or of the `text` fields of JSON lines for kind "text".

    Args:
        max_length: longest sample, tokens.   on_error: "raise", or "skip" to count into the `rejects` file.
        unknown_fields: see `records.read_rows`.   truncate: cut longer samples, see `encode_conversation`.
        quiet: no progress bar.
    Returns:
        samples, number of rejected rows.
    Raises:
        ValueError: `path:line: ...` for a bad row under "raise", or no usable row.
    """

    def encode(row: Conversation | str) -> Sample:
        if isinstance(row, str):
            return encode_text(tokenizer, row, max_length=max_length, truncate=truncate)
        return encode_conversation(
            tokenizer, row.messages, weights=row.weights, max_length=max_length, truncate=truncate
        )

    read = _texts if kind == "text" else read_conversations
    rows, unread = read(paths, on_error=on_error, unknown_fields=unknown_fields, rejects=rejects)
    samples, refused = encode_all(rows, encode, on_error, rejects, quiet=quiet)
    return samples, unread + refused


def read_pairs(
    paths: Sequence[Path],
    encode: Callable[[Preference], Pair],
    *,
    on_error: OnError,
    rejects: Path,
    unknown_fields: UnknownFields = "refuse",
    quiet: bool = False,
) -> tuple[list[Pair], int]:
    """Pairs of preference rows; see `read_samples`."""
    rows, unread = _located(paths, "preference", on_error, unknown_fields, rejects)
    pairs, refused = encode_all(rows, encode, on_error, rejects, quiet=quiet)
    return pairs, unread + refused


def answer_pair(tokenizer: Tokenizer, row: Preference, max_length: int, capacity: int | None = None) -> Pair:
    """The two answers of a preference row; the margin is its judge's `gap`, else its `margin`, 0 where it has none.

    Args:
        max_length: longest of the two, tokens.   capacity: tokens of a pack, which must hold both.
    Raises:
        ValueError: they are the same, blank, or too long.
    """
    values = [row.attributes.get(name) for name in ("gap", "margin")]
    gaps = [float(value) for value in values if isinstance(value, int | float)]
    pair = Pair(*encode_preference(tokenizer, row, max_length=max_length), *gaps[:1])
    return pair if capacity is None else fitting_pair(pair, capacity)


def fitting_pair(pair: Pair, capacity: int) -> Pair:
    """The pair itself; ValueError if a pack of `capacity` tokens cannot hold both answers."""
    if pair.length > capacity:
        raise ValueError(
            f"pair: expected at most {capacity} tokens of both together (training.pack_tokens), got {pair.length}"
        )
    return pair


def margin_of(row: Preference) -> float:
    """Margin of a row in a ranking loss, in score units: its `margin`, else that of its judge's `gap`, else 0.

    margin = MARGIN_PER_POINT x gap for rows with a gap alone, which is in points of the judge's score.

    Raises:
        ValueError: not a finite number >= 0, or a gap of 0, which is a tie.
    """
    name = next((name for name in ("margin", "gap") if row.attributes.get(name) is not None), None)
    if name is None:
        return 0.0
    value = row.attributes[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {brief(value)}")
    if name == "gap" and value == 0:
        raise ValueError("gap: expected a number above 0, got 0, which is a tie; there is nothing to learn")
    return float(value) if name == "margin" else MARGIN_PER_POINT * value


def fitting_prompt(tokenizer: Tokenizer, row: Conversation, limit: int) -> tuple[Message, ...]:
    """The turns of a conversation up to its last question; ValueError if they have more than `limit` tokens."""
    prompt = tuple(row.messages[:-1])
    length = len(encode_prompt(tokenizer, prompt))
    if length > limit:
        raise ValueError(f"prompt: expected at most {limit} tokens (context less the longest answer), got {length}")
    return prompt


def read_processes(
    paths: Sequence[Path], *, on_error: OnError, rejects: Path, unknown_fields: UnknownFields = "refuse"
) -> tuple[list[tuple[str, Process]], int]:
    """(`path:line`, row) of every process row, and how many records could not be read."""
    return _located(paths, "process", on_error, unknown_fields, rejects)


def encode_all(
    rows: Sequence[tuple[str, Any]],
    encode: Callable[[Any], Item],
    on_error: OnError,
    rejects: Path,
    *,
    quiet: bool = False,
) -> tuple[list[Item], int]:
    """encode(row) of every row; a ValueError names the row's place, or is counted into `rejects`.

    Raises:
        ValueError: a row cannot be encoded and on_error is "raise", or none can.
    """
    items, refused = [], []
    for where, row in progress(rows, desc="tokenize", unit="row", quiet=quiet):
        try:
            items.append(encode(row))
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"{where}: {error}; or count such rows with --on-error skip") from error
            refused.append({"where": where, "error": str(error)})
    if refused:
        write_text(rejects, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in refused))
    if not items:
        raise ValueError(f"rows: expected at least one row to learn from, got none of {len(rows)}")
    return items, len(refused)


def read_conversations(
    paths: Sequence[Path], *, on_error: OnError, rejects: Path, unknown_fields: UnknownFields = "refuse"
) -> tuple[list[tuple[str, Conversation]], int]:
    """(`path:line`, row) of every conversation, and how many records could not be read."""
    return _located(paths, "conversation", on_error, unknown_fields, rejects)


def _located(
    paths: Sequence[Path], kind: str, on_error: OnError, unknown_fields: UnknownFields, rejects: Path
) -> tuple[list[tuple[str, Any]], int]:
    """(`path:line`, row) of every row, and how many records could not be read (listed beside `rejects`)."""
    unread = rejects.with_name(f"unread_{rejects.name}")
    rows, bad = read_located(paths, kind=kind, on_error=on_error, unknown_fields=unknown_fields, rejects=unread)
    return rows, len(bad)


def _texts(
    paths: Sequence[Path], *, on_error: OnError, unknown_fields: UnknownFields, rejects: Path
) -> tuple[list[tuple[str, str]], int]:
    """(`path:line`, `text` field) of every record, and how many have none (listed beside `rejects`)."""
    texts, bad = [], []
    for path in paths:
        reader = FieldReader(unknown_fields)
        before = len(texts) + len(bad)
        for piece in read_values(path):
            where = f"{path}:{piece.line}"
            try:
                texts.append((where, _text(piece, reader)))
            except ValueError as error:
                if on_error == "raise":
                    raise ValueError(f"{where}: {error}") from None
                bad.append({"where": where, "error": f"{where}: {error}", "text": piece.text})
        if len(texts) + len(bad) == before:
            raise ValueError(f"{path}:1: file: expected at least one record, got none; give a file with rows")
        reader.report(path)
    if bad:
        unread = rejects.with_name(f"unread_{rejects.name}")
        write_text(unread, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad))
    return texts, len(bad)


def _text(piece: Piece, reader: FieldReader) -> str:
    """The `text` field of a record; its other columns are counted."""
    if piece.error is not None:
        raise ValueError(piece.error)
    record = expect(piece.value, dict, "record")
    text = field(record, "text", str)
    check_text(text, "text")
    reader.start()
    reader.columns_of(record, ("text",))
    reader.finish()
    return text


def check_rows(runtime: Runtime, name: str, samples: Iterable[Sample]) -> None:
    """Raises ValueError on every rank unless all ranks have read the same tokens and loss weights."""
    if runtime.world_size == 1:
        return
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.tokens.tobytes())
        digest.update(sample.weights.tobytes())
    check_same(runtime, f"{name}: tokens of the rows", digest.hexdigest()[:16])
