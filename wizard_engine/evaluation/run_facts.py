"""Facts of a run of one's own, from the files of its stages: agents, base model, what stages bought, examples."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wizard_engine.agents.ledger import Ledger
from wizard_engine.data.proportions import wilson_interval
from wizard_engine.data.records import Conversation, read_located
from wizard_engine.model import ModelDirectory
from wizard_engine.runtime.files import read_object
from wizard_engine.runtime.metrics import read_metrics

from .accuracy import marks

# Columns of what a ledger says of an agent.
COUNTED = ("replies", "failures", "tokens_in", "tokens_out", "seconds")
LEARNING = ("sft", "stage_dpo", "instruction_reward", "process_reward", "preference_reward", "rleif")
EXAMPLES = 4


# ---- agents ---------------------------------------------------------------------------------------------------------


def agents_used(out: Path, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What every agent of the run was asked, from all ledgers, and what it cost.

    Args:
        known: {"agent" (name in ledgers), "spec", "roles", "price": [of a million tokens in, out] or None} of each that
            the run names. Agents of a ledger that are not among them come behind them, by their names.
    """
    totals: dict[str, dict[str, float]] = {}
    reasons: dict[str, dict[str, int]] = {}
    for ledger in _ledgers(out):
        for agent, counts in ledger.totals().items():
            of_agent = totals.setdefault(agent, dict.fromkeys(COUNTED, 0))
            for name in COUNTED:
                of_agent[name] += counts[name]
        for agent, counts in ledger.reasons().items():
            of_reason = reasons.setdefault(agent, {})
            for reason, count in counts.items():
                of_reason[reason] = of_reason.get(reason, 0) + count
    named = {entry["agent"] for entry in known}
    others = [
        {"agent": name, "spec": name.removesuffix("/model"), "roles": [], "price": None}
        for name in sorted(set(totals) - named)
    ]
    lines = []
    for entry in [*known, *others]:
        counts = totals.get(entry["agent"], dict.fromkeys(COUNTED, 0))
        tokens, price = (counts["tokens_in"], counts["tokens_out"]), entry["price"]
        cost = None if price is None else sum(n * p for n, p in zip(tokens, price)) / 1e6
        lines.append({**entry, **counts, "reasons": reasons.get(entry["agent"], {}), "cost": cost})
    return lines


def _ledgers(out: Path) -> Iterator[Ledger]:
    """The ledgers below a folder, each closed before the next one."""
    for path in sorted(out.rglob("ledger*.sqlite")):
        ledger = Ledger(path, read_only=True)
        try:
            yield ledger
        finally:
            ledger.close()


def stage_facts(out: Path, where: str, timing: Mapping[str, float]) -> dict[str, Any]:
    """Seconds of a stage, calls and tokens of its agents, and the tokens per second of its training.

    The rate is that of all steps together: tokens over the seconds of the steps, not of loading and measuring.
    """
    facts: dict[str, Any] = {"seconds": timing.get(where)}
    paths = sorted((out / where).glob("**/metrics.jsonl"))
    rates = [pair for path in paths for pair in _step_rates(path)]
    seconds = sum(tokens / rate for tokens, rate in rates)
    facts["tokens_per_second"] = sum(tokens for tokens, _ in rates) / seconds if seconds else None
    totals = [counts for ledger in _ledgers(out / where) for counts in ledger.totals().values()]
    facts["calls"] = int(sum(counts["replies"] + counts["failures"] for counts in totals)) or None
    facts["call_tokens"] = int(sum(counts["tokens_in"] + counts["tokens_out"] for counts in totals)) or None
    return facts


def _step_rates(path: Path) -> Iterator[tuple[float, float]]:
    """(tokens, tokens per second) of every step."""
    before = 0
    for line in read_metrics(path):
        if line.get("tokens_per_second"):
            yield line["tokens"] - before, line["tokens_per_second"]
        before = line["tokens"]


# ---- the base model -------------------------------------------------------------------------------------------------


def model_facts(path: Path) -> dict[str, str]:
    """Sizes of a model's directory, as text."""
    with ModelDirectory(path) as directory:
        config, parameters = directory.config, directory.parameter_count
    facts = {
        "parameters": f"{parameters:,}",
        "layers": str(config.layers),
        "width": f"{config.width:,}",
        "heads": f"{config.heads} of {config.head_width}, {config.kv_heads} for keys and values",
        "vocabulary": f"{config.vocab_size:,} entries",
        "context": f"{config.max_positions:,} tokens",
    }
    if config.experts:
        facts["experts"] = f"{config.experts}, {config.experts_per_token} for each token"
    return facts


# ---- what stages bought ---------------------------------------------------------------------------------------------


def held_out_measures(out: Path) -> list[dict[str, Any]]:
    """What the training stages of every slice measured on held-out rows, in the order in which they ended."""
    records = []
    for path in out.glob("slice_*/*/stage.json"):
        slice_name, stage = path.parts[-3:-1]
        result = (read_object(path) or {}).get("result", {})
        if stage.rstrip("_23456789").startswith(LEARNING) and isinstance(result.get("held_out"), dict):
            records.append((path.stat().st_mtime_ns, int(slice_name[6:]), stage, result["held_out"]))
    return [{"slice": t, "stage": stage, **measured} for _, t, stage, measured in sorted(records, key=lambda r: r[:3])]


def own_shares(out: Path) -> list[dict[str, Any]]:
    """What reward models say of the share of their own rows that they did not learn from."""
    lines = []
    for path in sorted(out.glob("slice_*/*_reward*/stage.json")):
        slice_name, stage = path.parts[-3:-1]
        result = (read_object(path) or {}).get("result", {})
        count, share = result.get("held_out_rows"), result.get("held_out_accuracy")
        line = {"slice": int(slice_name[6:]), "stage": stage, "rows": count, "on": "own rows kept apart"}
        if count and share is not None:
            interval = wilson_interval(share * count, count)
            lines.append(line | {"measure": "accuracy", "after": [share, *interval]})
        if count and result.get("held_out_answer_auc") is not None:
            lines.append(line | {"measure": "answer_auc", "after": [result["held_out_answer_auc"], None, None]})
    return lines


def exact_answers(
    measured: Sequence[tuple[int, str, Path]], starts: Mapping[tuple[int, str], tuple[int, str]]
) -> list[dict[str, Any]]:
    """Exact answers of every stage, greedy and sampled, against the model that the stage started from.

    Args:
        measured: (slice, stage, directory of recipes/accuracy.py).   starts: stage -> the one it started from.
    """
    right = {(t, name): _right_answers(path) for t, name, path in measured}
    lines = []
    for (t, name), columns in right.items():
        before = right.get(starts.get((t, name), (0, "")))
        for kind in columns if before is not None else ():
            pairs = [(a, b) for a, b in zip(before[kind], columns[kind]) if a is not None and b is not None]
            if not pairs:
                continue
            first, last = (sum(column) / len(pairs) for column in zip(*pairs))
            line = {"slice": t, "stage": name, "rows": len(pairs), "on": "held-out rows", "measure": f"{kind}_accuracy"}
            line["before"] = [first, *wilson_interval(first * len(pairs), len(pairs))]
            line["after"] = [last, *wilson_interval(last * len(pairs), len(pairs))]
            lines.append(line | {"change": paired([b - a for a, b in pairs])})
    return lines


def _right_answers(path: Path) -> dict[str, list[bool | None]]:
    """Whether each answer is right, None where none came; {} without a file."""
    file = path / "answers.jsonl"
    lines = [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []
    references = [line["reference"] for line in lines]
    return {kind: marks([line[kind] for line in lines], references) for kind in ("greedy", "sampled") if lines}


def paired(differences: Sequence[float]) -> list[float | None]:
    """[mean, standard error] of differences."""
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return [mean, None]
    return [mean, math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (count - 1) / count)]


def preferences(
    pairwise: Sequence[Mapping[str, Any]], last: int, starts: Mapping[tuple[int, str], tuple[int, str]]
) -> list[dict[str, Any]]:
    """Blind wins of every stage of the last slice over the model that it started from, ties half."""
    lines = []
    for pair in pairwise:
        before = starts.get((last, pair["a"]), (0, ""))[1]
        if pair["b"] == before and pair["win_rate_with_ties"] is not None:
            count = pair["wins"] + pair["losses"] + pair["ties"]
            line = {"slice": last, "stage": pair["a"], "rows": count, "on": "the judge", "against": before}
            rate = [pair["win_rate_with_ties"], *(pair["ci95_with_ties"] or (None, None))]
            lines.append(line | {"measure": "wins", "after": rate})
    return lines


def ratings(tests: Mapping[str, Mapping[str, Any]], last: int) -> list[dict[str, Any]]:
    """The rated questions of the last model, beside those of the base model."""
    first = tests.get("base", {}).get("overall")
    lines = []
    for name, report in tests.items():
        overall = report.get("overall")
        if name == "base" or not overall or overall["score"] is None:
            continue
        line = {"slice": last, "stage": name, "rows": overall["rated"], "on": "the judge", "against": "base"}
        line |= {"measure": "rating", "after": [overall["score"], *(overall["ci95"] or (None, None))]}
        if first and first["score"] is not None:
            line["before"] = [first["score"], *(first["ci95"] or (None, None))]
        lines.append(line)
    return lines


# ---- rows -----------------------------------------------------------------------------------------------------------


def learned_shares(out: Path, slices: int) -> dict[str, dict[str, float]]:
    """attribute -> value -> share of the rows that the slices' models learned from, evolved ones and lessons included.

    Rows that have no such attribute are "unknown".
    """
    counts: dict[str, dict[str, float]] = {}
    for t in range(1, slices + 1):
        report = read_object(out / f"slice_{t}" / "rows" / "sampling.json") or {}
        rows = report.get("counts", {}).get("drawn", 0)
        for name, shares in report.get("drawn", {}).items():
            of_name = counts.setdefault(name, {})
            for value, share in shares.items():
                of_name[value] = of_name.get(value, 0.0) + share * rows
    return {name: {v: n / sum(of.values()) for v, n in of.items()} for name, of in counts.items() if sum(of.values())}


def examples(out: Path, prompts: Path | None, held_out: Sequence[Path], last: int) -> list[dict[str, Any]]:
    """Some rows with the answers of all models: those of the arena, or those before and after RLEIF.

    Args:
        prompts: rows of the arena.   held_out: rows of RLEIF.   last: the last slice.
    """
    if prompts is not None and (out / "arena" / "battles.jsonl").exists():
        return _arena_examples(out / "arena", prompts)
    return _rleif_examples(out / f"slice_{last}" / "rleif" / "held_out.jsonl", held_out)


def _arena_examples(folder: Path, prompts: Path) -> list[dict[str, Any]]:
    """Battles of the last model with the first one: won, lost and tied in turn."""
    results = read_object(folder / "arena.json") or {}
    names = list(results.get("missing_answers", {}))
    answers = {name: _by_id(folder / "answers" / f"{name}.jsonl") for name in names}
    rows = {row.id: row for _, row in _rows([prompts])}
    battles = [json.loads(line) for line in (folder / "battles.jsonl").open(encoding="utf-8")]
    of_pair = [line for line in battles if {line["a"], line["b"]} == {names[0], names[-1]} and line["prompt"] in rows]
    won = [line for line in of_pair if line["score"] == (1.0 if line["a"] == names[-1] else 0.0)]
    tied = [line for line in of_pair if line["score"] == 0.5]
    lost = [line for line in of_pair if line["score"] is not None and line not in won and line not in tied]
    chosen = []
    for verdict, line in _in_turn({"won": won, "lost": lost, "tied": tied}):
        row, key = rows[line["prompt"]], line["prompt"]
        texts = {name: of[key]["answer"] for name, of in answers.items() if of.get(key, {}).get("answer") is not None}
        verdicts = {names[-1]: f"{verdict} against {names[0]}"}
        chosen.append({"prompt": _asked(row), "answers": texts, "verdicts": verdicts, "kind": verdict})
    return chosen


def _in_turn(kinds: Mapping[str, Sequence[Any]]) -> list[tuple[str, Any]]:
    """The first items of each kind, one of each after the other."""
    most = max(map(len, kinds.values()), default=0)
    return [(kind, items[n]) for n in range(most) for kind, items in kinds.items() if n < len(items)][:EXAMPLES]


def _rleif_examples(path: Path, held_out: Sequence[Path]) -> list[dict[str, Any]]:
    """Answers before and after RLEIF, those whose reward changed most first."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    rows, chosen = dict(_rows(held_out)), []
    for line in sorted(lines, key=lambda line: -abs(line["after"]["reward"] - line["before"]["reward"])):
        if line["row"] in rows and len(chosen) < EXAMPLES:
            texts = {f"{when} RLEIF": line[when]["answer"] for when in ("before", "after")}
            verdicts = {f"{when} RLEIF": f"reward {line[when]['reward']:.2f}" for when in ("before", "after")}
            item = {"prompt": _asked(rows[line["row"]]), "answers": texts, "verdicts": verdicts, "kind": ""}
            chosen.append(item)
    return chosen


def _rows(paths: Sequence[Path]) -> list[tuple[str, Any]]:
    """(`path:line`, row) of every row that can be read."""
    present = [path for path in paths if path.exists()]
    return read_located(present, on_error="skip", unknown_fields="count")[0] if present else []


def _asked(row: Any) -> str:
    """The last question of a row."""
    messages = row.messages[:-1] if isinstance(row, Conversation) else row.prompt
    return messages[-1].content if messages else ""


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []
    return {line["id"]: line for line in lines}
