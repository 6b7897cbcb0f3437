"""The command new-run: writes a commented run file for rows, a base model and teachers of your own."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from wizard_engine.runtime.files import write_text
from wizard_engine.runtime.ranges import Checked, Count
from wizard_engine.runtime.text_lines import printable

from .run_file import DEFAULT_STAGES, SLICE_STAGES

ENDPOINT = "openai:MODEL@https://api.example.org/v1"
TEMPLATE = """\
# A run of the whole system. Check it:  python recipes/progressive.py {path} --dry-run
# Run it:                               python recipes/progressive.py {path}
# On several GPUs:                      torchrun --standalone --nproc-per-node 8 recipes/progressive.py {path}
# Every name: docs/recipes/progressive.md. Paths are relative to the folder that the command runs in.
out = {out}
seed = 0
slices = {slices}
# Stages of a slice, in their order; one may stand twice. {rest}.
stages = {stages}
on-empty = "skip"           # a stage without rows is left out, with the reason; "end" ends the run

[rows]
data = {rows}
# Held-out rows, which nothing is trained on: files of them (held-out), or a number of rows to keep apart, at most half.
{held_out}
# Preference rows of your own for Stage-DPO and preference_reward; every slice learns from all of them.
{pairs}
# Pairs that each slice keeps apart to measure Stage-DPO on, at most half of them.
hold-out-pairs = 50
{questions}
{references}  # the rows' own answers are right: judges and labellers go by them
on-error = "skip"           # rows that cannot be read or are too long are counted; "raise" stops at the first

[base]
model = {base}
# Learning rates follow the number of its parameters: 135M, 1B, 7B, 70B or 8x22B. A much smaller one ("demo") has the
# defaults of the recipes.
# size = "7B"

# Who does what: openai:MODEL@URL (its key in OPENAI_API_KEY), a model directory, served:NAME (see below), or, with
# reference-answers, the programs reference:judge and reference:labeller. "none" leaves an optional role empty:
# labeller, optimizer, ranker, suggester, user.
[agents]
{teacher}  # every role that is not named
{judge}  # compares and rates answers
{rivals}  # co-teaching compares our model with these
# labeller = "reference:labeller"

# A model of your own that the run serves while its stages ask for served:NAME.
# [served.big]
# model = "models/big"
# port = 8001

# Target shares of the rows' attributes (see recipes/analyze.py). Without a table rows are drawn as they are;
# [sample] uniform = ["topic"] gives all values of an attribute the same share.
# [targets]
# language = {{ en = 0.8, zh = 0.2 }}

# Shares of what earlier stages made in what later ones learn from, 0 to 1.
[mix]
self-taught = 1.0
self-teach = 1.0
evol-answer = 1.0
battles = 1.0

# What is measured of every model on held-out rows.
[measure]
# accuracy = true           # exact answers; default: where nine in ten rows have an answer that can be checked
# arena = true              # games of the last slice's models; default: where there is a judge
# rows = 200                # at most

# Training. A step takes packs-per-step packs of pack-tokens tokens from all GPUs together, so packs-per-step is a
# multiple of their number; --dry-run shows the steps. A row, or a pair with both answers, that is longer than a pack is
# left out and counted.
[sft.training]
pack-tokens = 2048
packs-per-step = 8
# epochs = 2
[stage_dpo.training]
pack-tokens = 4096
packs-per-step = 8
[instruction_reward.training]
pack-tokens = 2048
packs-per-step = 8
[process_reward.training]
pack-tokens = 2048
packs-per-step = 8
[preference_reward.training]
pack-tokens = 4096
packs-per-step = 8

# The longest answers, in tokens. One that reaches the limit is used as it is ("keep"), or counts as missing ("drop").
# A stage with more than 5 % missing ends the run, and goes on with the same command.
[evol_instruct]
max-tokens = 1024
# optimise = {{ steps = 4 }}  # improve the evolving method; asks for at least 60 rows in a slice
[co_teach]
max-tokens = 512
on-length = "keep"
[self_teach]
max-tokens = 512
on-length = "keep"

# Further options of a stage, by the names of its recipe's command line, for all slices ...
# [sample]
# size = 6000               # rows drawn for all slices together; default: all
# [rleif]
# rollout = {{ steps = 100 }}
# reward = {{ factors = ["instruction", "process"] }}  # "preference" needs the stage preference_reward before it

# ... for one slice, and a finished directory in place of a stage.
# [slice_2.sft]
# training = {{ lr = 2e-6 }}
# [slice_1.evol_instruct]
# use = "runs/before/slice_1/evol_instruct"

# Large models: less memory for more work, and how GPUs share a model (docs/parallelism.md).
# [sharding]
# recompute = "full"
# [mesh]
# tp = 2

# Stages in processes of their own, as on several nodes; --print-commands and --slurm write them out.
# [launch]
# separate-processes = true
# processes = 8
# nodes = 2
"""


@dataclass(frozen=True)
class Options(Checked):
    """Write a commented run file for the whole system on your own rows.

    Without a teacher it has the stages that need none: supervised learning, Stage-DPO where there are pairs, and
    self-teaching where there is a judge.
    """

    directory: Positional[Path]
    """Folder for run.toml; made if it is absent."""
    rows: tuple[Path, ...] = ()
    """Row files."""
    held_out: Path | None = None
    """Held-out rows; default: some are kept apart."""
    pairs: tuple[Path, ...] = ()
    """Files of preference rows for Stage-DPO."""
    questions: Path | None = None
    """Two-turn questions in the form of MT-Bench; they need a judge."""
    base: Path | None = None
    """Model directory to start from."""
    teacher: str | None = None
    """Agent for every role, such as openai:MODEL@URL."""
    judge: str | None = None
    """Agent that judges; default: the teacher."""
    rivals: tuple[str, ...] = ()
    """Agents that co-teaching compares the model with; default: the teacher."""
    slices: Count[int] = 3
    """Slices of the rows."""


def stages_of(options: Options) -> tuple[str, ...]:
    """The stages of a slice that have what they need."""
    if options.teacher is not None:
        return DEFAULT_STAGES
    taught = ("self_teach",) if options.judge is not None else ()
    return ("sft", *taught, *(("stage_dpo",) if taught or options.pairs else ()))


def run_text(options: Options) -> str:
    """The text of a run file."""
    path, stages = options.directory / "run.toml", stages_of(options)
    rest = [name for name in SLICE_STAGES if name not in stages]
    rivals = options.rivals or ((options.teacher,) if options.teacher else ())
    held_out = "hold-out = 200" if options.held_out is None else f"held-out = {_toml([str(options.held_out)])}"
    return TEMPLATE.format(
        path=shlex.quote(str(path)),
        out=_toml(str(options.directory / "run")),
        slices=options.slices,
        stages=_toml(stages),
        rest=f"Left out: {', '.join(rest)}" if rest else "Leave out what you do not want",
        rows=_toml([str(file) for file in options.rows] or ["rows.jsonl"]),
        held_out=held_out,
        pairs=_line("pairs", [str(file) for file in options.pairs], ["pairs.jsonl"]),
        questions=_line("questions", options.questions and str(options.questions), "question.jsonl"),
        references=_line("reference-answers", "reference:" in (options.judge or ""), True),
        base=_toml(str(options.base or "models/base")),
        teacher=_line("teacher", options.teacher, ENDPOINT),
        judge=_line("judge", options.judge, ENDPOINT),
        rivals=_line("rivals", rivals, [ENDPOINT]),
    )


def _line(name: str, value: object, example: object) -> str:
    """A line of TOML; an example in a comment where there is no value."""
    return f"{name} = {_toml(value)}" if value else f"# {name} = {_toml(example)}"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def write_run_file(options: Options) -> Path:
    """Write the file, and return its path.

    Raises:
        ValueError: there is one.   OSError: the folder cannot be written.
    """
    path = options.directory / "run.toml"
    if path.exists():
        raise ValueError(f"{path}: expected no run file yet, got one; choose another folder, or edit that file")
    options.directory.mkdir(parents=True, exist_ok=True)
    write_text(path, run_text(options))
    return path


def main(options: Options) -> int:
    """Run the command; 1 after an error in one line."""
    try:
        path = write_run_file(options)
    except (ValueError, OSError) as error:
        print(f"new-run: error: {printable(str(error))}", file=sys.stderr)
        return 1
    command = f"python recipes/progressive.py {shlex.quote(str(path))} --dry-run"
    print(f"done: {path}, with {', '.join(stages_of(options))}; check it with: {command}")
    return 0
