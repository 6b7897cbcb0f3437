"""Arena: several models answer the same prompts, judges compare every two of them blind, and Elo ratings follow.

    python recipes/arena.py --models base=runs/base/model sft=runs/sft/model --out runs/arena
    python recipes/arena.py --models ours=answers.jsonl rival=world:terse --prompts rows.jsonl --out runs/arena

A model is NAME=SPEC. SPEC is a model directory, a registered program (world:NAME), an endpoint (openai:MODEL@URL), or a
JSONL file of answers. Writes OUT/answers/NAME.jsonl, OUT/battles.jsonl and OUT/arena.json. Every call goes through
OUT/ledger.sqlite: a resumed run repeats none. The judges see no names; the two answers to a prompt are shuffled and
judged in both orders. All models and judges are asked at once, and no prompt waits for another one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from wizard_engine import runtime, world
from wizard_engine.agents import Calls, Cast, Limits, Request
from wizard_engine.agents.aids import read_attributes
from wizard_engine.agents.missing import Missing, Reasons, check_missing, shown_reasons
from wizard_engine.agents.options import AgentOptions, estimated, open_cast
from wizard_engine.data.records import Message, read_rows
from wizard_engine.data.references import References, with_reference
from wizard_engine.evaluation.answers import read_answers
from wizard_engine.evaluation.battles import Judging, Outcome
from wizard_engine.evaluation.elo import Rating, connected, elo
from wizard_engine.evaluation.pairwise import Pairwise, Tournament, model_pairs, scored
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.runtime.files import to_plain, write_json, write_json_lines
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Count, Finite, Seed, Temperature
from wizard_engine.runtime.spill import Spill
from wizard_engine.runtime.stage import INCIDENTAL, SCRIPTED, Stage, path_of
from wizard_engine.runtime.text_lines import printable


@dataclass(frozen=True)
class Config(AgentOptions):
    """Blind pairwise preference and Elo."""

    models: tuple[str, ...]
    """NAME=SPEC each, at least two; SPEC is a model directory, a registered program (world:NAME), an endpoint
    (openai:MODEL@URL), or FILE.jsonl of answers: lines {"answer": text}, with "id" or "prompt" where the order differs;
    FILE.jsonl#FIELD reads another field."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for arena.json, battles.jsonl, answers/ and ledger.sqlite."""
    prompts: Path | None = field(default=None, metadata=INCIDENTAL)
    """Rows whose last user turn is answered; default: held-out problems of the embedded world."""
    n: Annotated[Count[int], tyro.conf.arg(name="limit")] = 200
    """Prompts at most."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read: stop, or leave it out and count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    references: References = "attribute"
    """Where the answer known to be right is: the row's attribute `reference`, or answers: also its own last answer. The
    judges see it, and reference:judge judges by it."""
    judge: tuple[str, ...] = ("world:judge",)
    """Registered programs (world:NAME, reference:judge), model directories, endpoints (openai:MODEL@URL) or
    scripted:FILE. A game is scored by the mean of those that gave both scores."""
    baseline: str | None = None
    """Compare every model with this one only; default: all pairs."""
    anchor: str | None = None
    """Model whose rating is fixed at --anchor-elo; default: the first."""
    anchor_elo: Finite[float] = 1000.0
    temperature: Temperature[float] = 0.0
    """Of the models' answers; 0 is greedy."""
    max_new_tokens: Count[int] = 256
    """Longest answer, tokens."""
    on_length: Literal["missing", "keep"] | None = None
    """An answer that reached its limit: missing, or keep and judge it as it is. Default: missing for an endpoint,
    whose answers are whole or none, and keep for a checkpoint."""
    seed: Seed[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.judge, str):
            object.__setattr__(self, "judge", (self.judge,))


def read_models(specs: Sequence[str]) -> dict[str, str]:
    """NAME -> SPEC; ValueError for another form, a repeated name, or fewer than two models."""
    models: dict[str, str] = {}
    for spec in specs:
        name, sign, target = spec.partition("=")
        if not (name and sign and target) or name in models or "/" in name:
            raise ValueError(f"models: expected NAME=SPEC with different names, got {spec!r}; see --help")
        models[name] = target
    if len(models) < 2:
        raise ValueError(f"models: expected at least two NAME=SPEC, got {len(models)}; name another one")
    return models


class Prompts(NamedTuple):
    """Ids, conversations that end with a user turn, and of the rows' attributes those that judges' prompts read."""

    ids: list[str]
    turns: list[tuple[Message, ...]]
    attributes: list[dict[str, Any]]


def read_prompts(cfg: Config) -> Prompts:
    """The prompts of the rows."""
    if cfg.prompts is None:
        rows = world.held_out(cfg.n, cfg.seed)
    else:
        rejects = cfg.out / "rejects.jsonl"
        rows = read_rows(cfg.prompts, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields, rejects=rejects)[
            : cfg.n
        ]
    rows = [with_reference(row, cfg.references) for row in rows]
    prompts = [tuple(row.messages[:-1] if hasattr(row, "messages") else row.prompt) for row in rows]
    if not all(prompts):
        raise ValueError(f"{cfg.prompts}: expected rows with a user turn, got a row without; remove such rows")
    return Prompts([row.id for row in rows], prompts, [read_attributes(row.attributes) for row in rows])


def is_file_of_answers(spec: str) -> bool:
    """Whether a spec is FILE.jsonl or FILE.jsonl#FIELD, and no agent with a file of replies."""
    return ".jsonl" in Path(spec).name and not spec.startswith(SCRIPTED)


def player(cfg: Config, spec: str, prompts: Prompts, cast: Cast) -> Callable[[int], Awaitable[str | Missing]]:
    """What gives a model's answer to the prompt of a number; a call that failed is Missing, and is not judged."""
    if is_file_of_answers(spec):
        answers = read_answers(spec, prompts.ids, [turns[-1].content for turns in prompts.turns])

        async def written(place: int) -> str | Missing:
            return answers[place]

        return written
    agent, on_length = cast.agent(spec), on_length_of(spec, cfg.on_length)
    settings = {"seed": cfg.seed, "temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens, "top_p": cfg.top_p}

    async def asked(place: int) -> str | Missing:
        request = Request("answer", prompts.turns[place], row=prompts.ids[place], **settings)
        return received(await cast.scheduler.ask(agent, request), on_length)

    return asked


def _line(key: str, answer: str | Missing) -> dict[str, Any]:
    if isinstance(answer, Missing):
        return {"id": key, "answer": None, "missing": answer.reason}
    return {"id": key, "answer": answer}


class Arena:
    """Answers and battles of all prompts, kept on disk until they are written in order.

    Args:
        models: NAME -> SPEC.
    """

    def __init__(
        self,
        cfg: Config,
        cast: Cast,
        models: Mapping[str, str],
        prompts: Prompts,
    ) -> None:
        self.cfg, self.cast, self.prompts = cfg, cast, prompts
        self.players = {name: player(cfg, spec, prompts, cast) for name, spec in models.items()}
        self.agents = [cast.agent(spec) for spec in models.values() if not is_file_of_answers(spec)]
        self.calls = Calls(cast.scheduler, limits=Limits(judge=cfg.judge_max_tokens), top_p=cfg.top_p)
        judging = Judging([cast.agent(spec) for spec in cfg.judge], self.calls, seed=cfg.seed)
        pairs = model_pairs(list(models), cfg.baseline)
        self.tournament = Tournament(pairs, len(prompts.ids), judging, folder=cfg.out)
        self.answers: dict[str, Spill[dict[str, Any]]] = {name: Spill(cfg.out) for name in models}
        self.missing = {name: Reasons() for name in models}

    async def run(self) -> None:
        """Answer and judge all prompts."""
        agents, width = [*self.agents, *self.tournament.judging.judges], self.tournament.width
        stage = {"desc": "arena", "total": len(self.prompts.ids), "width": width, "agents": agents}
        stage["calls"] = len(self.agents) + width
        await self.cast.scheduler.rows(range(len(self.prompts.ids)), self.play, self.add, **stage)

    async def play(self, place: int) -> tuple[list[str | Missing], list[Outcome]]:
        """All models answer one prompt at once; two are judged as soon as both have answered."""
        prompts = self.prompts
        async with asyncio.TaskGroup() as group:
            said = {name: group.create_task(answer(place)) for name, answer in self.players.items()}
            outcomes = await self.tournament.play(
                place, prompts.turns[place], said, prompts.ids[place], prompts.attributes[place]
            )
        return [answer.result() for answer in said.values()], outcomes

    def add(self, place: int, played: tuple[list[str | Missing], list[Outcome]]) -> None:
        """Count and keep what one prompt gave."""
        answers, outcomes = played
        for (name, spill), answer in zip(self.answers.items(), answers):
            spill.put(place, _line(self.prompts.ids[place], answer))
            if isinstance(answer, Missing):
                self.missing[name].add(answer.reason, place)
        self.tournament.add(place, outcomes)

    def check(self, results: Sequence[Pairwise]) -> None:
        """Raises ValueError where more answers of a model, or verdicts of a judge, are missing than may be."""
        most = self.cfg.max_missing
        for name, reasons in self.missing.items():
            advice = "raise --max-new-tokens"
            check_missing(f"answers of {name}", reasons.ranked(), len(self.prompts.ids), most, advice)
        for result in results:
            answered = len(self.prompts.ids) - sum(
                count for kind, count in result.missing.items() if not kind.startswith("judge: ")
            )
            for judge, reasons in zip(self.cfg.judge, result.judges.values() or [result.missing]):
                kinds = {kind[7:]: count for kind, count in reasons.items() if kind.startswith("judge: ")}
                what = f"verdicts of {judge} on {result.a} : {result.b}"
                check_missing(what, kinds, answered, most, "raise --judge-max-tokens")

    def ratings(self, results: Sequence[Pairwise], anchor: str) -> list[Rating]:
        """Ratings of the models that a verdict connects with the anchor; none where there is no such verdict."""
        known = connected(scored(results), anchor)
        if len(known) < 2:
            return []
        battles = ((a, b, score) for a, b, score in scored(results) if a in known)
        return elo(battles, anchor=anchor, anchor_elo=self.cfg.anchor_elo, seed=self.cfg.seed)

    def report(self, results: Sequence[Pairwise], ratings: Sequence[Rating]) -> dict[str, Any]:
        """The content of arena.json."""
        missing = {name: reasons.ranked() for name, reasons in self.missing.items()}
        errors = {name: reasons.total() for name, reasons in self.missing.items()}
        report = {"prompts": len(self.prompts.ids), "seed": self.cfg.seed, "answer_errors": errors}
        report |= {"missing_answers": missing, "pairwise": [result.to_json() for result in results]}
        report |= {"elo": [asdict(rating) for rating in ratings], "calls": self.cast.ledger.counts()}
        rated = {rating.model for rating in ratings}
        unrated = [name for name in self.answers if name not in rated]
        report |= {"unrated": unrated} if unrated else {}
        repeats = self.calls.repeats()
        return to_plain(report | ({"repeats": repeats} if repeats else {}))

    def write(self, results: Sequence[Pairwise], report: dict[str, Any]) -> list[Path]:
        """Writes answers, battles and arena.json; returns the paths."""
        out = self.cfg.out
        for name, lines in self.answers.items():
            write_json_lines(out / "answers" / f"{name}.jsonl", lines)
        battles = (
            battle.to_json() | {"prompt": self.prompts.ids[battle.prompt]} for r in results for battle in r.battles
        )
        write_json_lines(out / "battles.jsonl", battles)
        write_json(out / "arena.json", report)
        return [out / "answers", out / "battles.jsonl", out / "arena.json"]


def print_report(results: Sequence[Pairwise], ratings: Sequence[Rating], unrated: Sequence[str]) -> None:
    """Prints a line per comparison and per rating."""
    for r in results:
        rate = "-" if r.win_rate is None else f"{100 * r.win_rate:.1f} % [{100 * r.ci95[0]:.1f}, {100 * r.ci95[1]:.1f}]"
        counts = f"{r.wins:5} : {r.losses:<5} {r.ties:5} ties {r.errors:4} missing {r.flips:4} flips"
        reasons = f"; missing: {shown_reasons(r.missing)}" if r.missing else ""
        print(f"{printable(r.a):>16} : {printable(r.b):<16}{counts}   {rate} without ties{reasons}")
        for judge, missing in r.judges.items():
            if missing:
                print(f"{'':19}missing of {printable(judge)}: {shown_reasons(missing)}")
    for r in ratings:
        print(f"{printable(r.model):>16}  Elo {r.elo:6.0f}  [{r.low:.0f}, {r.high:.0f}]  {r.battles} battles")
    for name in unrated:
        print(f"{printable(name):>16}  no rating: no verdict connects it with the anchor")


def open_arena(cfg: Config, models: dict[str, str]) -> Stage:
    """The stage: model directories, answer files, prompts and a judge's directory are inputs by content."""
    named = {f"model {name}": spec.partition("#")[0] for name, spec in models.items()}
    is_one = len(cfg.judge) == 1
    judges = {"judge" if is_one else f"judge {number}": spec for number, spec in enumerate(cfg.judge, 1)}
    inputs = {key: path_of(spec) for key, spec in (named | judges).items() if path_of(spec).exists()}
    inputs |= {} if cfg.prompts is None else {"prompts": cfg.prompts}
    inputs |= {"chat_format": cfg.chat_format} if isinstance(cfg.chat_format, Path) else {}
    read = [x.name for x in fields(cfg) if not x.metadata.get("incidental") and x.name != "chat_format"]
    options = {name: getattr(cfg, name) for name in [*read, *({"chat_format"} - inputs.keys())]}
    options["models"] = {
        name: None if f"model {name}" in inputs else cfg.in_identity(spec) for name, spec in models.items()
    }
    named_judges = [None if name in inputs else cfg.in_identity(spec) for name, spec in judges.items()]
    options["judge"] = named_judges[0] if is_one else named_judges
    return Stage(cfg.out, "arena", options, inputs, overwrite=cfg.overwrite, quiet=cfg.quiet)


def main(cfg: Config, rt: runtime.Runtime | None = None) -> dict[str, Any]:
    """Answers, judges and rates; returns the content of arena.json.

    With a runtime of several ranks, every rank makes this call and the work is sharded; without one, it runs alone.
    """
    rt = rt or runtime.Runtime()
    world.register()
    models = read_models(cfg.models)
    model_pairs(list(models), cfg.baseline)
    if cfg.anchor is not None and cfg.anchor not in models:
        raise ValueError(f"anchor: expected one of {', '.join(models)}, got {cfg.anchor!r}; choose one of them")
    if cfg.estimate:
        return from_main(rt, lambda: estimate(cfg, models))
    stage = open_arena(cfg, models)
    if from_main(rt, stage.is_current):
        return from_main(rt, stage.result)
    prompts = read_prompts(cfg)
    from_main(rt, stage.start)
    cast = open_cast(cfg.out, cfg, rt)
    try:
        return cast.conduct(lambda: conduct(cfg, cast, stage, models, prompts))
    finally:
        cast.close()


def estimate(cfg: Config, models: Mapping[str, str]) -> dict[str, Any]:
    """What the arena will ask, without a call."""
    prompts = read_prompts(cfg)
    return estimated(cfg, lambda options, cast: play(options, cast, models, prompts))


def play(cfg: Config, cast: Cast, models: Mapping[str, str], prompts: Prompts) -> Arena:
    """The arena after all its games."""
    arena = Arena(cfg, cast, models, prompts)
    cast.scheduler.run(arena.run())
    return arena


def conduct(
    cfg: Config,
    cast: Cast,
    stage: Stage,
    models: Mapping[str, str],
    prompts: Prompts,
) -> dict[str, Any]:
    """The whole arena, on rank 0; returns the content of arena.json."""
    arena = play(cfg, cast, models, prompts)
    results = arena.tournament.results()
    ratings = arena.ratings(results, cfg.anchor or next(iter(models)))
    report = arena.report(results, ratings)
    # Also where too much is missing: what came can be looked at.
    outputs = arena.write(results, report)
    arena.check(results)
    stage.finish(report, outputs)
    if not cfg.quiet:
        print_report(results, ratings, report.get("unrated", ()))
    return report


if __name__ == "__main__":
    launch(lambda cfg: main(cfg, runtime.start(cfg.device)), Config)
