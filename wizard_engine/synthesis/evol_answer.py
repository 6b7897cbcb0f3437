"""Evol-Answer: answers are rewritten several times; a rewrite is kept only if a judge prefers it in both orders.

The WizardLM-2 report has one sentence on this stage. The operators follow the answer evolving of DEITA. The guards are
those of this project: see `evolve_answers`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import AnyAgent, Calls, Limits, derive_seed
from wizard_engine.agents.reading.texts import read_rewritten, without_remarks
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.final_answers import read_claim
from wizard_engine.data.records import Conversation, Message, Preference, kept_weights
from wizard_engine.runtime.spill import Spill

from .judging import Judges, Match, Verdict, aids, check_judges, judge_match, names_of, panel
from .pairs import Pairs, instruction_attributes, row_spill

OPERATORS = ("helpfulness", "relevance", "depth", "correctness", "details")
# Answers shorter than this may grow to length_cap times it, so that a bare number can become a worked solution.
SHORTEST_CHARACTERS = 120


@dataclass(frozen=True)
class EvolvedAnswers:
    """Result of a run of Evol-Answer, kept on disk.

    Attributes:
        rows: the input rows in order, each with its last answer or the best rewrite of it.
        preferences: winner and loser of every comparison with a margin in which the judge's two orders do not disagree.
        chains: one object a row: row (id) and links: every rewrite with round, operator, answer, accepted, reason and,
            if judged, the scores of rewrite and parent, averaged over the orders.
        statistics: "operators" (operator -> tried, accepted, and every reason), "rows_changed", "pairs", "calls".
    """

    rows: Spill[Conversation]
    preferences: Spill[Preference]
    chains: Spill[dict[str, Any]]
    statistics: dict[str, Any]


@dataclass
class _Chain:
    """The rewrites of one row's answer, and the verdict of each round that was judged."""

    row: Conversation
    answer: str
    order: list[str]
    links: list[dict[str, Any]] = field(default_factory=list)
    verdicts: dict[int, Verdict | None] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.row.messages[:-1]


def evolve_answers(
    rows: Sequence[Conversation],
    *,
    rewriter: AnyAgent,
    judge: Judges,
    rounds: int = 2,
    operators: Sequence[str] = OPERATORS,
    length_cap: float = 4.0,
    result_margin: float = 2.0,
    min_gap: float = 0.5,
    seed: int = 0,
    limits: Limits | None = None,
    top_p: float = 1.0,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> EvolvedAnswers:
    """The rows with their last answers rewritten.

    In each round every answer is rewritten once, by an operator that its row has not used yet (all are available again
    once used). The parent is kept unless the judge prefers the rewrite in both orders. A rewrite is not judged if it is
    blank, equal to its parent, or longer than `length_cap` times the row's first answer. A remark such as "Here is the
    improved answer:" is cut off. A rewrite with another result (the number that it claims) than its parent must win by
    `result_margin` in both orders: only then is the old result taken for wrong.

    Args:
        rewriter: does task "rewrite".   judge: task "judge"; of several the mean counts.
        length_cap: ratio of characters; first answers count as at least SHORTEST_CHARACTERS.
        result_margin: points of score.
        min_gap: smallest averaged gap of a preference row, points.
        limits: longest replies.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Raises:
        ValueError: an unknown operator, a cap below 1, a negative number of rounds, or no judge.
    """
    _validate(operators, rounds, length_cap)
    check_judges(judge)
    writer = _Writer(
        Calls(scheduler, limits=limits, top_p=top_p),
        rewriter,
        judge,
        tuple(operators),
        rounds,
        length_cap,
        result_margin,
        seed,
    )
    return writer.calls.scheduler.run(_evolved(writer, rows, Pairs(min_gap, folder), folder))


async def _evolved(
    writer: "_Writer", rows: Sequence[Conversation], pairs: Pairs, folder: Path | None
) -> EvolvedAnswers:
    calls, chains = writer.calls, Spill(folder, dump=_to_line)
    verdicts = 2 * len(panel(writer.judges))
    await calls.scheduler.rows(
        rows,
        writer.chain,
        chains.put,
        desc="answers",
        total=len(rows),
        width=verdicts,
        calls=writer.rounds * (1 + verdicts),
        agents=[writer.rewriter, *panel(writer.judges)],
    )
    counts = {name: Counter(tried=0, accepted=0) for name in writer.operators}
    changed, described, num_changed = row_spill(folder), Spill(folder), 0
    for number in range(writer.rounds):
        for place, row in enumerate(rows):
            _, links, verdicts = chains[place]
            _count(counts, links[number])
            if str(number) in verdicts:
                _offer(pairs, row, links[number], verdicts[str(number)], names_of(writer.judges))
    for place, row in enumerate(rows):
        answer, links, _ = chains[place]
        new = _evolved_row(row, answer, links, writer.rewriter.name)
        num_changed += new is not row
        changed.append(new)
        described.append({"row": row.id, "links": links})
    statistics = {
        "operators": {name: dict(count) for name, count in counts.items()},
        "rows_changed": num_changed,
        "pairs": pairs.statistics(),
        "calls": calls.statistics(),
    }
    return EvolvedAnswers(changed, pairs.rows, described, statistics)


def _to_line(chain: _Chain) -> list[Any]:
    return [chain.answer, chain.links, chain.verdicts]


def _count(counts: dict[str, Counter[str]], link: dict[str, Any]) -> None:
    counts[link["operator"]].update(["tried", link["reason"], *["meta removed"] * link["meta_removed"]])


def _offer(pairs: Pairs, row: Conversation, link: dict[str, Any], verdict: list | None, judges: str) -> None:
    """Offers a rewrite and its parent as a preference row."""
    lineage = {"parents": [row.id], "operator": f"evol_answer:{link['operator']}", "agent": judges}
    match = Match(row.messages[:-1], link["answer"], link["parent"])
    given = None if verdict is None else Verdict(*(tuple(scores) for scores in verdict))
    pairs.add(match, given, instruction_attributes(row), lineage)


def strip_meta(text: str) -> str:
    """An answer without remarks about having been improved, and without what else stands around it in a reply."""
    return without_remarks(text)


def _answered(text: str, before: str) -> str | None:
    """The reply as it is; None for a refusal, or the word that nothing has to change."""
    return text.strip() if read_rewritten(text, before) is not None or not strip_meta(text) else None


def _order(row: Conversation, operators: Sequence[str], rounds: int, seed: int) -> list[str]:
    """The operator of each round: every operator once in a drawn order, then again."""
    rng, order = random.Random(derive_seed(seed, "operators", row.id)), []
    while len(order) < rounds:
        order += rng.sample(list(operators), len(operators))
    return order[:rounds]


@dataclass(frozen=True)
class _Writer:
    """The agents and settings of one run."""

    calls: Calls
    rewriter: AnyAgent
    judges: Judges
    operators: tuple[str, ...]
    rounds: int
    length_cap: float
    result_margin: float
    seed: int

    async def chain(self, row: Conversation) -> _Chain:
        """The rewrites of a row's answer, round after round."""
        chain = _Chain(row, row.answer, _order(row, self.operators, self.rounds, self.seed))
        for number in range(self.rounds):
            link = await self._rewritten(chain, number)
            chain.links.append(link)
            if link["reason"] is None:
                await self._judge(chain, link, number)
            if link["accepted"]:
                chain.answer = link["answer"]
        return chain

    async def _rewritten(self, chain: _Chain, number: int) -> dict[str, Any]:
        """A link with the new answer, and the reason why the judge need not see it, or None."""
        operator, row = chain.order[number], chain.row
        fields = {"operator": operator, "instruction": row.instruction, "answer": chain.answer}
        fields |= {"history": prompts.dialogue(chain.prompt[:-1]), "reference": prompts.reference_of(row.attributes)}
        seed = derive_seed(self.seed, "rewrite", number + 1)
        text = await self.calls.ask(
            self.rewriter, "rewrite", fields, seed, read=lambda text: _answered(text, chain.answer) or None, row=row.id
        )
        link = {"round": number + 1, "operator": operator, "accepted": False, "reason": None}
        link |= {"answer": text, "parent": chain.answer, "meta_removed": False}
        if text is None:
            return link | {"reason": "call failed"}
        bare = strip_meta(text)
        return link | {"answer": bare, "meta_removed": bare != text.strip(), "reason": self._fault(chain, bare)}

    def _fault(self, chain: _Chain, text: str) -> str | None:
        if not text:
            return "only a remark"
        if prompts.flatten(text) == prompts.flatten(chain.answer):
            return "unchanged"
        longest = self.length_cap * max(len(chain.row.answer), SHORTEST_CHARACTERS)
        return "too long" if len(text) > longest else None

    async def _judge(self, chain: _Chain, link: dict[str, Any], number: int) -> None:
        """Judges a rewrite and decides."""
        match = Match(chain.prompt, link["answer"], chain.answer, **aids(chain.row.attributes, chain.prompt))
        verdict = await judge_match(self.calls, self.judges, match, self.seed, row=chain.row.id)
        link["reason"] = _decision(match, verdict, self.result_margin)
        link["accepted"] = link["reason"] == "accepted"
        if verdict is not None:
            link["scores"] = list(verdict.scores)
        chain.verdicts[number] = verdict


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


def _evolved_row(row: Conversation, answer: str, links: Sequence[dict[str, Any]], agent: str) -> Conversation:
    accepted = [link for link in links if link["accepted"]]
    if not accepted:
        return row
    operators = "+".join(link["operator"] for link in accepted)
    lineage = {"parents": [row.id], "operator": f"evol_answer:{operators}", "agent": agent}
    messages = (*row.messages[:-1], Message("assistant", answer))
    attributes = {**instruction_attributes(row), "answer_score": accepted[-1]["scores"][0]}
    return Conversation(messages, attributes, lineage, kept_weights(row, messages))


def _validate(operators: Sequence[str], rounds: int, length_cap: float) -> None:
    known = prompts.operators("rewrite")
    unknown = [name for name in operators if name not in known]
    if unknown or not operators:
        raise ValueError(f"operators: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    if rounds < 0 or length_cap < 1:
        raise ValueError(f"rounds, length_cap: expected at least 0 and 1, got {rounds} and {length_cap}; raise them")
