"""Training rows for the two reward models: answers with a label per step, and instructions ranked by quality.

Source: WizardMath (Luo et al. 2023, arXiv:2308.09583): a model labels each step of the student's own solutions 1, 0 or
-1, and ranks evolutions of one instruction.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent
from wizard_engine.agents.replies import read_labels, read_ranking
from wizard_engine.data.records import Conversation, Preference, Process
from wizard_engine.data.solution_steps import step_texts

from .calls import JUDGE_TOKENS, Calls, OnLength, derive_seed
from .pairs import instruction_attributes


def label_processes(
    rows: Sequence[Conversation],
    *,
    student: Agent,
    labeller: Agent,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 256,
    judge_max_tokens: int = JUDGE_TOKENS,
    on_length: OnLength = "drop",
    statistics: dict[str, Any] | None = None,
) -> list[Process]:
    """The student's answers with a label for each step, in the order of the rows.

    A labeller sees one instruction and no history, so multi-turn rows are skipped and counted.

    Args:
        rows: their user turns are answered.
        student: task "answer", `samples` times at `temperature`; equal answers to a row count once.
        labeller: task "label".
        judge_max_tokens: longest list of labels.   on_length: "drop" or "keep" answers that were cut (see Calls).
        statistics: filled with "answers", "kept", "dropped" (reasons), "labels" (label -> steps), "calls".
    Returns:
        one row an answer; answers with unreadable labels are skipped and counted.
    Raises:
        ValueError: fewer than 1 sample.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}; give the answers wanted a row")
    calls, dropped = Calls(max_tokens=max_tokens, judge_max_tokens=judge_max_tokens, on_length=on_length), Counter()
    single = [row for row in rows if sum(message.role == "user" for message in row.messages) == 1]
    dropped["several turns"] += len(rows) - len(single)
    answers = _distinct_answers(calls, student, single, samples, temperature, dropped, seed)
    fields = [{"instruction": row.instruction, "answer_steps": _lines(steps)} for row, _, steps in answers]
    labels = calls.ask(
        labeller,
        "label",
        fields,
        derive_seed(seed, "label"),
        read=lambda text, index: read_labels(text, len(answers[index][2])),
    )
    processes = []
    for (row, answer, steps), marks in zip(answers, labels):
        if marks is None:
            dropped["labels unreadable"] += 1
            continue
        lineage = {"parents": [row.id], "operator": "label_processes", "agent": labeller.name}
        attributes = (
            instruction_attributes(row) | {"policy": student.fingerprint, "answer": answer} | calls.marks(answer)
        )
        processes.append(Process(tuple(row.messages[:-1]), steps, marks, attributes, lineage))
    if statistics is not None:
        label_counts = Counter(str(mark) for process in processes for mark in process.labels)
        statistics |= {"answers": len(answers), "kept": len(processes), "dropped": dict(sorted(dropped.items()))}
        statistics |= {"labels": dict(sorted(label_counts.items())), "calls": calls.statistics()}
    return processes


def _distinct_answers(
    calls: Calls, student: Agent, rows, samples: int, temperature: float, dropped: Counter, seed: int
) -> list[tuple[Conversation, str, tuple[str, ...]]]:
    """(row, answer, its steps) for every distinct answer, grouped by row."""
    seeds = [derive_seed(seed, "sample", number) for number in range(samples) for _ in rows]
    texts = calls.converse(student, [row.messages[:-1] for row in rows] * samples, seeds, temperature=temperature)
    dropped["no answer"] += texts.count(None)
    answers = []
    for index, row in enumerate(rows):
        row_answers = [text for text in texts[index :: len(rows)] if text is not None]
        distinct = list(dict.fromkeys(row_answers))
        dropped["repeated"] += len(row_answers) - len(distinct)
        answers += [(row, text, tuple(step_texts(text))) for text in distinct]
    return answers


def _lines(steps: Sequence[str]) -> str:
    return "\n".join(prompts.flatten(step) for step in steps)


def rank_instructions(
    groups: Sequence[Sequence[str]],
    *,
    ranker: Agent,
    min_gap: float = 0.5,
    margin_scale: float = 0.1,
    seed: int = 0,
    judge_max_tokens: int = JUDGE_TOKENS,
    statistics: dict[str, Any] | None = None,
) -> list[Preference]:
    """Pairs of instructions for the instruction reward model: an empty prompt, the better text chosen.

    Every pair of a group whose quality scores (0 to 10) differ by more than `min_gap` is a row;
    attributes["margin"] = margin_scale * difference is the margin of the ranking loss.

    Args:
        groups: texts to compare with each other, best 4 to 8 in a group (see instruction_groups); groups with fewer
            than two distinct texts give nothing.
        ranker: task "rank".   judge_max_tokens: longest ranking.
        statistics: filled with "groups", "kept", "dropped" (reasons), "calls".
    Raises:
        ValueError: a negative min_gap or margin_scale.
    """
    if min_gap < 0 or margin_scale < 0:
        raise ValueError(f"min_gap, margin_scale: expected 0 or more, got {min_gap}, {margin_scale}; raise them")
    calls, dropped = Calls(judge_max_tokens=judge_max_tokens), Counter()
    distinct = [list({prompts.flatten(text): text for text in group}.values()) for group in groups]
    usable = [group for group in distinct if len(group) > 1]
    dropped["groups too small"] += len(distinct) - len(usable)
    scores = calls.ask(
        ranker,
        "rank",
        [{"instructions": prompts.numbered(group)} for group in usable],
        derive_seed(seed, "rank"),
        read=lambda text, index: read_ranking(text, len(usable[index])),
    )
    dropped["groups unreadable"] += scores.count(None)
    rows: dict[str, Preference] = {}
    for group, group_scores in zip(usable, scores):
        for pair in _ranked_pairs(group, group_scores or (), min_gap, margin_scale, ranker.name, dropped):
            dropped["repeated"] += pair.id in rows
            rows.setdefault(pair.id, pair)
    if statistics is not None:
        statistics |= {"groups": len(usable), "kept": len(rows), "dropped": dict(sorted(dropped.items()))}
        statistics |= {"calls": calls.statistics()}
    return list(rows.values())


def _ranked_pairs(group, scores, min_gap: float, margin_scale: float, ranker: str, dropped: Counter):
    for (first, a), (second, b) in combinations(zip(group, scores), 2):
        if abs(a - b) <= min_gap:
            dropped["no margin"] += 1
            continue
        chosen, rejected = (first, second) if a > b else (second, first)
        attributes = {"margin": margin_scale * abs(a - b), "chosen_score": max(a, b), "rejected_score": min(a, b)}
        yield Preference((), chosen, rejected, attributes, {"operator": "rank_instructions", "agent": ranker})


def instruction_groups(rows: Sequence[Conversation], *, size: int = 6) -> list[list[str]]:
    """Groups of instructions that descend from one row, in the order of their first members, at most `size` in each.

    Rows are joined through lineage["parents"]; families larger than `size` are cut into several groups.
    """
    by_id = {row.id: row for row in rows}
    families: dict[str, list[str]] = {}
    for row in rows:
        families.setdefault(_root(row, by_id), []).append(row.instruction)
    return [group[i : i + size] for group in families.values() for i in range(0, len(group), size)]


def _root(row: Conversation, by_id: dict[str, Conversation]) -> str:
    """The id of the oldest ancestor among the rows, or of the first parent that is not among them."""
    seen = {row.id}
    while parents := [parent for parent in row.lineage.get("parents", ()) if parent not in seen]:
        seen.add(parents[0])
        if parents[0] not in by_id:
            return parents[0]
        row = by_id[parents[0]]
    return row.id
