"""MT-Bench: a model answers two-turn questions, a judge rates each turn from 1 to 10.

    python recipes/mt_bench.py --model runs/rleif/model --out runs/mt_bench
    python recipes/mt_bench.py --model DIR --questions question.jsonl --references reference_answer_gpt-4.jsonl \\
        --judge DIR --out runs/mt_bench

Reads FastChat's files as they are; without --questions it asks the embedded world's own. Writes OUT/mt_bench.json,
OUT/answers.jsonl and OUT/ratings.jsonl; every call goes through OUT/ledger.sqlite. A rating that cannot be read is
counted as missing, with its reason.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wizard_engine import runtime, world
from wizard_engine.agents import Calls, Cast, Limits, Request
from wizard_engine.agents.missing import Missing, check_missing, count_reasons, shown_reasons
from wizard_engine.agents.options import AgentOptions, estimated, open_cast
from wizard_engine.evaluation.mt_bench import Bench, Conversation, Mean, MTBench
from wizard_engine.evaluation.questions import Question, read_questions
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.runtime.files import to_plain, write_json, write_json_lines
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Count, Seed, Temperature
from wizard_engine.runtime.stage import INCIDENTAL, Stage, path_of
from wizard_engine.runtime.text_lines import one_line, printable


@dataclass(frozen=True)
class Config(AgentOptions):
    """Two-turn questions, rated."""

    model: str
    """Model directory, registered program (world:NAME), endpoint (openai:MODEL@URL) or answers (scripted:FILE)."""
    out: Path = field(metadata=INCIDENTAL)
    """Directory for mt_bench.json, answers.jsonl, ratings.jsonl and ledger.sqlite."""
    questions: Path | None = None
    """FastChat's question.jsonl, or a file like it; default: questions of the embedded world."""
    references: Path | None = None
    """FastChat's reference answers, shown to the judge where a question has them."""
    n: Annotated[Count[int], tyro.conf.arg(name="limit")] = 80
    """Questions at most."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a question or reference that cannot be read: stop, or leave it out and say so."""
    judge: str = "world:judge"
    """Registered program (world:NAME, reference:judge), model directory, endpoint (openai:MODEL@URL), scripted:FILE."""
    repeats: Count[int] = 1
    """Ratings of each turn, with different seeds."""
    default_temperature: Temperature[float] = 0.0
    """Temperature of answers, except in writing and roleplay (0.7), stem and humanities (0.1)."""
    max_new_tokens: Count[int] = 1024
    """Longest answer, tokens; a checkpoint's context may allow less."""
    on_length: Literal["missing", "keep"] | None = None
    """An answer that reached its limit: missing, or keep and judge it as it is. Default: missing for an endpoint,
    whose answers are whole or none, and keep for a checkpoint."""
    seed: Seed[int] = 0


def bench_of(cfg: Config, cast: Cast, questions: list[Question]) -> Bench:
    """The questions with the model that answers and the judge; a call that fails is Missing."""
    agent, on_length = cast.agent(cfg.model), on_length_of(cfg.model, cfg.on_length)

    async def answering(conversation: Conversation, temperature: float, row: str) -> str | Missing:
        request = Request("answer", conversation, cfg.seed, temperature, cfg.max_new_tokens, cfg.top_p, row=row)
        return received(await cast.scheduler.ask(agent, request), on_length)

    calls = Calls(cast.scheduler, limits=Limits(judge=cfg.judge_max_tokens), top_p=cfg.top_p)
    settings = {"seed": cfg.seed, "repeats": cfg.repeats, "default_temperature": cfg.default_temperature}
    return Bench(questions, cast.agent(cfg.judge), calls, answering=answering, **settings)


def read(cfg: Config) -> list[Question]:
    """The questions: the file's, or the embedded world's."""
    if cfg.questions is not None:
        return read_questions(cfg.questions, cfg.references, on_error=cfg.on_error)[: cfg.n]
    questions = world.mt_questions(cfg.n, cfg.seed)
    return [Question(item.id, item.category, item.turns, item.references) for item in questions]


def write(out: Path, questions: list[Question], result: MTBench, report: dict[str, Any]) -> list[Path]:
    """Writes the report, the answers and the single ratings; returns the paths."""
    write_json_lines(out / "answers.jsonl", map(_line, questions, result.answers))
    write_json_lines(out / "ratings.jsonl", map(asdict, result.ratings))
    write_json(out / "mt_bench.json", report)
    return [out / "answers.jsonl", out / "ratings.jsonl", out / "mt_bench.json"]


def _line(question: Question, answers: tuple[str | Missing, str | Missing]) -> dict[str, Any]:
    texts = [None if isinstance(answer, Missing) else answer for answer in answers]
    line = {"question_id": question.id, "category": question.category, "answers": texts}
    missing = [answer.reason if isinstance(answer, Missing) else None for answer in answers]
    return line | ({"missing": missing} if any(missing) else {})


def print_report(result: MTBench) -> None:
    """Prints the means."""
    print(f"{'overall':16}{shown(result.overall)}")
    for turn, mean in enumerate(result.turns, start=1):
        print(f"turn {turn:<11}{shown(mean)}")
    for category, mean in result.categories.items():
        print(f"{printable(one_line(category))[:15]:16}{shown(mean)}")
    if result.missing:
        reasons = shown_reasons(result.missing)
        print(f"missing: {reasons}; counted as 1 the overall mean is {result.score_missing_as_1:.2f}")
    print("\n".join(result.notes))


def shown(mean: Mean) -> str:
    """A mean as text for one line."""
    if mean.score is None:
        return f"   -  no rating, {mean.missing} missing"
    low, high = mean.ci95
    return f"{mean.score:5.2f}  [{low:.2f}, {high:.2f}]  {mean.rated} ratings, {mean.missing} missing"


def check_result(cfg: Config, result: MTBench) -> int:
    """The number of missing answers.

    Raises:
        ValueError: more answers or ratings are missing than may be.
    """
    answers = [answer for pair in result.answers for answer in pair]
    failures = count_reasons(answers)
    check_missing(f"answers of {cfg.model}", failures, len(answers), cfg.max_missing, "raise --max-new-tokens")
    reasons = {kind[7:]: count for kind, count in result.missing.items() if kind.startswith("judge: ")}
    asked = len(result.ratings) - result.unanswered
    check_missing(f"ratings of {cfg.judge}", reasons, asked, cfg.max_missing, "raise --judge-max-tokens")
    return sum(failures.values())


def open_bench(cfg: Config) -> Stage:
    """The stage: model and judge directories and the question files are inputs by content."""
    named = {"model": cfg.model, "judge": cfg.judge, "questions": cfg.questions, "references": cfg.references}
    inputs = {key: path_of(spec) for key, spec in named.items() if spec is not None and path_of(spec).exists()}
    inputs |= {"chat_format": cfg.chat_format} if isinstance(cfg.chat_format, Path) else {}
    read = [option for option in fields(cfg) if not option.metadata.get("incidental") and option.name not in inputs]
    options = {option.name: getattr(cfg, option.name) for option in read}
    options |= {name: cfg.in_identity(options[name]) for name in ("model", "judge") if name in options}
    return Stage(cfg.out, "mt_bench", options, inputs, overwrite=cfg.overwrite, quiet=cfg.quiet)


def main(cfg: Config, rt: runtime.Runtime | None = None) -> dict[str, Any]:
    """Answers and rates; returns the content of mt_bench.json.

    With a runtime of several ranks, every rank makes this call and the work is sharded; without one, it runs alone.
    """
    rt = rt or runtime.Runtime()
    world.register()
    if cfg.estimate:
        return from_main(rt, lambda: estimated(cfg, partial(ask, questions=read(cfg))))
    stage = open_bench(cfg)
    if from_main(rt, stage.is_current):
        return from_main(rt, stage.result)
    questions = read(cfg)
    from_main(rt, stage.start)
    cast = open_cast(cfg.out, cfg, rt)
    try:
        return cast.conduct(lambda: conduct(cfg, cast, stage, questions))
    finally:
        cast.close()


def ask(cfg: Config, cast: Cast, questions: list[Question]) -> Bench:
    """The questions with all answers and ratings."""
    bench = bench_of(cfg, cast, questions)
    cast.scheduler.run(bench.run("questions", [cast.agent(cfg.model), bench.judge]))
    return bench


def conduct(cfg: Config, cast: Cast, stage: Stage, questions: list[Question]) -> dict[str, Any]:
    """All answers and ratings, on rank 0; returns the content of mt_bench.json."""
    bench = ask(cfg, cast, questions)
    result = bench.result(cast.agent(cfg.model).name)
    failures = check_result(cfg, result)
    counts = {"questions": len(questions), "answer_errors": failures, "calls": cast.ledger.counts()}
    repeats = bench.calls.repeats()
    report = to_plain(result.to_json() | counts | ({"repeats": repeats} if repeats else {}))
    outputs = write(cfg.out, questions, result, report)
    stage.finish(report, outputs)
    if not cfg.quiet:
        print_report(result)
    return report


if __name__ == "__main__":
    launch(lambda cfg: main(cfg, runtime.start(cfg.device)), Config)
