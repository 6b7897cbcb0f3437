"""Readers of replies: one a task, tolerant of how models write, strict where two readings are possible.

Each reader's docstring is its grammar. `forms` has the table of readers, what is said where a reply cannot
be read, and the JSON schemas of verdicts.
"""

from .forms import READERS, missing_line, read_reply, schema

__all__ = ["READERS", "missing_line", "read_reply", "schema"]
