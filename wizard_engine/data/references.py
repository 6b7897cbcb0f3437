"""The answer known to be right of a row: its attribute `reference`, or its own last answer where the user says so."""

from typing import Literal

from .records import Conversation, Row

References = Literal["attribute", "answers"]


def with_reference(row: Row, references: References) -> Row:
    """The row; with "answers" a supervised one without the attribute `reference` gets its last answer as such."""
    if (
        references == "attribute"
        or not isinstance(row, Conversation)
        or isinstance(row.attributes.get("reference"), str)
    ):
        return row
    return row.replace(attributes={**row.attributes, "reference": row.answer})
