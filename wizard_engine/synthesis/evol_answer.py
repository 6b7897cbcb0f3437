"""Evol-Answer: answers are rewritten several times; a rewrite is kept only if a judge prefers it in both orders.

The WizardLM-2 report has one sentence on this stage. The operators follow the answer evolving of DEITA. The guards are
those of this project: see `evolve_answers`.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent
from wizard_engine.data.final_answers import read_claim
from wizard_engine.data.records import Conversation, Message, Preference, kept_weights

from .calls import JUDGE_TOKENS, Calls, as_read, derive_seed
from .judging import Match, Verdict, judge_matches
from .pairs import Pairs, instruction_attributes

OPERATORS = ("helpfulness", "relevance", "depth", "correctness", "details")
# Answers shorter than this may grow to length_cap times it, so that a bare number can become a worked solution.
SHORTEST_CHARACTERS = 120
_META = re.compile(
    r"(?:sure|certainly|of course)?[\s,.!:]*(?:here(?:'s| is| are)|this is|below is|i have|i've)\b[^\n.:]*"
    r"\b(?:improved|rewritten|revised|better|enhanced|updated|new)\b[^\n]*?(?:[:.]\s*|\n|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class EvolvedAnswers:
    """Result of a run of Evol-Answer.

    Attributes:
        rows: the input rows in order, each with its last answer or the best rewrite of it.
        preferences: winner and loser of every comparison with a margin in which the judge's two orders do not disagree.
        chains: one object a row: row (id) and links: every rewrite with round, operator, answer, accepted, reason and,
        if
            judged, the scores of rewrite and parent, averaged over the orders.
        statistics: "operators" (operator -> tried, accepted, and every reason), "rows_changed", "pairs", "calls".
    """

    rows: list[Conversation]
    preferences: list[Preference]
    chains: list[dict[str, Any]]
    statistics: dict[str, Any]


@dataclass
class _Chain:
    """The rewrites of one row's answer."""

    row: Conversation
    answer: str
    order: list[str]
    links: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.row.messages[:-1]


def evolve_answers(
    rows: Sequence[Conversation],
    *,
    rewriter: Agent,
    judge: Agent,
    rounds: int = 2,
    operators: Sequence[str] = OPERATORS,
    length_cap: float = 4.0,
    result_margin: float = 2.0,
    min_gap: float = 0.5,
    seed: int = 0,
    max_tokens: int = 256,
    judge_max_tokens: int = JUDGE_TOKENS,
) -> EvolvedAnswers:
    """The rows with their last answers rewritten.

    In each round every answer is rewritten once, by an operator that its row has not used yet (all are available again
    once used). The parent is kept unless the judge prefers the rewrite in both orders. A rewrite is not judged if it is
    blank, equal to its parent, or longer than `length_cap` times the row's first answer. A remark such as "Here is the
    improved answer:" is cut off. A rewrite with another result (the number that it claims) than its parent must win by
    `result_margin` in both orders: only then is the old result taken for wrong.

    Args:
        rewriter: does task "rewrite".   judge: task "judge".
        length_cap: ratio of characters; first answers count as at least SHORTEST_CHARACTERS.
        result_margin: points of score.
        min_gap: smallest averaged gap of a preference row, points.
        max_tokens: longest reply.   judge_max_tokens: longest verdict.
    Raises:
        ValueError: an unknown operator, a cap below 1 or a negative number of rounds.
    """
    _validate(operators, rounds, length_cap)
    calls, pairs = Calls(max_tokens=max_tokens, judge_max_tokens=judge_max_tokens), Pairs(min_gap)
    counts = {name: Counter(tried=0, accepted=0) for name in operators}
    chains = [_Chain(row, row.answer, _order(row, operators, rounds, seed)) for row in rows]
    for number in range(1, rounds + 1):
        _rewrite(calls, rewriter, chains, number, seed)
        _check_texts(chains, length_cap)
        _judge(calls, judge, chains, result_margin, pairs, seed)
        _settle(chains, counts)
    changed = [_evolved_row(chain, rewriter.name) for chain in chains]
    statistics = {
        "operators": {name: dict(count) for name, count in counts.items()},
        "rows_changed": sum(new is not old for new, old in zip(changed, rows)),
        "pairs": pairs.statistics(),
        "calls": calls.statistics(),
    }
    described = [{"row": chain.row.id, "links": chain.links} for chain in chains]
    return EvolvedAnswers(changed, pairs.rows, described, statistics)


def strip_meta(text: str) -> str:
    """An answer without an opening remark about having been improved."""
    return _META.sub("", text, count=1).strip() if _META.match(text) else text.strip()


def _order(row: Conversation, operators: Sequence[str], rounds: int, seed: int) -> list[str]:
    """The operator of each round: every operator once in a drawn order, then again."""
    rng, order = random.Random(derive_seed(seed, "operators", row.id)), []
    while len(order) < rounds:
        order += rng.sample(list(operators), len(operators))
    return order[:rounds]


def _rewrite(calls: Calls, rewriter: Agent, chains: Sequence[_Chain], number: int, seed: int) -> None:
    """Adds a link with the new answer to every chain."""
    fields = [
        {
            "operator": chain.order[number - 1],
            "suggestion": "",
            "instruction": chain.row.instruction,
            "answer": chain.answer,
        }
        for chain in chains
    ]
    texts = calls.ask(rewriter, "rewrite", fields, derive_seed(seed, "rewrite", number), read=as_read)
    for chain, text in zip(chains, texts):
        link = {"round": number, "operator": chain.order[number - 1], "accepted": False, "reason": None}
        chain.links.append(link | {"answer": text, "parent": chain.answer, "meta_removed": False})


def _check_texts(chains: Sequence[_Chain], length_cap: float) -> None:
    """Cuts remarks off, and sets the reason of rewrites that are rejected without the judge."""
    for chain in chains:
        link = chain.links[-1]
        if link["answer"] is None:
            link["reason"] = "call failed"
            continue
        text = strip_meta(link["answer"])
        link["meta_removed"], link["answer"] = text != link["answer"].strip(), text
        if not text:
            link["reason"] = "only a remark"
        elif prompts.flatten(text) == prompts.flatten(chain.answer):
            link["reason"] = "unchanged"
        elif len(text) > length_cap * max(len(chain.row.answer), SHORTEST_CHARACTERS):
            link["reason"] = "too long"


def _judge(calls: Calls, judge: Agent, chains, result_margin: float, pairs: Pairs, seed: int) -> None:
    """Judges the remaining rewrites, decides, and collects preference pairs."""
    open_chains = [chain for chain in chains if chain.links[-1]["reason"] is None]
    matches = [Match(chain.prompt, chain.links[-1]["answer"], chain.answer) for chain in open_chains]
    for chain, match, verdict in zip(open_chains, matches, judge_matches(calls, judge, matches, seed)):
        link = chain.links[-1]
        link["reason"] = _decision(match, verdict, result_margin)
        link["accepted"] = link["reason"] == "accepted"
        if verdict is not None:
            link["scores"] = list(verdict.scores)
        lineage = {"parents": [chain.row.id], "operator": f"evol_answer:{link['operator']}", "agent": judge.name}
        pairs.add(match, verdict, instruction_attributes(chain.row), lineage)


def _decision(match: Match, verdict: Verdict | None, result_margin: float) -> str:
    """ "accepted", or why the parent is kept."""
    if verdict is None:
        return "call failed"
    if verdict.winner < 1:
        return "flipped" if verdict.is_flipped else "not preferred"
    new, old = read_claim(match.first), read_claim(match.second)
    is_same = old is None or (new is not None and new.equals(old))
    if not is_same and min(verdict.gaps) < result_margin:
        return "result changed"
    return "accepted"


def _settle(chains: Sequence[_Chain], counts: dict[str, Counter[str]]) -> None:
    for chain in chains:
        link = chain.links[-1]
        counts[link["operator"]].update(["tried", link["reason"], *["meta removed"] * link["meta_removed"]])
        if link["accepted"]:
            chain.answer = link["answer"]


def _evolved_row(chain: _Chain, agent: str) -> Conversation:
    accepted = [link for link in chain.links if link["accepted"]]
    if not accepted:
        return chain.row
    operators = "+".join(link["operator"] for link in accepted)
    lineage = {"parents": [chain.row.id], "operator": f"evol_answer:{operators}", "agent": agent}
    messages = (*chain.prompt, Message("assistant", chain.answer))
    attributes = {**instruction_attributes(chain.row), "answer_score": accepted[-1]["scores"][0]}
    return Conversation(messages, attributes, lineage, kept_weights(chain.row, messages))


def _validate(operators: Sequence[str], rounds: int, length_cap: float) -> None:
    known = prompts.operators("rewrite")
    unknown = [name for name in operators if name not in known]
    if unknown or not operators:
        raise ValueError(f"operators: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    if rounds < 0 or length_cap < 1:
        raise ValueError(f"rounds, length_cap: expected at least 0 and 1, got {rounds} and {length_cap}; raise them")
