"""Whether rows and questions of a run have the answers that its stages go by, in a form to compare with."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from wizard_engine.data.records import Reject, Row, stream_located
from wizard_engine.data.references import reference_of, with_reference
from wizard_engine.evaluation.accuracy import check_reference
from wizard_engine.evaluation.mt_bench import shown_references
from wizard_engine.evaluation.questions import read_questions

from .graph import Node
from .run_file import RunFile

# Rows of a file that are looked at.
LOOKED_AT = 1000
# Prefix of agents that go by the reference of each row.
REFERENCE = "reference:"
# Recipes whose judges and labellers see references; evolving only compares instructions.
JUDGING = ("evol_answer", "co_teach", "self_teach", "arena")


def check_answers(run: RunFile, nodes: Sequence[Node]) -> Iterator[str]:
    """Findings: rows that cannot be read, and stages that most of the rows have no answer for."""
    try:
        rows, bad = _first_rows(run, run.rows.data)
    except ValueError as error:
        yield f"rows.data: {error}"
        return
    if not rows and bad:
        yield f"rows.data: expected rows with an answer, got none that can be read; the first: {bad[0].error}"
        return
    held_out = _first_rows(run, run.rows.held_out)[0] if run.rows.held_out else rows if run.rows.hold_out else []
    stages: dict[str, list[str]] = {}
    for node in nodes:
        read = held_out if node.recipe in ("accuracy", "arena") else rows
        finding = _ratings(node) if node.recipe == "mt_bench" else _answers(node, read) if read else None
        if finding is not None:
            stages.setdefault(finding, []).append(node.where)
    yield from (f"{', '.join(places)}: {finding}" for finding, places in stages.items())


def _first_rows(run: RunFile, files: Sequence[Path]) -> tuple[list[Row], list[Reject]]:
    bad: list[Reject] = []
    options = {"on_error": run.rows.on_error, "unknown_fields": run.rows.unknown_fields}
    return [row for _, row in islice(stream_located(files, bad, **options), LOOKED_AT)], bad


def _answers(node: Node, rows: Sequence[Row]) -> str | None:
    """Why a stage cannot go by the rows' answers."""
    config = node.config
    if node.recipe in JUDGING and (agents := _by_reference(config)):
        texts = [reference_of(with_reference(row, config.references).attributes) for row in rows]
        missing = sum(not _is_checkable(text) for text in texts)
        if missing > config.max_missing * len(rows):
            return (
                f"{' and '.join(agents)}: expected rows with an answer known to be right that can be compared with, "
                f"got {missing} of {len(rows)} without; say rows.reference-answers = true where the rows' own answers "
                "are right, name another agent, or raise the stage's max-missing"
            )
    if node.recipe == "accuracy" or (node.recipe == "rleif" and "checked" in config.reward.factors):
        missing = sum(not _is_checkable(row.answer) for row in rows)
        if missing == len(rows) or (missing and config.on_error == "raise"):
            return (
                f"expected rows whose answer can be compared with, got {missing} of {len(rows)} without; say "
                'rows.on-error = "skip" to leave such rows out, or leave the stage out where there are no others'
            )
    return None


def _ratings(node: Node) -> str | None:
    """Why a judge cannot rate enough of the questions."""
    config = node.config
    if config.questions is None or not config.questions.exists() or not config.judge.startswith(REFERENCE):
        return None
    questions = read_questions(config.questions, config.references, on_error=config.on_error)[: config.n]
    turns = [shown_references(question, turn) for question in questions for turn in (1, 2)]
    missing = sum(not _is_checkable(text) for text in turns)
    if missing <= config.max_missing * len(turns):
        return None
    return (
        f"{config.judge}: expected questions with references that can be compared with, got {missing} of {len(turns)} "
        f"turns without; name another judge, or say mt_bench.max-missing = {missing / len(turns) + 0.005:.2f}"
    )


def _by_reference(config: Any) -> list[str]:
    """The agents of a stage that go by references."""
    agents = getattr(config, "agents", config)
    judges = (agents.judge,) if isinstance(agents.judge, str) else agents.judge
    specs = [*judges, getattr(agents, "labeller", None)]
    return list(dict.fromkeys(spec for spec in specs if spec and spec.startswith(REFERENCE)))


def _is_checkable(text: str) -> bool:
    try:
        check_reference(text)
    except ValueError:
        return False
    return True
