"""The answer known to be right of a row: its attribute `reference`, or its own last answer where the user says so."""

from collections.abc import Mapping
from typing import Any, Literal

from .records import Conversation, Row

References = Literal["attribute", "answers"]


def reference_of(attributes: Mapping[str, Any] | None) -> str:
    """The answer known to be right of a row with these attributes, a text or a number there, "" for none."""
    reference = (attributes or {}).get("reference")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        return str(reference)
    return reference if isinstance(reference, str) else ""


def with_reference(row: Row, references: References) -> Row:
    """The row; with "answers" a supervised one without the attribute `reference` gets its last answer as such."""
    if references == "attribute" or not isinstance(row, Conversation) or reference_of(row.attributes):
        return row
    return row.replace(attributes={**row.attributes, "reference": row.answer})
