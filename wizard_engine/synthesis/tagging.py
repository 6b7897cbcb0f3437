"""Topic, skill and difficulty of rows from an agent, for rows without them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from wizard_engine.agents import Agent, Request, prompts
from wizard_engine.agents.replies import read_tags
from wizard_engine.curation.attributes import view
from wizard_engine.data.records import Row

from .calls import JUDGE_TOKENS

TAGS = ("topic", "skill", "difficulty")


def tag_rows(
    rows: Sequence[Row], tagger: Agent, *, seed: int = 0, max_tokens: int = JUDGE_TOKENS
) -> tuple[list[Row], dict[str, int]]:
    """Rows with the tagger's attributes of their first instruction; attributes that a row already has are kept.

    Returns:
        rows in order, and counts: tagged, kept (nothing was missing), failed (no reply, or one that was cut) with its
        reasons, unreadable.
    """
    asked = [i for i, row in enumerate(rows) if not set(TAGS) <= set(row.attributes or {})]
    requests = [
        Request("tag", prompts.request_messages("tag", instruction=view(rows[i]).first), seed, 0.0, max_tokens)
        for i in asked
    ]
    tagged, counts = list(rows), Counter(tagged=0, kept=len(rows) - len(asked), failed=0, unreadable=0)
    for i, reply in zip(asked, tagger.respond(requests)):
        tags = None if reply.reason else read_tags(reply.text)
        if tags is None:
            counts["failed" if reply.reason else "unreadable"] += 1
            counts.update([f"failed: {reply.reason}"] if reply.reason else [])
            continue
        counts["tagged"] += 1
        tagged[i] = replace(rows[i], attributes={**tags, **(rows[i].attributes or {})})
    return tagged, dict(counts)
