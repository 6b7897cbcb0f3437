"""MT-Bench: a model answers two-turn questions, a judge rates each turn from 1 to 10.

    python recipes/mt_bench.py --model runs/rleif/model --out runs/mt_bench
    python recipes/mt_bench.py --model DIR --questions question.jsonl --references reference_answer_gpt-4.jsonl \\
        --judge DIR --out runs/mt_bench

Reads FastChat's files as they are; without --questions it asks the embedded world's own. Writes OUT/mt_bench.json,
OUT/answers.jsonl and OUT/ratings.jsonl; every call goes through OUT/ledger.sqlite. A rating that cannot be read is
counted as missing, with its reason.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wizard_engine import runtime, world
from wizard_engine.agents import Agent, Cast, Request
from wizard_engine.agents.missing import MAX_MISSING, Missing, check_missing, check_share, count_reasons, shown_reasons
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.records import Message
from wizard_engine.evaluation.mt_bench import Mean, MTBench, mt_bench
from wizard_engine.evaluation.pairwise import JUDGE_TOKENS
from wizard_engine.evaluation.questions import Question, read_questions
from wizard_engine.evaluation.received import on_length_of, received
from wizard_engine.runtime.files import to_plain, write_json, write_text
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.ranges import Checked, Count, Seed, Share, Temperature
from wizard_engine.runtime.stage import Stage
from wizard_engine.runtime.text_lines import one_line, printable


@dataclass(frozen=True)
class Config(Checked):
    """Two-turn questions, rated."""

    model: str
    """Model directory, registered program (world:NAME) or endpoint (openai:MODEL@URL)."""
    out: Path
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
    """Registered program (world:NAME), model directory or endpoint (openai:MODEL@URL)."""
    repeats: Count[int] = 1
    """Ratings of each turn, with different seeds."""
    default_temperature: Temperature[float] = 0.0
    """Temperature of answers, except in writing and roleplay (0.7), stem and humanities (0.1)."""
    max_new_tokens: Count[int] = 1024
    """Longest answer, tokens; a checkpoint's context may allow less."""
    judge_max_tokens: Count[int] = JUDGE_TOKENS
    """Longest rating of the judge with its explanation, tokens."""
    on_length: Literal["missing", "keep"] | None = None
    """An answer that reached its limit: missing, or keep and judge it as it is. Default: missing for an endpoint,
    whose answers are whole or none, and keep for a checkpoint."""
    max_missing: Share[float] = MAX_MISSING
    """Largest share of answers, and of ratings, 0 to 1, that may be missing; above it the stage ends with an error."""
    chat_format: ChatFormatChoice = "auto"
    """Of local models: auto is a directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a
    .jinja file."""
    batch_size: Count[int] = 256
    seed: Seed[int] = 0
    device: str = "auto"
    overwrite: bool = False
    """Replace the results of another configuration in OUT."""
    quiet: bool = False


def answers_of(agent: Agent, cfg: Config):
    """The agent as an answer function; a failed call is Missing."""

    def respond(conversations: list[tuple[Message, ...]], temperature: float) -> list[str | Missing]:
        settings = {"seed": cfg.seed, "temperature": temperature, "max_tokens": cfg.max_new_tokens}
        replies = agent.respond([Request("answer", conversation, **settings) for conversation in conversations])
        return received(replies, on_length_of(cfg.model, cfg.on_length))

    return respond


def read(cfg: Config) -> list[Question]:
    """The questions: the file's, or the embedded world's."""
    if cfg.questions is not None:
        return read_questions(cfg.questions, cfg.references, on_error=cfg.on_error)[: cfg.n]
    questions = world.mt_questions(cfg.n, cfg.seed)
    return [Question(item.id, item.category, item.turns, item.references) for item in questions]


def write(out: Path, questions: list[Question], result: MTBench, report: dict[str, Any]) -> list[Path]:
    """Writes the report, the answers and the single ratings; returns the paths."""
    write_lines(out / "answers.jsonl", map(_line, questions, result.answers))
    write_lines(out / "ratings.jsonl", map(asdict, result.ratings))
    write_json(out / "mt_bench.json", report)
    return [out / "answers.jsonl", out / "ratings.jsonl", out / "mt_bench.json"]


def _line(question: Question, answers: tuple[str | Missing, str | Missing]) -> dict[str, Any]:
    texts = [None if isinstance(answer, Missing) else answer for answer in answers]
    line = {"question_id": question.id, "category": question.category, "answers": texts}
    missing = [answer.reason if isinstance(answer, Missing) else None for answer in answers]
    return line | ({"missing": missing} if any(missing) else {})


def write_lines(path: Path, objects: Iterable[dict]) -> None:
    """Writes one JSON object a line."""
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))


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
    inputs = {key: Path(spec) for key, spec in named.items() if spec is not None and Path(spec).exists()}
    inputs |= {"chat_format": cfg.chat_format} if isinstance(cfg.chat_format, Path) else {}
    incidental = ("out", "batch_size", "max_missing", "device", "overwrite", "quiet", *inputs)
    options = {name: value for name, value in asdict(cfg).items() if name not in incidental}
    return Stage(cfg.out, "mt_bench", options, inputs, overwrite=cfg.overwrite)


def main(cfg: Config, rt: runtime.Runtime | None = None) -> dict[str, Any]:
    """Answers and rates; returns the content of mt_bench.json.

    With a runtime of several ranks, every rank makes this call and the work is sharded; without one, it runs alone.
    """
    check_share(cfg.max_missing)
    rt = rt or runtime.Runtime()
    world.register()
    stage = open_bench(cfg)
    if from_main(rt, stage.is_current):
        return from_main(rt, stage.result)
    questions = read(cfg)
    from_main(rt, stage.start)
    cast = Cast(cfg.out / "ledger.sqlite", rt, batch_size=cfg.batch_size, quiet=cfg.quiet, chat_format=cfg.chat_format)
    agent = cast.agent(cfg.model)
    result = mt_bench(
        answers_of(agent, cfg),
        questions,
        judge=cast.agent(cfg.judge),
        name=agent.name,
        seed=cfg.seed,
        repeats=cfg.repeats,
        default_temperature=cfg.default_temperature,
        max_tokens=cfg.judge_max_tokens,
    )
    failures = check_result(cfg, result)

    def finish() -> dict[str, Any]:
        counts = {"questions": len(questions), "answer_errors": failures, "calls": cast.ledger.counts()}
        report = to_plain(result.to_json() | counts)
        stage.finish(report, write(cfg.out, questions, result, report))
        if not cfg.quiet:
            print_report(result)
        return report

    report = from_main(rt, finish)
    cast.close()
    return report


if __name__ == "__main__":
    launch(lambda cfg: main(cfg, runtime.start(cfg.device)), Config)
