"""Arena: several models answer the same prompts, a judge compares every two of them blind, and Elo ratings follow.

    python recipes/arena.py --models base=runs/base/model sft=runs/sft/model --out runs/arena
    python recipes/arena.py --models ours=answers.jsonl rival=world:terse --prompts rows.jsonl --out runs/arena

A model is NAME=SPEC. SPEC is a model directory, a registered program (world:NAME), an endpoint (openai:MODEL@URL), or a
JSONL file of answers. Writes OUT/answers/NAME.jsonl, OUT/battles.jsonl and OUT/arena.json. Every call goes through
OUT/ledger.sqlite: a resumed run repeats none. The judge sees no names; the two answers to a prompt are shuffled and
judged in both orders.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wizard_engine import runtime, world
from wizard_engine.agents import Cast, Request
from wizard_engine.agents.missing import MAX_MISSING, Missing, check_missing, check_share, count_reasons, shown_reasons
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Message, read_rows
from wizard_engine.evaluation.answers import read_answers
from wizard_engine.evaluation.elo import Rating, elo
from wizard_engine.evaluation.pairwise import JUDGE_TOKENS, Pairwise, all_pairs
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.runtime.files import to_plain, write_json, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, Finite, Seed, Share, Temperature
from wizard_engine.runtime.stage import Stage
from wizard_engine.runtime.text_lines import printable


@dataclass(frozen=True)
class Config(Checked):
    """Blind pairwise preference and Elo."""

    models: tuple[str, ...]
    """NAME=SPEC each, at least two; SPEC is a model directory, a registered program (world:NAME), an endpoint
    (openai:MODEL@URL), or FILE.jsonl of answers: lines {"answer": text}, with "id" or "prompt" where the order differs;
    FILE.jsonl#FIELD reads another field."""
    out: Path
    """Directory for arena.json, battles.jsonl, answers/ and ledger.sqlite."""
    prompts: Path | None = None
    """Rows whose last user turn is answered; default: held-out problems of the embedded world."""
    n: Annotated[Count[int], tyro.conf.arg(name="limit")] = 200
    """Prompts at most."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a row that cannot be read: stop, or leave it out and count it into OUT/rejects.jsonl."""
    unknown_fields: Literal["refuse", "count"] = "refuse"
    """Fields that rows have no place for, such as tool calls: an error of the row, or left out and counted."""
    judge: str = "world:judge"
    """Registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""
    baseline: str | None = None
    """Compare every model with this one only; default: all pairs."""
    anchor: str | None = None
    """Model whose rating is fixed at --anchor-elo; default: the first."""
    anchor_elo: Finite[float] = 1000.0
    temperature: Temperature[float] = 0.0
    """Of the models' answers; 0 is greedy."""
    max_new_tokens: Count[int] = 256
    """Longest answer, tokens."""
    judge_max_tokens: Count[int] = JUDGE_TOKENS
    """Longest verdict of the judge with its explanation, tokens."""
    on_length: Literal["missing", "keep"] | None = None
    """An answer that reached its limit: missing, or keep and judge it as it is. Default: missing for an endpoint,
    whose answers are whole or none, and keep for a checkpoint."""
    max_missing: Share[float] = MAX_MISSING
    """Largest share of a model's answers, and of the verdicts, 0 to 1, that may be missing; above it the stage ends
    with an error."""
    chat_format: ChatFormatChoice = "auto"
    """Of local models: auto is a directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a
    .jinja file."""
    batch_size: Count[int] = 256
    seed: Seed[int] = 0
    device: str = "auto"
    overwrite: bool = False
    """Replace the results of another configuration in OUT."""
    quiet: bool = False


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


def read_prompts(cfg: Config) -> tuple[list[str], list[tuple[Message, ...]]]:
    """Ids and conversations that end with a user turn."""
    if cfg.prompts is None:
        rows = world.held_out(cfg.n, cfg.seed)
    else:
        rejects = cfg.out / "rejects.jsonl"
        rows = read_rows(cfg.prompts, on_error=cfg.on_error, unknown_fields=cfg.unknown_fields, rejects=rejects)[
            : cfg.n
        ]
    prompts = [tuple(row.messages[:-1] if hasattr(row, "messages") else row.prompt) for row in rows]
    if not all(prompts):
        raise ValueError(f"{cfg.prompts}: expected rows with a user turn, got a row without; remove such rows")
    return [row.id for row in rows], prompts


def answer(
    cfg: Config, spec: str, ids: Sequence[str], prompts: Sequence[tuple[Message, ...]], cast: Cast
) -> list[str | Missing]:
    """A model's answers; a call that failed is Missing, and its prompt is not judged."""
    if ".jsonl" in Path(spec).name:
        return read_answers(spec, ids, [prompt[-1].content for prompt in prompts])
    settings = {"seed": cfg.seed, "temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
    replies = cast.agent(spec).respond([Request("answer", prompt, **settings) for prompt in prompts])
    return received(replies, on_length_of(spec, cfg.on_length))


def write(
    out: Path, ids: Sequence[str], answers: dict[str, list[str | Missing]], results: Sequence[Pairwise], report: dict
) -> list[Path]:
    """Writes answers, battles and arena.json; returns the paths."""
    for name, texts in answers.items():
        lines = (_line(key, text) for key, text in zip(ids, texts))
        write_text(out / "answers" / f"{name}.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    battles = (asdict(battle) | {"prompt": ids[battle.prompt]} for result in results for battle in result.battles)
    write_text(out / "battles.jsonl", "".join(json.dumps(battle, ensure_ascii=False) + "\n" for battle in battles))
    write_json(out / "arena.json", report)
    return [out / "answers", out / "battles.jsonl", out / "arena.json"]


def _line(key: str, answer: str | Missing) -> dict[str, Any]:
    if isinstance(answer, Missing):
        return {"id": key, "answer": None, "missing": answer.reason}
    return {"id": key, "answer": answer}


def print_report(results: Sequence[Pairwise], ratings: Sequence[Rating]) -> None:
    """Prints a line per comparison and per rating."""
    for r in results:
        rate = "-" if r.win_rate is None else f"{100 * r.win_rate:.1f} % [{100 * r.ci95[0]:.1f}, {100 * r.ci95[1]:.1f}]"
        counts = f"{r.wins:5} : {r.losses:<5} {r.ties:5} ties {r.errors:4} missing {r.flips:4} flips"
        reasons = f"; missing: {shown_reasons(r.missing)}" if r.missing else ""
        print(f"{printable(r.a):>16} : {printable(r.b):<16}{counts}   {rate} without ties{reasons}")
    for r in ratings:
        print(f"{printable(r.model):>16}  Elo {r.elo:6.0f}  [{r.low:.0f}, {r.high:.0f}]  {r.battles} battles")


def open_arena(cfg: Config, models: dict[str, str]) -> Stage:
    """The stage: model directories, answer files, prompts and a judge's directory are inputs by content."""
    named = {f"model {name}": spec.partition("#")[0] for name, spec in models.items()} | {"judge": cfg.judge}
    inputs = {key: Path(spec) for key, spec in named.items() if Path(spec).exists()}
    inputs |= {} if cfg.prompts is None else {"prompts": cfg.prompts}
    inputs |= {"chat_format": cfg.chat_format} if isinstance(cfg.chat_format, Path) else {}
    options = {name: value for name, value in asdict(cfg).items() if name not in (*INCIDENTAL, *inputs)}
    options["models"] = {name: None if f"model {name}" in inputs else spec for name, spec in models.items()}
    options["judge"] = None if "judge" in inputs else cfg.judge
    return Stage(cfg.out, "arena", options, inputs, overwrite=cfg.overwrite)


def _check_verdicts(cfg: Config, result: Pairwise, prompts: int) -> None:
    """Raises ValueError where the judge failed on more prompts than may be missing."""
    reasons = {kind[7:]: count for kind, count in result.missing.items() if kind.startswith("judge: ")}
    asked = prompts - sum(result.missing.values()) + sum(reasons.values())
    what = f"verdicts of {cfg.judge} on {result.a} : {result.b}"
    check_missing(what, reasons, asked, cfg.max_missing, "raise --judge-max-tokens")


INCIDENTAL = ("out", "prompts", "batch_size", "max_missing", "device", "overwrite", "quiet")


def main(cfg: Config, rt: runtime.Runtime | None = None) -> dict[str, Any]:
    """Answers, judges and rates; returns the content of arena.json.

    With a runtime of several ranks, every rank makes this call and the work is sharded; without one, it runs alone.
    """
    check_share(cfg.max_missing)
    rt = rt or runtime.Runtime()
    world.register()
    models = read_models(cfg.models)
    stage = open_arena(cfg, models)
    if from_main(rt, stage.is_current):
        return from_main(rt, stage.result)
    ids, prompts = read_prompts(cfg)
    from_main(rt, stage.start)
    cast = Cast(cfg.out / "ledger.sqlite", rt, batch_size=cfg.batch_size, quiet=cfg.quiet, chat_format=cfg.chat_format)
    answers = {}
    for name, spec in models.items():
        answers[name] = answer(cfg, spec, ids, prompts, cast)
        what = f"answers of {name}"
        check_missing(what, count_reasons(answers[name]), len(prompts), cfg.max_missing, "raise --max-new-tokens")
    settings = {"seed": cfg.seed, "baseline": cfg.baseline, "max_tokens": cfg.judge_max_tokens}
    results = all_pairs(answers, prompts, judge=cast.agent(cfg.judge), **settings)
    for result in results:
        _check_verdicts(cfg, result, len(prompts))
    battles = [battle for result in results for battle in result.battles]
    ratings = elo(battles, anchor=cfg.anchor or next(iter(models)), anchor_elo=cfg.anchor_elo, seed=cfg.seed)
    missing = {name: count_reasons(texts) for name, texts in answers.items()}
    errors = {name: sum(reasons.values()) for name, reasons in missing.items()}
    report = {"prompts": len(prompts), "seed": cfg.seed, "answer_errors": errors, "missing_answers": missing}
    report |= {"pairwise": [item.to_json() for item in results], "elo": [asdict(rating) for rating in ratings]}

    def finish() -> dict[str, Any]:
        done = to_plain(report | {"calls": cast.ledger.counts()})
        stage.finish(done, write(cfg.out, ids, answers, results, done))
        if not cfg.quiet:
            print_report(results, ratings)
        return done

    report = from_main(rt, finish)
    cast.close()
    return report


if __name__ == "__main__":
    launch(lambda cfg: main(cfg, runtime.start(cfg.device)), Config)
