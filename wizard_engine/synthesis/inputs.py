"""What a stage of synthesis starts from: agents behind a ledger, and conversations."""

from pathlib import Path
from typing import Protocol

from wizard_engine.agents import Cast
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Conversation
from wizard_engine.runtime.process import Runtime

from .outputs import read_conversations


class SynthesisOptions(Protocol):
    """Options that the recipes of synthesis share."""

    data: tuple[Path, ...]
    out: Path
    limit: int | None
    on_error: str
    unknown_fields: str
    batch_size: int
    chat_format: ChatFormatChoice
    quiet: bool


def open_inputs(cfg: SynthesisOptions, runtime: Runtime) -> tuple[Cast, list[Conversation], int]:
    """Agents with the ledger OUT/ledger.sqlite, the rows, and how many records were rejected.

    Raises:
        ValueError: a bad record, or one of another kind (with on_error="raise"); no row at all.
    """
    cast = Cast(
        cfg.out / "ledger.sqlite", runtime, batch_size=cfg.batch_size, quiet=cfg.quiet, chat_format=cfg.chat_format
    )
    rejects = cfg.out / "rejects.jsonl"
    options = {"on_error": cfg.on_error, "unknown_fields": cfg.unknown_fields, "rejects": rejects}
    rows, rejected = read_conversations(cfg.data, limit=cfg.limit, **options)
    return cast, rows, rejected
