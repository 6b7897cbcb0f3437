"""Topic, skill and difficulty of rows from an agent, for rows without them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from wizard_engine.agents.calls import JUDGE_TOKENS, AnyAgent, Calls, Limits
from wizard_engine.agents.replies import read_tags
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.curation.attributes import view
from wizard_engine.data.records import Row

TAGS = ("topic", "skill", "difficulty")
Tags = dict[str, str]


def tag_rows(
    rows: Sequence[Row],
    tagger: AnyAgent,
    *,
    seed: int = 0,
    max_tokens: int = JUDGE_TOKENS,
    scheduler: Scheduler | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Rows with the tagger's attributes of their first instruction; attributes that a row already has are kept.

    Args:
        scheduler: of the calls; default: one without a ledger.
    Returns:
        rows in order, and counts: tagged, kept (nothing was missing), failed (no reply, or one that was cut) with its
        reasons, unreadable; "asked again" and "asked longer" where that was needed.
    """
    tags, counts = tags_of(rows, tagger, Calls(scheduler, limits=Limits(judge=max_tokens)), seed=seed)
    return with_tags(rows, tags), counts


def tags_of(
    rows: Sequence[Row], tagger: AnyAgent, calls: Calls, *, seed: int = 0
) -> tuple[dict[int, Tags], dict[str, int]]:
    """The tags of those rows, by number, that lack some and got them; and the counts of `tag_rows`."""
    asked = [i for i, row in enumerate(rows) if not set(TAGS) <= set(row.attributes or {})]
    tags: dict[int, Tags] = {}

    async def work(i: int) -> Tags | None:
        fields = {"instruction": view(rows[i]).first}
        return await calls.ask(tagger, "tag", fields, seed, read=read_tags, row=rows[i].id)

    def done(place: int, found: Tags | None) -> None:
        if found is not None:
            tags[asked[place]] = found

    calls.scheduler.run(calls.scheduler.rows(asked, work, done, desc="tags", total=len(asked), agents=[tagger]))
    said = Counter(calls.counts.get("tag", {}))
    counts = {"tagged": len(tags), "kept": len(rows) - len(asked), "failed": said["failed"]}
    counts["unreadable"] = said["unreadable"]
    more = {name: said[name] for name in sorted(said) if name.startswith(("failed: ", "asked ")) and said[name]}
    return tags, counts | more


def with_tags(rows: Sequence[Row], tags: dict[int, Tags]) -> list[Row]:
    """The rows with these attributes, where they have none of the name."""
    return [
        replace(row, attributes={**tags[i], **(row.attributes or {})}) if i in tags else row
        for i, row in enumerate(rows)
    ]
